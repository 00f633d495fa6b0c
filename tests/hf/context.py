"""Batches split over ranks against the same batches whole: a program that test_context.py runs.

python -m tests.hf.forked tests.hf.context REPORT CASE CASE ...

A case is one of CASES, or a family of the zoo; "zoo" is all of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Unavailable
from benchmarks.ranks.ring_on_cpu import ring_on_cpu
from groundkern.hf import (
    DvSft,
    GroundedOutput,
    GroundingCollator,
    Klal,
    PatchText,
    Smam,
    attach,
    context_parallel,
    doctor,
    supported_objectives,
)
from tests.hf import videos
from tests.hf.methods import METHODS
from tests.hf.packed import packed_batch
from tests.hf.samples import SAMPLES, Sample, make_batch, weighted
from tests.hf.test_families import EXAMPLES
from tests.hf.zoo.test_videos import examples as with_videos

THREE = {"smam": Smam(weight=0.7), "dv_sft": DvSft(weight=0.5), "klal": Klal(weight=0.8)}
EACH = {
    "smam": Smam(divide_by="aligned"),
    "dv_sft": DvSft(weight=0.5, average="image"),
    "klal": Klal(over="visible", heads="each", head_weight="learned"),
}
HEADS = {
    "klal": Klal(
        chosen_heads=((0, 3), (1, 0), (1, 1), (1, 2)),
        average_layers=True,
        head_weight="learned",
    )
}
PER_LAYER = {"klal": Klal(over="renormalised", divergence="reverse_kl")}
BLANK = Sample(seed=9, pieces=(3, (2, 2), 6), answer=0)  # an image, and no supervised row
SHORT = Sample(seed=8, pieces=(3,), answer=1)  # on more than three ranks some have no token
LINEARS = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)"


@dataclass(frozen=True)
class Case:
    """A model, its objectives, a batch, and how it is split."""

    methods: dict
    order: str = "zigzag"
    side: str = "right"
    rows: str = (
        "padded"  # "packed"; "few": one sample has any; "short": of three tokens; "weighted"
    )
    attention: str = "sdpa"
    checkpointed: bool = False
    training: bool = True
    lora: bool = False
    family: str | None = None  # with its own processor; None: hand-made samples of Qwen2.5-VL
    videos: bool = False  # of the family
    engine: str = "gather"
    multiple: int = 1  # of the length of a batch

    def model(self) -> nn.Module:
        """Attached."""
        name = self.family or "qwen2_5_vl"
        make = partial(videos.model, name) if self.videos else families()[name].model
        model = make() if self.family else make(attention=self.attention)
        attach(model, **self.methods)
        if self.lora:
            from peft import LoraConfig, get_peft_model  # after what makes torchvision importable

            torch.manual_seed(3)
            config = LoraConfig(r=3, target_modules=LINEARS, init_lora_weights=False)
            model = get_peft_model(model, config)
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train(self.training)

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        """The same on every rank."""
        if self.videos:
            processor = videos.processor(self.family, padding_side=self.side)
            return GroundingCollator(processor, model.config)(with_videos())
        if self.family is not None:
            processor = families()[self.family].processor(padding_side=self.side)
            return GroundingCollator(processor, model.config)(EXAMPLES)
        samples = SAMPLES["qwen"]
        if self.rows == "packed":
            return packed_batch(model, [samples[:2], samples[2:]])
        others = {"few": (BLANK, samples[0]), "short": (SHORT,), "weighted": weighted(samples)}
        samples = others.get(self.rows, samples)
        batch = make_batch(model, samples, side=self.side)
        missing = -batch["input_ids"].shape[1] % self.multiple
        if missing:
            longest = int(batch["attention_mask"].sum(1).argmax())
            longer = replace(samples[longest], pieces=(missing, *samples[longest].pieces))
            samples = (*samples[:longest], longer, *samples[longest + 1 :])
            batch = make_batch(model, samples, side=self.side)
        return batch


# BASIC and the words of patch-text contrast need whole sequences
SPLIT = {name: how for name, how in METHODS["attention"].items() if name != "basic"}
SPLIT["patch_text"] = PatchText()
CASES = {
    "three": Case(THREE),
    "all": Case(SPLIT, rows="weighted"),
    "each head": Case(EACH, order="contiguous"),
    "chosen heads": Case(HEADS, order="striped"),
    "per layer": Case(PER_LAYER, order="striped"),
    "padding on the left": Case(THREE, side="left"),
    "packed": Case(THREE, rows="packed", checkpointed=True),
    "few rows": Case(THREE, rows="few", order="contiguous"),
    "short": Case(THREE, rows="short", order="contiguous"),
    "checkpointed": Case(THREE, checkpointed=True),
    "eager": Case(THREE, attention="eager"),
    "evaluation": Case(THREE, training=False),
    "adapters": Case(THREE, lora=True),
    "ring": Case(THREE, engine="ring", multiple=24),
    "videos of Qwen2.5-VL": Case(SPLIT, family="qwen2_5_vl", videos=True),
    "videos of Qwen3-VL": Case(SPLIT, family="qwen3_vl", videos=True),
    "kept sinks": Case({"smam": Smam(keep="sinks")}, rows="few"),  # refused
    "ring, checkpointed": Case(THREE, engine="ring", multiple=24, checkpointed=True),
}
Step = tuple[GroundedOutput, dict[str, Tensor]]


def step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """The output of a step, and the gradients of all trained weights; zeros where none came."""
    record = {} if model.training else {"gk_record": "maps"}
    output = model(**dict(batch), **record)
    output.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    zero = torch.zeros_like
    found = {name: zero(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    return output, found


def compared(case: Case, prepare: Callable[[nn.Module], object] = id) -> dict[str, float | str]:
    """How far what a split batch comes to is from the whole, in shares of the largest.

    Args:
        case: which.
        prepare: is called with the model after the whole batch.
    """
    model = case.model()
    context_parallel(model, dist.group.WORLD, order=case.order)  # refuses a family
    context_parallel(model, None)
    batch = case.batch(model)
    whole, wanted = step(model, batch)
    prepare(model)
    context_parallel(model, dist.group.WORLD, order=case.order, engine=case.engine)
    off: dict[str, float | str] = {}
    try:
        report = doctor(model, batch)
        off["doctor"] = max(report.main, report.side or 0.0)
    except ValueError as error:  # the step still says whether it was right to
        off["doctor refused"] = str(error)
    split, found = step(model, batch)
    context_parallel(model, None)
    for gradient in found.values():
        dist.all_reduce(gradient)
    off |= _losses(split, whole)
    largest = max(float(g.abs().max()) for g in wanted.values())
    off["gradient"] = max(float((found[k] - g).abs().max()) for k, g in wanted.items()) / largest
    return off


def _losses(split: GroundedOutput, whole: GroundedOutput) -> dict[str, float]:
    found = {"loss": _off(split.loss, whole.loss)}
    found |= {name: _off(split.parts[name], part) for name, part in whole.parts.items()}
    for name in ("text_log_prob", "side_log_prob", "word_log_prob", "maps"):
        x, y = getattr(split, name), getattr(whole, name)
        if y is not None and y.numel():
            found[name] = _off(x, y)
    found["predicted"] = float((whole.text_predicted != split.text_predicted).sum())
    return found


def _off(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-6))


def tried(name: str) -> dict[str, float | str]:
    """`compared`, or why a family cannot be built, split or run at all."""
    try:
        return compared(CASES.get(name) or Case(_supported(name), family=name))
    except Unavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:  # whatever a family's code raises is a finding
        kind = "refused" if isinstance(error, ValueError) else "crashed"
        return {kind: f"{type(error).__name__}: {error}".split("\n")[0]}


def _supported(name: str) -> dict:
    """Every method that a family's model supports and that does not need whole sequences."""
    family = families()[name]
    if family.processor is None:
        raise Unavailable("a processor that can be built here: there is none")
    reasons = supported_objectives(family.model())
    return {key: how for key, how in SPLIT.items() if reasons[key] is None}


def main(report: str, *names: str) -> None:
    """Write what was compared as JSON."""
    torch.set_num_threads(1)
    ring_on_cpu()
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    found = {}
    for name in families() if names == ("zoo",) else names:
        found[name] = tried(name)
        if dist.get_rank() == 0:
            print(name, found[name], flush=True)
            Path(report).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
