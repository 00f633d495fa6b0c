"""The `gk_` tensors of a batch, and the selections the ops take, built from them without a sync.

Every position tensor is [B, R], padded with -1: rows keep the batch dimension, so that samplers,
accelerate and FSDP slice them like any other input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from groundkern import checks
from groundkern.selection import KeySets, QueryRows

# Shapes by name, without the `gk_` prefix. A group (the word before `_`) comes whole or not at all.
SHAPES = {
    "image": "B S",
    "text_position": "B Rt",
    "side_position": "B Rs",
    "side_set": "B Rs",
    "side_inside": "B G S",
    "word_position": "B Rw",
    "word_label": "B Rw",
    "word_bag": "B I Y",
    "map_position": "B Rm",
    "map_image": "B Rm",
    "map_target": "B Rm C",
    "map_columns": "B C",
    "phrase_position": "B Rp",
    "phrase_number": "B Rp",
    "phrase_subject": "B Rp",
    "phrase_composite": "B K 3",
    "lens_position": "B Rl",
    "lens_label": "B Rl",
    "lens_inside": "B Rl",
}
# What the terms' sums are divided by, in the order of `gk_totals`.
COUNTS = (
    "text",
    "word",
    "map",
    "aligned",
    "visual",
    "labelled_image",
    "phrase",
    "subject",
    "composite",
    "raise",
    "suppress",
)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Supervision:
    """What a batch supervises. Integers are padded with -1; a width may be 0.

    Args:
        image: [B, S] the image of each visual token within its sample.
        text_position: [B, Rt] rows that predict a trained token (the one after them).
        side_position, side_set: [B, Rs] rows that predict an aligned answer token, and their set in
            `side_inside` (-1: unrestricted).
        side_inside: bool [B, G, S] the visual tokens inside each phrase's regions.
        word_position, word_label: [B, Rw] labelled visual tokens (their own rows) and their labels.
        word_bag: [B, I, Y] the distinct labels of each image.
        map_position, map_image: [B, Rm] rows with a target map, and the image it is on.
        map_target: [B, Rm, C] the target in fixed point, any scale.
        map_columns: [B, C] the visual tokens of the sequence, ascending.
        phrase_position: [B, Rp] rows that predict a token of a phrase, once for each of its
            phrases.
        phrase_number, phrase_subject: [B, Rp] which phrase of the sample, from 0, and 1 where the
            token belongs to its subject.
        phrase_composite: [B, K, 3] the numbers of "p1 and p2", p1 and p2.
        lens_position, lens_label: [B, Rl] visual tokens (their own rows) and a concept's token id.
        lens_inside: [B, Rl] 1 where the visual token lies on the concept's object, else 0.
    """

    image: Tensor
    text_position: Tensor
    side_position: Tensor
    side_set: Tensor
    side_inside: Tensor
    word_position: Tensor
    word_label: Tensor
    word_bag: Tensor
    map_position: Tensor
    map_image: Tensor
    map_target: Tensor
    map_columns: Tensor
    phrase_position: Tensor
    phrase_number: Tensor
    phrase_subject: Tensor
    phrase_composite: Tensor
    lens_position: Tensor
    lens_label: Tensor
    lens_inside: Tensor

    @classmethod
    def pop(cls, inputs: dict, input_ids: Tensor) -> Supervision:
        """Take the supervision out of a model's keyword inputs.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, or a group of which only a part is there.
        """
        given = {name: inputs.pop(f"gk_{name}") for name in SHAPES if f"gk_{name}" in inputs}
        unknown = sorted(name for name in inputs if name.startswith("gk_"))
        if unknown:
            checks.fail(unknown[0], f"one of {', '.join('gk_' + n for n in SHAPES)}", unknown[0])
        _whole_groups(given)
        sizes = {"B": input_ids.shape[0], "S": input_ids.shape[1], "3": 3}
        for name, x in given.items():
            dtype = torch.bool if name == "side_inside" else INTEGERS
            device = input_ids.device
            checks.tensor(f"gk_{name}", x, SHAPES[name], sizes, dtype=dtype, device=device)
        for name in SHAPES.keys() - given.keys():
            shape = [sizes.get(size, 0) for size in SHAPES[name].split()]
            dtype = torch.bool if name == "side_inside" else torch.int32
            given[name] = input_ids.new_full(shape, -1 if dtype == torch.int32 else 0, dtype=dtype)
        return cls(**given)

    def check_values(self, input_ids: Tensor, *, image_token: int | None, vocabulary: int) -> None:
        """Look at the values, where that is free of a sync (`checks.values_visible`).

        Raises:
            ValueError: a row outside its sequence, an aligned row that is an image token, a set or
                label that does not exist.
        """
        if not checks.values_visible(*(getattr(self, f.name) for f in fields(self))):
            return
        length = input_ids.shape[1]
        _in_range("gk_text_position", self.text_position, length - 1)
        _in_range("gk_side_position", self.side_position, length - 1)
        _in_range("gk_side_set", self.side_set, self.side_inside.shape[1])
        _in_range("gk_word_position", self.word_position, length)
        _in_range("gk_word_label", self.word_label, vocabulary)
        _in_range("gk_word_bag", self.word_bag, vocabulary)
        _in_range("gk_map_position", self.map_position, length)
        _in_range("gk_phrase_position", self.phrase_position, length - 1)
        if self.phrase_composite.numel():
            last = int(self.phrase_number.max()) if self.phrase_number.numel() else -1
            _in_range("gk_phrase_composite", self.phrase_composite, last + 1)
        _in_range("gk_lens_position", self.lens_position, length)
        _in_range("gk_lens_label", self.lens_label, vocabulary)
        token = input_ids.gather(1, self.side_position.clamp(min=0).long())
        on_image = (token == image_token) & (self.side_position >= 0)
        if bool(on_image.any()):
            checks.fail(
                "gk_side_position", "rows of text tokens", "a row that is an image token itself"
            )

    @cached_property
    def counts(self) -> Tensor:
        """int64 [len(COUNTS)]: the rows of this batch, by COUNTS."""
        return _counts({name: getattr(self, name) for name in SHAPES})


def row_counts(batch: dict) -> Tensor:
    """int64 [len(COUNTS)]: the rows of a batch by COUNTS; a kind that is not there counts 0.

    Summed over the micro-batches of a step, and over ranks, it is the step's `gk_totals`.
    """
    return _counts({name: batch.get(f"gk_{name}") for name in SHAPES})


def _counts(s: dict[str, Tensor | None]) -> Tensor:
    device = next((x.device for x in s.values() if x is not None), None)

    def count(chosen: Callable[..., Tensor], *names: str) -> Tensor:
        if any(s[name] is None for name in names):
            return torch.zeros((), dtype=torch.int64, device=device)
        return chosen(*(s[name] for name in names)).sum()

    def there(x: Tensor) -> Tensor:
        return x >= 0

    return torch.stack(
        [
            count(there, "text_position"),
            count(there, "word_position"),
            count(there, "map_position"),
            count(there, "side_position"),
            count(there, "image"),
            count(lambda bag: (bag >= 0).any(-1), "word_bag"),
            count(there, "phrase_position"),
            count(lambda p, own: (p >= 0) & (own > 0), "phrase_position", "phrase_subject"),
            count(lambda three: (three >= 0).all(-1), "phrase_composite"),
            count(lambda p, own: (p >= 0) & (own > 0), "lens_position", "lens_inside"),
            count(lambda p, own: (p >= 0) & (own == 0), "lens_position", "lens_inside"),
        ]
    )


def _whole_groups(given: dict[str, Tensor]) -> None:
    """A group of tensors comes whole, and all but the text rows need `gk_image`."""
    for group in ("side", "word", "map", "phrase", "lens"):
        members = [name for name in SHAPES if name.startswith(f"{group}_")]
        present = [name for name in members if name in given]
        for name in (*members, "image") if present else ():
            if name not in given:
                checks.fail(f"gk_{name}", f"a tensor, since gk_{present[0]} is given", "nothing")


def _in_range(name: str, x: Tensor, stop: int) -> None:
    if x.numel():
        low, high = int(x.min()), int(x.max())
        checks.require(
            low >= -1 and high < stop, name, f"values in [-1, {stop})", f"[{low}, {high}]"
        )


def first_keys(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int32 [B]: the first attended key of each sequence (left padding).

    Raises:
        ValueError: a mask that is not [B, S], or (looked at where free) one with holes: documents
            packed by masks, or padding in the middle.
    """
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


def refuse_packing(inputs: dict, attention_mask: Tensor | None) -> None:
    """Refuse several documents in one sequence: side tokens and maps would see all of them.

    Raises:
        ValueError: FlashAttention's cumulative lengths, or (looked at where free) positions that
            start again.
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"):
        if inputs.get(name) is not None:
            checks.fail(name, "one document to a sequence (no packing)", "packed documents")
    positions = inputs.get("position_ids")
    if positions is None or not checks.values_visible(positions):
        return
    # [B, S], or Qwen's [3 or 4, B, S] with time or text first
    text = positions if positions.dim() == 2 else positions[0]
    restarts = text.diff(dim=-1) < 0
    if attention_mask is not None:
        restarts = restarts & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if bool(restarts.any()):
        checks.fail(
            "position_ids", "one document to a sequence (no packing)", "positions that restart"
        )


class Rows:
    """[B, R] positions as `QueryRows` of N = B x R, for each sliding window that a layer has."""

    def __init__(self, position: Tensor, first_key: Tensor) -> None:
        batch, rows = position.shape
        sequence = torch.arange(batch, dtype=torch.int32, device=position.device)
        self.sequence = sequence.repeat_interleave(rows)
        self.position = position.flatten().to(torch.int32)
        self.start = first_key.repeat_interleave(rows)
        self._windows: dict[int | None, QueryRows] = {}

    def at(self, window: int | None) -> QueryRows:
        """The rows of a layer whose sliding window is `window` (None: full attention)."""
        if window not in self._windows:
            self._windows[window] = QueryRows.causal(
                self.sequence, self.position, start=self.start, window=window
            )
        return self._windows[window]


def side_sets(s: Supervision) -> KeySets:
    """Omega of (S1) for each aligned row: language tokens, and visual ones inside its regions."""
    batch, sets, length = s.side_inside.shape
    sequence = torch.arange(batch, device=s.image.device)
    index = torch.where(s.side_set >= 0, s.side_set + sequence[:, None] * sets, -1)
    index = torch.where(s.side_position >= 0, index, -1).flatten().to(torch.int32)
    inside = s.side_inside.reshape(batch * sets, length)
    return KeySets.regions(s.image >= 0, inside, sequence.repeat_interleave(sets), index)


def map_sets(s: Supervision) -> KeySets:
    """The keys of each map row's own image."""
    same = s.image[:, None, :] == s.map_image[:, :, None]  # [B, Rm, S]
    rows = same.flatten(0, 1)
    index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return KeySets.from_bool(rows, index)


def word_images(s: Supervision) -> Tensor:
    """int64 [B, Rw]: each labelled token's bag among the B x I bags; -1 where it has none."""
    image = s.image.gather(1, s.word_position.clamp(min=0).long()).long()
    image = torch.where(s.word_position >= 0, image, -1)
    offset = torch.arange(len(image), device=image.device)[:, None] * s.word_bag.shape[1]
    return torch.where((image >= 0) & (image < s.word_bag.shape[1]), image + offset, -1)


def tokens_after(input_ids: Tensor, position: Tensor) -> Tensor:
    """int64 [B, R]: the token that each row predicts; -100 for padding rows."""
    after = (position.clamp(min=0) + 1).clamp(max=input_ids.shape[1] - 1).long()
    return torch.where(position >= 0, input_ids.gather(1, after), -100)


def take_rows(x: Tensor, position: Tensor) -> Tensor:
    """[B, S, D] -> [B, R, D], differentiable; a padding row takes row 0."""
    batch = torch.arange(len(x), device=x.device)[:, None]
    return x[batch, position.clamp(min=0).long()]
