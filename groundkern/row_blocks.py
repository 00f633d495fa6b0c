"""What the implementations share: bounded blocks of rows, and autograd inside an op."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from groundkern import checks

BLOCK_ELEMENTS = 2**24  # scores or logits alive at a time: 64 MiB in fp32
LOGIT_BYTES = 2**30  # logits and their gradient alive at a time, unless a backend knows better

_logit_budget: int | None = None


def logit_budget() -> int | None:
    """The bytes that `set_logit_budget` has set.

    Returns:
        Bytes, or None: every backend's own default.
    """
    return _logit_budget


def set_logit_budget(size: int | None) -> None:
    """Set the bytes of logits, their gradient included, that `linear_cross_entropy` and
    `linear_log_prob` hold at a time, and of maps that `attention_divergence` does.

    More of them means fewer and larger matrix products, and a trained head's gradient written once
    if all rows fit. Results differ by rounding. One row is a chunk of its own, however small the
    budget (on native it takes the room of 32, as does every part of 32 rows).

    The setting is the process's, like torch's number of threads: every call of the native and the
    Triton kernels reads it as it runs, compiled or not, in the backward too (which autograd may run
    on threads of its own, out of a context manager's reach). With a process group it must be the
    same on all ranks.

    Args:
        size: bytes; None: the backend's default (2**30 on Triton, 2**26 on native).

    Raises:
        ValueError: neither None nor a positive whole number.
    """
    whole = isinstance(size, int) and not isinstance(size, bool)
    checks.require(
        size is None or (whole and size > 0), "size", "a positive number of bytes or None", size
    )
    global _logit_budget
    _logit_budget = size


_logit_dtype: torch.dtype | None = None


def set_logit_dtype(dtype: torch.dtype | None) -> None:
    """Set the dtype in which the Triton kernels hold the logits of 16-bit operands.

    In the operands' own, their gradient takes their place: 2 bytes a logit, and results as exact as
    those of torch, whose 16-bit products are rounded too. In float32 logits are rounded by 2^-24 of
    their size instead of 2^-9, and take 6 bytes, their gradient included.

    The setting is the process's, like `set_logit_budget`. With a process group it must be the same
    on all ranks.

    Args:
        dtype: torch.float32, or None: the operands'.

    Raises:
        ValueError: another dtype.
    """
    good = dtype is None or dtype == torch.float32
    checks.require(good, "dtype", "torch.float32 or None", dtype)
    global _logit_dtype
    _logit_dtype = dtype


def logit_dtype(operands: torch.dtype) -> torch.dtype:
    """The dtype of logits that the Triton kernels hold.

    Args:
        operands: the dtype of hidden and weight.

    Returns:
        What `set_logit_dtype` has set, else the operands' dtype.
    """
    return _logit_dtype or operands


def row_blocks(sequence: Tensor, sequences: int, per_row: int) -> Iterator[tuple[int, slice]]:
    """Yield (sequence, rows) so that a block holds rows of one sequence and about BLOCK_ELEMENTS
    scores.

    Args:
        sequence: int32 [N], ascending.
        sequences: B.
        per_row: scores one row needs (query heads x keys).
    """
    limit = max(1, BLOCK_ELEMENTS // max(1, per_row))
    first = 0
    for b, count in enumerate(torch.bincount(sequence.cpu(), minlength=sequences).tolist()):
        for start in range(first, first + count, limit):
            yield b, slice(start, min(start + limit, first + count))
        first += count


@contextmanager
def recording() -> Iterator[None]:
    """Let autograd record inside a custom op, although the dispatcher has switched it off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def vjp(
    block: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of `block(*inputs)` against `upstream`, one per input (None for an absent one).

    Outputs of the block beyond the upstream gradients given are left out.
    """
    with recording():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = block(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        present = [x for x in leaves if x is not None]
        outputs = outputs[: len(upstream)]
        gradients = iter(torch.autograd.grad(outputs, present, upstream, materialize_grads=True))
    return [None if x is None else next(gradients) for x in leaves]


def scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """s_tj = scale q_t . k_j, softcapped: q [n, Hq, D], k [Hkv, S, D] -> [n, Hq, S]."""
    n, heads, dim = q.shape
    grouped = q.reshape(n, k.shape[0], heads // k.shape[0], dim)  # [n, Hkv, Hq / Hkv, D]
    s = torch.einsum("nkgd,ksd->nkgs", grouped, k).reshape(n, heads, -1) * scale
    return softcap * torch.tanh(s / softcap) if softcap > 0 else s


def logit_chunks(
    rows: int,
    vocabulary: int,
    bytes_per_logit: int,
    budget: int | None = None,
    *,
    dim: int | None = None,
    processors: int = 132,
) -> list[slice]:
    """Cut [0, rows) into chunks of even size whose logits fit a budget; rows >= 1 in each.

    Args:
        bytes_per_logit: all that is held for one logit, its gradient included.
        budget: bytes of a chunk if none is set; default LOGIT_BYTES.
        dim: columns of hidden. If given, there may be up to a third more chunks than fit, if the
            products [rows of a chunk, dim] then take fewer waves over a GPU's `processors`.
    """
    size = _logit_budget or budget or LOGIT_BYTES
    limit = max(1, size // (max(1, vocabulary) * bytes_per_logit))
    fewest = -(-rows // limit)
    if dim is not None and fewest > 1:

        def waves(chunks: int) -> int:
            heights = (x.stop - x.start for x in _even(rows, chunks, limit))
            tiles = (-(-height // 128) * -(-dim // 256) for height in heights)
            return sum(-(-count // processors) for count in tiles)

        fewest = min(range(fewest, fewest + fewest // 3 + 1), key=waves)  # the first of the best
    return _even(rows, fewest, limit)


def _even(rows: int, chunks: int, limit: int) -> list[slice]:
    """[0, rows) in about so many chunks, their heights multiples of a GEMM's tiles if they may."""
    height = -(-rows // max(1, chunks))
    for tile in (256, 128):
        aligned = -(-height // tile) * tile
        if aligned <= limit:
            height = aligned
            break
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height or 1)]
