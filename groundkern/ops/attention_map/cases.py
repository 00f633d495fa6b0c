"""Calls of attention maps, contributions and their KL that tests and benchmarks share."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from groundkern.ops.attention_map.api import attention_contribution, attention_kl, attention_map
from groundkern.ops.cases import Call, coin, integers, randn
from groundkern.precision import accumulation_dtype
from groundkern.selection import KeySets, QueryRows

KEYS = 45
COLUMNS = [[1, 2, 5, 11, 12, 13, 30, 44], [0, 3, 4, 20, 32, 33, -1, -1]]


def _rows(device: torch.device) -> QueryRows:
    """Rows that see all, some or none of their columns, and a padding row."""
    return QueryRows.causal(
        integers([0] * 6 + [1] * 6, device),
        integers([44, 11, 13, 30, 31, 40, 32, -1, 40, 44, 33, 21], device),
        start=integers([0, 2, 0, 5, 0, 1, 0, 0, 34, 3, 0, 0], device),
    )


def _sets(device: torch.device) -> KeySets:
    allowed = coin(9, 3, KEYS, device=device)
    allowed[:, 5] = True
    return KeySets.from_bool(allowed, integers([0, -1, 1, 1, 2, 0, 1, 0, 2, -1, 1, 0], device))


def call(function, dtype, device, *, shape=(4, 2), dim=16, **options) -> Call:
    """Random inputs for one of the three functions."""
    rows, inputs = _rows(device), {}
    inputs["q"] = randn(1, len(rows), shape[0], dim, dtype=dtype, device=device)
    inputs["k"] = randn(2, 2, shape[1], KEYS, dim, dtype=dtype, device=device)
    fixed: tuple[str, ...] = ()
    if function is attention_contribution:
        inputs["v"] = randn(3, 2, shape[1], KEYS, 12, dtype=dtype, device=device)
        inputs["g"] = randn(4, len(rows), shape[0], 12, dtype=dtype, device=device)
    if function is attention_kl:
        inputs["target"] = target(device)
        fixed = ("target",)
    options = {"rows": rows, "columns": integers(COLUMNS, device), **options}
    return Call(function, inputs, options, fixed)


def target(device: torch.device) -> Tensor:
    """[N, C]: uneven, partly on columns the rows do not own, and empty in one row."""
    t = randn(5, 12, 8, dtype=torch.float32, device=device).square()
    t[6] = 0.0
    t[0, 3] = 0.0
    return t


def _weighted(c: Call, per_row: bool) -> Call:
    shape = c.inputs["q"].shape[: 2 if per_row else 0] or c.inputs["q"].shape[1:2]
    weight = randn(6, *shape, dtype=torch.float32, device=c.inputs["q"].device).abs()
    return replace(c, inputs={**c.inputs, "head_weight": weight})


def _with_lse(c: Call) -> Call:
    """The exact statistics of all visible keys."""
    q, k, rows = c.inputs["q"], c.inputs["k"], c.options["rows"]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)[rows.sequence.long()].double()
    s = (keys @ q.double()[..., None])[..., 0] * q.shape[-1] ** -0.5  # [N, Hq, S]
    j = torch.arange(KEYS, device=q.device)
    visible = (j >= rows.start[:, None]) & (j < rows.stop[:, None])
    lse = s.masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)
    return replace(c, options={**c.options, "lse": lse.to(accumulation_dtype(q.dtype))})


def with_trained_lse(c: Call) -> Call:
    """A normaliser that is an input with a gradient, near the exact one."""
    lse = _with_lse(c).options["lse"]
    away = randn(10, *lse.shape, dtype=torch.float32, device=lse.device).to(lse.dtype)
    return replace(c, inputs={**c.inputs, "lse": lse + 0.3 * away})


def _no_columns(function, dtype, device, **options) -> Call:
    c = call(function, dtype, device, **options)
    none = torch.zeros(2, 0, dtype=torch.int32, device=device)
    inputs = {k: x[:, :0] if k == "target" else x for k, x in c.inputs.items()}
    return replace(c, inputs=inputs, options={**c.options, "columns": none})


def _no_rows(function, dtype, device, **options) -> Call:
    c = call(function, dtype, device, **options)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    inputs = {k: x[:0] if k in ("q", "g", "target") else x for k, x in c.inputs.items()}
    return replace(
        c, inputs=inputs, options={**c.options, "rows": QueryRows(none, none, none, none)}
    )


def _flat_heads(dtype, device) -> Call:
    """Heads so peaked off the target that every probability there underflows in fp32."""
    c = call(attention_kl, dtype, device, over="visible")
    return replace(c, inputs={**c.inputs, "q": c.inputs["q"] * 300})


def _strided(dtype, device) -> Call:
    c = call(attention_map, dtype, device, over="visible", allowed=_sets(device))
    k = randn(7, 2, KEYS, 2, 32, dtype=dtype, device=device).transpose(1, 2)[..., 8:24]
    q = randn(8, 4, 12, 32, dtype=dtype, device=device)[..., :16].transpose(0, 1)
    return replace(c, inputs={"q": q, "k": k})


Maker = Callable[[torch.dtype, torch.device], Call]


def _cases() -> dict[str, Maker]:
    cases: dict[str, Maker] = {"kl_flat_heads": _flat_heads, "map_strided": _strided}

    def add(name: str, make: Maker) -> None:
        cases[name] = make

    for over in ("visible", "columns"):
        add(f"map_{over}", lambda t, d, o=over: call(attention_map, t, d, over=o))
        add(
            f"map_{over}_sets_weights",
            lambda t, d, o=over: _weighted(
                call(attention_map, t, d, over=o, allowed=_sets(d), softcap=2.0), per_row=True
            ),
        )
        add(
            f"map_{over}_lse",
            lambda t, d, o=over: _with_lse(call(attention_map, t, d, over=o, shape=(6, 2), dim=20)),
        )
        for rectify in (False, True):
            add(
                f"contribution_{over}{'_rectified' if rectify else ''}",
                lambda t, d, o=over, r=rectify: call(
                    attention_contribution, t, d, over=o, rectify=r, allowed=_sets(d)
                ),
            )
        for heads in ("mean", "each"):
            add(
                f"kl_{over}_{heads}",
                lambda t, d, o=over, h=heads: call(attention_kl, t, d, over=o, heads=h),
            )
            add(
                f"kl_{over}_{heads}_sets_weights",
                lambda t, d, o=over, h=heads: _weighted(
                    call(attention_kl, t, d, over=o, heads=h, allowed=_sets(d), softcap=2.0), False
                ),
            )
    add(
        "map_trained_lse",
        lambda t, d: with_trained_lse(
            _weighted(call(attention_map, t, d, over="visible", allowed=_sets(d)), per_row=True)
        ),
    )
    add(
        "kl_trained_lse",
        lambda t, d: with_trained_lse(call(attention_kl, t, d, over="visible", softcap=2.0)),
    )
    for function in (attention_map, attention_contribution, attention_kl):
        name = function.__name__.removeprefix("attention_")
        add(f"{name}_no_rows", lambda t, d, f=function: _no_rows(f, t, d, over="visible"))
        add(f"{name}_no_columns", lambda t, d, f=function: _no_columns(f, t, d, over="columns"))
    return cases


CASES = _cases()
