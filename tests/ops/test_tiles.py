"""Which row of a tile table serves a call, and what calls of many lanes compute with the rows that
serve only those."""

import pytest
import torch

from groundkern import available_backends

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from groundkern import KeySets, QueryRows, tiles
from groundkern.ops.cases import coin, integers
from groundkern.ops.side_attention.cases import call, main_lse
from groundkern.tiles import Tile, tile_key
from tests.ops.test_contract import CPU, hold

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


@pytest.mark.parametrize("given", ["sets", "softcap", "lse"])
@pytest.mark.parametrize("processors", [2, 132])  # one split of the keys, and as many as there are
@pytest.mark.parametrize(
    ("dims", "rows", "tile"),
    [
        ((256, 192), 70, (64, 64)),  # three row tiles; dq is stored a quarter at a time
        ((72, 256), 30, (64, 64)),
        ((64, 40), 62, (128, 64)),  # dk and dv of 64 keys at a time
    ],
)
def test_side_attention_of_many_lanes(dims, rows, tile, processors, given, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "processors", lambda _: processors)
    keys, found = 170, []
    at = integers([(37 * i) % keys for i in range(rows)], CPU)
    selection = QueryRows.causal(torch.zeros_like(at), at, window=150)
    of_call = {"softcap": 2.0} if given == "softcap" else {}
    if given == "sets":
        sets = integers([i % 3 - 1 for i in range(rows)], CPU)
        of_call["allowed"] = KeySets.from_bool(coin(9, 2, keys, device=CPU), sets)
    of_dims = {"heads": (2, 1), "dims": dims, "sequences": 1, "keys": keys}
    made = call(selection, torch.bfloat16, **of_dims, **of_call)
    if given == "lse":
        made.options["lse"] = main_lse(made)

    def chosen(table, *of_call):
        key = tile_key(table, *of_call)
        found.append(table.get(key))
        return key

    monkeypatch.setattr(tiles, "tile_key", chosen)
    hold(made, "triton", torch.bfloat16)
    assert found[0][:2] == tile
