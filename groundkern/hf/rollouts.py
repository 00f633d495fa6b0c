"""Grounding losses on a policy's own completions: what a subclass of TRL's GRPOTrainer needs.

TRL is not imported: the mixin overrides its methods and calls the next class's.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.data.batch import row_counts
from groundkern.hf.data.geometry import image_geometry
from groundkern.hf.data.image_token import one_of
from groundkern.hf.data.policy_rows import policy_rows
from groundkern.hf.data.regions import MapTargets
from groundkern.hf.data.rollouts import (
    check_region,
    image_numbers,
    map_rows,
    token_rows,
)
from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.head_weight import train_head_weight
from groundkern.hf.model.own_forward import ATTACHMENT
from groundkern.hf.model.request import visual_tokens_of
from groundkern.hf.model.support import base_model
from groundkern.hf.objectives import Objectives
from groundkern.hf.output import GroundedOutput
from groundkern.hf.rewards import AttentionReward

if TYPE_CHECKING:
    from transformers import Trainer

    class NextClass(Trainer):
        """What is used of TRL's GRPOTrainer."""

        args: Any  # a GRPOConfig
        model: Any  # the policy, as accelerate wrapped it
        reward_funcs: list[Any]
        num_iterations: int
        temperature: float
        current_gradient_accumulation_steps: int
        _metrics: dict[str, dict[str, list[float]]]

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            return {}

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            return torch.empty(())

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    NextClass = object

logger = logging.getLogger(__name__)

OVERRIDDEN = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
)
SERVED = ("policy", "distill", "klal", "margins")
TOTALS = "gk_totals"
VISION = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class Evidence(NamedTuple):
    """Which rollouts' rows get the maps of their regions, and which maps.

    Args:
        above: rollouts of an advantage above this have rows; None: all have.
        rows: of a rollout and image at most, evenly spread over its tokens; None: all.
        kind, levels, sigma: of `groundkern.maps.target_map`.
        floor: the part of each target that is spread evenly over its image, in [0, 1].

    Source: EASE (arXiv 2605.30912), (W2): `Evidence(kind="evidence", floor=0.1)`.
    """

    above: float | None = 0.0
    rows: int | None = 64
    kind: str = "neighbours"
    levels: tuple[float, float, float] = (1.0, 0.5, 1e-3)
    sigma: float = 0.8
    floor: float = 0.0

    @property
    def targets(self) -> MapTargets:
        """How target maps are made.

        Raises:
            ValueError: rows or a floor out of range.
        """
        few = self.rows is None or self.rows > 0
        require(few, "evidence.rows", "a positive number or None", self.rows)
        require(0.0 <= self.floor <= 1.0, "evidence.floor", "a number in [0, 1]", self.floor)
        return MapTargets(self.kind, self.levels, self.sigma, floor=self.floor, most=self.rows)


class RolloutMixin(NextClass):
    """What a subclass of TRL's GRPOTrainer needs to train an attached model.

        class GroundedGRPOTrainer(RolloutMixin, GRPOTrainer): ...

    In the one forward pass that TRL makes of a micro-batch anyway, log probabilities and entropies
    come from the fused head on the completions' rows alone, and the attached objectives are
    computed on these rows: `policy` (RAL) on all of them, with the advantages and the attention of
    the policy that generated them; `distill` on all of them, against a teacher's attention; KLAL
    and the margins on rows of rollouts that passed the gate, with a map of the sample's `regions`,
    a column of the data set (`check_region`), which `Evidence` says more of. Their sum is added to
    TRL's loss, divided by the rows of the whole
    generation batch as TRL's DAPO loss is; each part is logged as `grounding/...`.

    Args:
        args, kwargs: as the next class expects them; the model is attached.
        evidence: of the objectives on maps; None: `Evidence()`.

    Raises:
        ValueError: a model that is not attached; in training, a region of another form, or an
            objective that needs more of a sample than completions have.
    """

    evidence: Evidence

    def __init__(self, *args: Any, evidence: Evidence | None = None, **kwargs: Any) -> None:
        others = super()
        missing = [name for name in OVERRIDDEN if not hasattr(others, name)]
        if missing:
            fail("trl.GRPOTrainer", f"one with {', '.join(OVERRIDDEN)}", f"none of {missing}")
        super().__init__(*args, **kwargs)
        objectives = objectives_of(self._grounded())
        for name in ("smam", "dv_sft", "hist", "logit_lens", "basic", "patch_text"):
            if getattr(objectives, name) is not None:
                got = "one that needs texts, words or images as a data set has them"
                fail(name, f"objectives of rows of completions ({', '.join(SERVED)})", got)
        if getattr(self, "aux_loss_enabled", False):
            wanted = "a model without output_router_logits (its experts' loss is not computed here)"
            fail("config.output_router_logits", wanted, True)
        self.evidence = evidence or Evidence()
        self._targets = self.evidence.targets
        for function in self.reward_funcs:
            if isinstance(function, AttentionReward):
                function.trainer = self
        train_head_weight(self._grounded())
        self._rows: dict[str, Tensor] | None = None  # `gk_` tensors of the batch that is scored
        self._terms: Tensor | None = None  # of that batch
        self._maps: list[Tensor] | None = None  # the policy's, while they are recorded
        self._told = False

    def _grounded(self) -> nn.Module:
        return base_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The next class's batch of rollouts, with the `gk_` tensors of their rows."""
        output = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            return {**output, **self._supervision(output, inputs)}

    def _supervision(
        self, output: dict[str, Any], inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        objectives: Objectives = objectives_of(self._grounded())
        mask, prompt = output["completion_mask"], output["prompt_ids"].shape[1]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        ids = torch.cat((output["prompt_ids"], output["completion_ids"]), 1)
        tables = self._tables(output, inputs)
        visual = visual_tokens_of(self._grounded())
        if bool((one_of(output["completion_ids"], visual) & (mask != 0)).any()):
            wanted = f"no visual tokens (generation_kwargs: suppress_tokens {sorted(visual)})"
            fail("completion_ids", wanted, "some that the policy wrote")
        image = image_numbers(ids.cpu(), tables, visual)
        rows = {"gk_image": image.to(ids.device)}
        text = {"gk_text_position": token_rows(mask, prompt)}
        if objectives.policy is not None and self._reused():
            known = {"input_ids": ids, **text}
            rows |= policy_rows(known, output["advantages"], rows=objectives.policy.rows)
            rows["gk_policy_reference"] = self._recorded(output, ids, rows)
        if objectives.klal is not None or objectives.margins is not None:
            found = self._evidence(output, inputs, (mask.cpu(), prompt, image, tables))
            rows |= {name: x.to(ids.device) for name, x in found.items()}
        counts = row_counts({**rows, **text})[None].to(ids.device)
        counts = self.accelerator.gather(counts).sum(0)
        share = 1.0 / self.accelerator.num_processes  # gradients are a mean over them
        if self.model.training:  # of the rollouts that one optimizer step takes
            share *= self.current_gradient_accumulation_steps / self.args.steps_per_generation
        totals = counts.float() * share
        return {**rows, TOTALS: totals.expand(len(ids), -1).clone()}

    def _reused(self) -> bool:
        """Whether a rollout is trained on after the policy changed, without which attention is that
        of the policy that made it and RAL's loss has no gradient."""
        updates = self.args.steps_per_generation * self.num_iterations
        reused = self.model.training and updates > self.args.gradient_accumulation_steps
        if self.model.training and not reused and not self._told:
            self._told = True
            logger.warning(
                "policy: every rollout is trained on once, by the policy that made it, so this "
                "term is 0: give num_iterations or steps_per_generation above "
                "gradient_accumulation_steps"
            )
        return reused

    def _recorded(self, output: dict[str, Any], ids: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """[B, C, M, P + C]: the policy's attention now, made in micro-batches."""
        attended = torch.cat((output["prompt_mask"], output["completion_mask"]), 1)
        kept = self._rows, self._maps
        self._rows, self._maps = {**rows}, []
        try:
            self._get_per_token_logps_and_entropies(
                self.model,
                ids,
                attended,
                output["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
                **{name: output[name] for name in VISION if name in output},
            )
            return torch.cat(self._maps)
        finally:
            self._rows, self._maps = kept

    def _evidence(
        self,
        output: dict[str, Any],
        inputs: list[dict[str, Any]],
        known: tuple[Tensor, int, Tensor, list[Tensor]],  # what `map_rows` takes first
    ) -> dict[str, Tensor]:
        regions = [sample.get("regions") or [] for sample in inputs]
        for b, (sample, own) in enumerate(zip(inputs, regions, strict=True)):
            for i, region in enumerate(own):
                check_region(region, len(_images(sample)), f"rollout {b}: regions[{i}]")
        weight = torch.ones(len(inputs))
        if self.evidence.above is not None:
            weight = (output["advantages"] > self.evidence.above).float().cpu()
            weight = weight if weight.dim() == 1 else weight.amax(1)
        return map_rows(*known, regions, weight, self._targets)

    def _tables(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> list[Tensor]:
        """Where the visual tokens of each rollout are."""
        images = [_images(sample) for sample in inputs]
        if not any(images):
            return [torch.zeros(0, 5, dtype=torch.float64) for _ in images]
        processor, config = self.processing_class, self._grounded().config
        return image_geometry(processor, config, images, output)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The next class's loss and that of the objectives."""
        rows = {name: x for name, x in inputs.items() if name.startswith("gk_")}
        rest = {name: x for name, x in inputs.items() if name not in rows}
        if rows:
            rows[TOTALS] = rows[TOTALS][0]
        self._rows, self._terms = rows or None, None
        try:
            loss = super()._compute_loss(model, rest)
            return loss if self._terms is None else loss + self._terms
        finally:
            self._rows = self._terms = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the next class does, which cuts batches, with the attached model's own forward."""
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        scored: Any = model
        if base_model(unwrapped).__dict__.get(ATTACHMENT) is not None:  # no reference model
            scored = _Scored(self, model, input_ids.shape[1] - logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def score(
        self, model: nn.Module, inputs: dict[str, Any], start: int, prompt: int
    ) -> GroundedOutput:
        """One forward pass of some rollouts, with the rows of the batch that they are of.

        Args:
            model: the wrapped model.
            inputs: of the model, with `labels`.
            start: the first of the rollouts in its batch.
            prompt: P.

        Returns:
            Its output; the objectives' loss is kept for `_compute_loss`.
        """
        labels, ids = inputs.pop("labels"), inputs["input_ids"]
        own: dict[str, Any] = {
            "gk_text_position": token_rows(labels[:, prompt:] != -100, prompt),
            "gk_temperature": self.temperature,
        }
        for name, x in (self._rows or {}).items():
            own[name] = x if name == TOTALS else x[start : start + len(ids)]
        if self._maps is not None:
            own["gk_record"] = "policy"
        output = model(**inputs, **own)
        if self._maps is not None:
            self._maps.append(output.policy_maps)
        elif self._rows is not None:
            self._terms = output.loss
            mode = "train" if self.model.training else "eval"
            for name, part in output.parts.items():
                seen = self.accelerator.gather(part[None]).sum() / self.accelerator.num_processes
                self._metrics[mode][f"grounding/{name}"].append(seen.item())
        return output


class _Scored:
    """What stands for the model in the next class's calls: it scores completions by our forward."""

    def __init__(self, trainer: RolloutMixin, model: nn.Module, prompt: int) -> None:
        self.trainer, self.model, self.prompt, self.start = trainer, model, prompt, 0

    def __call__(self, *, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        output = self.trainer.score(self.model, inputs, self.start, self.prompt)
        self.start += len(inputs["input_ids"])
        return SimpleNamespace(log_probs=output.text_log_prob, entropy=output.text_entropy)


def _images(sample: dict[str, Any]) -> list[Any]:
    if "images" in sample:
        return list(sample["images"] or ())
    return [] if sample.get("image") is None else [sample["image"]]
