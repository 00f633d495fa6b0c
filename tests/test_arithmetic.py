"""The arithmetic of docs/scale/scale.md against what autograd keeps, and against two processes."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import arithmetic
from benchmarks.ranks.memory import COUNTED, counted, table
from benchmarks.training_step.model import SHAPES, Rows, build, sample
from groundkern.hf import DvSft, Klal, Smam, attach

ROOT = Path(__file__).parents[1]
SCALE = ROOT / "docs" / "scale" / "scale.md"
TOKENS = 256
# of each precision: the weights' dtype, and whether autocast is on
KINDS = {
    "float32": (torch.float32, False),
    "float32 + bf16 autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}


def kept(layers: int, precision: str, *, side: bool, checkpointed: bool) -> int:
    """Bytes that autograd keeps of a forward pass."""
    shape = replace(SHAPES["tiny"], layers=layers)
    dtype, autocast = KINDS[precision]
    model = build(shape, torch.device("cpu"), dtype)
    model.model.visual.requires_grad_(False)
    attach(model, **({"smam": Smam(), "dv_sft": DvSft(), "klal": Klal()} if side else {}))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = sample(shape, TOKENS, Rows(side=32), torch.device("cpu"))
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    if not side:
        plain = ("gk_image", "gk_text_position")
        batch = {k: x for k, x in batch.items() if not k.startswith("gk_") or k in plain}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x
        return x

    cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), cast:
        model(**batch)
    return sum(x.untyped_storage().nbytes() for x in found.values())


LONG = pytest.mark.long  # autocast has every term that the others have


@pytest.mark.parametrize(
    "precision",
    [pytest.param(x, marks=[] if "autocast" in x else LONG) for x in KINDS],
)
def test_a_layer_s_activations(precision):
    three, two = (kept(n, precision, side=False, checkpointed=False) for n in (3, 2))
    shape, chosen = SHAPES["tiny"], arithmetic.PRECISIONS[precision]
    wanted = TOKENS * arithmetic.layer_activations(shape, chosen)
    if chosen.copies:
        linear = arithmetic.parameters(shape).layer
        wanted += linear * chosen.copies  # biases and norms with them: a percent
    assert three - two == pytest.approx(wanted, rel=0.02 if chosen.copies else 1e-9)


def test_side_tokens_cost_what_tokens_cost():
    chosen, shape = arithmetic.PRECISIONS["float32"], replace(SHAPES["tiny"], layers=1)
    found = [kept(n, "float32", side=True, checkpointed=False) for n in (3, 2)]
    wanted = arithmetic.activations(shape, chosen, TOKENS, checkpointed=False, side=32)
    assert found[0] - found[1] == pytest.approx(wanted, rel=0.03)


def test_checkpointing_keeps_the_layers_inputs():
    found = [kept(n, "float32", side=True, checkpointed=True) for n in (3, 2)]
    assert found[0] - found[1] == (TOKENS + 32) * SHAPES["tiny"].hidden * 4


def test_parameters_are_those_of_the_model():
    shape = SHAPES["tiny"]
    model = build(shape, torch.device("cpu"), torch.float32)
    found = arithmetic.parameters(shape)
    assert found.decoder + found.vision == sum(p.numel() for p in model.parameters())
    # the model card says 8.29 billion; 72B has 73.4
    assert arithmetic.parameters(SHAPES["qwen2.5-vl-7b"]).decoder == pytest.approx(7.62e9, rel=0.01)


def test_two_processes_hold_what_the_arithmetic_says():
    (path,) = (ROOT / "benchmarks" / "results" / "ranks").glob("*-memory.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {(row["strategy"], row["how"]) for row in rows}
    assert measured >= set(product(("ddp", "fsdp2", "zero3"), ("full", "lora")))
    for row in rows:
        expected = counted(row["strategy"], row["how"], row["shape"])._asdict()
        # AdamW counts steps for each tensor; FSDP fills its parts up to a multiple of the ranks;
        # DeepSpeed leaves small weights whole
        off = {"ddp": 1e-4, "fsdp2": 0.01, "zero3": 0.05}[row["strategy"]]
        for name in COUNTED:
            assert int(row[f"{name}_by_arithmetic"]) == round(expected[name])
            assert int(row[name]) == pytest.approx(expected[name], rel=off)
    assert "\n".join(table(rows)) in SCALE.read_text(encoding="utf-8")


def test_the_tables_of_the_docs_are_generated():
    text = SCALE.read_text(encoding="utf-8")
    names = ("qwen2.5-vl-7b", "qwen2.5-vl-72b")
    for made in (arithmetic.states_table, arithmetic.lengths_table, arithmetic.fits_table):
        assert "\n".join(made(names)) in text
