"""The calls whose launches are counted, on tensors without storage."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import groundkern as gk
from benchmarks.costs import loss_times
from benchmarks.launches.recording import GPU
from groundkern.ops.cases import Call

# 64 rows of Qwen2.5-VL-7B on two sequences of 4096 keys. The head's hidden size is small: only the
# GEMMs depend on it, and they do not run.
ROWS, HEADS, KV_HEADS, DIM, BATCH, KEYS, COLUMNS, REGIONS = 64, 28, 4, 128, 2, 4096, 1024, 8
HIDDEN, VOCABULARY, LABELS, IMAGES = 64, 128_256, 100, 4


def _floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def _integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def _rows() -> gk.QueryRows:
    return gk.QueryRows(*(_integers(ROWS) for _ in range(4)))


def _selection(sets: bool) -> dict[str, object]:
    allowed = gk.KeySets(_integers(REGIONS, KEYS // 32), _integers(ROWS), KEYS) if sets else None
    return {"rows": _rows(), "allowed": allowed}


def _attention(names: str) -> dict[str, Tensor]:
    of_row, of_key = (ROWS, HEADS, DIM), (BATCH, KV_HEADS, KEYS, DIM)
    return {name: _floats(*(of_row if name in "qg" else of_key)) for name in names}


def _side(sets: bool, lse: bool) -> Call:
    statistics = _floats(ROWS, HEADS, dtype=torch.float32) if lse else None
    options = {**_selection(sets), "lse": statistics}
    return Call(gk.side_attention, _attention("qkv"), options)


def _maps(function: Callable, over: str, sets: bool = False, **options) -> Call:
    inputs = _attention("qkvg" if function is gk.attention_contribution else "qk")
    if function is gk.attention_kl:
        inputs["target"] = _floats(ROWS, COLUMNS, dtype=torch.float32)
    options |= {**_selection(sets), "columns": _integers(BATCH, COLUMNS), "over": over}
    return Call(function, inputs, options, fixed=("target",))


def _loss(
    rows: int,
    function: Callable = gk.linear_cross_entropy,
    trained: bool = True,
    vocabulary: int = VOCABULARY,
    dim: int = HIDDEN,
    **options,
) -> Call:
    inputs = {"hidden": _floats(rows, dim), "weight": _floats(vocabulary, dim)}
    if options.pop("soft", False):
        ids, shape = _integers(rows, 8, dtype=torch.int64), (rows, 8)
        options["target"] = gk.SoftTargets(ids, _floats(*shape, dtype=torch.float32))
        return Call(function, inputs, options)
    if "smoothing" in options:
        sizes = (LABELS, IMAGES + 1, rows)
        options["bags"] = gk.LabelBags(*(_integers(n, dtype=torch.int64) for n in sizes))
    options["target"] = _integers(rows, dtype=torch.int64)
    return Call(function, inputs, options, fixed=() if trained else ("weight",))


def _kl(rows: int, kind: str, trained: bool = True, **options) -> Call:
    heads = {"hidden": (rows, HIDDEN), "weight": (VOCABULARY, HIDDEN)}
    heads |= {f"teacher_{name}": (n, 2 * HIDDEN) for name, (n, _) in heads.items()}
    inputs = {name: _floats(*shape) for name, shape in heads.items()}
    fixed = ("teacher_hidden", "teacher_weight", *(() if trained else ("weight",)))
    options |= {"kind": kind, "mask": _integers(rows, dtype=torch.bool)}
    return Call(gk.linear_kl, inputs, options, fixed)


def _take() -> Call:
    inputs = {"x": _floats(BATCH, HEADS, KEYS, DIM)}
    return Call(gk.QueryRows.take, inputs, {"self": _rows()})


def _causal() -> Call:
    options = {"sequence": _integers(ROWS), "position": _integers(ROWS)}
    return Call(lambda **o: gk.QueryRows.causal(**o).stop, {}, options)


def _regions() -> Call:
    options = {"visual": (BATCH, KEYS), "inside": (REGIONS, KEYS)}
    options = {name: _integers(*shape, dtype=torch.bool) for name, shape in options.items()}
    options |= {"sequence": _integers(REGIONS), "index": _integers(ROWS)}
    return Call(lambda **o: gk.KeySets.regions(**o).bits, {}, options)


_KL = [
    (heads, over, sets)
    for heads in ("mean", "each")
    for over in ("visible", "columns")
    for sets in (False, True)
]
# The last three are no ops: `take` runs once per layer before them, the others once per step.
CASES: dict[str, Callable[[], Call]] = {
    "side_attention": partial(_side, False, False),
    "side_attention sets": partial(_side, True, False),
    "side_attention sets lse": partial(_side, True, True),
    **{
        f"{function.__name__} {over}": partial(_maps, function, over)
        for function in (gk.attention_map, gk.attention_contribution)
        for over in ("visible", "columns")
    },
    **{
        f"attention_kl {heads} {over}{' sets' * sets}": partial(
            _maps, gk.attention_kl, over, sets, heads=heads
        )
        for heads, over, sets in _KL
    },
    "linear_cross_entropy 512 rows": partial(_loss, 512),
    "linear_cross_entropy 512 rows smoothed": partial(_loss, 512, smoothing=0.3),
    "linear_cross_entropy 512 rows per row": partial(_loss, 512, reduction="none"),
    "linear_cross_entropy 512 rows frozen": partial(_loss, 512, trained=False),
    "linear_cross_entropy 512 rows frozen smoothed": partial(
        _loss, 512, trained=False, smoothing=0.3
    ),
    "linear_cross_entropy 8192 rows": partial(_loss, 8192),
    "linear_cross_entropy 512 rows soft targets": partial(_loss, 512, soft=True),
    "linear_cross_entropy 512 rows with the rest": partial(
        _loss, 512, label_smoothing=0.1, z_loss=1e-4, temperature=0.7, entropy=True, top_k=8
    ),
    "linear_log_prob 512 rows": partial(_loss, 512, gk.linear_log_prob),
    "linear_log_prob 512 rows entropy": partial(_loss, 512, gk.linear_log_prob, entropy=True),
    **{
        f"loss {loss_times.name(x)}": partial(
            _loss, x.rows, trained=x.trained, vocabulary=x.vocabulary, dim=x.dim
        )
        for x in loss_times.SHAPES
    },
    "linear_kl forward 512 rows": partial(_kl, 512, "forward"),
    "linear_kl js 512 rows per row": partial(_kl, 512, "js", reduction="none"),
    "linear_kl js 512 rows frozen": partial(_kl, 512, "js", trained=False),
    "QueryRows.take": _take,
    "QueryRows.causal": _causal,
    "KeySets.regions": _regions,
}
