"""Draws calls of the loss, with all that a user may pass to it, and checks them against plain torch
with full logits (tests/ops/naive.py) in fp64 and in the call's own dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import groundkern as gk
from groundkern.ops.cases import Call
from tests import interpreter
from tests.closeness import GRADIENTS, VALUES, measured
from tests.ops import naive
from tests.ops.random_calls.checking import BESIDES, Answer, dirty_memory, same_bits
from tests.ops.random_calls.layouts import Dice, laid_out

DTYPES = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 1}
FUNCTIONS = {"loss": gk.linear_cross_entropy, "log_prob": gk.linear_log_prob}
IGNORED = (-100, -1, 7)


@dataclass
class Drawn:
    """A call. upstream: of loss, or of log_prob, lse and entropy. budget: bytes of logits."""

    op: str
    dtype: torch.dtype
    call: Call
    trained: tuple[str, ...]
    upstream: list[Tensor]
    budget: int | None
    wide: bool
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        options = self.call.options
        soft = isinstance(options["target"], gk.SoftTargets)
        names = ("bags", "label_smoothing", "class_weight", "z_loss", "entropy", "top_k")
        rest = [n for n in names if isinstance(options.get(n), Tensor) or options.get(n)]
        return " ".join([self.op, *(["soft"] if soft else []), *rest])


def _labels(dice: Dice, rows: int, vocabulary: int, ignored: int) -> Tensor:
    target = dice.integers(0, vocabulary - 1, rows).long()
    if dice.chance(0.2):  # the ends
        target = torch.where(dice.coin(rows), vocabulary - 1, 0)
    share = dice.one_of([0.0, 0.0, 0.1, 0.5, 1.0])
    return target.masked_fill(dice.coin(rows, share=share), ignored)


def _soft(dice: Dice, rows: int, vocabulary: int, ignored: int) -> gk.SoftTargets:
    count = dice.weighed({1: 1, 2: 1, dice.within(3, 9): 4, dice.within(10, 150): 0.5})
    ids = dice.integers(0, vocabulary - 1, rows, count).long()
    if vocabulary > ignored >= 0:
        ids = torch.where(ids == ignored, 0, ids)
    ids = ids.masked_fill(dice.coin(rows, count, share=dice.one_of([0.0, 0.2, 0.9])), ignored)
    probabilities = dice.uniform(rows, count)
    if dice.chance(0.3):
        probabilities = probabilities * dice.coin(rows, count)  # many are 0
    if dice.chance(0.6):
        probabilities = probabilities / probabilities.sum(1, keepdim=True).clamp(min=1e-3)
    return gk.SoftTargets(ids, probabilities.float())


def _bags(dice: Dice, rows: int, vocabulary: int) -> gk.LabelBags:
    images = dice.within(0, 4)
    counts = torch.tensor([dice.one_of([0, 1, 3, 20, 200]) for _ in range(images)])
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).long()
    spare = dice.one_of([0, 5])
    ids = dice.integers(0, vocabulary - 1, int(offsets[-1]) + spare).long()
    return gk.LabelBags(ids, offsets, dice.integers(-1, images - 1, rows).long())


def _options(dice: Dice, rows: int, vocabulary: int, ignored: int) -> dict[str, object]:
    """Of a loss, besides what a log-probability has too."""
    options: dict[str, object] = {"reduction": dice.one_of(["mean", "sum", "none"])}
    if dice.chance(0.35):
        options["target"] = _soft(dice, rows, vocabulary, ignored)
    elif dice.chance(0.4):
        options["bags"] = _bags(dice, rows, vocabulary)
        options["smoothing"] = dice.one_of([0.0, 0.1, 0.5, 0.99])
    if dice.chance(0.4):
        options["label_smoothing"] = dice.one_of([0.05, 0.5, 1.0])
    if dice.chance(0.3):
        weight = dice.uniform(vocabulary) * dice.coin(vocabulary, share=0.8)
        options["class_weight"] = weight.float()
    if dice.chance(0.3):
        options["z_loss"] = dice.one_of([1e-4, 0.1])
    if dice.chance(0.3):
        options["row_weight"] = dice.normal(rows).float()
    return options


def _laid_out(dice: Dice, x: object) -> object:
    """Tensors, also those of a value type, in some layout."""
    if isinstance(x, Tensor):
        return laid_out(dice, x, 0.6)[0]
    if isinstance(x, gk.LabelBags | gk.SoftTargets):
        return type(x)(*(laid_out(dice, y, 0.6)[0] for y in x.tensors()))
    return x


def draw(seed: int, number: int, op: str | None = None, *, small: bool = False) -> Drawn:
    """Call `number`. small: for a few seconds of the interpreter."""
    dice = Dice(seed, number)
    op = op or dice.weighed({"loss": 3, "log_prob": 1})
    dtype = dice.weighed(DTYPES)
    rows = dice.weighed(
        {0: 0.3, 1: 2, dice.within(2, 12): 10, dice.within(13, 70): 0 if small else 3}
    )
    few, some = dice.within(2, 40), dice.within(41, 400)
    many = dice.within(4000, 9000)
    vocabulary = dice.weighed({1: 0.5, few: 4, some: 6, many: 0 if small else 1})
    dim = dice.weighed({1: 0.5, dice.one_of([8, 16, 32, 64]): 5, dice.within(2, 70): 4})
    size = dice.weighed({0.3: 1, 1.0: 6, 5.0: 2, 30.0: 1})
    inputs = {
        "hidden": dice.normal(rows, dim) * size,
        "weight": dice.normal(vocabulary, dim) * dim**-0.5,
    }
    if dice.chance(0.4):
        inputs["bias"] = dice.normal(vocabulary)
    if rows and dice.chance(0.2):  # one row is certain of one label
        inputs["hidden"][0] = inputs["weight"][vocabulary // 2] * 40
    inputs = {n: laid_out(dice, x.to(dtype))[0] for n, x in inputs.items()}
    ignored = dice.one_of(IGNORED)
    options = {"target": _labels(dice, rows, vocabulary, ignored), "ignore_index": ignored}
    options["softcap"] = dice.weighed({None: 3, 3.0: 1, 30.0: 1})
    options["temperature"] = dice.weighed({1.0: 3, 0.3: 1, 2.5: 1})
    options["entropy"] = dice.chance(0.4)
    options["top_k"] = dice.weighed({0: 3, 1: 0.5, dice.within(2, 32): 1})
    if op == "loss":
        options |= _options(dice, rows, vocabulary, ignored)
    options = {n: _laid_out(dice, x) for n, x in options.items()}
    trained = tuple(n for n in inputs if dice.chance(0.75)) or ("hidden",)
    upstream = [dice.normal(rows) for _ in range(3)]
    if op == "loss":
        upstream = [dice.normal(rows) if options["reduction"] == "none" else dice.normal()]
    notes = {"rows": rows, "vocabulary": vocabulary, "dim": dim, "size": size, "trained": trained}
    notes |= {n: x for n, x in options.items() if not isinstance(x, Tensor)}
    budget = dice.weighed({None: 2, vocabulary * dtype.itemsize * dice.within(1, 9): 1})
    call = Call(FUNCTIONS[op], inputs, options)
    return Drawn(op, dtype, call, trained, upstream, budget, dice.chance(0.2), notes)


def _results(op: str, options: dict, results: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """(the differentiable ones, the others)."""
    if op == "loss":
        return [results[0]], list(results[1:])
    first = [0, 1] + [3] * bool(options["entropy"])
    return [results[i] for i in first], [x for i, x in enumerate(results) if i not in first]


def _answer(drawn: Drawn, function, inputs: dict[str, Tensor], **more) -> Answer:
    leaves = {n: x.detach().requires_grad_(n in drawn.trained) for n, x in inputs.items()}
    results = Call(function, leaves, drawn.call.options).run(**more)
    outputs, others = _results(drawn.op, drawn.call.options, results)
    wanted = [leaves[n] for n in drawn.trained]
    above = [u.to(o.dtype) for u, o in zip(drawn.upstream, outputs, strict=False)]
    gradients = torch.autograd.grad(
        outputs, wanted, above, allow_unused=True, materialize_grads=True
    )
    return Answer((*outputs, *others), dict(zip(drawn.trained, gradients, strict=True)))


@contextmanager
def _settings(drawn: Drawn) -> Iterator[None]:
    gk.set_logit_budget(drawn.budget)
    gk.set_logit_dtype(torch.float32 if drawn.wide else None)
    try:
        yield
    finally:
        gk.set_logit_budget(None)
        gk.set_logit_dtype(None)


def ours(drawn: Drawn, backend: str) -> Answer:
    if backend == "triton" and not torch.cuda.is_available():
        interpreter.install()
    with _settings(drawn), dirty_memory():
        return _answer(drawn, drawn.call.function, drawn.call.inputs, backend=backend)


def plain(drawn: Drawn, dtype: torch.dtype) -> Answer:
    """By plain torch in a dtype."""
    inputs = {n: x.to(dtype) for n, x in drawn.call.inputs.items()}
    return _answer(drawn, getattr(naive, drawn.call.function.__name__), inputs)


def _close(name: str, o: Tensor, p: Tensor, t: Tensor, factor: float, besides: float) -> str:
    if o.shape != t.shape:
        return f"{name}: shape {list(o.shape)}, not {list(t.shape)}"
    error, allowed = measured(o, p, t, factor)
    finite = t[t.isfinite()].detach().abs()
    allowed += besides * (1 + float(finite.max()) if len(finite) else 1.0)
    if error == float("inf"):
        return f"{name}: not finite where the truth is, or infinities differ"
    return "" if error <= allowed else f"{name}: error {error:.3e} exceeds {allowed:.3e}"


def _logits(drawn: Drawn) -> Tensor:
    """fp64 [N, V], over the temperature."""
    inputs, options = drawn.call.inputs, drawn.call.options
    operands = [inputs[n].double() if n in inputs else None for n in ("hidden", "weight", "bias")]
    z = torch.nn.functional.linear(*operands)
    cap = options["softcap"]
    return (z if cap is None else cap * torch.tanh(z / cap)) / options["temperature"]


def _terms(drawn: Drawn, total: Tensor) -> float:
    """How much larger than a reduced loss what it is the sum of is: rows of either sign cancel."""
    if drawn.op != "loss" or total.dim() or not drawn.notes["rows"]:
        return 1.0
    options = {**drawn.call.options, "reduction": "none"}
    inputs = {n: x.double() for n, x in drawn.call.inputs.items()}
    rows = naive.linear_cross_entropy(**inputs, **options)[0]
    return max(1.0, float(rows.abs().sum() / (1 + rows.sum().abs())))


def _likeliest(name: str, ids: Tensor, logits: Tensor, apart: float) -> str:
    """The k-th id has a logit no further than `apart` from the k-th largest."""
    if not ids.numel():
        return ""
    ids = ids.reshape(len(logits), -1)
    kept, count = ids[:, 0] >= 0, min(ids.shape[1], logits.shape[1])
    ids, logits = ids[kept], logits[kept]
    if (ids[:, count:] != -1).any():
        return f"{name}: ids beyond the vocabulary"
    ids = ids[:, :count]
    if any(len(set(row)) != count for row in ids.tolist()):
        return f"{name}: an id is there twice"
    missed = logits.sort(dim=1, descending=True)[0][:, :count] - logits.gather(1, ids)
    return f"{name}: other ids" if missed.numel() and float(missed.abs().max()) > apart else ""


def _ignored(drawn: Drawn, got: Answer) -> list[str]:
    """What must be exactly 0."""
    options, gradient = drawn.call.options, got.gradients.get("hidden")
    target = options["target"]
    soft = isinstance(target, gk.SoftTargets)
    listed = target.ids if soft else target[:, None]
    out = (listed == options["ignore_index"]).all(1)
    wrong = gradient is not None and bool(gradient[out].any())
    return ["dhidden of an ignored row is not 0"] * wrong


def wrong(drawn: Drawn, backend: str, *, twice: bool = True) -> list[str]:
    """What is wrong with a backend's answer to a call, in sentences."""
    try:
        got = ours(drawn, backend)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"]
    truth, budget = plain(drawn, torch.float64), plain(drawn, drawn.dtype)
    logits = _logits(drawn)
    largest = float(logits.abs().max()) if logits.numel() else 0.0
    above = max([1.0, *(float(x.abs().max()) for x in drawn.upstream if x.numel())])
    besides = BESIDES * (1 + largest) * above
    # Products of 16-bit operands are rounded to 16 bits, by torch and, but for `wide`, by us: half
    # a last place in each logit. A row may be lucky on one side and not on the other.
    rounded = torch.finfo(drawn.dtype).eps * (1 + largest) if drawn.dtype.itemsize == 2 else 0.0
    found = []
    for i, (o, p, t) in enumerate(zip(got.results, budget.results, truth.results, strict=True)):
        name = f"result {i}"
        if o.is_floating_point():
            terms = _terms(drawn, t) if i == 0 else 1.0
            found.append(_close(name, o, p, t, VALUES, (besides + rounded) * terms))
        else:
            found.append(_likeliest(name, o, logits, rounded + 8 * besides))
    other = {"hidden": "weight", "weight": "hidden"}
    for name, t in truth.gradients.items():
        operand = drawn.call.inputs.get(other.get(name, ""), torch.ones(1))
        size = float(operand.abs().max()) if operand.numel() else 1.0
        p, o = budget.gradients[name], got.gradients[name]
        found.append(_close(f"d{name}", o, p, t, GRADIENTS, besides * max(1.0, size)))
    found += _ignored(drawn, got)
    if twice:
        found += same_bits(got, ours(drawn, backend))
    return [x for x in found if x]
