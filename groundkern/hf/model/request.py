"""What one forward of an attached model is asked for: its inputs, sorted and checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from groundkern import checks
from groundkern.checks import fail, tensor
from groundkern.hf.data.batch import COUNTS, FIELDS, GroundedBatch
from groundkern.hf.data.image_token import image_token_id, visual_token_ids
from groundkern.hf.model.context import Split, split_of
from groundkern.hf.model.documents import FLASH_LENGTHS, Documents
from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.logit_rule import LogitRule, logit_rule
from groundkern.hf.model.positions import model_positions, text_positions
from groundkern.hf.model.prefix import refuse_seeing_rows, unbounded_rows
from groundkern.hf.model.rows import Rows
from groundkern.hf.model.sharded import sharded
from groundkern.hf.model.side_tokens import filler
from groundkern.hf.model.support import evaluated, refuse_packing
from groundkern.hf.objectives import Objectives
from groundkern.parallel import Shard

RECORDS = (
    *("maps", "klal", "heads", "contributions", "gradcam", "logits", "layers", "visible", "policy"),
)
VIDEOS = "pixel_values_videos"
NOT_FOR_THE_BODY = ("labels", "logits_to_keep", "return_dict", "use_cache")


@dataclass(frozen=True)
class Request:
    """What one grounded forward is to compute.

    Args:
        model: the attached model itself, without wrappers.
        attached: the objectives that make the loss.
        terms: the objectives to compute: the attached ones in training; in evaluation all that
            compare models, as far as this one supports them.
        batch: the batch's supervision.
        inputs: what is left for the model's body.
        denominators: fp32 [len(COUNTS)], by which sums over rows of each kind are divided.
        records: what to record, some of RECORDS.
        documents: those of its rows, if text positions came without an attention mask; None: a row
            is one document.
        part: the one part that the loss consists of; None: all that are attached.
        split: of the tokens over the ranks of a group; None: they are whole.
        temperature: of the text tokens' log probabilities and entropies, of which the caller makes
            the loss of the text; None: it is their cross entropy.
        given: the body's inputs as the batch has them, which a teacher is given too.
    """

    model: nn.Module
    attached: Objectives
    terms: Objectives
    batch: GroundedBatch
    inputs: dict
    denominators: Tensor
    records: frozenset[str]
    documents: Documents | None = None
    part: str | None = None
    split: Split | None = None
    temperature: float | None = None
    given: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, attached: Objectives, inputs: dict) -> Request:
        """Sort and check a model's keyword inputs.

        Args:
            model: the attached model itself.
            attached: its objectives.
            inputs: as the model's forward got them.

        Returns:
            The request.

        Raises:
            TypeError, ValueError: bad supervision, or inputs that the wiring does not support.
        """
        inputs = {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_BODY}
        records = _records(inputs.pop("gk_record", None), training=model.training)
        attended = {"maps", "heads", "contributions", "gradcam", "policy"}
        if records & attended and not text_attention(model):
            got = f"{type(model).__name__}, which has none"
            fail("gk_record", "a decoder with layers of softmax attention", got)
        part = inputs.pop("gk_part", None)
        temperature = inputs.pop("gk_temperature", None)
        checks.finite_positive("gk_temperature", temperature)
        totals, items = inputs.pop("gk_totals", None), inputs.pop("num_items_in_batch", None)
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            fail("input_ids", "token ids, from which rows and side tokens are built", "nothing")
        if inputs.get("past_key_values") is not None:
            fail("past_key_values", "nothing beside gk_ inputs", "a cache")
        pixels = any("pixel_values" in name and name != VIDEOS for name in inputs)
        if pixels and image_token_id(model.config) is None:
            wanted = "the id of visual tokens (the processor's image_token_id) beside images"
            fail("model.config.image_token_id", wanted, None)
        if VIDEOS in inputs and not visual_tokens_of(model):
            wanted = "the id of visual tokens (the processor's video_token_id) beside videos"
            fail("model.config.video_token_id", wanted, None)
        for name in inputs:  # Granite-Docling's `router_labels`
            if name.endswith("_labels"):
                fail(
                    name, "nothing beside gk_ inputs: its loss is not computed with them", "labels"
                )
        batch = GroundedBatch.pop(inputs, input_ids)
        vocabulary = model.config.get_text_config().vocab_size
        batch.check_values(input_ids, visual=visual_tokens_of(model), vocabulary=vocabulary)
        given = inputs
        inputs, documents = with_documents(model, inputs)
        if documents is not None:
            ends = documents.padding(input_ids, batch.text_position)
            pad = model.config.get_text_config().pad_token_id
            filled = filler(visual_tokens_of(model), pad)
            inputs = {**inputs, "input_ids": torch.where(ends, filled, input_ids)}
            _refuse_crossing(batch, documents)
        refuse_seeing_rows(model, batch, inputs, visual_tokens_of(model), documents)
        terms = attached if model.training else evaluated(model, attached)
        denominators = _denominators(batch, totals, items)
        aligned = batch.side_position if terms.smam is not None else batch.side_position[:, :0]
        split = split_of(model, input_ids, aligned)
        if split is not None:
            got = "a sequence that is split over ranks"
            for name in sorted(records & {"contributions", "gradcam", "policy"}):
                fail("gk_record", f"whole sequences for {name}", got)
            for name in ("policy", "distill"):
                if getattr(terms, name) is not None:
                    fail(name, "whole sequences", got)
            if terms.klal is not None and terms.klal.by_queries:
                fail("klal.head_weight", "whole sequences for head weights of each row", got)
            if terms.smam is not None and terms.smam.keep == "sinks":
                fail("smam.keep", "whole sequences for sinks", got)
            if terms.klal is not None and terms.klal.picked_heads is not None:
                fail("klal.picked_heads", "whole sequences for heads that are picked by row", got)
            if terms.gradcam:
                fail(terms.gradcam[0], "whole sequences for maps of GradCAM", got)
            if temperature is not None:
                fail("gk_temperature", "whole sequences", got)
        known = batch, inputs, denominators, records, documents, part, split, temperature, given
        return cls(model, attached, terms, *known)

    @property
    def input_ids(self) -> Tensor:
        """int64 [B, S]."""
        return self.inputs["input_ids"]

    @property
    def head(self) -> nn.Module:
        """The output embeddings."""
        return self.model.get_output_embeddings()

    @property
    def logit_rule(self) -> LogitRule:
        """What the model's own forward does around its head."""
        return logit_rule(self.model)

    @property
    def side_tokens(self) -> int:
        """Rs, the number of side tokens that SMAM appends to every sequence."""
        return 0 if self.terms.smam is None else self.batch.side_position.shape[1]

    @property
    def layer_count(self) -> int:
        """L, the layers of the text decoder whose attention can be read."""
        return len(text_attention(self.model))

    @property
    def tokens_here(self) -> int:
        """S, or how many of its tokens this rank has."""
        return self.input_ids.shape[1] if self.split is None else len(self.split.shard)

    @property
    def shard(self) -> Shard | None:
        """This rank's part of the sequences; None: all of them."""
        return None if self.split is None else self.split.shard

    @property
    def share(self) -> float:
        """The part of a loss that every rank computes alike, so that all add up to it."""
        return 1.0 if self.split is None else 1.0 / self.split.ranks

    @cached_property
    def first_key(self) -> Tensor:
        """int32 [B, S]: the first key that each token may see, were it not for windows."""
        if self.documents is not None:
            return self.documents.start.to(torch.int32)
        return _first_keys(self.inputs)[:, None].expand(self.input_ids.shape)

    @cached_property
    def recorded_position(self) -> Tensor:
        """[B, R] of the aligned rows whose contributions and GradCAM are recorded.

        Ranks with parts of the weights gather them for the same modules, whether they have a row or
        not: one without any takes padding for it.
        """
        position = self.batch.side_position
        if position.shape[1] == 0 and sharded(self.model):
            return position.new_full((len(position), 1), -1)
        return position

    def denominator(self, name: str) -> Tensor:
        """The number that a sum over rows of a kind is divided by; `name` is one of COUNTS."""
        return self.denominators[COUNTS.index(name)]

    def rows(self, position: Tensor) -> Rows:
        """[B, R] positions as query rows."""
        first_key = self.first_key.gather(1, position.clamp(min=0).long())
        unbounded = unbounded_rows(self.model, self.inputs, position)
        return Rows(position, first_key, unbounded, self.shard)


def _records(wanted: str | Iterable[str] | None, *, training: bool) -> frozenset[str]:
    if wanted is None:
        return frozenset()
    names = frozenset([wanted] if isinstance(wanted, str) else wanted)
    for name in names - set(RECORDS):
        fail("gk_record", f"one or several of {', '.join(RECORDS)}", name)
    if "gradcam" in names and training:
        fail("gk_record", "a model in eval mode for gradcam", "one in training mode")
    if "gradcam" in names and torch.is_inference_mode_enabled():
        fail("gk_record", "no_grad for gradcam, whose gradients it switches on", "inference_mode")
    return names


def _first_keys(inputs: dict) -> Tensor:
    """int32 [B]: the first attended key of each sequence (left padding).

    Raises:
        ValueError: a mask that is not [B, S], or (checked if that needs no sync) one with holes:
            documents packed by masks, or padding in the middle.
    """
    input_ids, attention_mask = inputs["input_ids"], inputs.get("attention_mask")
    if attention_mask is None:
        return input_ids.new_zeros(len(input_ids), dtype=torch.int32)
    checks.tensor(
        "attention_mask", attention_mask, "B S", dict(zip("BS", input_ids.shape, strict=True))
    )
    attended = attention_mask.bool()
    if attended.numel() and checks.values_visible(attended):
        runs = attended[:, 0] + (attended[:, 1:] & ~attended[:, :-1]).sum(1)
        got = "padding in the middle"
        checks.require(int(runs.max()) <= 1, "attention_mask", "padding at the ends only", got)
    return attended.int().argmax(1).to(torch.int32)


def with_documents(model: nn.Module, inputs: dict) -> tuple[dict, Documents | None]:
    """Find the documents of packed rows, and give the model its own positions for each.

    Args:
        model: the attached model itself.
        inputs: of its body, with `input_ids`.

    Returns:
        The inputs, and the documents; None: no text positions came without an attention mask.

    Raises:
        ValueError: packed rows that the model does not support; lengths without positions, or other
            ones; (checked if that needs no sync) positions that start again beside a mask.
    """
    if inputs.get("cu_seqlens") is not None:
        fail("cu_seqlens", "position_ids for packed documents", "a tensor")
    text = text_positions(model, inputs)
    if text is None:
        _refuse_restarts(inputs)
        return inputs, None
    documents = Documents(text)
    refuse_packing(model, documents)
    documents.check_lengths(inputs)
    positions = model_positions(model, inputs, documents)
    rest = {name: x for name, x in inputs.items() if name not in (*FLASH_LENGTHS, "seq_idx")}
    return {**rest, "position_ids": positions}, documents


def _refuse_crossing(batch: GroundedBatch, documents: Documents) -> None:
    """Refuse rows that would predict the first token of the next document.

    Raises:
        ValueError: (checked if that needs no sync) there is one.
    """
    if not checks.values_visible(documents.new):
        return
    ends = documents.new.roll(-1, 1)
    for name in (name for name, spec in FIELDS.items() if spec.values == "predictor"):
        position = getattr(batch, name)
        if bool((ends.gather(1, position.clamp(min=0).long()) & (position >= 0)).any()):
            fail(f"gk_{name}", "rows that predict a token of their own document", "a last token")


def _refuse_restarts(inputs: dict) -> None:
    """Refuse several documents in a row that are not told by text positions alone.

    Raises:
        ValueError: FlashAttention's cumulative lengths, or (checked if that needs no sync)
            positions that start again.
    """
    wanted = "text positions of packed documents as position_ids, and no attention_mask"
    for name in (*FLASH_LENGTHS, "seq_idx"):
        if inputs.get(name) is not None:
            fail(name, wanted, "packed documents without them")
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or not checks.values_visible(positions):
        return
    # [B, S], or Qwen's [3 or 4, B, S] with time or text first
    text = positions if positions.dim() == 2 else positions[0]
    restarts = text.diff(dim=-1) < 0
    if positions.dim() == 2:  # behind a document of one token
        restarts = restarts | ((text[:, 1:] == 0) & (text[:, :-1] == 0))
    if mask is not None:
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(restarts.any()):
        fail("position_ids", wanted, "positions that restart")


def visual_tokens_of(model: nn.Module) -> frozenset[int]:
    """The ids that stand for visual tokens, of images and of videos; none for a text model."""
    return visual_token_ids(model.config)


def _denominators(
    batch: GroundedBatch, totals: Tensor | None, items: Tensor | int | None
) -> Tensor:
    if totals is not None:
        tensor("gk_totals", totals, "K", {"K": len(COUNTS)})
        return totals.to(batch.image.device, torch.float32)
    counts = batch.counts.float()
    if items is not None:
        items = torch.as_tensor(items, dtype=torch.float32, device=counts.device)
        counts = torch.cat((items.reshape(-1)[:1], counts[1:]))
    return counts
