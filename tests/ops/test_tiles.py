"""Which row of a tile table serves a call."""

import pytest
import torch

from groundkern import available_backends

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from groundkern import tiles
from groundkern.tiles import Tile, tile_key

TILE = Tile(32, 32, 4)


@pytest.mark.parametrize(
    ("dims", "row"), [([128], 128), ([72], 127), ([64], 64), ([200], 255), ([128, 72], 127)]
)
def test_a_row_serves_its_dimensions(dims: list[int], row: int) -> None:
    table = dict.fromkeys([("dq", False, x) for x in (63, 64, 127, 128, 255, 256)], TILE)
    table |= {("dkv", False, 80): TILE, ("dq", True, 256): TILE}
    assert tile_key(table, ("dq", False), dims, 448) == ("dq", False, row)


@pytest.mark.parametrize(
    ("dim", "packed", "row"),
    [
        (128, 7, (128, 16)),
        (128, 16, (128, 16)),
        (100, 17, (128, 64)),
        (128, 65, (128,)),
        (64, 7, (64,)),
    ],
)
def test_a_row_for_packed_rows_is_preferred(dim: int, packed: int, row: tuple) -> None:
    table = dict.fromkeys([("dq", 64), ("dq", 128), ("dq", 128, 64), ("dq", 128, 16)], TILE)
    table[("dkv", 128, 32)] = TILE
    assert tile_key(table, ("dq",), [dim], packed) == ("dq", *row)


@pytest.mark.parametrize(
    ("capability", "small"),
    [((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((10, 3), False)]
    + [((11, 0), False), ((12, 0), True), ((12, 1), True)],
)
def test_cards_with_little_shared_memory_have_small_tiles(capability, small, monkeypatch) -> None:
    """99 KiB for a program on 8.6, 8.9 and 12.x; 227 on Hopper and 10.x."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.small.__wrapped__(torch.device("cuda", 0)) is small
