"""Linear KL on the CPU: torch's matrix products over chunks of the counted rows, and in between
closed forms of loss and gradient, on so few rows at a time that they stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from groundkern import buffers, native
from groundkern.head_gradients import multiplied
from groundkern.ops import linear_kl as kl
from groundkern.row_blocks import logit_chunks

LOGIT_BYTES = 64 * 2**20  # of both heads, alive at a time, if no budget is set
scaled = multiplied
CACHED = 2**19  # logits of one head that the closed forms work on at once: 2 MiB in fp32


def unsupported(inputs: kl.Inputs, group: object) -> str | None:
    """Why native cannot serve this call, in one sentence; None if it can."""
    return native.unsupported_output_head(group, *inputs)


@dataclass(frozen=True)
class _Head:
    """One head on the counted rows, in the dtype of its products."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # fp32 [V]
    softcap: float

    @classmethod
    def of(cls, operands: tuple, rows: Tensor | None, softcap: float) -> _Head:
        hidden, weight, bias = operands
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        dtype = native.product_dtype(hidden.dtype)
        hidden, weight = (native.rows_contiguous(x.to(dtype)) for x in (hidden, weight))
        return cls(hidden, weight, None if bias is None else bias.float(), softcap)

    def multiply(self, rows: slice, out: Tensor) -> None:
        torch.mm(self.hidden[rows], self.weight.t(), out=out)

    def logits(self, product: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """(T1) fp32 [m, V], a new tensor, and the slope at the product: None means 1."""
        z, slope = product.to(torch.float32, copy=True), None
        if self.bias is not None:
            z += self.bias
        if self.softcap > 0:
            z = z.div_(self.softcap).tanh_()
            slope = torch.addcmul(torch.ones(()), z, z, value=-1)
            z *= self.softcap
        if temperature != 1:
            z /= temperature
            slope = torch.tensor(1 / temperature) if slope is None else slope.div_(temperature)
        return z, slope


def _log_probs(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of logits [m, V]; the likeliest entry [m, 1], and the sum of the others' exp."""
    top, own = z.max(1, keepdim=True)
    z -= top
    e = z.exp().scatter_(1, own, 0.0)
    others = e.sum(1, keepdim=True)
    z -= others.log1p()
    return z, own, others


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p x, 0 where p is: x may be infinite there."""
    return torch.where(p == 0, 0.0, p * x)


def _compared(
    log_s: Tensor, log_t: Tensor, options: kl.Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of (T2) or (T3) [m, V], s, s - t, and the log-ratio whose distance from its mean
    over s is the gradient (T4)."""
    s, t = log_s.exp(), log_t.exp()
    ratio = torch.where((s == 0) & (t == 0), 0.0, log_t - log_s)
    rest = ratio.abs().neg_().expm1_()  # min(s, t) / max(s, t) - 1
    difference = torch.where(ratio > 0, t, -s) * rest  # s - t
    if options.kind == "forward":
        return difference + _times(t, ratio), s, difference, ratio
    if options.kind == "reverse":
        ratio.neg_()
        return _times(s, ratio) - difference, s, difference, ratio
    beta = options.beta
    rest = rest.mul_(torch.where(ratio > 0, 1 - beta, beta)).log1p_()  # log(m / max(s, t))
    of_teacher = _times(t, ratio.clamp(max=0) - rest)
    to_mixture = ratio.clamp_(min=0).neg_().sub_(rest)  # log(s / m)
    of_student = _times(s, to_mixture)
    return of_teacher.mul_(beta).add_(of_student, alpha=1 - beta), s, difference, to_mixture


def _losses(
    student: Tensor, teacher: Tensor, options: kl.Options, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits [m, V], which are overwritten -> loss [m] and its gradient [m, V] (T4)."""
    log_s, own, others = _log_probs(student)
    log_t, own_t, others_t = _log_probs(teacher)
    if options.kind == "forward":
        # At the student's likeliest entry, from the others' shares.
        share_t = torch.where(
            own == own_t, others_t / (1 + others_t), -torch.expm1(log_t.gather(1, own))
        )
        at_own = share_t - others / (1 + others)
    terms, s, difference, ratio = _compared(log_s, log_t, options)
    loss = terms.sum(1)
    if not gradient:
        return loss, None
    if options.kind == "forward":
        return loss, difference.scatter_(1, own, at_own)
    ratio -= ratio.gather(1, own)  # 0 at the likeliest entry
    ratio = torch.where(s == 0, 0.0, ratio)
    mean = (s * ratio).sum(1, keepdim=True)
    scale = 1.0 if options.kind == "reverse" else 1 - options.beta
    return loss, ratio.sub_(mean).mul_(s).mul_(scale)


@dataclass(frozen=True)
class _Counted:
    """The counted rows."""

    rows: Tensor | None  # int64 [n]: which of all rows they are; None: all
    student: _Head
    teacher: _Head
    options: kl.Options

    @classmethod
    def of(cls, inputs: kl.Inputs, rows: kl.Rows, options: kl.Options) -> _Counted:
        at = None if rows.counted is None else rows.counted.nonzero()[:, 0]
        student = _Head.of(inputs[:3], at, options.softcap)
        return cls(at, student, _Head.of(inputs[3:], at, options.teacher_softcap), options)

    def __len__(self) -> int:
        return len(self.student.hidden)

    def chunks(self, loss: Tensor, upstream: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Fill loss [n]; yield rows and, in the memory of the student's logits, the gradient at
        its product against `upstream` [n], if that is given."""
        heads, vocabulary = (self.student, self.teacher), len(self.student.weight)
        per_logit = sum(head.weight.element_size() for head in heads)
        parts = logit_chunks(len(self), vocabulary, per_logit, LOGIT_BYTES)
        height = parts[0].stop if parts else 0
        room = [buffers.empty(height, vocabulary, dtype=head.weight.dtype) for head in heads]
        for rows in parts:
            products = [x[: rows.stop - rows.start] for x in room]
            for head, product in zip(heads, products, strict=True):
                head.multiply(rows, product)
            above = None if upstream is None else upstream[rows]
            self._compare(products, loss[rows], above)
            yield rows, products[0]

    def _compare(self, products: list[Tensor], loss: Tensor, upstream: Tensor | None) -> None:
        student, teacher = products
        temperature = self.options.temperature
        step = max(1, CACHED // student.shape[1])
        for some in (slice(at, at + step) for at in range(0, len(loss), step)):
            z, slope = self.student.logits(student[some], temperature)
            t, _ = self.teacher.logits(teacher[some], temperature)
            loss[some], gradient = _losses(z, t, self.options, upstream is not None)
            if gradient is not None:
                gradient *= upstream[some, None]
                student[some] = gradient if slope is None else gradient.mul_(slope)

    def spread(self, x: Tensor, like: Tensor) -> Tensor:
        """x of the counted rows among all rows, in like's dtype, contiguous; 0 elsewhere."""
        if self.rows is None:
            return x.to(like.dtype)
        every = buffers.empty(len(like), *x.shape[1:], dtype=like.dtype).zero_()
        return every.index_copy_(0, self.rows, x.to(like.dtype))

    def gradients(
        self, loss: Tensor, upstream: Tensor, inputs: kl.Inputs, train_weight: bool
    ) -> kl.Gradients:
        """Fill loss [n]. dweight is summed in fp32, or written once if all rows fit one chunk."""
        hidden, weight, bias = inputs[:3]
        states, head = self.student.hidden, self.student.weight
        dhidden, dweight = buffers.empty(*states.shape, dtype=states.dtype), None
        dbias = None if bias is None else torch.zeros(len(bias))
        for rows, dlogits in self.chunks(loss, upstream):
            torch.mm(dlogits, head, out=dhidden[rows])
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=torch.float32)
            if train_weight:
                dweight = self._add_dweight(dweight, dlogits, states[rows])
        if train_weight:
            dweight = weight.new_zeros(weight.shape) if dweight is None else dweight
        return kl.Gradients(
            self.spread(dhidden, hidden),
            dweight.to(weight.dtype) if train_weight else None,
            None if dbias is None else dbias.to(bias.dtype),
        )

    def _add_dweight(self, dweight: Tensor | None, dlogits: Tensor, states: Tensor) -> Tensor:
        """dweight [V, D] with a chunk's part."""
        head = self.student.weight
        if dweight is None:
            dtype = head.dtype if len(dlogits) == len(self) else torch.float32
            dweight = buffers.empty(*head.shape, dtype=dtype)
            if dtype == head.dtype:
                return torch.mm(dlogits.t(), states, out=dweight)
            return dweight.copy_(torch.mm(dlogits.t(), states))
        if dweight.dtype == head.dtype:
            return dweight.addmm_(dlogits.t(), states)
        return dweight.add_(torch.mm(dlogits.t(), states))


def _loss_of_all(counted: _Counted, loss: Tensor, hidden: Tensor) -> Tensor:
    return counted.spread(loss, hidden.new_empty(len(hidden), dtype=torch.float32))


def forward(inputs: kl.Inputs, rows: kl.Rows, options: kl.Options) -> Tensor:
    """Loss [N]."""
    counted = _Counted.of(inputs, rows, options)
    loss = torch.empty(len(counted))
    for _ in counted.chunks(loss, None):
        pass
    return _loss_of_all(counted, loss, inputs.hidden)


def forward_with_gradients(
    inputs: kl.Inputs, rows: kl.Rows, options: kl.Options, ahead: kl.Ahead
) -> tuple[Tensor, kl.Gradients]:
    """Both from one set of logits: four products, or three if the weight is frozen.

    With row_factor [N] the loss is sum_n row_factor_n L_n, and the gradients are its own. Without,
    it is L [N], and row n of dhidden is the gradient of L_n.
    """
    counted, factor = _Counted.of(inputs, rows, options), ahead.row_factor
    upstream = torch.ones(len(counted))
    if factor is not None:
        upstream = factor if counted.rows is None else factor[counted.rows]
    loss = torch.empty(len(counted))
    gradients = counted.gradients(loss, upstream, inputs, ahead.train_weight)
    if factor is not None:
        return (loss * upstream).sum(), gradients
    return _loss_of_all(counted, loss, inputs.hidden), gradients


def backward(
    upstream: kl.Upstream,
    inputs: kl.Inputs,
    rows: kl.Rows,
    options: kl.Options,
    train_weight: bool,
) -> kl.Gradients:
    counted = _Counted.of(inputs, rows, options)
    above = upstream.dloss if counted.rows is None else upstream.dloss[counted.rows]
    return counted.gradients(torch.empty(len(counted)), above, inputs, train_weight)
