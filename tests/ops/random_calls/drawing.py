"""Draws one call of an attention op, with all that a user may pass to it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import groundkern as gk
from groundkern.selection import KeySets, QueryRows
from tests.ops.random_calls import truth
from tests.ops.random_calls.layouts import Dice, laid_out

OPS = {"side": 5, "map": 2, "contribution": 2, "kl": 5}
DTYPES = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 1}
FUNCTIONS = {
    "side": gk.side_attention,
    "map": gk.attention_map,
    "contribution": gk.attention_contribution,
    "kl": gk.attention_kl,
}


@dataclass
class Drawn:
    """A call: inputs are float tensors with a gradient where `trained` names them.

    upstream: the gradient of each result, None: the result is not differentiated. notes: what was
    drawn, for the summary and the reader of a failure.
    """

    op: str
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    options: dict[str, object]
    trained: tuple[str, ...] = ()
    upstream: list[Tensor | None] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        over = self.options.get("over")
        parts = [self.options.get("heads"), over, self.options["allowed"] is not None and "sets"]
        return " ".join([self.op, *(str(x) for x in parts if x)])


@dataclass(frozen=True)
class _Sizes:
    batch: int
    rows: int
    keys: int
    kv_heads: int
    group: int
    dim: int
    value_dim: int

    @classmethod
    def drawn(cls, dice: Dice, small: bool) -> "_Sizes":
        """Mostly small, because the interpreter is slow; with `small` all of them."""
        rows = dice.weighed({0: 0.3, 1: 3, dice.within(2, 8): 10, dice.within(9, 40): 3})
        short, middle, long = dice.within(2, 40), dice.within(41, 100), dice.within(101, 300)
        keys = dice.weighed({1: 1, short: 8, middle: 5, long: 2})
        batch = dice.weighed({1: 4, 2: 4, 3: 1, 4: 1})
        kv_heads, group = dice.weighed({1: 4, 2: 3, 3: 1}), dice.within(1, 7)
        if rows * group > 60:
            kv_heads, group = 1, min(group, 3)
        common = [8, 16, 24, 32, 40, 48, 64]
        dims = {dice.one_of(common): 8, dice.within(1, 64): 3, dice.within(65, 160): 1}
        dim = dice.weighed(dims)
        value_dim = dim if dice.chance(0.6) else dice.weighed(dims)
        if small:
            batch, rows, keys, kv_heads = min(batch, 2), min(rows, 6), min(keys, 70), 1
        return cls(batch, rows, keys, kv_heads, group, dim, value_dim)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def _rows(dice: Dice, s: _Sizes) -> tuple[QueryRows, str]:
    """Rows of some of the sequences, in any order of position, some of them padding."""
    n, keys = s.rows, s.keys
    some = [b for b in range(s.batch) if dice.chance(0.75)] or [dice.within(0, s.batch - 1)]
    sequence = torch.tensor(sorted(dice.one_of(some) for _ in range(n)), dtype=torch.int32)
    position = dice.integers(0 if dice.chance(0.5) else keys // 2, keys - 1, n)
    stop = position + 1
    kind = dice.one_of(["causal", "causal", "window", "documents", "left padding", "whole", "any"])
    match kind:
        case "window":
            start = (stop - max(dice.within(1, keys), dice.within(1, keys))).clamp(min=0)
        case "documents":
            length = dice.within(1, keys)
            start = position // length * length
        case "left padding":
            first = dice.integers(0, keys - 1, s.batch)[sequence.long()]
            start = torch.minimum(first, position)
        case "whole":
            start, stop = torch.zeros_like(stop), torch.full_like(stop, keys)
        case "any":
            start = dice.integers(0, dice.one_of([keys // 4, keys]), n)
            stop = torch.maximum(start, dice.integers(0, keys, n))
        case _:
            start = torch.zeros_like(stop)
    padded = dice.coin(n, share=dice.one_of([0.0, 0.0, 0.0, 0.15, 0.15, 0.5]))
    start = torch.where(padded, stop, start)
    fields = [sequence, position, start, stop]
    if n > 1 and dice.chance(0.3):  # rows that ask twice
        twice = torch.arange(n)
        again = dice.coin(n, share=0.5)
        again[0] = False
        twice = torch.where(again, twice - 1, twice)
        fields = [x[twice] for x in fields]
    return QueryRows(*(laid_out(dice, x.to(torch.int32), 0.8)[0] for x in fields)), kind


def _sets(dice: Dice, s: _Sizes) -> tuple[KeySets | None, str]:
    kind = dice.weighed(
        {"none": 4, "no sets": 0.5, "random": 3, "runs": 3, "regions": 3, "single": 0.5}
    )
    if kind == "none":
        return None, kind
    sets = 0 if kind == "no sets" else dice.within(1, 4)
    j = torch.arange(s.keys)
    match kind:
        case "random":
            allowed = dice.coin(sets, s.keys, share=dice.weighed({0.02: 1, 0.3: 3, 0.9: 3}))
        case "runs":  # whole tiles are left out
            start = dice.integers(0, s.keys - 1, sets)[:, None]
            allowed = (j >= start) & (j < start + max(1, dice.within(s.keys // 4, s.keys)))
        case "regions":
            inside = dice.coin(sets, s.keys, share=0.1)
            allowed = ~dice.coin(1, s.keys, share=0.7) | inside
        case _:
            allowed = j == dice.integers(0, s.keys - 1, sets)[:, None]
    allowed = allowed & ~dice.coin(sets, 1, share=0.15)  # some are empty
    free = dice.coin(s.rows, share=dice.one_of([0.0, 0.2, 0.9]))
    index = dice.integers(0, max(0, sets - 1), s.rows)
    index = torch.where(free, -1, index) if sets else torch.full_like(index, -1)
    made = KeySets.from_bool(allowed, index.to(torch.int32))
    moved = {"bits": laid_out(dice, made.bits, 0.7)[0], "index": laid_out(dice, made.index, 0.7)[0]}
    return replace(made, **moved), kind


def _columns(dice: Dice, s: _Sizes) -> tuple[Tensor, str]:
    """int32 [B, C], ascending in every sequence."""
    kind = dice.weighed({"none": 0.3, "one": 0.7, "all": 3, "run": 3, "ragged": 6, "holes": 1})
    b, keys = s.batch, s.keys
    match kind:
        case "none":
            columns = torch.zeros(b, 0)
        case "one":
            columns = dice.integers(0, keys - 1, b, 1)
        case "all":
            columns = torch.arange(keys).repeat(b, 1)
        case "run":
            count = max(dice.within(1, keys), dice.within(1, keys))
            columns = (torch.arange(count) + dice.within(0, keys - count)).repeat(b, 1)
        case _:
            share = dice.one_of([0.2, 0.5, 0.9])
            chosen = [dice.coin(keys, share=share).nonzero()[:, 0] for _ in range(b)]
            longest = max(len(x) for x in chosen) + dice.within(0, 3)
            columns = torch.full((b, longest), -1)
            for row, x in zip(columns, chosen, strict=True):
                row[: len(x)] = x
            if kind == "holes":
                columns[dice.coin(b, longest, share=0.3)] = -1
    return laid_out(dice, columns.to(torch.int32), 0.7)[0], kind


def _queries_and_keys(dice: Dice, s: _Sizes) -> tuple[Tensor, Tensor, float | None, str]:
    """q, k, scale: scores of size 1, of tens, of hundreds, or all about the same large number."""
    q, k = dice.normal(s.rows, s.heads, s.dim), dice.normal(s.batch, s.kv_heads, s.keys, s.dim)
    scale = None if dice.chance(0.6) else dice.one_of([0.05, 0.3, 1.0])
    factor = s.dim**-0.5 if scale is None else scale
    kinds = {"small": 6, "about 50": 2, "about 500": 1, "all +50": 1, "all -50": 1, "all +500": 1}
    kind = dice.weighed(kinds | {"all -500": 1, "tiny": 0.5})
    if kind == "tiny":
        q *= 1e-4
    elif kind.startswith("about"):
        q *= float(kind.split()[1]) / 2 / (factor * s.dim**0.5)
    elif kind.startswith("all"):
        common = float(kind.split()[1]) / factor
        q[..., 0] = abs(common) ** 0.5
        k[..., 0] = common / abs(common) ** 0.5
    return q, k, scale, kind


def _lse(dice: Dice, drawn: Drawn, q: Tensor, k: Tensor) -> tuple[Tensor | None, str]:
    """For side attention anything; else the exact normaliser, or, with a gradient, one near it."""
    kinds = {"none": 4, "exact": 4}
    if drawn.op == "side":
        kinds |= {"superset": 3, "shifted": 5, "-inf": 1, "inf": 0.5, "foreign": 2, "mixed": 2}
    elif drawn.options["over"] == "visible":
        kinds |= {"trained": 3}
    kind = dice.weighed(kinds)
    if kind == "none":
        return None, kind
    selected = truth.Selected.of(drawn.options, k.shape[2])
    kept = selected.usable if kind == "exact" and drawn.op == "side" else selected.visible
    _, s = truth.scores(q.double(), k.double(), drawn.options)
    lse = torch.where(kept.any(-1)[:, None], truth.log_sum(s, kept), -torch.inf)
    if kind == "shifted":
        lse = lse + dice.one_of([1.0, 40.0, 200.0, 1e4]) * dice.one_of([-1, 1])
    elif kind in ("-inf", "inf"):
        lse = torch.full_like(lse, float(kind))
    elif kind == "trained":
        lse = lse + 0.5 * dice.normal(*lse.shape)
    elif kind == "foreign":
        lse = dice.normal(*lse.shape) * dice.one_of([1.0, 30.0, 3000.0])
    elif kind == "mixed":
        size = torch.tensor([0.0, 1.0, 100.0, 1e4])[dice.integers(0, 3, *lse.shape).long()]
        lse = lse + size * dice.normal(*lse.shape)
    return laid_out(dice, lse.float(), 0.6)[0], kind


def _target(dice: Dice, drawn: Drawn, s: _Sizes) -> tuple[Tensor, str]:
    columns = drawn.options["columns"].shape[1]
    own = truth.Selected.of(drawn.options, s.keys).own
    target = dice.normal(s.rows, columns).square()
    kind = dice.weighed({"dense": 6, "sparse": 3, "one-hot": 1, "off": 0.5, "zero": 0.2})
    match kind:
        case "sparse":
            target *= dice.coin(s.rows, columns, share=0.3)
        case "one-hot" if columns:
            target = torch.zeros_like(target)
            target.scatter_(1, dice.integers(0, columns - 1, s.rows, 1).long(), 1.0)
        case "off":  # every row's mass is on columns that it does not own
            target = torch.where(own, 0.0, target)
        case "zero":
            target = torch.zeros_like(target)
    target = target * ~dice.coin(s.rows, 1, share=0.1)
    dtype = dice.weighed({torch.float32: 6, torch.float64: 1, torch.bfloat16: 1})
    return laid_out(dice, target.to(dtype), 0.6)[0], kind


def _head_weight(dice: Dice, drawn: Drawn, s: _Sizes) -> tuple[Tensor | None, str]:
    kind = dice.weighed({"none": 4, "[Hq]": 2, "[N, Hq]": 3})
    if kind == "none":
        return None, kind
    weight = dice.uniform(*((s.heads,) if kind == "[Hq]" else (s.rows, s.heads))) + 0.05
    if dice.chance(0.5):
        zero = dice.coin(*weight.shape, share=0.4)
        if drawn.op == "kl" and drawn.options["heads"] == "mean":
            zero[..., 0] = False  # a map that is 0 everywhere has no KL
        weight = weight.masked_fill(zero, 0.0)
        kind += " with zeros"
    weight = weight.to(dice.weighed({torch.float32: 5, drawn.dtype: 1}))
    return laid_out(dice, weight, 0.5)[0], kind


def _upstream(dice: Dice, drawn: Drawn, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Uneven gradients of all results, or of one."""
    size = dice.weighed({1.0: 6, 1e-3: 1, 30.0: 1})
    asked = dice.weighed({"all": 6, "first": 1, "last": 1})
    for i, (shape, dtype) in enumerate(shapes):
        skipped = asked != "all" and i != (0 if asked == "first" else len(shapes) - 1)
        given, _ = laid_out(dice, (size * dice.normal(*shape)).to(dtype), 0.6)
        drawn.upstream.append(None if skipped else given)
    drawn.notes |= {"upstream": asked, "upstream size": size}


def draw(seed: int, number: int, op: str | None = None, *, small: bool = False) -> Drawn:
    """Call `number` of a seed; `small`: of few programs, for tests."""
    dice = Dice(seed, number)
    drawn_op, dtype = dice.weighed(OPS), dice.weighed(DTYPES)
    op = op or drawn_op
    s = _Sizes.drawn(dice, small)
    q, k, scale, magnitude = _queries_and_keys(dice, s)
    rows, visibility = _rows(dice, s)
    allowed, sets = _sets(dice, s)
    softcap = dice.one_of([2.0, 20.0]) if dice.chance(0.2) else None
    options = {"rows": rows, "allowed": allowed, "scale": scale, "softcap": softcap}
    drawn = Drawn(op, dtype, {}, options)
    drawn.notes = {"visibility": visibility, "sets": sets, "scores": magnitude, **vars(s)}
    inputs = {"q": q, "k": k}
    if op in ("side", "contribution"):
        inputs["v"] = dice.normal(s.batch, s.kv_heads, s.keys, s.value_dim)
    if op == "contribution":
        inputs["g"] = dice.normal(s.rows, s.heads, s.value_dim)
        options["rectify"] = dice.chance(0.5)
    for name, x in inputs.items():
        drawn.inputs[name], drawn.notes[f"{name} is"] = laid_out(dice, x.to(dtype))
    shapes = [((s.rows, s.heads, s.value_dim), dtype), ((s.rows, s.heads), torch.float32)]
    if op != "side":
        options["over"] = dice.one_of(["visible", "columns"])
        options["columns"], drawn.notes["columns"] = _columns(dice, s)
        shapes = [((s.rows, options["columns"].shape[1]), torch.float32)]
    if op == "kl":
        options["heads"] = dice.weighed({"mean": 3, "each": 2})
        drawn.inputs["target"], drawn.notes["target"] = _target(dice, drawn, s)
        shapes = [((s.rows,), torch.float32)]
    if op in ("map", "kl"):
        weight, drawn.notes["head weight"] = _head_weight(dice, drawn, s)
        if weight is not None:
            drawn.inputs["head_weight"] = weight
    lse, drawn.notes["lse"] = _lse(dice, drawn, drawn.inputs["q"], drawn.inputs["k"])
    (drawn.inputs if drawn.notes["lse"] == "trained" else options)["lse"] = lse
    can = [name for name in drawn.inputs if name != "target"]
    drawn.trained = tuple(can) if dice.chance(0.7) else (dice.one_of(can),)
    if "lse" in can and "lse" not in drawn.trained:  # without a gradient it would mean another call
        drawn.trained += ("lse",)
    _upstream(dice, drawn, shapes)
    return drawn
