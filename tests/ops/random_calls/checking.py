"""What must hold of a drawn call: the closeness rule against fp64, exact zeros where nothing may
arrive, the same bits on a second run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groundkern import asked
from tests import interpreter
from tests.closeness import GRADIENTS, VALUES, measured
from tests.ops.random_calls import truth
from tests.ops.random_calls.drawing import FUNCTIONS, Drawn
from tests.ops.random_calls.truth import Selected

# As in test_contract: plain torch may be right to the bit by luck, so fp32 rounding of numbers of
# the inputs' size is allowed besides. Here scores have any size, and rounding one of 500 moves its
# exponential 500 times as much.
BESIDES = 4 * torch.finfo(torch.float32).eps
ASKED = {
    "side": asked.side_attention,
    "map": asked.attention_map,
    "kl": asked.attention_kl,
}
OPERANDS = ("q", "k", "v", "g")
HUGE = 1e6  # d head_weight of a head of weight 0 that lies far above all others is cut off


@dataclass
class Answer:
    results: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


@contextmanager
def dirty_memory() -> Iterator[None]:
    """New memory is filled with NaN, so that a read before the first write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _differentiate(drawn: Drawn, function, dtype: torch.dtype | None) -> Answer:
    """dtype: of q, k, v and g, all others being fp32 or fp64; None: as drawn."""
    inputs = {n: x.detach() for n, x in drawn.inputs.items()}
    if dtype is not None:
        others = torch.promote_types(dtype, torch.float32)
        inputs = {n: x.to(dtype if n in OPERANDS else others) for n, x in inputs.items()}
    leaves = {n: inputs[n].requires_grad_() for n in drawn.trained}
    results = function(inputs)
    pairs = [(r, u) for r, u in zip(results, drawn.upstream, strict=True) if u is not None]
    pairs = [(r, u) for r, u in pairs if r.requires_grad]  # lse does not depend on v
    found = [torch.zeros_like(x) for x in leaves.values()]
    if pairs:
        outputs, above = [r for r, _ in pairs], [u.to(r.dtype) for r, u in pairs]
        found = torch.autograd.grad(
            outputs, list(leaves.values()), above, allow_unused=True, materialize_grads=True
        )
    return Answer(tuple(results), dict(zip(leaves, found, strict=True)))


def ours(drawn: Drawn, backend: str) -> Answer:
    def function(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = FUNCTIONS[drawn.op](**inputs, **drawn.options, backend=backend)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    if backend == "triton" and not torch.cuda.is_available():
        interpreter.install()
    with dirty_memory():
        return _differentiate(drawn, function, None)


def plain(drawn: Drawn, selected: Selected, dtype: torch.dtype) -> Answer:
    """By plain torch in a dtype."""

    def function(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return truth.FUNCTIONS[drawn.op](inputs, drawn.options, selected)

    return _differentiate(drawn, function, dtype)


def _budget(drawn: Drawn, selected: Selected) -> list[Answer]:
    """By plain torch in the call's dtype, with the head dimensions of q and k in several orders,
    which round otherwise when summed: one order alone may be right by luck."""
    size, found = drawn.inputs["q"].shape[-1], []
    generator = torch.Generator().manual_seed(size)
    for order in (torch.arange(size), *(torch.randperm(size, generator=generator) for _ in "abc")):
        turned = {n: x[..., order] if n in ("q", "k") else x for n, x in drawn.inputs.items()}
        answer, back = plain(replace(drawn, inputs=turned), selected, drawn.dtype), order.argsort()
        for name in {"q", "k"} & set(answer.gradients):
            answer.gradients[name] = answer.gradients[name][..., back]
        found.append(answer)
    return found


def _allowed(
    name: str, o: Tensor, p: list[Tensor], t: Tensor, factor: float, besides: float
) -> str:
    """A sentence if `o` is too far from the truth `t`, else nothing."""
    if o.shape != t.shape:
        return f"{name}: shape {list(o.shape)}, not {list(t.shape)}"
    huge = t.abs() > HUGE if name == "dhead_weight" else torch.zeros_like(t, dtype=torch.bool)
    beyond = t.abs() > torch.finfo(o.dtype).max / 2
    if not ((o.isfinite() | beyond) & (o.abs() > 0.05 * HUGE))[huge].all():
        return f"{name}: not finite or small where the truth is above {HUGE:g}"
    o, t, *p = (x.masked_fill(huge, 0.0) for x in (o, t, *p))
    error, allowed = measured(o, p[0], t, factor)
    allowed = max(allowed, *(measured(o, other, t, factor)[1] for other in p[1:]))
    finite = t[t.isfinite()]
    allowed += besides * (1 + float(finite.detach().abs().max()) if len(finite) else 1.0)
    if error == float("inf"):
        return f"{name}: not finite where the truth is, or infinities differ"
    return "" if error <= allowed else f"{name}: error {error:.3e} exceeds {allowed:.3e}"


def _largest_score(drawn: Drawn) -> float:
    """The largest number that scores are rounded at: their own size or a given shift's. One further
    off than e^60 is not used."""
    if not drawn.inputs["q"].numel() or not drawn.inputs["k"].numel():
        return 0.0
    raw, _ = truth.scores(*(drawn.inputs[n].double() for n in "qk"), drawn.options)
    shift, largest = drawn.options.get("lse"), float(raw.abs().max())
    if drawn.op == "side" and shift is not None:
        given = shift[shift.isfinite()].abs()
        largest = max(largest, min(60.0, float(given.max()) if len(given) else 0.0))
    return largest


def _close(drawn: Drawn, got: Answer, selected: Selected) -> list[str]:
    right = plain(drawn, selected, torch.float64)
    budget = _budget(drawn, selected)
    size = _largest_score(drawn)
    rounded = BESIDES * (1 + size)
    # What a score is rounded by is multiplied by the gradient from above: by its largest number,
    # and not by the size that it was drawn with. Results do not depend on it.
    above = [x.abs().max() for x in drawn.upstream if x is not None and x.numel()]
    besides = rounded * max([1.0, *(float(x) for x in above)])
    # A score's gradient is multiplied by k to dq, and by q to dk.
    larger = (
        {a: max(1.0, float(drawn.inputs[b].abs().max())) for a, b in ("qk", "kq")} if size else {}
    )
    found = []
    for i, (o, t) in enumerate(zip(got.results, right.results, strict=True)):
        p = [b.results[i] for b in budget]
        found.append(_allowed(f"result {i}", o, p, t, VALUES, rounded))
    for name, t in right.gradients.items():
        p = [b.gradients[name] for b in budget]
        found.append(
            _allowed(
                f"d{name}", got.gradients[name], p, t, GRADIENTS, besides * larger.get(name, 1)
            )
        )
    return [x for x in found if x]


def _reached(drawn: Drawn, selected: Selected) -> tuple[Tensor, Tensor]:
    """bool [N, S]: keys that gradients of a row may reach as k, and as v."""
    if drawn.op == "side":
        return selected.usable, selected.usable
    listed = torch.zeros_like(selected.usable)
    listed.scatter_reduce_(1, selected.at, selected.own, "amax") if listed.numel() else None
    softmax = drawn.options["over"] == "visible" and "lse" not in drawn.inputs
    as_key = selected.visible if softmax else listed
    return as_key & listed.any(-1, keepdim=True), listed


def _zeros(drawn: Drawn, got: Answer, selected: Selected) -> list[str]:
    """What must be exactly 0: rows without keys, keys without rows, columns that are not own."""
    found, rows = [], drawn.options["rows"]
    as_key, as_value = _reached(drawn, selected)
    empty = ~as_key.any(-1)
    if drawn.op == "side":
        out, lse = got.results
        if out[empty].any() or not (lse[empty] == -torch.inf).all():
            found.append("a row without a key has out other than 0 or lse other than -inf")
    elif drawn.op == "kl":
        kept = torch.where(selected.own, drawn.inputs["target"].double(), 0.0).sum(-1) > 0
        empty = empty | ~kept
        if got.results[0][~kept].any():
            found.append("a row without target has a KL other than 0")
    elif got.results[0][~selected.own].any():
        found.append("a column that is not the row's own is not 0")
    for name in ("q", "g", "head_weight", "lse"):
        gradient = got.gradients.get(name)
        per_row = gradient is not None and gradient.dim() > 1  # a weight [Hq] has no rows
        if per_row and gradient[empty].any():
            found.append(f"d{name} of a row without keys, columns or target is not 0")
    for name, reach in (("k", as_key), ("v", as_value)):
        if name in got.gradients:
            for b in range(drawn.inputs[name].shape[0]):
                used = (reach & ~empty[:, None])[rows.sequence == b].any(0)
                if got.gradients[name][b][:, ~used].any():
                    found.append(f"d{name} of keys that no row of sequence {b} uses is not 0")
    return found


def same_bits(first: Answer, second: Answer) -> list[str]:
    """A sentence if two runs differ in a bit."""
    pairs = [*zip(first.results, second.results, strict=True)]
    pairs += [(x, second.gradients[name]) for name, x in first.gradients.items()]
    same = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)
    return [] if same else ["a second run has other bits"]


def wrong(drawn: Drawn, backend: str, *, twice: bool = True) -> list[str]:
    """What is wrong with a backend's answer to a call, in sentences."""
    selected = Selected.of(drawn.options, drawn.inputs["k"].shape[2])
    try:
        got = ours(drawn, backend)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"]
    found = _close(drawn, got, selected) + _zeros(drawn, got, selected)
    if twice:
        found += same_bits(got, ours(drawn, backend))
        if drawn.op in ASKED:
            found += _beside_itself(drawn, backend, got)
    return found


def _beside_itself(drawn: Drawn, backend: str, alone: Answer) -> list[str]:
    """What is wrong with two such calls that share their keys and values, as those of a layer do:
    each has the bits that it has alone, and keys and values have the gradients of both."""
    shared = {n: drawn.inputs[n].detach() for n in ("k", "v") if n in drawn.inputs}
    calls = [{n: x.detach() for n, x in drawn.inputs.items()} | shared for _ in range(2)]
    for inputs in calls:
        for name in drawn.trained:
            inputs[name].requires_grad_()
    with dirty_memory():
        asks = [ASKED[drawn.op](**x, **drawn.options, backend=backend) for x in calls]
        results = [x for found in asked.run(asks) for x in found]
        pairs = zip(results, drawn.upstream * 2, strict=True)
        pairs = [(r, u.to(r.dtype)) for r, u in pairs if u is not None and r.requires_grad]
        if not pairs:
            return []
        names = [n for n in drawn.trained if n in shared]
        own = [(i, n) for i in (0, 1) for n in drawn.trained if n not in shared]
        leaves = [shared[n] for n in names] + [calls[i][n] for i, n in own]
        outputs, above = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, leaves, above, allow_unused=True, materialize_grads=True
        )
    half, wrong = len(results) // 2, []
    for i, n in enumerate(names):
        one = alone.gradients[n]
        eps = torch.finfo(one.dtype).eps  # sums of fp32 are rounded at the size of what they add
        size = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
        close = {"rtol": 4 * eps, "atol": 4 * eps * size}
        if not torch.allclose(found[i], one + one, **close, equal_nan=True):
            off = float((found[i] - one - one).abs().nan_to_num().max())
            wrong.append(f"d{n} of two calls together is {off:.1e} off that of both ({size:.1e})")
        if (found[i].abs() > torch.finfo(one.dtype).tiny)[one == 0].any():
            wrong.append(f"d{n} of two calls together is not 0 where that of one is")
    for i in (0, 1):
        gradients = {n: d for (j, n), d in zip(own, found[len(names) :], strict=True) if i == j}
        answer = Answer(tuple(results[i * half : (i + 1) * half]), gradients)
        wrong += same_bits(answer, alone)
    return wrong
