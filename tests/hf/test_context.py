"""Context parallelism: losses, rows and gradients of a split batch are those of the whole."""

from __future__ import annotations

import json

import pytest
from torch import nn

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import Klal, attach, context_parallel
from tests.hf.context import CASES
from tests.hf.launching import FORKED, run

QUICK = ("all", "packed", "few rows")  # "three" is "packed" without documents
FAMILIES = ("llava", "qwen3_vl", "llava_next", "idefics3", "internvl", "mistral3", "qwen2_vl")


def compared(folder, *names: str, processes: int = 2) -> dict[str, dict]:
    """What the program found for some cases."""
    report = folder / "report.json"
    run("tests.hf.context", str(report), *names, launcher=FORKED, FORKED=str(processes))
    return json.loads(report.read_text(encoding="utf-8"))


def assert_alike(found: dict[str, dict]) -> None:
    """Every case within 1e-5 of the largest, and predictions the same."""
    assert found
    far = {
        (name, key): off
        for name, case in found.items()
        for key, off in case.items()
        if key == "refused" or not off <= (0 if key == "predicted" else 1e-5)
    }
    assert far == {}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, dict]:
    return compared(tmp_path_factory.mktemp("context"), *QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_a_split_batch_is_the_whole_one(quick, name):
    assert_alike({name: quick[name]})


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_case_on_more_ranks(tmp_path, processes):
    assert_alike(compared(tmp_path, *CASES, processes=processes))


@pytest.mark.long
def test_families_with_their_own_processors(tmp_path):
    assert_alike(compared(tmp_path, *FAMILIES))


@pytest.mark.long
def test_families_that_cannot_be_split_say_why(tmp_path):
    found = compared(tmp_path, "gemma3", "paligemma", "lfm2_vl")
    reasons = {name: case["refused"] for name, case in found.items()}
    assert "image tokens do" in reasons["gemma3"]
    assert "image tokens do" in reasons["paligemma"]
    assert "recurrence or convolution" in reasons["lfm2_vl"]


def test_what_is_not_known_is_refused_by_name():
    model = attach(tiny_qwen_model(), klal=Klal())
    for name, wanted in (("order", "zigzag"), ("engine", "gather")):
        with pytest.raises(ValueError, match=f"`{name}`: expected .*{wanted}"):
            context_parallel(model, object(), **{name: "other"})
    with pytest.raises(ValueError, match=r"`order`: expected 'contiguous' with .*'ulysses'"):
        context_parallel(model, object(), engine="ulysses")
    with pytest.raises(TypeError, match="transformers model"):
        context_parallel(nn.Linear(2, 2), object())
    assert context_parallel(model, None) is model
