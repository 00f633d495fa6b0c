"""A batch split over ranks against the whole: a program that test_context.py runs.

python -m tests.hf.forked tests.hf.context FOLDER quick
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.families.zoo import first, tiles
from groundkern.hf import DvSft, Klal, Smam, attach, context_parallel, doctor
from tests.hf.methods import METHODS
from tests.hf.packed import packed_batch
from tests.hf.samples import SAMPLES, make_batch

FAMILIES = first.FAMILIES | tiles.FAMILIES
ALL = METHODS["attention"]
THREE = {"smam": Smam(weight=0.7), "dv_sft": DvSft(weight=0.5), "klal": Klal(weight=0.8)}
EACH = {"smam": Smam(divide_by="aligned"), "klal": Klal(over="visible", heads="each")}
RENORMALISED = {"klal": Klal(over="renormalised", divergence="reverse_kl")}


@dataclass(frozen=True)
class Case:
    """A model, its objectives, a batch, and how it is split."""

    methods: dict
    family: str = "qwen2_5_vl"
    order: str = "zigzag"
    side: str = "right"
    packed: bool = False
    attention: str = "sdpa"
    checkpointed: bool = False
    training: bool = True

    def model(self) -> nn.Module:
        model = FAMILIES[self.family].model(attention=self.attention)
        attach(model, **self.methods)
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train(self.training)

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        samples = SAMPLES["qwen" if hasattr(model.config, "vision_start_token_id") else "llava"]
        if self.packed:
            return packed_batch(model, [samples[:2], samples[2:]])
        return make_batch(model, samples, side=self.side)


CASES = {
    "three": Case(THREE),
    "all": Case(ALL),
    "each, contiguous": Case(EACH, order="contiguous"),
    "renormalised, striped": Case(RENORMALISED, order="striped"),
    "left": Case(THREE, side="left"),
    "packed": Case(THREE, packed=True),
    "checkpointed": Case(THREE, checkpointed=True),
    "eager": Case(THREE, attention="eager"),
    "evaluated": Case(THREE, training=False),
    **{name: Case(ALL, family=name) for name in FAMILIES if name != "qwen2_5_vl"},
}


def step(model: nn.Module, batch: dict[str, Tensor]):
    """The output of a step, and the gradients of all weights."""
    model.zero_grad()
    output = model(**batch, **({} if model.training else {"gk_record": "maps"}))
    output.loss.backward()
    return output, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def compared(case: Case) -> dict[str, float]:
    """How far losses, rows and gradients of the split batch are from those of the whole."""
    model = case.model()
    batch = case.batch(model)
    whole, wanted = step(model, dict(batch))
    context_parallel(model, dist.group.WORLD, order=case.order)
    report = doctor(model, batch)
    split, found = step(model, dict(batch))
    for name in wanted:
        if name not in found:
            found[name] = torch.zeros_like(wanted[name])
        dist.all_reduce(found[name])
    largest = max(float(g.abs().max()) for g in wanted.values())
    gradient = max(float((found[k] - wanted[k]).abs().max()) for k in wanted) / largest
    off = {"loss": float((split.loss - whole.loss).abs() / whole.loss.abs()), "gradient": gradient}
    off |= {k: float((split.parts[k] - x).abs() / x.abs().clamp(min=1e-6)) for k, x in whole.parts.items()}
    for name in ("text_log_prob", "side_log_prob", "word_log_prob", "maps"):
        x, y = getattr(whole, name), getattr(split, name)
        if x is not None and x.numel():
            off[name] = float((x - y).abs().max() / x.abs().max())
    off["predicted"] = float((whole.text_predicted != split.text_predicted).sum())
    off["doctor"] = report.main + report.side
    context_parallel(model, None)
    return off


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = sys.argv[1:] or CASES
    for name in names:
        off = compared(CASES[name])
        if dist.get_rank() == 0:
            print(name, {k: f"{x:.1e}" for k, x in off.items() if x > 1e-5}, f"gradient {off['gradient']:.1e} loss {off['loss']:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
