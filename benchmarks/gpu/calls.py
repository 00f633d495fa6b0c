"""The calls that the steps measure: each as it runs on the card, and small for a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

import groundkern as gk
from benchmarks import problems
from benchmarks.launches.noting import Launch
from benchmarks.problems import Model, Problem

BF16 = torch.bfloat16
SEVEN = problems.MODELS["qwen2.5-vl-7b"]
THREE = problems.MODELS["qwen2.5-vl-3b"]
WIDE = Model(
    4096, 32, 8, 128, 128_256
)  # the sizes for which other libraries publish numbers of their loss
SMALL = problems.TINY
SWEPT = replace(SMALL, dim=SEVEN.dim)  # small, and served by the swept rows of the tile tables


@dataclass(frozen=True)
class Sized:
    """real: the call that is measured. small: the same call in a rehearsal."""

    real: Problem
    small: Problem

    @property
    def name(self) -> str:
        return self.real.key


def _sized(
    make: Callable[..., Problem],
    model: Model,
    change: Callable[[Problem], Problem] = lambda p: p,
    few: Model = SMALL,
    **options,
) -> Sized:
    """A call and its small twin; `options` are sizes, which a rehearsal reduces, and kinds."""
    small = dict(options)
    for name, most in (("rows", 4), ("keys", 64), ("counted", 3)):
        if small.get(name):
            small[name] = min(small[name], most)
    if make is problems.side_attention:
        small = {"visual": 40, "regions": 2, "patches": 4} | small
    real = make(model, BF16, shape=_shape(model), **options)
    return Sized(change(real), change(make(few, BF16, shape=problems.QUICK, **small)))


def _shape(model: Model) -> str:
    known = [name for name, m in problems.MODELS.items() if m == model]
    return known[0] if known else f"{model.hidden}x{model.vocabulary}"


def _altered(suffix: str, **options: object) -> Callable[[Problem], Problem]:
    """The same call with other options, under another name."""

    def change(problem: Problem) -> Problem:
        def make(device: torch.device):
            call = problem.make(device)
            given = {k: x(call) if callable(x) else x for k, x in options.items()}
            return replace(call, options={**call.options, **given})

        kind, _, sizes = problem.name.partition("/")[2].partition("/")
        name = f"{problem.name.partition('/')[0]}/{kind}_{suffix}/{sizes}"
        return replace(problem, name=name, make=make)

    return change


def _one_set(call) -> gk.KeySets:
    """A key set for every row that is all columns, as for a sequence with one image."""
    rows, columns = call.options["rows"], call.options["columns"]
    inside = torch.zeros(1, call.inputs["k"].shape[2], dtype=torch.bool, device=columns.device)
    inside[0, columns[0].long()] = True
    return gk.KeySets.from_bool(inside, torch.zeros_like(rows.sequence))


def _shift(call) -> torch.Tensor:
    q = call.inputs["q"]
    return q.new_zeros(q.shape[:2], dtype=torch.float32)


def _log_prob(problem: Problem) -> Problem:
    def make(device: torch.device):
        call = problem.make(device)
        options = {"target": call.options["target"]}
        return replace(call, function=gk.linear_log_prob, options=options, differentiable=2)

    return replace(problem, name=problem.name.replace("cross_entropy", "log_prob"), make=make)


WHOLE_ROW = {"visual": 0, "change": _altered("whole_row", allowed=None)}  # every key is used
KL_SETS = _altered("sets", allowed=_one_set)


def smoke() -> Iterator[Sized]:
    """Every op and kind at few rows, which must be right before anything is timed."""
    for n in (1, 8, 64):
        side = {"rows": n, "keys": 2048}
        yield _sized(problems.side_attention, SEVEN, **side)
        yield _sized(problems.side_attention, SEVEN, **side, **WHOLE_ROW)
        yield _sized(problems.side_attention, SEVEN, _altered("lse", lse=_shift), **side)
        for over in ("visible", "columns"):
            for function in (gk.attention_map, gk.attention_contribution, gk.attention_kl):
                yield _sized(
                    problems.attention_map, SEVEN, function=function, over=over, rows=n, keys=2048
                )
            yield _sized(problems.attention_map, SEVEN, heads="each", over=over, rows=n, keys=2048)
        yield _sized(problems.attention_map, SEVEN, KL_SETS, over="columns", rows=n, keys=2048)
        loss = problems.linear_cross_entropy
        yield _sized(loss, THREE, rows=n)
        yield _sized(loss, THREE, _altered("none", reduction="none"), rows=n)
        yield _sized(loss, THREE, rows=n, trained=False, smoothing=0.3)
        yield _sized(loss, THREE, _log_prob, rows=n)


def attention() -> Iterator[Sized]:
    """Side attention and KLAL, the sizes that matter most first."""
    for keys, rows in ((32768, 8), (32768, 64), (131072, 8), (131072, 64)):
        yield _sized(problems.side_attention, SEVEN, rows=rows, keys=keys)
    for rows in (4, 32):
        yield _sized(problems.attention_map, SEVEN, KL_SETS, over="columns", rows=rows, keys=8192)
        yield _sized(problems.attention_map, SEVEN, over="visible", rows=rows, keys=8192)
    for rows in (8, 64):
        yield _sized(problems.side_attention, SEVEN, rows=rows, keys=32768, **WHOLE_ROW)
    for keys, rows in ((32768, 1), (32768, 256), (131072, 1), (131072, 256)):
        yield _sized(problems.side_attention, SEVEN, rows=rows, keys=keys)
    yield _sized(problems.attention_map, SEVEN, heads="each", over="visible", rows=32, keys=8192)


def loss() -> Iterator[Sized]:
    """A trained head with three numbers of rows, and DV-SFT's few smoothed rows of a frozen one."""
    yield _sized(problems.linear_cross_entropy, THREE, rows=512)
    yield _sized(problems.linear_cross_entropy, WIDE, rows=4096)
    yield _sized(problems.linear_cross_entropy, WIDE, rows=1024)
    yield _sized(problems.linear_cross_entropy, THREE, rows=512, trained=False)
    yield _sized(
        problems.linear_cross_entropy, SEVEN, rows=2048, counted=137, trained=False, smoothing=0.3
    )


def compared() -> Iterator[Sized]:
    """Calls that others can compute too. On 128k keys SDPA's mask and FlexAttention's blocks are
    those of 64 rows; eager attention keeps every probability."""
    yield _sized(problems.linear_cross_entropy, WIDE, rows=4096)
    for keys, rows in ((32768, 64), (131072, 64), (32768, 8), (131072, 8)):
        yield _sized(problems.side_attention, SEVEN, rows=rows, keys=keys)
    yield _sized(problems.attention_map, SEVEN, KL_SETS, over="columns", rows=32, keys=8192)
    yield _sized(problems.linear_cross_entropy, THREE, rows=512)
    yield _sized(problems.attention_map, SEVEN, over="visible", rows=32, keys=8192)
    yield _sized(problems.linear_cross_entropy, THREE, rows=512, trained=False)


@dataclass(frozen=True)
class Bucket:
    """A call whose lanes (rows times query heads of a KV head) fall into one bucket of the tile
    tables. most: the bucket's end; None: no end."""

    op: str
    most: int | None
    call: Sized

    def kinds(self) -> dict[str, problems.Mode]:
        """The kinds of rows in the op's tile table that serve the call, with the mode that runs
        their kernels; "" if the table has one kind."""
        if self.op == "attention_map":
            return {"": "full"}
        if self.most is not None:
            return {"forward": "forward", "backward": "full"}
        return {"forward": "forward", "dq": "full", "dkv": "full"}

    def uses(self, kind: str, launch: Launch) -> bool:
        """Whether a launch takes its tile from a row of that kind: the op's own kernels on tiles of
        keys, but not those that make the step's plan."""
        own = launch.kernel.fn.__module__ == f"groundkern.ops.{self.op}.triton_kernels"
        named = not kind or launch.name in (f"{kind}_kernel", f"backward_{kind}_kernel")
        return own and named and "BLOCK_N" in launch.options


def buckets() -> Iterator[Bucket]:
    """7 query heads share a KV head: 2, 9, 18 and 64 rows are 14, 63, 126 and 448 lanes. A
    rehearsal's few rows have so many query heads that they fall into the same buckets."""
    for most, rows, heads in ((64, 9, 14), (16, 2, 7), (128, 18, 30), (None, 64, 40)):
        few = replace(SWEPT, heads=heads, kv_heads=1)
        side = _sized(problems.side_attention, SEVEN, few=few, rows=rows, keys=32768)
        yield Bucket("side_attention", most, side)
    for most, rows in ((64, 4), (512, 32)):
        kl = _sized(problems.attention_map, SEVEN, few=SWEPT, over="visible", rows=rows, keys=8192)
        yield Bucket("attention_map", most, kl)
