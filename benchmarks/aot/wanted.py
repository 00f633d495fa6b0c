"""What the main loop of an attention kernel must show on Hopper at 16 bits, whatever is committed:
wgmma with at least 32 columns, and at least two groups of asynchronous copies still in flight when
it waits for one. (That nothing spills at 16 bits is asked of every kernel: `compiling`.)

A wgmma of 16 columns reads 64 rows of its other operand from shared memory for 16 products each,
which takes longer than the products; with fewer copies in flight the loop waits for memory.

Not asked of loops without a matrix instruction (sums of parts), nor of edges: there a row may have
too few bytes for an asynchronous copy. Tiles of fewer than 64 rows have no wgmma to look at.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

TARGET = "sm_90"
OPS = ("side_attention", "attention_map")
WGMMA = re.compile(r"[A-Z]GMMA \d+x(\d+)x\d+")


class Least(NamedTuple):
    """Columns of a wgmma, groups of copies in flight."""

    n: int = 32
    copies: int = 2


class Exempt(NamedTuple):
    """Launches that are held to less.

    kernel, launch: the kernel's name, and a pattern found in "label tile" of the launch. least:
    what is asked of them instead. why: why no more is possible.
    """

    kernel: str
    launch: str
    least: Least
    why: str


EXEMPT = (
    Exempt(
        "backward_kernel",
        r"^side_attention .*D=(192|256) .*BLOCK_M=64 BLOCK_N=32 num_warps=8 ",
        Least(n=16),
        "two warp groups share the 32 keys; 64 keys with two copies in flight take 256 KiB of "
        "shared memory, and one warp group alone spills 144 bytes or more",
    ),
)


class Launch(Protocol):
    """What is read of a `recorder.LabelledLaunch`."""

    name: str
    label: str
    tile: str
    edge: bool


def unmet(launch: Launch, target: str, loop: dict | None) -> str | None:
    """What is wanted of a launch's main loop and what it has, in one sentence; None if that is
    enough.

    Args:
        loop: as in a `table.Entry`.
    """
    asked = target == TARGET and launch.label.startswith(OPS) and not launch.edge
    if not asked or "float32" in launch.label or loop is None or not loop["matrix"]:
        return None
    columns = [int(x[1]) for x in map(WGMMA.match, loop["matrix"]) if x]
    got = Least(min(columns, default=Least().n), loop["in_flight"] or 0)
    exempt = _exempt(launch)
    least = Least() if exempt is None else exempt.least
    who = f"{launch.name} of {launch.label} ({launch.tile}) on {target}"
    if got.n < least.n:
        return f"{who}: wanted wgmma with at least {least.n} columns, got {got.n}"
    if got.copies < least.copies:
        return f"{who}: wanted at least {least.copies} copies in flight, got {got.copies}"
    if exempt is not None and got.n >= Least().n and got.copies >= Least().copies:
        return f"{who}: wanted no exemption for what meets all, got {exempt.launch!r} in EXEMPT"
    return None


def _exempt(launch: Launch) -> Exempt | None:
    text = f"{launch.label} {launch.tile}"
    return next((x for x in EXEMPT if x.kernel == launch.name and re.search(x.launch, text)), None)
