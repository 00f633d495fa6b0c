"""Calls whose arguments Triton's runtime specialises in another way than those of a usual call.

An int of 1 becomes a constant; one divisible by 16 allows wider loads; None drops a branch; an
offset makes a pointer unaligned; more than 2 GiB means no 32-bit offsets on AMD. The label says
what is special. bf16 only: `launches` crosses dtypes with dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from benchmarks.aot.calls import (
    Sizes,
    attention_map,
    linear_cross_entropy,
    linear_kl,
    recorded,
    rows_taken,
    side_attention,
)
from benchmarks.aot.recorder import LabelledLaunch

ONES = {"rows": 1, "heads": 1, "kv_heads": 1, "keys": 1, "columns": 1, "batch": 1}
ODD = {"rows": 7, "heads": 21, "kv_heads": 7, "keys": 33, "columns": 7, "batch": 3}
SHAPES: dict[str, dict[str, object]] = {
    "rows=1": {"rows": 1},
    "rows=7": {"rows": 7},
    "rows=16": {"rows": 16},
    "keys=1": {"keys": 1},
    "keys=33": {"keys": 33},
    "columns=1": {"columns": 1},
    "columns=7": {"columns": 7},
    "columns=16": {"columns": 16},
    "batch=1": {"batch": 1},
    "kv_heads=1": {"kv_heads": 1},
    "group=1": {"heads": 4},
    "heads=1": {"heads": 1, "kv_heads": 1},
    "all ones": ONES,
    "all odd": ODD,
    "unaligned": {"layout": "unaligned"},
    "transposed": {"layout": "transposed"},
    "odd strides": {"layout": "odd strides"},
    "over 2 GiB": {"keys": 2**23},  # and 64-bit strides
}
DIMS: dict[str, dict[str, object]] = {
    "D=1": {"dim": 1},
    "D=1 all ones": {"dim": 1, **ONES},
    "D=7 all odd": {"dim": 7, "layout": "odd strides", **ODD},
    **{f"D={dim}": {"dim": dim} for dim in (16, 40, 64, 72, 80, 96, 192, 256)},
    **{f"D={d} Dv={v}": {"dim": d, "value_dim": v} for d, v in ((128, 64), (64, 128), (192, 128))},
    "D=72 Dv=40 unaligned": {"dim": 72, "value_dim": 40, "layout": "unaligned"},
}
# For CI, those that can fail in a way of their own: OF_AMD on gfx942, the others on sm_90.
SUBSET = ("rows=1", "rows=7", "D=1 all ones", "all odd", "unaligned", "over 2 GiB")
OF_AMD = "over 2 GiB"
SIDES = ((True, False), (True, True), (False, False))  # (sets, lse); the first is the subset's
MAPS = (  # the first two are the subset's
    ("kl", "mean", "visible"),
    ("map", "value", "columns"),
    ("kl", "each", "columns"),
    ("map", "weight", "visible"),
)
ALL_MAPS = [
    (function, kind, over)
    for function, kind in (("kl", "mean"), ("kl", "each"), ("map", "weight"), ("map", "value"))
    for over in ("visible", "columns")
]


def edges(subset: bool) -> Iterator[LabelledLaunch]:
    """Launches of every op at the edges. The subset: SUBSET, and the combinations of optional
    inputs."""
    yield from _present(subset)
    for special, changes in (SHAPES | DIMS).items():
        if subset and special not in SUBSET:
            continue
        given = "" if "dim" in changes else " D=128"
        sizes, name = Sizes(**changes), f"bfloat16{given} {special}"
        if not special.startswith("columns="):
            for sets, lse in SIDES[: 1 if subset else None]:
                given = " sets" * sets + " lse" * lse
                run = partial(side_attention, sizes, sets, lse, 0.0)
                yield from recorded(f"side_attention {name}{given}", run, edge=True)
        if not special.startswith("columns="):
            run = partial(rows_taken, sizes, True)
            yield from recorded(f"rows_taken {name}", run, edge=True)
        if subset and special == OF_AMD:
            continue
        for call in MAPS[: 2 if subset else None]:
            run = partial(attention_map, sizes, *call, 0.0)
            yield from recorded(f"attention_map {name} {' '.join(call)}", run, edge=True)
    yield from _linear_cross_entropy(subset)
    yield from _linear_kl(subset)


def _present(subset: bool) -> Iterator[LabelledLaunch]:
    """The combinations of optional inputs, and every map, at usual sizes; the subset has softcap
    and signed contributions once per op."""
    for sets, lse, softcap in product((True, False), (True, False), (0.0, 30.0)):
        if subset and softcap and (sets, lse) != SIDES[0]:
            continue
        given = " sets" * sets + " lse" * lse + " softcap" * (softcap > 0)
        run = partial(side_attention, Sizes(), sets, lse, softcap)
        yield from recorded(f"side_attention bfloat16 D=128{given}", run, edge=True)
    yield from recorded(
        "rows_taken bfloat16 D=128 alone", partial(rows_taken, Sizes(), False), True
    )
    for call in [call for call in ALL_MAPS if call[2] == "columns"][: 1 if subset else 3]:
        run = partial(attention_map, Sizes(), *call, 0.0, adds=True)
        yield from recorded(f"attention_map bfloat16 D=128 {' '.join(call)} adds", run, edge=True)
    for call, softcap in product(ALL_MAPS, (0.0, 30.0)):
        if subset and softcap and call != MAPS[0]:
            continue
        label = f"attention_map bfloat16 D=128 {' '.join(call)}{' softcap' * (softcap > 0)}"
        signed = call == MAPS[1] or ("value" in call and not subset)
        for rectify in (True, False) if signed and not softcap else (True,):
            run = partial(attention_map, Sizes(), *call, softcap, rectify)
            yield from recorded(label + " signed" * (not rectify), run, edge=True)


# (bias, lists, softcap), and what else is asked of the loss; the first are the subset's.
LOSSES: dict[str, tuple[tuple[bool, str, float], dict[str, object]]] = {
    "plain": ((False, "", 0.0), {}),
    "bias bags softcap": ((True, "bags", 30.0), {}),
    "soft everything softcap": ((False, "soft", 30.0), {"everything": True}),
    "soft logits=float32": ((False, "soft", 0.0), {"logits": torch.float32}),
    "bags head=frozen": ((False, "bags", 0.0), {"head": "frozen"}),
    "bags everything sharded": ((False, "bags", 0.0), {"everything": True, "sharded": True}),
    "bags everything": ((False, "bags", 0.0), {"everything": True}),
    "bias everything": ((True, "", 0.0), {"everything": True}),
    "soft softcap": ((False, "soft", 30.0), {}),
    "soft sharded": ((False, "soft", 30.0), {"sharded": True}),
    "bias": ((True, "", 0.0), {}),
    "softcap": ((False, "", 30.0), {}),
    "bags softcap": ((False, "bags", 30.0), {}),
    "bags head=added": ((False, "bags", 0.0), {"head": "added"}),
}
OF_SUBSET = 6
KL_KINDS = ("forward", "reverse", "js")


def _linear_cross_entropy(subset: bool) -> Iterator[LabelledLaunch]:
    """Rows, chunks of one row, vocabularies, alignment; what may be asked."""
    op = "linear_cross_entropy bfloat16"
    bags = (False, "bags", 0.0)
    for rows in (1,) if subset else (1, 7, 16):
        run = partial(linear_cross_entropy, Sizes(rows=rows), *bags)
        yield from recorded(f"{op} rows={rows}", run, edge=True)
    # One row per chunk; then three rows in chunks of two, so that the last chunk has one.
    for rows, budget, what in ((3, 1, "rows=1 a chunk"), (3, 151_936 * 4, "rows=1 last chunk")):
        run = partial(linear_cross_entropy, Sizes(rows=rows), *bags, budget=budget)
        yield from recorded(f"{op} {what}", run, edge=True)
    for vocabulary in (1, 151_937) if subset else (1, 33, 8192, 151_937):
        for rows in (1,) if subset else (64, 1):
            run = partial(linear_cross_entropy, Sizes(rows=rows, vocabulary=vocabulary), *bags)
            yield from recorded(f"{op} vocabulary={vocabulary} rows={rows}", run, edge=True)
    run = partial(linear_cross_entropy, Sizes(layout="unaligned"), True, "bags", 0.0)
    yield from recorded(f"{op} unaligned bias", run, edge=True)
    for name, (given, asked) in list(LOSSES.items())[: OF_SUBSET if subset else None]:
        run = partial(linear_cross_entropy, Sizes(), *given, **asked)
        yield from recorded(f"{op} {name}", run, edge=True)


def _linear_kl(subset: bool) -> Iterator[LabelledLaunch]:
    """Rows, chunks of one row, vocabularies, alignment; kinds and optional inputs."""
    op, plain = "linear_kl bfloat16", ("js", False, True, 0.0)  # kind, bias, mask, softcap
    for rows in (1,) if subset else (1, 7):
        run = partial(linear_kl, Sizes(rows=rows), *plain)
        yield from recorded(f"{op} rows={rows}", run, edge=True)
    run = partial(linear_kl, Sizes(rows=3), *plain, budget=1)
    yield from recorded(f"{op} rows=1 a chunk", run, edge=True)
    for vocabulary in (1, 151_937) if subset else (1, 33, 151_937):
        run = partial(linear_kl, Sizes(vocabulary=vocabulary), *plain)
        yield from recorded(f"{op} vocabulary={vocabulary}", run, edge=True)
    run = partial(linear_kl, Sizes(layout="unaligned"), "forward", True, False, 0.0)
    yield from recorded(f"{op} unaligned bias", run, edge=True)
    kinds = (("forward", 0.0), ("reverse", 30.0), ("js", 0.0))
    for kind, softcap in kinds if subset else product(KL_KINDS, (0.0, 30.0)):
        given = " bias softcap" * (softcap > 0)
        run = partial(linear_kl, Sizes(), kind, softcap > 0, softcap == 0, softcap)
        yield from recorded(f"{op} {kind}{given}", run, edge=True)
    run = partial(linear_kl, Sizes(), *plain, sharded=True)
    yield from recorded(f"{op} sharded", run, edge=True)
