"""The merge of a side attention's splits, in whatever order its programs arrive, wait, merge and
leave: the same bits, and counters left at 0."""

import pytest
import torch

from groundkern import QueryRows, available_backends, side_attention

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from groundkern import tiles

if not tiles.INTERPRETED:
    pytest.skip("on a GPU nobody can say in which order", allow_module_level=True)

from tests.interleaving import interleaved

ORDERS = 10
LEAVING = 1 << 16


def _results(rows: int, keys: int, lse: float | None) -> tuple[torch.Tensor, ...]:
    """Values whose memory held NaN before."""
    draw = torch.Generator().manual_seed(rows)
    q = torch.randn(rows, 6, 16, generator=draw).bfloat16()
    k, v = (torch.randn(2, 2, keys, 16, generator=draw).bfloat16() for _ in range(2))
    sequence = torch.arange(rows) % 2
    stop = torch.full((rows,), keys - 1)
    shift = None if lse is None else torch.full((rows, 6), lse)
    of_rows = QueryRows.causal(sequence.sort().values.int(), stop.int())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return side_attention(q, k, v, of_rows, lse=shift, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lse", [None, 5.0, 500.0], ids=["no lse", "lse", "lse far above"])
@pytest.mark.parametrize(
    ("rows", "keys"),
    [(1, 128), (3, 192), (11, 300)],
    ids=["two splits", "three splits", "five splits"],
)
def test_any_order_gives_the_same_bits(
    rows: int, keys: int, lse: float | None, monkeypatch
) -> None:
    monkeypatch.setattr(tiles, "processors", lambda device: 20)
    expected = _results(rows, keys, lse)
    assert all(x.isfinite().all() for x in expected)
    counters = tiles.arrival_counters(torch.device("cpu"), 1)
    merged = 0
    for seed in range(ORDERS if rows < 11 else 3):
        with interleaved("_forward_kernel", seed) as added:
            found = _results(rows, keys, lse)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed
        assert not counters.any(), seed
        assert sum(x >= LEAVING for _, x in added) == len({place for place, _ in added})
        merged += sum(x == LEAVING + 1 for _, x in added)
    assert merged > 0 or keys == 128, "others than the last merge too"
