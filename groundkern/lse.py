"""The main pass's log-sum-exp, from kernels that compute one anyway.

`attention` calls such a kernel and returns both results; `Watch` picks up the statistics of an
attention function that drops them. Before a kernel's statistics are used for the first time on a
device, `self_test` compares their dtype (fp32), layout ([B, Hq, S]) and base (natural) with fp64.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from groundkern.checks import fail
from groundkern.precision import accumulation_dtype

Run = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def _aten_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    return op(q, k, v, is_causal=True, scale=scale)[:2]


def _aten_flash_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(q, k, v, is_causal=True, scale=scale)


def _aten_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(q, k, v, None, True, is_causal=True, scale=scale)
    return out, _squeezed(lse)


def _squeezed(lse: Tensor) -> Tensor:
    """cuDNN returns [B, Hq, S, 1], every other kernel [B, Hq, S]."""
    return lse[..., 0] if lse.dim() == 4 and lse.shape[3] == 1 else lse


def _aten_efficient(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # not grouped in this kernel
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    return op(q, k, v, None, True, is_causal=True, scale=scale)[:2]


def _flash_attn(package: str) -> Run:
    """`flash_attn_func` of FlashAttention-2 or -3, whose tensors are [B, S, H, D]."""

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        try:
            function = import_module(package).flash_attn_func
        except ImportError as error:
            raise ValueError(f"`kernel`: {package} is not importable here ({error})") from error
        optional = "return_attn_probs" in inspect.signature(function).parameters
        options = {"return_attn_probs": True} if optional else {}  # early FA-3 always returns both
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = function(q, k, v, softmax_scale=scale, causal=True, **options)
        return out.transpose(1, 2), lse

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    flex = import_module("torch.nn.attention.flex_attention")
    length = q.shape[2]
    causal = _causal_blocks(length, q.device)
    run = flex.flex_attention if q.device.type == "cpu" else _compiled_flex()
    request = flex.AuxRequest(lse=True)
    grouped = q.shape[1] != k.shape[1]
    out, aux = run(q, k, v, block_mask=causal, scale=scale, enable_gqa=grouped, return_aux=request)
    return out, aux.lse


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(import_module("torch.nn.attention.flex_attention").flex_attention)


@cache
def _causal_blocks(length: int, device: torch.device) -> object:  # a BlockMask
    create = import_module("torch.nn.attention.flex_attention").create_block_mask
    return create(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


KERNELS: dict[str, Run] = {
    "aten_flash": _aten_flash,
    "aten_flash_cpu": _aten_flash_cpu,
    "aten_efficient": _aten_efficient,
    "aten_cudnn": _aten_cudnn,
    "flash_attn_2": _flash_attn("flash_attn"),
    "flash_attn_3": _flash_attn("flash_attn_interface"),
    "flex": _flex,
}
# Ops whose second result is the log-sum-exp, by their name in torch's dispatcher.
OPS = {
    "aten::_scaled_dot_product_flash_attention": "aten_flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "aten_flash_cpu",
    "aten::_scaled_dot_product_efficient_attention": "aten_efficient",
    "aten::_scaled_dot_product_cudnn_attention": "aten_cudnn",  # torch >= 2.11 on Hopper
    "flash_attn::_flash_attn_forward": "flash_attn_2",
}
WATCHED = ("sdpa", "flash_attention_2")  # implementations of transformers that end in one of these


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: str, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention by a named kernel, with the log-sum-exp it computes anyway.

    Equals `F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)`
    and `scores.logsumexp(-1)` of the causal scores.

    Args:
        q: [B, Hq, S, D] float.
        k, v: [B, Hkv, S, D] in q's dtype; Hq is a multiple of Hkv.
        kernel: "aten_flash", "aten_flash_cpu", "aten_efficient", "aten_cudnn", "flash_attn_2",
            "flash_attn_3" or "flex". Each serves its own devices, dtypes and head dimensions.
        scale: of the scores; default D ** -0.5.

    Returns:
        out [B, Hq, S, D], differentiable if the kernel is, and lse [B, Hq, S], detached: fp32 (fp64
        for fp64 inputs), natural log. Pass `rows.take(lse[..., None])[..., 0]` as the `lse` of
        `side_attention` or `attention_map` for rows without padding or window.

    Raises:
        ValueError: an unknown kernel, or one whose package is not installed.
        RuntimeError: a kernel that cannot run here, or whose statistics have another dtype, layout
            or base than expected.
    """
    if kernel not in KERNELS:
        fail("kernel", " | ".join(KERNELS), kernel)
    self_test(kernel, q.device.type, q.dtype)
    out, lse = KERNELS[kernel](q, k, v, scale)
    return out, lse.detach()[..., : q.shape[2]]


class CannotRun(RuntimeError):
    """A kernel fails on the self-test's inputs, so nothing is known of its statistics."""


def self_test(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Compare a kernel's log-sum-exp of a small causal problem with fp64, once per combination.

    Args:
        kernel: a name in `KERNELS`.
        device: a device type, "cpu" or "cuda".
        dtype: of q, k and v.

    Raises:
        CannotRun: the kernel does not run on this device in this dtype.
        RuntimeError: another dtype, layout or base than fp32, [B, Hq, S] and natural.
        ValueError: its package is not installed.
    """
    error = _tested(kernel, device, dtype)
    if error is not None:
        raise error


@cache
def _tested(kernel: str, device: str, dtype: torch.dtype) -> Exception | None:
    """What is wrong with a kernel's statistics; None if nothing is."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 37, 64), (2, 2, 37, 64), (2, 2, 37, 64))  # no two of B, H, S alike
    q, k, v = (torch.randn(s, generator=draw).to(device, dtype) for s in shapes)
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            _, lse = KERNELS[kernel](q, k, v, None)
        except ValueError as error:
            return error
        except Exception as error:
            return CannotRun(f"{kernel} does not run on {device} in {dtype}: {error}")
    s = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 64**-0.5
    future = torch.ones(37, 37, dtype=torch.bool, device=device).triu(1)
    truth = s.masked_fill(future, -torch.inf).logsumexp(-1)
    try:
        _hold(kernel, lse, truth, accumulation_dtype(dtype))
    except RuntimeError as error:
        return error
    return None


def _hold(kernel: str, lse: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `lse` is `truth` [B, Hq, S] in `dtype`; its S may be padded."""

    def near(x: Tensor) -> bool:
        return bool(((lse[..., : x.shape[2]].double() - x).abs() < 1e-3).all())

    said = f"the log-sum-exp of {kernel} on {truth.device.type} "
    if lse.dtype != dtype:
        raise RuntimeError(said + f"is {lse.dtype} and not {dtype}: too coarse for a normaliser")
    *lead, length = truth.shape
    if lse.dim() != 3 or list(lse.shape[:2]) != lead or lse.shape[2] < length:
        raise RuntimeError(said + f"has shape {list(lse.shape)} and not [B, Hq, S] = {lead}")
    if not near(truth):
        base = near(truth / torch.tensor(2.0).double().log().to(truth.device))
        raise RuntimeError(said + ("has base 2 and not e" if base else "is not that of its scores"))


class Watch(TorchDispatchMode):
    """Records the log-sum-exp of the attention kernel that runs within the block.

    >>> with Watch() as seen:
    ...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> seen.lse(q)  # [B, Hq, S], or None
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[str, torch.dtype, Tensor]] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kernel = OPS.get(func.name())
        if kernel is not None and result[1] is not None:  # cuDNN has none without a gradient
            self._seen.append((kernel, args[0].dtype, _squeezed(result[1].detach())))
        return result

    def lse(self, q: Tensor) -> Tensor | None:
        """The log-sum-exp of the one kernel call that was seen.

        Args:
            q: [B, Hq, S, D], the queries of that call.

        Returns:
            [B, Hq, S], detached; None if no call was seen, or several, or one whose statistics have
            another shape (unpadded sequences, none requested), or one of a kernel that cannot run
            the self-test (warns once).

        Raises:
            RuntimeError: a kernel whose statistics have another dtype, layout or base than
                expected.
        """
        return _tested_lse(*self._seen[0], q) if len(self._seen) == 1 else None


# What the backward of a kernel is called in a graph: the kernel, and where its statistics are.
SAVED = {
    "ScaledDotProductFlashAttentionBackward0": ("aten_flash", "_saved_logsumexp"),
    "ScaledDotProductFlashAttentionForCpuBackward0": ("aten_flash_cpu", "_saved_logsumexp"),
    "ScaledDotProductEfficientAttentionBackward0": ("aten_efficient", "_saved_log_sumexp"),
    "ScaledDotProductCudnnAttentionBackward0": ("aten_cudnn", "_saved_logsumexp"),
}
# What may stand above it: moves of elements, which keep their dtype.
MOVES = ("Alias", "Clone", "Permute", "ReshapeAlias", "Slice", "Transpose", "UnsafeView", "View")
MOST_MOVES = 8


def graph_is_readable(*operands: Tensor) -> bool:
    """Whether `lse_of_graph` may be asked after an attention function ran on these operands.

    Not without a graph, and not if hooks on saved tensors would answer: those of checkpointing
    compute a layer again, those of offloading copy.

    Args:
        operands: of the attention function, of any shape.

    Returns:
        Whether a graph was recorded whose saved tensors can be read.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    return recorded and hooks is not None and hooks(False) is None


def lse_of_graph(out: Tensor, q: Tensor) -> Tensor | None:
    """The log-sum-exp that torch's own attention saved for its backward; cheaper than `Watch`,
    which slows every operator in its block.

    Args:
        out: what the attention function returned, or moved elements of it.
        q: [B, Hq, S, D], its queries.

    Returns:
        As `Watch.lse`; None also for an attention of other kernels.

    Raises:
        RuntimeError: as `Watch.lse`.
    """
    node = out.grad_fn
    for _ in range(MOST_MOVES):
        name = "" if node is None else node.name()
        if name in SAVED:
            kernel, statistics = SAVED[name]
            lse = getattr(node, statistics)
            lse = lse.detach() if lse.requires_grad else lse
            return _tested_lse(kernel, out.dtype, _squeezed(lse), q)
        if node is None or name.removesuffix("Backward0") not in MOVES:
            return None
        node = node.next_functions[0][0]
    return None


def _tested_lse(kernel: str, dtype: torch.dtype, lse: Tensor, q: Tensor) -> Tensor | None:
    """[B, Hq, S] of a kernel's statistics; None if it has another shape, or cannot be tested."""
    *lead, length, _ = q.shape
    if lse.dim() != 3 or list(lse.shape[:2]) != lead or lse.shape[2] < length:
        return None
    try:
        self_test(kernel, q.device.type, dtype)
    except CannotRun as error:
        _warn_once(f"the main pass's log-sum-exp is not shared: {error}")
        return None
    return lse if lse.shape[2] == length else lse[..., :length]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
