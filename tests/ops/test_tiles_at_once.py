"""`_map_kernel` reads two tiles of 32 keys at once where it has 64 lanes: each column's number is
that of a kernel that reads one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from groundkern import (
    KeySets,
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    available_backends,
)
from groundkern.kept import nothing_kept
from groundkern.ops.cases import Call, coin, integers, randn
from tests.ops.test_contract import CPU, hold

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from groundkern import tiles
from groundkern.ops.attention_map import triton_launch

KEYS = 290  # ten tiles, the last of two keys
# One, two and three live tiles, all ten; two next to each other and far apart.
COLUMNS = {
    "one": [[33, 40, 63, -1], [64, 65, -1, -1]],
    "two": [[0, 31, 289, -1], [96, 127, 128, 159]],
    "three": [[5, 64, 95, 288], [0, 32, 64, 80]],
    "all": [[*range(3, KEYS, 29)], [*range(0, KEYS, 29)]],
}
KINDS = {
    "contribution": (attention_contribution, {}),
    "rectified": (attention_contribution, {"rectify": True}),
    "map": (attention_map, {}),
    "kl": (attention_kl, {"heads": "mean"}),
}


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    with nothing_kept():
        yield


def make_call(kind: str, columns: str, over: str = "columns") -> Call:
    """bf16, with as wide heads as give the kernel tiles of 64 lanes and 32 keys."""
    function, options = KINDS[kind]
    of_values = function is attention_contribution
    dim, dtype = 128 if of_values else 256, torch.bfloat16
    found = COLUMNS[columns]
    width = max(map(len, found))
    rows = QueryRows.causal(
        integers([0, 0, 0, 1, 1], CPU),
        integers([289, 70, -1, 289, 130], CPU),
        start=integers([0, 33, 0, 0, 64], CPU),
    )
    allowed = KeySets.from_bool(coin(9, 2, KEYS, device=CPU), integers([-1, 0, 1, 1, -1], CPU))
    inputs = {"q": randn(1, 5, 4, dim, dtype=dtype, device=CPU)}
    inputs["k"] = randn(2, 2, 2, KEYS, dim, dtype=dtype, device=CPU)
    fixed: tuple[str, ...] = ()
    if of_values:
        inputs["v"] = randn(3, 2, 2, KEYS, 128, dtype=dtype, device=CPU)
        inputs["g"] = randn(4, 5, 4, 128, dtype=dtype, device=CPU)
    if function is attention_kl:
        inputs["target"], fixed = (
            randn(5, 5, width, dtype=torch.float32, device=CPU).abs(),
            ("target",),
        )
    of_call = {
        "rows": rows,
        "columns": integers([x + [-1] * (width - len(x)) for x in found], CPU),
        "allowed": allowed,
        "over": over,
        "backend": "triton",
    }
    return Call(function, inputs, of_call | options, fixed)


@pytest.mark.parametrize("processors", [2, 132])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", ["contribution", "rectified", "map"])
def test_the_bits_of_one_after_the_other(kind, columns, processors, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "processors", lambda _: processors)
    call, used = make_call(kind, columns), []
    chosen = triton_launch._at_once
    monkeypatch.setattr(
        triton_launch, "_at_once", lambda tile: used.append(chosen(tile)) or used[-1]
    )
    (at_once,) = call.run()
    assert used == [2]
    monkeypatch.setattr(triton_launch, "_at_once", lambda _: 1)
    assert torch.equal(at_once, call.run()[0])
    assert at_once.count_nonzero() > 0


@pytest.mark.parametrize("columns", ["two", "three"])
@pytest.mark.parametrize("over", ["columns", "visible"])
@pytest.mark.parametrize("kind", ["rectified", "kl"])
def test_values_and_gradients(kind: str, over: str, columns: str) -> None:
    hold(make_call(kind, columns, over), "triton", torch.bfloat16)


def test_a_kl_is_summed_over_all_splits(monkeypatch) -> None:
    """With more programs than pairs of tiles, of which some have none."""
    monkeypatch.setattr(tiles, "processors", lambda _: 132)
    for columns in ("one", "three", "all"):
        call = make_call("kl", columns)
        many = call.run()[0]
        with monkeypatch.context() as patched:
            patched.setattr(tiles, "splits", lambda *_: 1)
            torch.testing.assert_close(many, call.run()[0], rtol=1e-5, atol=1e-6)
