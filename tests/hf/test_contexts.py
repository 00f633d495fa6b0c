"""Ranks that share each sequence train as one process does, and everything counts them once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.hf import contexts
from tests.hf.launching import FORKED, run

CLOSE = {"rel": 1e-5, "abs": 1e-5}
# The mean loss of a run that goes on from a checkpoint is that of the steps since then in newer
# versions of transformers (5.20.2, not 5.17).
RESUMED = ("train_loss",)
READERS = ("total_flos",)  # a micro-batch without images is given one of a token or a few
TIMED = ("runtime", "per_second")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launched(folder: Path, size: int, *names: str, ranks: int = 2, **environment: str) -> dict:
    """What the runs of `contexts` came to."""
    folder.mkdir()
    words = ("tests.hf.contexts", str(folder), str(size), *names)
    run(*words, launcher=FORKED, FORKED=str(ranks), **environment)
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of the same batches."""
    return contexts.main(tmp_path_factory.mktemp("one"), 1, ["norms"])["norms"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks make of the sequences that they share."""
    names = ("norms", "other", "unsupervised")
    return launched(tmp_path_factory.mktemp("two") / "runs", 2, *names)


def timeless(row: dict) -> dict:
    return {k: x for k, x in row.items() if not any(word in k for word in TIMED)}


def assert_same(found: dict, wanted: dict, *apart: str) -> None:
    """Every logged figure, count and weight; norms of terms only where they are logged.

    Args:
        apart: names of figures that are not the same.
    """
    assert len(found["log"]) == len(wanted["log"]) > 1
    rows = zip(
        [*found["log"], found["held_out"]], [*wanted["log"], wanted["held_out"]], strict=True
    )
    for row, other in rows:
        row, other = timeless(row), timeless(other)
        left_out = {name for name in other.keys() - row.keys() if name.startswith("grad_norm_")}
        left_out.update(apart)
        row, other = ({k: x for k, x in each.items() if k not in left_out} for each in (row, other))
        assert row == pytest.approx(other, **CLOSE)
    assert found["tokens"] == wanted["tokens"] > 0
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, x in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], x, rtol=1e-5, atol=1e-5)


def test_two_ranks_that_share_sequences_equal_one_process(one, two):
    assert_same(two["norms"], one)
    assert "grad_norm_map_kl" in two["norms"]["log"][0]
    assert two["norms"]["operations"] == one["operations"] > 0


def test_ranks_with_different_batches_are_refused(two):
    assert two["other"].startswith("`train_dataset`: expected the same batches on ranks that share")


def test_batches_without_supervision_are_refused(two):
    assert two["unsupervised"].startswith("`gk_text_position`: expected gk_ tensors in every batch")


@pytest.mark.long
def test_a_context_continues_from_its_checkpoint(one, tmp_path):
    found = launched(tmp_path / "runs", 2, "plain", "resumed", "mean")
    assert_same(found["plain"], one)
    assert_same(found["resumed"], one, *RESUMED)
    assert_same(found["mean"], one)  # with one reader a mean over readers is the same


@pytest.mark.long
def test_two_contexts_of_two_ranks_equal_one_process(one, tmp_path):
    assert_same(launched(tmp_path / "runs", 2, "norms", ranks=4)["norms"], one, *READERS)


@pytest.mark.long
def test_two_contexts_are_averaged_as_two_ranks_are(tmp_path):
    """Where every reader divides by its own counts."""
    readers = launched(tmp_path / "readers", 1, "mean")["mean"]
    assert_same(launched(tmp_path / "contexts", 2, "mean", ranks=4)["mean"], readers)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_are_sharded_over_contexts_too(one, tmp_path, ranks):
    found = launched(tmp_path / "runs", 2, "plain", "resumed", ranks=ranks, **FSDP2)
    apart = READERS if ranks > 2 else ()
    assert_same(found["plain"], one, *apart)
    assert_same(found["resumed"], one, *RESUMED, *apart)
