"""Linear cross entropy on the CPU: matrix products over chunks of the counted rows (our own in fp32
where the CPU has 512-bit vectors, else torch's), and csrc/cpu/linear_cross_entropy.cpp for
everything between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from groundkern import native
from groundkern.row_blocks import logit_chunks

# Logits alive at a time. 512 rows x 32,768 words in fp32 are one chunk; with 2048 x 65,536 it is an
# eighth of one [N, V] buffer. Smaller chunks slow the first product: 128 rows cost it 1.3x.
LOGIT_BYTES = 64 * 2**20
HUGE_AT_MOST = 2**25  # bytes of a scaled gradient that asks for huge pages


def unsupported(hidden: Tensor, weight: Tensor, group: object) -> str | None:
    """Why native cannot serve this call, in one sentence; None when it can.

    Args:
        hidden: [N, D].
        weight: [V, D].
        group: the process group of a sharded vocabulary, or None.
    """
    reason = native.unsupported(hidden, weight)
    if reason is None and group is not None:
        return "the native kernels do not shard the vocabulary over a process group"
    return reason


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 where this CPU multiplies it, else fp32: torch multiplies fp16 40 times slower."""
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class _Counted:
    """The rows that count, in the dtype of the products."""

    rows: Tensor  # int64 [n]: their numbers
    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    tensors: dict[str, Tensor | None]  # target, ids, offsets and index, as _C names them
    results: list[Tensor]  # loss, log_prob, lse and predicted [n]
    smoothing: float
    softcap: float

    def chunks(self, *upstream: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Fill the results a chunk at a time and yield its rows with what stands in its logits'
        place: with an upstream gradient of loss, log_prob or lse, the logits' gradient."""
        from groundkern import _C

        words = self.weight.shape[0]
        parts = logit_chunks(len(self.rows), words, self.weight.element_size(), LOGIT_BYTES)
        tallest = parts[0].stop if parts else 0
        buffer = native.empty(tallest, words, dtype=self.hidden.dtype)
        names = ("loss", "log_prob", "lse", "predicted", "dloss", "dlog_prob", "dlse")
        for part in parts:
            logits = buffer[: part.stop - part.start]
            native.product(self.hidden[part], self.weight, logits, transposed_b=True)
            if self.bias is not None:
                logits += self.bias
            tensors = {**self.tensors, "logits": logits}
            for name in ("target", "index"):
                tensors[name] = None if tensors[name] is None else tensors[name][part]
            for name, x in zip(names, (*self.results, *upstream, *[None] * 3)):
                tensors[name] = None if x is None else x[part]
            options = {"smoothing": self.smoothing, "softcap": self.softcap}
            native.call(_C.linear_cross_entropy, tensors, **options)
            yield part, logits

    def spread(self, x: Tensor, like: Tensor, ignored: int = 0) -> Tensor:
        """x of the counted rows among all rows, in like's dtype, contiguous."""
        if len(self.rows) == len(like):
            return x.to(like.dtype)
        every = native.empty(len(like), *x.shape[1:], dtype=like.dtype).fill_(ignored)
        return every.index_copy_(0, self.rows, x.to(like.dtype))

    def statistics(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results among all rows."""
        *floats, predicted = self.results
        like = target.new_empty(target.shape, dtype=torch.float32)
        return *(self.spread(x, like) for x in floats), self.spread(predicted, target, -1)


def _count(
    hidden, weight, bias, target, ids, offsets, bag_index, smoothing, ignore_index, softcap
) -> _Counted:
    rows = (target != ignore_index).nonzero()[:, 0]
    if len(rows) < len(target):
        hidden, target = hidden.index_select(0, rows), target[rows]
        bag_index = None if bag_index is None else bag_index[rows]
    dtype = _product_dtype(hidden.dtype)
    operands = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
    bags = (ids, offsets, bag_index) if smoothing > 0 else (None,) * 3
    named = dict(zip(("target", "ids", "offsets", "index"), (target, *bags)))
    tensors = {name: None if x is None else x.contiguous() for name, x in named.items()}
    results = [torch.empty(len(rows)) for _ in range(3)]
    results.append(torch.empty(len(rows), dtype=torch.int64))
    return _Counted(rows, *operands, tensors, results, smoothing, softcap)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, log p(w), lse [N] and the likeliest id [N]; ignored rows: 0, 0, 0 and -1."""
    bags = (ids, offsets, bag_index)
    counted = _count(hidden, weight, bias, target, *bags, smoothing, ignore_index, softcap)
    for _ in counted.chunks():
        pass
    return counted.statistics(target)


def _gradients(
    counted: _Counted, upstream, train_weight: bool, weight_grad: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dhidden [n, D], dweight and dbias of the counted rows: two products, three with dweight.

    dweight is summed in fp32, or written once where all counted rows fit one chunk.
    """
    dhidden = torch.empty(counted.hidden.shape, dtype=counted.hidden.dtype)
    dweight = weight_grad
    dbias = None if counted.bias is None else torch.zeros(len(counted.bias))
    for part, dlogits in counted.chunks(*upstream):
        hidden = counted.hidden[part]
        native.product(dlogits, counted.weight, dhidden[part])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=torch.float32)
        if not train_weight and weight_grad is None:
            continue
        if dweight is None:
            dweight = native.empty(*counted.weight.shape, dtype=counted.weight.dtype)
            native.product(dlogits, hidden, dweight, transposed_a=True)
            if part.stop < len(counted.rows):
                dweight = dweight.float()
        elif dlogits.dtype == torch.float32:
            native.product(dlogits, hidden, dweight, transposed_a=True, add=True)
        else:
            dweight += torch.mm(dlogits.t(), hidden)
    return dhidden, dweight, dbias


def _returned(counted: _Counted, gradients, hidden, weight, bias, train_weight: bool):
    """Gradients of the counted rows in the inputs' shapes and dtypes."""
    dhidden, dweight, dbias = gradients
    if train_weight:
        dweight = weight.new_zeros(weight.shape) if dweight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return counted.spread(dhidden, hidden), dweight if train_weight else None, dbias


def forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    row_factor: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    train_weight: bool,
) -> tuple[Tensor | None, ...]:
    """loss, log p(w), lse, likeliest id, dhidden, dweight and dbias, from one set of logits.

    With row_factor [N] the loss is sum_n row_factor_n L_n, and the gradients are its own. Without,
    it is L [N], and row n of dhidden is the gradient of L_n.
    """
    bags = (ids, offsets, bag_index)
    counted = _count(hidden, weight, bias, target, *bags, smoothing, ignore_index, softcap)
    rows = counted.rows
    upstream = torch.ones(len(rows)) if row_factor is None else row_factor[rows]
    gradients = _gradients(counted, [upstream], train_weight, None)
    loss, *rest = counted.statistics(target)
    if row_factor is not None:
        loss = (loss * row_factor).sum()
    return loss, *rest, *_returned(counted, gradients, hidden, weight, bias, train_weight)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in gradient's dtype.

    Huge pages up to 32 MiB only: asked for a second W-shaped buffer (64 MiB beside dW), the system
    took up to 1.2 s to find them, where the whole step takes 0.15 s.
    """
    large = gradient.numel() * gradient.element_size() > HUGE_AT_MOST
    empty = torch.empty if large else native.empty
    return torch.mul(gradient, factor, out=empty(*gradient.shape, dtype=gradient.dtype))


def backward(
    dloss: Tensor,
    dlog_prob: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    group: str,
    train_weight: bool,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dhidden, dweight, dbias; dweight is added to `weight_grad` instead when that is given."""
    bags = (ids, offsets, bag_index)
    counted = _count(hidden, weight, bias, target, *bags, smoothing, ignore_index, softcap)
    upstream = [x[counted.rows] for x in (dloss, dlog_prob, dlse)]
    gradients = _gradients(counted, upstream, train_weight, weight_grad)
    returned = train_weight and weight_grad is None
    return _returned(counted, gradients, hidden, weight, bias, returned)
