"""Linear cross entropy on the CPU, over chunks of the counted rows with logits transposed, [V, n].

csrc/cpu/linear_cross_entropy*.cpp do all of it if the matrix products are our own (see
`native.multiplies`); else torch multiplies, and they do the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from groundkern import buffers, native
from groundkern.head_gradients import multiplied
from groundkern.ops import linear_cross_entropy as ce
from groundkern.row_blocks import logit_budget, logit_chunks

# Logits alive at a time. In fp32 512 rows and a vocabulary of 32,768 are one chunk; 2048 rows and
# 65,536 are eight. With four chunks the first product costs 4 % more than with one, and a trained
# head's gradient is summed in fp32.
LOGIT_BYTES = 64 * 2**20

scaled = multiplied


def unsupported(inputs: ce.Inputs, group: object) -> str | None:
    """Why native cannot serve this call, in one sentence; None if it can."""
    return native.unsupported_output_head(group, *inputs[:2])


def _padded(rows: int) -> int:
    """ce.Rows rounded up to a whole number of panels."""
    from groundkern import _C

    return -(-rows // _C.lanes) * _C.lanes


def _statistics(rows: int, vocabulary: int) -> int:
    """Floats that a chunk stores beside its logits."""
    from groundkern import _C

    return (_C.terms + -(-vocabulary // _C.entries)) * _padded(rows)


def _chunk_bytes(rows: int, vocabulary: int, per_logit: int) -> int:
    return 4 * _statistics(rows, vocabulary) + per_logit * _padded(rows) * _padded(vocabulary)


def _logit_bytes(dtype: torch.dtype, scores: bool) -> int:
    """Bytes that a chunk takes per logit, of products in this dtype. With `scores` they are fp32,
    in the logits' place, but beside bf16 logits of another library's product."""
    if not scores:
        return dtype.itemsize
    beside = dtype != torch.float32 and not native.multiplies(dtype)
    return 4 + (dtype.itemsize if beside else 0)


def _keeps_scores(options: ce.Options, entropy_grad: bool) -> bool:
    """Whether the backward needs the scores: exponentials alone do not tell the entropy's gradient,
    nor the softcap's slope where the exponential is 0."""
    return entropy_grad or (options.label_smoothing > 0 and options.softcap > 0)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 where this CPU multiplies it, else fp32: torch multiplies fp16 40 times slower."""
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class _Counted:
    """The counted rows, in the dtype of the products."""

    rows: Tensor  # int64 [n]: which of all rows they are
    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # fp32 [V]
    labels: dict[str, Tensor | None]  # of these rows, as _C names them
    results: ce.Rows  # of these rows
    options: ce.Options
    scores: bool  # whether chunks keep scores, see `_keeps_scores`

    def chunks(self) -> Iterator[_Chunk]:
        """Fill the results a chunk at a time; one buffer serves all."""
        vocabulary, per_logit = len(self.weight), _logit_bytes(self.weight.dtype, self.scores)
        parts = logit_chunks(len(self.rows), vocabulary, per_logit, LOGIT_BYTES)
        tallest = parts[0].stop if parts else 0
        buffer = buffers.empty(_chunk_bytes(tallest, vocabulary, per_logit), dtype=torch.uint8)
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

    def all_rows(self, target: Tensor) -> ce.Rows:
        """The results among all rows."""
        like = target.new_empty(target.shape, dtype=torch.float32)
        every = {}
        for name, x in self.results._asdict().items():
            if x is None:
                every[name] = None
            elif x.is_floating_point():
                every[name] = self.spread(x, like)
            else:
                every[name] = self.spread(x, target, -1)
        return ce.Rows(**every)


class _Chunk:
    """Some of the counted rows. What their backward reads of their forward is in `buffer`, which
    the backward must leave as it is if it is `saved`."""

    def __init__(self, of: _Counted, rows: slice, buffer: Tensor, saved: bool = False) -> None:
        from groundkern import _C

        self.of, self.rows, self.hidden, self.saved = of, rows, of.hidden[rows], saved
        self.own = native.multiplies(self.hidden.dtype)
        count, vocabulary = len(self.hidden), len(of.weight)
        width, tall = _padded(count), _padded(vocabulary) if self.own else vocabulary
        statistics = buffer.view(torch.float32)[: _statistics(count, vocabulary)].view(-1, width)
        self.used = statistics.nbytes

        def plane(dtype: torch.dtype) -> Tensor:
            taken = buffer[self.used :].view(dtype)[: tall * width].view(tall, width)
            self.used += taken.nbytes
            return taken

        dtype = self.hidden.dtype
        scores = plane(torch.float32) if of.scores else None
        self.logits = scores if scores is not None and dtype == torch.float32 else None
        if self.logits is None and not (self.own and of.scores):
            self.logits = plane(dtype)
        labels = dict(of.labels)
        for name in ("target", "own", "index"):
            labels[name] = None if labels[name] is None else labels[name][rows]
        head = {"hidden": self.hidden, "weight": of.weight}
        self.tensors = {
            "logits": None if self.own and of.scores else self.logits,
            "scores": scores,
            "tops": statistics[_C.terms :],
            "terms": statistics[: _C.terms],
            "slopes": self.slopes(labels["offsets"]),
            **labels,
            **(head if self.own else dict.fromkeys(head)),
        }
        named = ("smoothing", "label_smoothing", "z_loss", "softcap", "temperature")
        options = {name: getattr(of.options, name) for name in named}
        self.options = {"vocabulary": vocabulary, **options}

    def slopes(self, offsets: Tensor | None) -> Tensor | None:
        """Room for the softcap's slope at the labels of each row's list."""
        if offsets is None or self.of.options.softcap == 0 or self.of.scores:
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
        every = self.of.results._asdict()
        results = {name: None if x is None else x[self.rows] for name, x in every.items()}
        tensors = {**self.tensors, **results, "bias": self.of.bias}
        native.call(_C.linear_cross_entropy_forward, tensors, **self.options)

    def backward(
        self,
        upstream: ce.Upstream,
        dhidden: Tensor,
        dweight: Tensor | None,
        dbias: Tensor | None,
        add: bool,
    ) -> None:
        """Fill this chunk's rows of dhidden; fill dweight, or add to it; add to dbias."""
        from groundkern import _C

        above = upstream._asdict()
        given = {name: None if x is None else x[self.rows] for name, x in above.items()}
        to = {"dhidden": dhidden[self.rows], "dweight": dweight, "dbias": dbias}
        dlogits = None
        if not self.own:
            to, dlogits = dict.fromkeys(to), self.logits
        if not self.own and self.saved:
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
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, entropy_grad: bool = False
) -> _Counted:
    hidden, weight, bias = inputs
    rows = (labels.target != options.ignore_index).nonzero()[:, 0]
    named = labels._asdict()
    if options.smoothing == 0 and labels.weights is None:  # a bag's labels have no share
        named |= dict.fromkeys(("ids", "weights", "offsets", "index"))
    if options.label_smoothing == 0:
        named["class_weight"] = None
    if len(rows) < len(labels.target):
        hidden = hidden.index_select(0, rows)
        for name in ("target", "own", "index"):
            named[name] = None if named[name] is None else named[name][rows]
    named = {name: None if x is None else x.contiguous() for name, x in named.items()}
    dtype = _product_dtype(hidden.dtype)
    hidden, weight = (native.rows_contiguous(x.to(dtype)) for x in (hidden, weight))
    bias = None if bias is None else bias.float().contiguous()
    results, scores = _results(len(rows), options), _keeps_scores(options, entropy_grad)
    return _Counted(rows, hidden, weight, bias, named, results, options, scores)


def _results(rows: int, options: ce.Options) -> ce.Rows:
    """Room for them."""
    top = (rows, options.top_k)
    return ce.Rows(
        *(torch.empty(rows) for _ in range(3)),
        torch.empty(rows) if options.entropy else None,
        torch.empty(rows, dtype=torch.int64),
        torch.empty(top, dtype=torch.int64) if options.top_k > 0 else None,
        torch.empty(top) if options.top_k > 0 else None,
    )


def forward(inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> ce.Rows:
    counted = _count(inputs, labels, options)
    for _ in counted.chunks():
        pass
    return counted.all_rows(labels.target)


def saves_logits(inputs: ce.Inputs, options: ce.Options) -> bool:
    """Whether the logits of all rows, counted or not, fit one chunk."""
    hidden, weight, _ = inputs
    per_logit = 2 if hidden.dtype == torch.bfloat16 else 4
    if _keeps_scores(options, options.entropy):
        per_logit = _logit_bytes(_product_dtype(hidden.dtype), scores=True)
    return hidden.shape[0] * weight.shape[0] * per_logit <= (logit_budget() or LOGIT_BYTES)


def saved_bytes(inputs: ce.Inputs, options: ce.Options) -> int:
    """What `forward_saving` saves: room for all rows, of which the counted ones use their part."""
    hidden, weight, _ = inputs
    scores = _keeps_scores(options, options.entropy)
    per_logit = _logit_bytes(_product_dtype(hidden.dtype), scores)
    return _chunk_bytes(hidden.shape[0], weight.shape[0], per_logit)


def forward_saving(
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options
) -> tuple[ce.Rows, Tensor]:
    """`forward`, and the bytes that let `backward` do without its first matrix product."""
    counted = _count(inputs, labels, options, entropy_grad=options.entropy)
    saved = buffers.empty(saved_bytes(inputs, options), dtype=torch.uint8)
    used = 0
    if len(counted.rows) > 0:
        chunk = _Chunk(counted, slice(0, len(counted.rows)), saved, saved=True)
        chunk.forward()
        used = chunk.used
    saved[used:].zero_()  # an op's outputs are the same on every run
    return counted.all_rows(labels.target), saved


def _gradients(
    counted: _Counted, chunks: Iterable[_Chunk], upstream: ce.Upstream, head: ce.Head
) -> ce.Gradients:
    """dhidden [n, D], dweight and dbias of the counted rows: two products, three with dweight.

    dweight is summed in fp32, or written once if all counted rows fit one chunk.
    """
    dhidden = torch.empty(counted.hidden.shape, dtype=counted.hidden.dtype)
    dbias = None if counted.bias is None else torch.zeros(len(counted.bias))
    (train_weight, weight_grad), count = head, len(counted.rows)
    dweight = weight_grad
    for chunk in chunks:
        if dweight is None and train_weight:
            whole = chunk.rows.stop - chunk.rows.start == count
            dtype = counted.weight.dtype if whole else torch.float32
            dweight = buffers.empty(*counted.weight.shape, dtype=dtype)
        add = weight_grad is not None or chunk.rows.start > 0
        chunk.backward(upstream, dhidden, dweight, dbias, add)
    return ce.Gradients(dhidden, dweight, dbias)


def _returned(
    counted: _Counted, gradients: ce.Gradients, inputs: ce.Inputs, train_weight: bool
) -> ce.Gradients:
    """ce.Gradients of the counted rows in the inputs' shapes and dtypes."""
    (dhidden, dweight, dbias), (hidden, weight, bias) = gradients, inputs
    if train_weight:
        dweight = weight.new_zeros(weight.shape) if dweight is None else dweight.to(weight.dtype)
    return ce.Gradients(
        counted.spread(dhidden, hidden),
        dweight if train_weight else None,
        None if bias is None else dbias.to(bias.dtype),
    )


def forward_with_gradients(
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, ahead: ce.Ahead
) -> tuple[ce.Rows, ce.Gradients]:
    """Both from one set of logits.

    With row_factor [N] the loss is sum_n row_factor_n L_n, and the gradients are its own. Without,
    it is L [N], and row n of dhidden is the gradient of L_n.
    """
    counted, (row_factor, train_weight) = _count(inputs, labels, options), ahead
    rows = counted.rows
    dloss = torch.ones(len(rows)) if row_factor is None else row_factor[rows]
    upstream, head = ce.Upstream(dloss, None, None, None), ce.Head(train_weight, None)
    gradients = _gradients(counted, counted.chunks(), upstream, head)
    results = counted.all_rows(labels.target)
    if row_factor is not None:
        results = results._replace(loss=(results.loss * row_factor).sum())
    return results, _returned(counted, gradients, inputs, train_weight)


def backward(
    upstream: ce.Upstream,
    inputs: ce.Inputs,
    labels: ce.Labels,
    options: ce.Options,
    head: ce.Head,
    saved: Tensor | None = None,
) -> ce.Gradients:
    """dweight is added to `weight_grad` instead of returned if that is given.

    saved: by `forward_saving`.
    """
    # Saved is what `forward_saving` keeps; else scores are kept where a gradient needs them.
    entropy_grad = upstream.dentropy is not None and bool(upstream.dentropy.any())
    kept = options.entropy if saved is not None else entropy_grad
    counted = _count(inputs, labels, options, entropy_grad=kept)
    if not entropy_grad:
        upstream = upstream._replace(dentropy=None)
    above = ce.Upstream(*(None if x is None else x[counted.rows] for x in upstream))
    chunks = counted.chunks()
    if saved is not None:
        whole = slice(0, len(counted.rows))
        chunks = [_Chunk(counted, whole, saved, saved=True)] if whole.stop > 0 else []
    gradients = _gradients(counted, chunks, above, head)
    return _returned(counted, gradients, inputs, head.train_weight and head.weight_grad is None)
