"""Main attention of a sequence that is split over ranks equals that of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hf.launching import FORKED, TORCHRUN, deepspeed, run

ERRORS = {"torch.float64": 1e-13, "torch.float32": 3e-6}  # over the largest value
DEMANDS = {  # of torch's and DeepSpeed's engines: what a refusal names
    "window": "sliding_window",
    "documents": "attention_mask",
    "order": "order",
    "implementation": "attn_implementation",
    "dropout": "attention_dropout",
    "causal": "is_causal",
    "length": "input_ids",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two processes found."""
    return _found(tmp_path_factory.mktemp("engines"), "tests.hf.engines", FORKED, "30")


def _found(
    out: Path, module: str, launcher: tuple[str, ...], *words: str, **env: str
) -> list[dict]:
    run(module, str(out), *words, launcher=launcher, **env)
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def _torchrun(processes: int) -> tuple[str, ...]:
    return tuple(str(processes) if word == "2" else word for word in TORCHRUN) + ("-m",)


def test_gathered_keys(found: list[dict]) -> None:
    """Padding, documents, windows, chunks, any order, empty shards, grouped heads."""
    _compare(found, "gather ")


def test_torchs_ring(found: list[dict]) -> None:
    """torch's own ring, on the flash attention of CPUs."""
    _compare(found, "ring ")


def _compare(found: list[dict], engine: str) -> None:
    assert len(found) >= 2
    for rank in found:
        for dtype, most in ERRORS.items():
            assert rank[f"{engine}{dtype}"] < most


def test_refusals(found: list[dict]) -> None:
    """Every rank refuses what an engine does not compute, by name; the ring, CPUs too."""
    for rank in found:
        _named(rank["ring"], DEMANDS)
        _named(rank["gather"], {k: DEMANDS[k] for k in ("implementation", "dropout", "causal")})
        assert "cuda" in rank["cpu"]["window"]


def _named(refusals: dict[str, str], wanted: dict[str, str]) -> None:
    assert refusals.keys() == wanted.keys()
    for name, argument in wanted.items():
        assert f"`{argument}`" in refusals[name]


@pytest.mark.long
@pytest.mark.parametrize("processes", [3, 4])
def test_more_ranks(processes: int, tmp_path: Path) -> None:
    """The same on more ranks, with more calls."""
    found = _found(tmp_path, "tests.hf.engines", _torchrun(processes), "200")
    for engine in ("gather ", "ring "):
        _compare(found, engine)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_deepspeeds_ulysses(processes: int, tmp_path: Path) -> None:
    """DeepSpeed's own Ulysses: grouped heads, and fewer key heads than ranks."""
    environment = deepspeed()
    found = _found(tmp_path, "tests.hf.ulysses", _torchrun(processes), **environment)
    _compare(found, "")
    others = {"batch": "input_ids", "plain": "attention function"}
    for rank in found:
        _named(rank["refused"], {**DEMANDS, **others})
