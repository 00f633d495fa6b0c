"""Linear cross entropy on the CPU, over chunks of the counted rows with logits transposed, [V, n].

csrc/cpu/linear_cross_entropy*.cpp do it all where the matrix products are our own (see
`native.multiplies`); else torch's products make the logits, and the gradients from theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from groundkern import buffers, native
from groundkern.row_blocks import logit_budget, logit_chunks

# Logits alive at a time. 512 rows x 32,768 words in fp32 are one chunk; with 2048 x 65,536 it is an
# eighth of one [N, V] buffer. Four chunks cost the first product 4 % more than one, and a trained
# head's gradient a sum in fp32.
LOGIT_BYTES = 64 * 2**20


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


def _padded(rows: int) -> int:
    """Rows rounded up to a whole number of panels."""
    from groundkern import _C

    return -(-rows // _C.lanes) * _C.lanes


def _statistics(rows: int, words: int) -> int:
    """Floats that a chunk keeps beside its logits."""
    from groundkern import _C

    return (_C.terms + -(-words // _C.entries)) * _padded(rows)


def _chunk_bytes(rows: int, words: int, per_logit: int) -> int:
    return 4 * _statistics(rows, words) + per_logit * _padded(rows) * _padded(words)


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
    bias: Tensor | None  # fp32 [V]
    labels: dict[str, Tensor | None]  # target, ids, offsets and index, as _C names them
    results: dict[str, Tensor]  # loss, log_prob, lse and predicted [n]
    smoothing: float
    softcap: float

    def chunks(self) -> Iterator[_Chunk]:
        """Fill the results a chunk at a time; one buffer serves all."""
        words, per_logit = len(self.weight), self.weight.element_size()
        parts = logit_chunks(len(self.rows), words, per_logit, LOGIT_BYTES)
        tallest = parts[0].stop if parts else 0
        buffer = buffers.empty(_chunk_bytes(tallest, words, per_logit), dtype=torch.uint8)
        for part in parts:
            chunk = _Chunk(self, part, buffer)
            chunk.forward()
            yield chunk

    def spread(self, x: Tensor, like: Tensor, ignored: int = 0) -> Tensor:
        """x of the counted rows among all rows, in like's dtype, contiguous."""
        if len(self.rows) == len(like):
            return x.to(like.dtype)
        every = buffers.empty(len(like), *x.shape[1:], dtype=like.dtype).fill_(ignored)
        return every.index_copy_(0, self.rows, x.to(like.dtype))

    def statistics(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results among all rows."""
        *floats, predicted = self.results.values()
        like = target.new_empty(target.shape, dtype=torch.float32)
        return *(self.spread(x, like) for x in floats), self.spread(predicted, target, -1)


class _Chunk:
    """Some of the counted rows. What leads from their forward to their backward is in `buffer`,
    which must stay as it is where it is `kept`."""

    def __init__(self, of: _Counted, rows: slice, buffer: Tensor, kept: bool = False) -> None:
        from groundkern import _C

        self.of, self.rows, self.hidden, self.kept = of, rows, of.hidden[rows], kept
        self.own = native.multiplies(self.hidden.dtype)
        count, words = len(self.hidden), len(of.weight)
        width, tall = _padded(count), _padded(words) if self.own else words
        statistics = buffer.view(torch.float32)[: _statistics(count, words)].view(-1, width)
        logits = buffer[4 * statistics.numel() :].view(self.hidden.dtype)[: tall * width]
        self.logits = logits.view(tall, width)
        self.used = statistics.nbytes + logits.nbytes
        labels = dict(of.labels)
        for name in ("target", "index"):
            labels[name] = None if labels[name] is None else labels[name][rows]
        head = {"hidden": self.hidden, "weight": of.weight}
        self.tensors = {
            "logits": self.logits,
            "tops": statistics[_C.terms :],
            "terms": statistics[: _C.terms],
            "slopes": self.slopes(labels["offsets"]),
            **labels,
            **(head if self.own else dict.fromkeys(head)),
        }
        self.options = {"vocabulary": words, "smoothing": of.smoothing, "softcap": of.softcap}

    def slopes(self, offsets: Tensor | None) -> Tensor | None:
        """Room for the slope of the cap at the labels of each row's bag."""
        if offsets is None or self.of.softcap == 0:
            return None
        longest = max(offsets.diff().tolist(), default=0)
        return torch.empty(len(self.hidden), longest)

    def forward(self) -> None:
        from groundkern import _C

        self.tensors["terms"].zero_()
        if not self.own:
            count = len(self.hidden)
            torch.mm(self.of.weight, self.hidden.t(), out=self.logits[:, :count])
            self.logits[:, count:] = 0
        results = {name: x[self.rows] for name, x in self.of.results.items()}
        tensors = {**self.tensors, **results, "bias": self.of.bias}
        native.call(_C.linear_cross_entropy_forward, tensors, **self.options)

    def backward(
        self,
        upstream: list[Tensor],
        dhidden: Tensor,
        dweight: Tensor | None,
        dbias: Tensor | None,
        add: bool,
    ) -> None:
        """Fill this chunk's rows of dhidden; fill dweight, or add to it; add to dbias."""
        from groundkern import _C

        names = ("dloss", "dlog_prob", "dlse")
        given = dict.fromkeys(names) | {k: x[self.rows] for k, x in zip(names, upstream)}
        to = {"dhidden": dhidden[self.rows], "dweight": dweight, "dbias": dbias}
        dlogits = None
        if not self.own:
            to, dlogits = dict.fromkeys(to), self.logits
        if not self.own and self.kept:
            dlogits = buffers.empty(*self.logits.shape, dtype=self.logits.dtype)
        tensors = {**self.tensors, **given, **to, "dlogits": dlogits}
        native.call(_C.linear_cross_entropy_backward, tensors, add=add, **self.options)
        if dlogits is None:
            return
        dlogits = dlogits[:, : len(self.hidden)]
        torch.mm(dlogits.t(), self.of.weight, out=dhidden[self.rows])
        if dbias is not None:
            dbias += dlogits.sum(1, dtype=torch.float32)
        if dweight is not None and dweight.dtype == dlogits.dtype:
            torch.addmm(dweight, dlogits, self.hidden, beta=float(add), out=dweight)
        elif dweight is not None:
            product = torch.mm(dlogits, self.hidden)
            dweight.copy_(dweight + product if add else product)


def _count(
    hidden, weight, bias, target, ids, offsets, bag_index, smoothing, ignore_index, softcap
) -> _Counted:
    rows = (target != ignore_index).nonzero()[:, 0]
    if len(rows) < len(target):
        hidden, target = hidden.index_select(0, rows), target[rows]
        bag_index = None if bag_index is None else bag_index[rows]
    dtype = _product_dtype(hidden.dtype)
    bags = (ids, offsets, bag_index) if smoothing > 0 else (None,) * 3
    named = dict(zip(("target", "ids", "offsets", "index"), (target, *bags)))
    labels = {name: None if x is None else x.contiguous() for name, x in named.items()}
    results = {name: torch.empty(len(rows)) for name in ("loss", "log_prob", "lse")}
    results["predicted"] = torch.empty(len(rows), dtype=torch.int64)
    hidden, weight = (native.rows_contiguous(x.to(dtype)) for x in (hidden, weight))
    bias = None if bias is None else bias.float().contiguous()
    return _Counted(rows, hidden, weight, bias, labels, results, smoothing, softcap)


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


def keeps(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the logits of all rows, counted or not, fit one chunk."""
    per_logit = 2 if hidden.dtype == torch.bfloat16 else 4
    return hidden.shape[0] * weight.shape[0] * per_logit <= (logit_budget() or LOGIT_BYTES)


def kept_bytes(hidden: Tensor, weight: Tensor) -> int:
    """What `forward_keeping` keeps: room for all rows, of which the counted ones take theirs."""
    return _chunk_bytes(hidden.shape[0], weight.shape[0], _product_dtype(hidden.dtype).itemsize)


def forward_keeping(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward`, and the bytes that let `backward` do without its first matrix product."""
    *options, _ = rest  # all but the group
    counted = _count(hidden, weight, bias, target, *options)
    kept = buffers.empty(kept_bytes(hidden, weight), dtype=torch.uint8)
    used = 0
    if len(counted.rows) > 0:
        chunk = _Chunk(counted, slice(0, len(counted.rows)), kept, kept=True)
        chunk.forward()
        used = chunk.used
    kept[used:].zero_()  # an op's outputs are the same on every run
    return *counted.statistics(target), kept


def _gradients(
    counted: _Counted,
    chunks: Iterable[_Chunk],
    upstream: list[Tensor],
    train_weight: bool,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dhidden [n, D], dweight and dbias of the counted rows: two products, three with dweight.

    dweight is summed in fp32, or written once where all counted rows fit one chunk.
    """
    dhidden = torch.empty(counted.hidden.shape, dtype=counted.hidden.dtype)
    dbias = None if counted.bias is None else torch.zeros(len(counted.bias))
    dweight, count = weight_grad, len(counted.rows)
    for chunk in chunks:
        if dweight is None and train_weight:
            whole = chunk.rows.stop - chunk.rows.start == count
            dtype = counted.weight.dtype if whole else torch.float32
            dweight = buffers.empty(*counted.weight.shape, dtype=dtype)
        add = weight_grad is not None or chunk.rows.start > 0
        chunk.backward(upstream, dhidden, dweight, dbias, add)
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
    gradients = _gradients(counted, counted.chunks(), [upstream], train_weight, None)
    loss, *rest = counted.statistics(target)
    if row_factor is not None:
        loss = (loss * row_factor).sum()
    return loss, *rest, *_returned(counted, gradients, hidden, weight, bias, train_weight)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in gradient's dtype."""
    return torch.mul(gradient, factor, out=buffers.empty(*gradient.shape, dtype=gradient.dtype))


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
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dhidden, dweight, dbias; dweight is added to `weight_grad` instead when that is given.

    kept: what `forward_keeping` kept.
    """
    bags = (ids, offsets, bag_index)
    counted = _count(hidden, weight, bias, target, *bags, smoothing, ignore_index, softcap)
    upstream = [x[counted.rows] for x in (dloss, dlog_prob, dlse)]
    chunks = counted.chunks()
    if kept is not None:
        whole = slice(0, len(counted.rows))
        chunks = [_Chunk(counted, whole, kept, kept=True)] if whole.stop > 0 else []
    gradients = _gradients(counted, chunks, upstream, train_weight, weight_grad)
    returned = train_weight and weight_grad is None
    return _returned(counted, gradients, hidden, weight, bias, returned)
