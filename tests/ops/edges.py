"""Calls with sizes and layouts that the ops' own cases leave out: ones, odd sizes, tensors that
start off any alignment, [B, S, H, D] layouts, every head dimension models have."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from groundkern import (
    KeySets,
    LabelBags,
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    linear_cross_entropy,
    linear_log_prob,
    side_attention,
)
from groundkern.ops.cases import Call, coin, integers, randn

FUNCTIONS = {
    "side": (side_attention, {}),
    "map": (attention_map, {"over": "visible"}),
    "map_columns": (attention_map, {"over": "columns"}),
    "contribution": (attention_contribution, {"over": "visible"}),
    "kl": (attention_kl, {"over": "visible", "heads": "mean"}),
    "kl_each_columns": (attention_kl, {"over": "columns", "heads": "each"}),
}
# Between them, these run every kernel except a contribution's.
SOME = ("side", "kl", "map_columns")


def attention(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: list[tuple[int, int]] = ((0, 130), (0, 97), (1, 3), (2, 128), (2, 64)),
    batch: int = 3,
    keys: int = 131,
    heads: tuple[int, int] = (6, 2),
    dims: tuple[int, int] = (24, 40),
    columns: int = 33,
    sets: bool = False,
    window: int | None = None,
    **options,
) -> Call:
    """rows: (sequence, position); columns: spread over the keys; in every sequence but the first,
    the last quarter of them is padding."""
    function, own = FUNCTIONS[name]
    draw = partial(randn, dtype=dtype, device=device)
    n, (hq, hkv), (dim, value_dim) = len(rows), heads, dims
    inputs = {"q": draw(1, n, hq, dim), "k": draw(2, batch, hkv, keys, dim)}
    if function in (side_attention, attention_contribution):
        inputs["v"] = draw(3, batch, hkv, keys, value_dim)
    if function is attention_contribution:
        inputs["g"] = draw(4, n, hq, value_dim)
    if function is attention_kl:
        inputs["target"] = randn(5, n, columns, dtype=torch.float32, device=device).square()
    sequence, position = (integers(x, device) for x in zip(*rows, strict=True))
    own = {**own, **options, "rows": QueryRows.causal(sequence, position, window=window)}
    if function is not side_attention:
        spread = torch.arange(columns) * keys // columns
        listed = spread.to(torch.int32).repeat(batch, 1)
        listed[1:, columns - columns // 4 :] = -1
        own["columns"] = listed.to(device)
    if sets:
        allowed = coin(6, 2, keys, device=device)
        own["allowed"] = KeySets.from_bool(allowed, integers([i % 3 - 1 for i in range(n)], device))
    results = 2 if function is side_attention else 1
    return Call(function, inputs, own, fixed=("target",), differentiable=results)


def head(
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: int = 5,
    vocabulary: int = 131,
    dim: int = 17,
    bags: bool = False,
    **options,
) -> Call:
    """A loss on a head of odd sizes; one row is ignored if there are several."""
    draw = partial(randn, dtype=dtype, device=device)
    inputs = {"hidden": draw(1, rows, dim), "weight": draw(2, vocabulary, dim)}
    target = (torch.arange(rows) * 37 + 5) % vocabulary
    target[1:2] = -100
    if bags:
        ids, offsets = torch.arange(0, vocabulary, 3), torch.tensor([0, 2, -(-vocabulary // 3)])
        index = torch.arange(rows) % 3 - 1
        options["bags"] = LabelBags(*(x.to(device) for x in (ids, offsets, index)))
        options["smoothing"] = 0.3
    return Call(linear_cross_entropy, inputs, {"target": target.to(device), **options})


def log_prob(dtype: torch.dtype, device: torch.device) -> Call:
    call = head(dtype, device, rows=1)
    return replace(call, function=linear_log_prob, differentiable=2)


def unaligned(call: Call) -> Call:
    """Every tensor starts one element into its storage, so at no multiple of 16 bytes."""

    def moved(x: object) -> object:
        if isinstance(x, QueryRows | KeySets | LabelBags):
            return replace(x, **{n: moved(t) for n, t in vars(x).items() if isinstance(t, Tensor)})
        if not isinstance(x, Tensor):
            return x
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    inputs = {name: moved(x) for name, x in call.inputs.items()}
    return replace(call, inputs=inputs, options={n: moved(x) for n, x in call.options.items()})


def keys_first(call: Call) -> Call:
    """k and v [B, Hkv, S, D] as views of [B, S, Hkv, D], q as one of [Hq, N, D]."""
    swapped = {
        name: x.transpose(-3, -2).contiguous().transpose(-3, -2)
        for name, x in call.inputs.items()
        if name in ("k", "v")
    }
    q = call.inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    return replace(call, inputs={**call.inputs, **swapped, "q": q})


ONE = {"rows": [(0, 0)], "batch": 1, "keys": 1, "columns": 1, "heads": (1, 1), "dims": (16, 16)}
SHAPES: dict[str, dict[str, object]] = {
    "ones": ONE,
    "one_row": {"rows": [(0, 130)], "batch": 1},
    "one_head_per_group": {"heads": (3, 3)},
    "one_kv_head": {"heads": (7, 1)},
    "odd": {"sets": True},
    "windows_softcap": {"window": 5, "softcap": 3.0, "sets": True},
    "nothing_visible": {"rows": [(0, -1), (1, -1), (2, 130)]},
}
DIMS = [(16, 16), (40, 40), (72, 72), (80, 80), (96, 96), (192, 128), (256, 256)]


def _edges() -> dict[str, Callable[[torch.dtype, torch.device], Call]]:
    edges: dict[str, Callable[[torch.dtype, torch.device], Call]] = {}
    for name in FUNCTIONS:
        for shape, sizes in SHAPES.items():
            edges[f"{name}/{shape}"] = partial(attention, name, **sizes)
        for layout in (unaligned, keys_first):
            edges[f"{name}/{layout.__name__}"] = lambda t, d, n=name, f=layout: f(
                attention(n, t, d, sets=True, dims=(32, 32))
            )
    for name in SOME:
        for dims in DIMS:
            edges[f"{name}/dims_{dims[0]}_{dims[1]}"] = partial(attention, name, dims=dims)
    return edges | {
        "loss/one_row": partial(head, rows=1),
        "loss/one_row_none": partial(head, rows=1, reduction="none"),
        "loss/one_dimension": partial(head, dim=1),
        "loss/one_entry": partial(head, vocabulary=1),
        "loss/odd": partial(head, bags=True),
        "loss/one_row_bags": partial(head, rows=1, bags=True, softcap=3.0),
        "loss/many_entries": partial(head, vocabulary=4099),
        "loss/unaligned": lambda t, d: unaligned(head(t, d, bags=True, dim=32)),
        "log_prob/one_row": log_prob,
    }


EDGES = _edges()
