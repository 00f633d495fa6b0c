"""Rows, key sets and label bags: what they mean and what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundkern import KeySets, LabelBags, QueryRows
from groundkern.selection import pack_bits, unpack_bits


def _int(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_causal_covers_padding_documents_and_windows() -> None:
    rows = QueryRows.causal(_int(0, 0, 1, 1), _int(5, -1, 9, 2), start=_int(1, 0, 4, 0), window=4)
    assert rows.start.tolist() == [2, 0, 6, 0]
    assert rows.stop.tolist() == [6, 0, 10, 3]
    assert rows.stop.dtype == torch.int32


def test_take_gathers_differentiably_from_heads_and_from_hidden_states() -> None:
    rows = QueryRows.causal(_int(0, 1, 1), _int(2, 0, -1))
    q = torch.randn(2, 3, 4, 5, requires_grad=True)
    taken = rows.take(q)
    assert torch.equal(taken, torch.stack([q[0, :, 2], q[1, :, 0], q[1, :, 0]]))
    taken[0].sum().backward()
    assert q.grad[0, :, 2].all() and q.grad.sum() == 15
    hidden = torch.randn(2, 4, 5)
    assert torch.equal(rows.take(hidden), hidden[[0, 1, 1], [2, 0, 0]])
    with pytest.raises(ValueError, match=r"`x`: expected a tensor \[B, H, S, D\]"):
        rows.take(torch.zeros(3))


@given(st.integers(0, 5), st.integers(0, 100), st.randoms(use_true_random=False))
def test_packing_round_trips(sets: int, keys: int, random) -> None:
    allowed = torch.tensor([[random.random() < 0.5 for _ in range(keys)] for _ in range(sets)])
    allowed = allowed.bool().view(sets, keys)
    words = pack_bits(allowed)
    assert words.shape == (sets, -(-keys // 32)) and words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, keys), allowed)


def test_regions_allow_text_and_the_inside() -> None:
    visual = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    inside = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]]).bool()
    sets = KeySets.regions(visual, inside, _int(0, 1), _int(1, -1, 0))
    assert sets.to_bool().tolist() == [[True, False, True, True], [True, False, True, True]]


def test_everything_moves_together() -> None:
    sets = KeySets.from_bool(torch.zeros(1, 40, dtype=torch.bool), _int(0)).to("meta")
    assert sets.bits.device.type == sets.index.device.type == "meta" and sets.keys == 40
    assert QueryRows.causal(_int(0), _int(0)).to("meta").stop.device.type == "meta"


BAD_ROWS = {
    "unsorted": ((1, 0), (0, 0), (0, 0), (1, 1), r"`rows.sequence`: expected rows sorted"),
    "start > stop": (
        (0, 0), (4, 4), (0, 9), (5, 5),
        r"`rows.start`: expected start <= stop in every row, got start 9 > stop 5 at row 1",
    ),
    "negative start": ((0,), (0,), (-1,), (1,), r"`rows.start`: expected values >= 0, got -1"),
    "negative sequence": ((-1,), (0,), (0,), (1,), r"`rows.sequence`: expected values >= 0"),
    "lengths": ((0, 0), (0,), (0, 0), (1, 1), r"`rows.position`: expected shape \[N=2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name: str) -> None:
    *columns, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        QueryRows(*(_int(*c) for c in columns))


def test_rows_must_be_int32() -> None:
    good = _int(0)
    with pytest.raises(TypeError, match=r"`rows.stop`: expected torch.int32, got torch.int64"):
        QueryRows(good, good, good, good.long())
    with pytest.raises(TypeError, match=r"`rows.start`: expected a tensor \[N\], got int"):
        QueryRows(good, good, 0, good)
    with pytest.raises(ValueError, match=r"`window`: expected a positive number of keys"):
        QueryRows.causal(good, good, window=0)


def test_bad_sets() -> None:
    allowed = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`index`: expected values in \[-1, 2\), got \[0, 2\]"):
        KeySets.from_bool(allowed, _int(0, 2))
    with pytest.raises(TypeError, match=r"`allowed`: expected torch.bool, got torch.float32"):
        KeySets.from_bool(allowed.float(), _int(0))
    with pytest.raises(TypeError, match=r"`index`: expected torch.int32"):
        KeySets.from_bool(allowed, _int(0).long())


@pytest.mark.parametrize("offsets", [(0, 3, 2), (1, 2), (0, 9)])
def test_bad_offsets(offsets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`bags.offsets`: expected offsets ascending from 0"):
        LabelBags(torch.arange(4), torch.tensor(offsets), torch.tensor([0]))


def test_bad_bag_index() -> None:
    with pytest.raises(
        ValueError, match=r"`bags.index`: expected values in \[-1, 1\), got \[1, 1\]"
    ):
        LabelBags(torch.arange(4), torch.tensor([0, 4]), torch.tensor([1]))
