"""What `make aot` wants of the main loops of attention kernels, on invented readings: the check can
fail, says what it wanted and got, and holds nothing to it that cannot meet it."""

from types import SimpleNamespace

import pytest

from benchmarks.aot.wanted import EXEMPT, Least, unmet

TILE = "BLOCK_M=64 BLOCK_N=64 num_warps=4 num_stages=3"


def launch(**changes: object) -> SimpleNamespace:
    usual = {"name": "forward_kernel", "label": "side_attention bfloat16 D=128 sets"}
    return SimpleNamespace(**(usual | {"tile": TILE, "edge": False} | changes))


def loop(*matrix: str, in_flight: int | None = 2) -> dict:
    return {"matrix": dict.fromkeys(matrix, 8), "in_flight": in_flight}


GOOD = loop("HGMMA 64x32x16", "HGMMA 64x128x16")


def test_a_loop_that_is_as_wanted_passes() -> None:
    assert unmet(launch(), "sm_90", GOOD) is None


@pytest.mark.parametrize(
    ("reading", "wanted"),
    [
        (loop("HGMMA 64x128x16", "HGMMA 64x16x16"), "wgmma with at least 32 columns, got 16"),
        (loop("HGMMA 64x64x16", in_flight=1), "at least 2 copies in flight, got 1"),
        (loop("HMMA 16x8x16", in_flight=0), "at least 2 copies in flight, got 0"),
        (loop("HGMMA 64x64x16", in_flight=None), "at least 2 copies in flight, got 0"),
    ],
)
def test_the_sentence_names_the_launch_what_was_wanted_and_what_it_got(
    reading: dict, wanted: str
) -> None:
    who = f"forward_kernel of side_attention bfloat16 D=128 sets ({TILE}) on sm_90"
    assert unmet(launch(), "sm_90", reading) == f"{who}: wanted {wanted}"


@pytest.mark.parametrize("op", ["attention_map float16 D=64 kl each columns", "side_attention"])
def test_both_attention_ops_are_asked(op: str) -> None:
    assert unmet(launch(label=op), "sm_90", loop("HGMMA 64x8x16")) is not None


@pytest.mark.parametrize(
    ("changes", "target", "reading"),
    [
        ({"label": "side_attention float32 D=128"}, "sm_90", loop("HMMA", in_flight=None)),
        ({"label": "linear_kl bfloat16"}, "sm_90", loop("HGMMA 64x16x16", in_flight=0)),
        ({"edge": True}, "sm_90", loop("HMMA 16x8x16", in_flight=None)),
        ({}, "sm_80", loop("HMMA 16x8x16", in_flight=0)),
        ({}, "gfx942", loop("v_mfma 32x32x8", in_flight=None)),
        ({"name": "sum_kernel"}, "sm_90", loop(in_flight=None)),  # no product in it
        ({}, "sm_90", None),  # no loop
        ({}, "sm_90", loop("HMMA 16x8x16")),  # a tile of few rows
        ({}, "sm_90", loop("HMMA 16x8x16", "HGMMA 64x64x16")),  # n = 8, but not of a wgmma
    ],
)
def test_what_is_not_asked(changes: dict, target: str, reading: dict | None) -> None:
    assert unmet(launch(**changes), target, reading) is None


def test_an_exempt_launch_is_held_to_less_and_only_while_it_needs_it() -> None:
    wide = "BLOCK_M=64 BLOCK_N=32 num_warps=8 num_stages=3 maxnreg=255"
    of = launch(
        name="backward_kernel", label="side_attention bfloat16 D=256 rows=9 sets", tile=wide
    )
    assert unmet(of, "sm_90", loop("HGMMA 64x16x16")) is None
    assert unmet(of, "sm_90", loop("HGMMA 64x8x16")).endswith("at least 16 columns, got 8")
    assert unmet(of, "sm_90", loop("HGMMA 64x16x16", in_flight=0)).endswith("in flight, got 0")
    assert "wanted no exemption" in unmet(of, "sm_90", GOOD)
    of.name = "backward_dq_kernel"
    assert unmet(of, "sm_90", loop("HGMMA 64x16x16")).endswith("at least 32 columns, got 16")


def test_each_exemption_asks_for_less_and_says_why() -> None:
    for exempt in EXEMPT:
        assert exempt.least != Least()
        assert exempt.least.n <= Least().n and exempt.least.copies <= Least().copies
        assert len(exempt.why) > 40
