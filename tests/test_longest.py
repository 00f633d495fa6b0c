"""The memory model of long samples against what steps really hold, and the tables of the docs."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.longest import __main__ as longest
from benchmarks.longest import growing, hours, measuring, memory, reaching, table
from benchmarks.longest.setting import EAGER, MAPS, METHODS, OURS, SDPA, SMALL, Setting
from benchmarks.preparing import label_bytes
from benchmarks.training_step.model import SHAPES, Rows, adapted, build, sample
from groundkern.hf.data.batch import GroundedBatch
from groundkern.hf.model.readings import map_target
from groundkern.hf.model.rows import map_sets, side_sets

ROOT = Path(__file__).parents[1]
LONG = (ROOT / "docs" / "scale" / "long.md").read_text(encoding="utf-8")
SCALE = (ROOT / "docs" / "scale" / "scale.md").read_text(encoding="utf-8")
(MEASURED,) = (ROOT / "benchmarks" / "results" / "longest").glob("*-measured.csv")
TOKENS = 512
QUICK = {(OURS, False), (OURS, True), (MAPS, True)}


@pytest.mark.parametrize(
    ("method", "checkpointed"),
    [
        pytest.param(m, c, marks=[] if (m, c) in QUICK else pytest.mark.long)
        for m in METHODS
        for c in (False, True)
    ],
)
def test_a_step_holds_what_is_counted(method, checkpointed):
    setting = Setting(SMALL, method, TOKENS, checkpointed=checkpointed)
    row = longest.one(setting, 2e9)
    assert longest.wrong([row]) == []
    assert row["ratio"] == pytest.approx(1, abs=longest.OFF)


def test_a_wrong_count_is_said():
    row = {"method": OURS, "tokens": 4096, "counted": 90, "measured": 100, "ratio": 0.89}
    assert longest.wrong([{**row, "status": "ok"}]) != []
    assert longest.wrong([{**row, "ratio": 0.91, "status": "ok"}]) == []
    assert longest.wrong([{**row, "ratio": None, "status": "out of memory at 6 GB"}]) != []


@pytest.mark.long
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_vision_tower_that_trains(checkpointed):
    setting = Setting(SMALL, OURS, 1024, checkpointed=checkpointed, vision=True)
    assert longest.wrong([longest.one(setting, 2e9)]) == []


def test_what_is_measured_needs_no_more_than_it_may_have():
    setting = Setting(SMALL, SDPA, 2**20)
    row = longest.one(setting, 1e9)
    assert row["measured"] is None
    assert str(row["status"]).startswith("not tried")


def test_every_length_is_within_a_tenth():
    with MEASURED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {(r["method"], int(r["tokens"])) for r in rows if r["measured"]}
    assert {(r["method"], int(r["tokens"]), r["checkpointed"]) for r in rows} == {
        (m, n, c) for m in METHODS for n in longest.TOKENS for c in ("False", "True")
    }
    assert measured >= {(m, n) for m in METHODS for n in (2048, 4096, 8192)}
    assert measured >= {(m, n) for m in (OURS, SDPA) for n in longest.TOKENS}
    for row in rows:
        checkpointed = row["checkpointed"] == "True"
        setting = Setting(SMALL, row["method"], int(row["tokens"]), checkpointed=checkpointed)
        counted = memory.peak_bytes(setting)
        assert int(row["counted"]) == round(counted)
        if row["measured"]:
            assert counted == pytest.approx(int(row["measured"]), rel=longest.OFF)
        else:
            assert row["status"].startswith("not tried")
            assert counted > 6e9
    assert "\n".join(table.measured(rows)) in LONG


def test_the_tables_of_the_docs_are_generated():
    for name in reaching.SHAPES_OF_TABLE:
        assert "\n".join(reaching.table(name)) in LONG
    assert "\n".join(reaching.components_table()) in LONG
    assert "\n".join(growing.table()) in LONG
    assert "\n".join(hours.table()) in SCALE
    assert "\n".join(label_bytes.table()) in SCALE


def test_the_longest_sample_just_fits():
    training, way = reaching.TRAININGS[1], reaching.WAYS[1]
    start = reaching.setting("qwen2.5-vl-7b", training, way, OURS, 1024)
    found = reaching.longest(start, 76e9)
    assert memory.peak_bytes(replace(start, tokens=found)) <= 76e9
    assert memory.peak_bytes(replace(start, tokens=found + 1024)) > 76e9
    assert reaching.longest(start, 1e9) == 0


def test_components_add_up_and_grow_as_they_should():
    short, long = (Setting(SMALL, EAGER, n) for n in (4096, 8192))
    maps = [memory.peak(s)[1]["attention maps"] for s in (short, long)]
    assert maps[1] == 4 * maps[0]
    assert maps[0] == 4 * SMALL.layers * SMALL.heads * 4096**2
    few, many = (Setting(SMALL, OURS, 4096, checkpointed=c) for c in (True, False))
    assert memory.peak_bytes(few) < memory.peak_bytes(many)
    tiled = replace(few, tiled=True, offload=True)
    assert memory.peak_bytes(tiled) < memory.peak_bytes(few)


def kept_of_a_layer(lora: int) -> int:
    """Bytes that autograd keeps of a layer of a bfloat16 model with adapters."""

    def kept(layers: int) -> int:
        shape = replace(SHAPES["tiny"], layers=layers)
        model = build(shape, torch.device("cpu"), torch.bfloat16)
        model = adapted(model, lora)
        batch = sample(shape, 256, Rows(), torch.device("cpu"))
        batch = {k: x for k, x in batch.items() if not k.startswith("gk_") and k != "labels"}
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                found[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**batch, use_cache=False, logits_to_keep=1)
        return sum(x.untyped_storage().nbytes() for x in found.values())

    return kept(3) - kept(2)


def test_adapters_keep_fp32_copies_of_their_inputs():
    setting = Setting(SHAPES["tiny"], SDPA, 256, "bfloat16", lora=8)
    counted = sum(memory._layer(setting).values())
    assert kept_of_a_layer(8) == pytest.approx(counted, rel=0.05)


def test_what_grows_is_what_is_allocated():
    length = 8192
    columns = 3 * length // 4
    given = {
        "gk_image": torch.where(torch.arange(length) < columns, 0, -1)[None].int(),
        "gk_side_position": torch.arange(length - growing.ROWS, length)[None].int() - 1,
        "gk_side_set": torch.arange(growing.SETS)[None].int(),
        "gk_side_inside": torch.zeros(1, growing.SETS, length, dtype=torch.bool),
        "gk_map_position": torch.arange(length - growing.ROWS, length)[None].int(),
        "gk_map_token_position": torch.arange(length - growing.ROWS, length)[None].int(),
        "gk_map_image": torch.zeros(1, growing.ROWS, dtype=torch.int32),
        "gk_map_target": torch.ones(1, growing.ROWS, columns, dtype=torch.int32),
        "gk_map_columns": torch.arange(columns)[None].int(),
    }
    batch = GroundedBatch.pop(dict(given), torch.zeros(1, length, dtype=torch.int64))
    request = type("Request", (), {"batch": batch})
    by_name = {one.name: one.bytes[0] for one in growing.growing(SHAPES["tiny"], (length,))}
    making = by_name["key sets in the making"]
    assert measuring.rise(lambda: side_sets(batch)) == pytest.approx(making, rel=0.02)
    assert measuring.rise(lambda: map_sets(batch)) == pytest.approx(making, rel=0.02)
    assert measuring.rise(lambda: map_target(request)) == by_name["the same as fp32"]
    assert given["gk_side_inside"].nbytes == by_name["`gk_side_inside`"]
    assert given["gk_map_target"].nbytes == by_name["`gk_map_target`"]


def test_flops_of_the_linear_layers():
    shape, tokens = SHAPES["tiny"], 256
    model = build(shape, torch.device("cpu"), torch.float32)
    states = torch.randn(1, tokens, shape.hidden, requires_grad=True)
    positions = torch.arange(tokens).expand(3, 1, -1)
    with FlopCounterMode(display=False) as counter:
        decoder = model.model.language_model
        output = decoder(inputs_embeds=states, position_ids=positions, use_cache=False)
        output.last_hidden_state.sum().backward()
    found = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in found.items() if "mm" in str(op) and "bmm" not in str(op))
    setting = Setting(shape, SDPA, tokens)
    # biases and norms are parameters too, without products
    assert linear == pytest.approx(hours.flops("qwen2.5-vl-3b", setting).decoder, rel=0.02)


def test_labels_are_measured():
    found = label_bytes.label_bytes(5)
    assert all(plain > deflated > 0 for plain, deflated in found.values())
    assert found["200 words of a page"][0] > found["8 regions with boxes"][0]
