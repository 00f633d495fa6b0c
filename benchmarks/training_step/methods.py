"""python -m benchmarks.training_step.methods: what each method adds to a step of plain fine-tuning.

CPU seconds of forward and backward in alternating rounds, each against the step of the same round
that skips full logits.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import rounds
from benchmarks.training_step.losses import SKIPPING, losses
from benchmarks.training_step.model import SHAPES, Rows, Shape, build, sample
from benchmarks.training_step.step import runner
from groundkern.hf import (
    AttentionPolicy,
    Basic,
    Distillation,
    DvSft,
    Klal,
    PatchText,
    Smam,
    attach,
    policy_rows,
)

REFERENCES = torch.Generator().manual_seed(2)
RESPONSE = 512  # rows of a policy
WORDS = 8  # of the caption, each with a region
COLUMNS = (
    "method",
    "cpu_ms_p50",
    "to_skipping_p20",
    "to_skipping_p50",
    "to_skipping_p80",
    "rounds",
)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        objectives: of the shape.
        groups: of the sample's `gk_` tensors that it reads, beside those of text.
        rows: what is supervised.
        more: tensors that `sample` does not make.
        teacher: with a teacher as large as the model.
    """

    objectives: Callable[[Shape], dict]
    groups: tuple[str, ...] = ()
    rows: Rows = field(default_factory=Rows)
    more: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] | None = None
    teacher: bool = False


def _klal(**settings: object) -> Callable[[Shape], dict]:
    return lambda shape: {"klal": Klal(**settings)}


def _one_head(shape: Shape) -> dict:
    return {"klal": Klal(chosen_heads=tuple((layer, 0) for layer in range(shape.layers)))}


def _gated(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = torch.ones(batch["gk_map_position"].shape)
    weight[:, ::2] = 0.0
    return {"gk_map_weight": weight}


def _queries(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every text token between the image and the answer, at most 64."""
    visual = batch["gk_map_columns"][0]
    first, row = int(visual[-1]) + 1, batch["gk_map_position"]
    asked = torch.arange(first, min(int(row.min()), first + 64), dtype=torch.int32)
    return {"gk_query_position": asked.expand(*row.shape, -1).clone()}


def _policy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows of the response, with references that are not the model's own."""
    own = policy_rows(batch, torch.ones(1), rows="own")
    with torch.no_grad():
        maps = model(**{**batch, **own}, gk_record="policy").policy_maps
    noise = torch.randn(maps.shape, generator=REFERENCES)
    return own | {"gk_policy_reference": maps * noise.exp()}


def _contrast(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A few words, each on some visual tokens."""
    columns, vocabulary = batch["gk_map_columns"], model.config.get_text_config().vocab_size
    words = torch.arange(8, 8 + WORDS) % vocabulary
    position = columns[:, : WORDS * 12]
    label = words.repeat_interleave(12)[None, :, None]
    return {
        "gk_contrast_position": position,
        "gk_contrast_label": label,
        "gk_contrast_bag": words[None, None],
    }


_MANY = Rows(map=64)
_LONG = Rows(text=RESPONSE, side=0, word=0, map=0)
METHODS = {
    "DV-SFT": Method(lambda shape: {"dv_sft": DvSft()}, ("word",)),
    "SMAM": Method(lambda shape: {"smam": Smam()}, ("side",)),
    "SMAM, sinks kept": Method(
        lambda shape: {"smam": Smam(keep="sinks", sink_layer=1)}, ("side", "map")
    ),
    "KLAL": Method(_klal(), ("map",)),
    "KLAL, half of the rows gated": Method(_klal(), ("map",), more=_gated),
    "KLAL, one head a layer": Method(_one_head, ("map",)),
    "KLAL, 8 heads picked in each step": Method(
        _klal(picked_heads=8, average_layers=True, over="renormalised"), ("map",)
    ),
    "KLAL, 64 rows": Method(_klal(), ("map",), _MANY),
    "EASE: one layer, 64 rows, reverse KL": Method(
        lambda shape: {"klal": Klal(layers=(2 * shape.layers // 3,), divergence="reverse_kl")},
        ("map",),
        _MANY,
    ),
    "KLAL, js, 64 rows": Method(_klal(divergence="js", over="renormalised"), ("map",), _MANY),
    "GuidedVLA: mass of one head": Method(
        lambda shape: {
            "klal": Klal(divergence="mass", over="visible", chosen_heads=((shape.layers // 2, 0),))
        },
        ("map",),
    ),
    "A3Tune: share": Method(
        _klal(divergence="share", over="renormalised", average_layers=True), ("map",)
    ),
    "GUI-AIMA: head weights by a sink": Method(
        _klal(head_weight="sink", average_layers=True, over="renormalised"),
        ("map",),
        Rows(map=1),
        _queries,
    ),
    "RAL: 512 rows": Method(lambda shape: {"policy": AttentionPolicy()}, (), _LONG, _policy),
    "distillation of attention, 512 rows": Method(
        lambda shape: {"distill": Distillation()}, (), _LONG, teacher=True
    ),
    "BASIC": Method(lambda shape: {"basic": Basic()}, ("map",)),
    "BASIC, patches alike": Method(lambda shape: {"basic": Basic(patches="uniform")}, ("map",)),
    "patch-text contrast": Method(lambda shape: {"patch_text": PatchText()}, more=_contrast),
}


def step_of(name: str, method: Method, shape: Shape, tokens: int) -> tuple[Callable, Callable]:
    """A step of a method, and one of plain fine-tuning of the same model on the same sample."""
    cpu = torch.device("cpu")
    model = build(shape, cpu, torch.float32)
    batch = sample(shape, tokens, method.rows, cpu)
    plain = runner(model, SKIPPING, losses(model, batch)[SKIPPING])
    teacher = {"teacher": build(shape, cpu, torch.float32)} if method.teacher else {}
    attach(model, **method.objectives(shape), **teacher)
    kept = ("gk_image", "gk_text_position", *(f"gk_{group}_" for group in method.groups))
    own = {k: x for k, x in batch.items() if not k.startswith("gk_") or k.startswith(kept)}
    if method.more is not None:
        own |= method.more(model, batch)
    return runner(model, name, lambda: model(**own).loss), plain


def measure(name: str, method: Method, settings: argparse.Namespace) -> dict[str, object]:
    """A row of the table."""
    ours, plain = step_of(name, method, SHAPES[settings.shape], settings.tokens)
    runs, seconds = {name: ours, SKIPPING: plain}, {name: [], SKIPPING: []}
    for run in runs.values():
        run()
    for number in range(settings.rounds):
        for which in list(runs) if number % 2 else list(runs)[::-1]:
            start = time.process_time()
            runs[which]()
            seconds[which].append(time.process_time() - start)
    ratio = rounds.ratio(seconds[name], seconds[SKIPPING])
    middle = 1000 * rounds.quantiles(seconds[name])[1]
    numbers = (round(middle, 1), *(round(x, 3) for x in ratio), settings.rounds)
    return dict(zip(COLUMNS, (name, *numbers), strict=True))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--shape", default="large", choices=SHAPES)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--only", nargs="+", choices=METHODS, help="some of the methods")
    p.add_argument("--output", type=Path, help="a CSV file")
    return p


def main(arguments: list[str] | None = None) -> int:
    settings, console = parser().parse_args(arguments), Console()
    torch.set_num_threads(1)
    chosen = settings.only or list(METHODS)
    found = [
        measure(name, METHODS[name], settings)
        for name in track(chosen, "methods", console=console, transient=True)
    ]
    table = Table(*COLUMNS, title=f"{settings.shape}, {settings.tokens} tokens, one thread")
    for row in found:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if settings.output is not None:
        with settings.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
