"""Context parallelism: losses, rows and gradients of a split batch are those of the whole."""

from __future__ import annotations

import json

import pytest
from torch import nn

from benchmarks.families.zoo import families
from benchmarks.families.zoo.first import tiny_qwen_model
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import Klal, attach, context_parallel
from tests.hf.context import CASES
from tests.hf.decoders import tiny_decoder
from tests.hf.launching import FORKED, run

QUICK = ("all", "packed", "few rows")  # "three" is "packed" without documents
# Deepstack by lists and by a dict, windows, chunks of tiles, experts, positions of several forms
FAMILIES = ("qwen3_vl", "granite4_vision", "aya_vision", "mistral3", "exaone4_5", "gemma3n")
REFUSED = {
    "gemma3": "image tokens do",
    "paligemma": "image tokens do",
    "lfm2_vl": "recurrence or convolution",
    "llama4": "attn_temperature_tuning",
    "chameleon": "puts images in itself",
}


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
        if isinstance(off, str) or not off <= (0 if key == "predicted" else 1e-5)
    }
    assert far == {}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, dict]:
    return compared(tmp_path_factory.mktemp("context"), *QUICK, "kept sinks")


def test_smam_with_sinks_is_refused(quick):
    assert "`smam.keep`: expected whole sequences for sinks" in quick["kept sinks"]["refused"]


@pytest.mark.parametrize("name", QUICK)
def test_a_split_batch_is_the_whole_one(quick, name):
    assert_alike({name: quick[name]})


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_case_on_more_ranks(tmp_path, processes):
    found = compared(tmp_path, *CASES, processes=processes)
    assert "`smam.keep`" in found.pop("kept sinks")["refused"]
    if processes > 3:
        assert "a token for each of 4 ranks" in found.pop("short")["refused"]
    assert_alike(found)


@pytest.mark.long
def test_families_with_their_own_processors(tmp_path):
    assert_alike(compared(tmp_path, *FAMILIES))


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_split_say_why(name):
    try:
        model = families()[name].model()
    except Unavailable as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=REFUSED[name]):
        context_parallel(model, object())


def test_sinks_are_refused():
    with pytest.raises(ValueError, match="layer 0, which has them"):
        context_parallel(tiny_decoder("gpt_oss"), object())


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
