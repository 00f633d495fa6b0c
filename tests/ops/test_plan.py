"""What a plan lists, when it is made again, and the merges that rely on it."""

import copy
import math

import pytest
import torch

from groundkern import KeySets, QueryRows, available_backends, kept, side_attention
from groundkern.selection import Selection

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from groundkern import plan_kernels, tiles
from tests.closeness import GRADIENTS, VALUES, assert_close

BATCH, KEYS, LANES, BLOCK_M, BLOCK_N, WIDE = 4, 200, 3, 16, 32, 64


def _rows(seed: int, count: int = 23) -> QueryRows:
    """Sequences 0, 1 and 3 of 4, in no order of positions; some rows see nothing."""
    draw = torch.Generator().manual_seed(seed)
    sequence = torch.tensor([0, 1, 3])[torch.randint(0, 3, (count,), generator=draw)].sort().values
    start = torch.randint(0, KEYS, (count,), generator=draw)
    stop = start + torch.randint(0, KEYS, (count,), generator=draw)
    stop = stop.clamp(max=KEYS) * (torch.rand(count, generator=draw) < 0.8)
    start = torch.minimum(start, stop)
    return QueryRows(*(x.int() for x in (sequence, start, start, stop)))


def _sets(seed: int, count: int = 23) -> KeySets:
    draw = torch.Generator().manual_seed(seed)
    allowed = torch.rand(3, KEYS, generator=draw) < 0.03
    return KeySets.from_bool(allowed, torch.randint(-1, 3, (count,), generator=draw).int())


def _columns() -> torch.Tensor:
    columns = torch.full((BATCH, 5), -1, dtype=torch.int32)
    columns[0, :3], columns[1, :5], columns[3, 0] = (
        torch.tensor([3, 70, 71]),
        torch.tensor([0, 31, 32, 64, 199]),
        150,
    )
    return columns


def _used(selection: Selection, rows: QueryRows) -> torch.Tensor:
    """bool [N, S]: the keys that each row reads."""
    used = selection.allowed(slice(None), KEYS)
    if selection.columns is None:
        return used
    column = torch.zeros(BATCH, KEYS + 1, dtype=torch.bool)
    column.scatter_(1, torch.where(selection.columns < 0, KEYS, selection.columns).long(), True)
    return used & column[rows.sequence.long(), :KEYS]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("sets", "columns"), [(False, False), (True, False), (True, True)])
def test_a_plan_lists_what_rows_read(seed: int, sets: bool, columns: bool) -> None:
    rows = _rows(seed)
    selection = Selection.of(rows, _sets(seed) if sets else None, _columns() if columns else None)
    sizes = {"lanes": LANES, "batch": BATCH, "keys": KEYS, "wide": WIDE}
    made = plan_kernels.plan(selection, **sizes, block_m=BLOCK_M, block_n=BLOCK_N)
    used, seen, read_by = _used(selection, rows), [], {}
    key_tiles = math.ceil(KEYS / BLOCK_N)
    for t, (b, first, last, low, count) in enumerate(made.tiles.tolist()):
        lanes = range(first, last)
        of = sorted({lane // LANES for lane in lanes})
        assert len(lanes) <= BLOCK_M and all(int(rows.sequence[n]) == b for n in of)
        seen += lanes
        tile = used[of].any(0) if of else torch.zeros(KEYS, dtype=torch.bool)
        tile = torch.nn.functional.pad(tile, (0, key_tiles * BLOCK_N - KEYS))
        live = tile.view(key_tiles, BLOCK_N).any(1).nonzero().flatten().tolist()
        if made.key_tiles is None:
            ends = [live[0], live[-1] + 1] if live else [0, 0]
            assert [low, low + count] == ends or (not live and count == 0)
        else:
            listed = made.key_tiles[t].tolist()
            assert listed[:count] == live and sorted(listed) == list(range(key_tiles))
        for j in tile.nonzero().flatten().tolist():
            read_by.setdefault((b, j // WIDE), set()).add(first)
    assert sorted(seen) == list(range(len(rows) * LANES)), "every lane in one tile"
    wide_tiles = math.ceil(KEYS / WIDE)
    for place, (count, end, first) in enumerate(made.row_spans.tolist()):
        b = place // wide_tiles
        wanted = read_by.get((b, place % wide_tiles), set())
        assert end == LANES * int((rows.sequence <= b).sum())
        if made.row_tiles is None:
            found = {first + i * BLOCK_M for i in range(count)}
            assert wanted <= found and (not wanted or first == min(wanted))
        else:
            assert set(made.row_tiles[place, :count].tolist()) == wanted
            assert count == len(wanted)
    if columns:
        for b in range(BATCH):
            for c, j in enumerate(_columns()[b].tolist()):
                assert j < 0 or made.place[b, j] == c
        assert (made.place >= 0).sum() == (_columns() >= 0).sum()


def test_a_plan_is_made_once() -> None:
    rows, allowed, made = _rows(0), _sets(0), []

    def make() -> int:
        made.append(None)
        return len(made)

    def get(rows=rows, allowed=allowed, key="side") -> int:
        return kept.kept(rows, (allowed,), key, make)

    assert [get(), get(), get()] == [1, 1, 1]
    assert get(key="map") == 2 and get(allowed=None) == 3 and get() == 1
    assert get(allowed=_sets(0)) == 4, "equal sets are not the same sets"
    rows.stop.add_(0)
    assert get() == 5, "rows that were written to may have changed"
    allowed.bits.add_(0)
    assert get() == 6
    assert get(rows=copy.deepcopy(rows)) == 7
    assert get(rows=rows.to("cpu")) == 8
    with torch.inference_mode():
        unknown = _rows(1)
        assert [get(rows=unknown), get(rows=unknown)] == [9, 10], "written to without a trace"
        assert get() == 11, "what is made here cannot be saved for a backward"


def test_what_is_used_stays() -> None:
    """A target of its own for every layer does not push the plan out."""
    rows, made = _rows(0), []
    for _ in range(2 * kept.MOST):
        kept.kept(rows, (), "plan", lambda: made.append(None))
        kept.kept(rows, (torch.zeros(1),), "target", lambda: None)
    assert len(made) == 1


def test_a_plan_outlives_no_capture(monkeypatch) -> None:
    """Rows made before a capture may hold other values when the graph is replayed."""
    rows, made = _rows(0), []
    get = lambda: kept.kept(rows, (), "side", lambda: made.append(None))  # noqa: E731
    get()
    monkeypatch.setattr(kept, "capturing", lambda x: True)
    get(), get()
    assert len(made) == 3
    monkeypatch.undo()
    get()
    assert len(made) == 3


@pytest.mark.parametrize("shift", [None, 0.0, 300.0], ids=["no lse", "lse", "lse far above"])
@pytest.mark.parametrize("keys", [300, 640], ids=["one level", "two levels"])
def test_splits_are_merged(keys: int, shift: float | None, monkeypatch) -> None:
    """With as many processors as a GPU has: more splits than one program merges."""
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 16), (1, 2, keys, 16), (1, 2, keys, 16))
    inputs = [torch.randn(s, generator=draw).bfloat16() for s in shapes]
    rows = QueryRows.causal(torch.zeros(2), torch.tensor([keys - 1, keys // 2]))
    allowed = KeySets.from_bool(
        torch.rand(2, keys, generator=draw) < 0.5, torch.tensor([0, 1], dtype=torch.int32)
    )
    upstream = torch.randn(2, 4, 16, generator=draw), torch.randn(2, 4, generator=draw)

    def run(dtype, backend, lse=None):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        found = side_attention(q, k, v, rows, allowed=allowed, lse=lse, backend=backend)
        total = sum((x * u.to(x.dtype)).sum() for x, u in zip(found, upstream))
        return [*found, *torch.autograd.grad(total, (q, k, v))]

    truth, naive = (run(dtype, "reference") for dtype in (torch.float64, torch.bfloat16))
    lse = None if shift is None else truth[1].detach().float() + shift
    ours, again = (run(torch.bfloat16, "triton", lse) for _ in range(2))
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        assert torch.equal(ours[i], again[i]), "the same bits"
        assert_close(name, ours[i], naive[i], truth[i], VALUES if i < 2 else GRADIENTS)
    counters = tiles.arrival_counters(torch.device("cpu"), 1)
    assert not counters.any(), "whoever merges leaves the counters at 0"
