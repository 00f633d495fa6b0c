"""FlexAttention as a contestant: a block mask that skips the tiles no row uses, and its lse.

The functions that end in `_step` take the function to run, so that a test can run it uncompiled and
without gradients, which is all that FlexAttention does on CPU.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

import groundkern as gk
from benchmarks.contestants import baselines
from benchmarks.contestants.baselines import Refused, Step
from groundkern.ops.cases import Call


def _module():
    try:
        return import_module("torch.nn.attention.flex_attention")
    except ImportError as error:
        raise Refused(f"FlexAttention is not importable here ({error})") from error


def compiled(call: Call) -> Callable:
    """flex_attention compiled for the device."""
    if call.inputs["q"].device.type != "cuda":
        raise Refused("FlexAttention has no backward on CPU")
    torch._dynamo.reset()
    return torch.compile(_module().flex_attention)


def _blocks(usable: Tensor):
    """A block mask of bool [N, S]."""
    create = _module().create_block_mask
    return create(lambda b, h, i, j: usable[i, j], 1, 1, *usable.shape, device=usable.device)


def _attend(run: Callable, q: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
    """out [N, Hq, Dv] and lse [N, Hq] of q [N, Hq, D] on k [1, Hkv, S, D]."""
    out, more = run(
        q.transpose(0, 1)[None],
        k,
        v,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=_module().AuxRequest(lse=True),
    )
    return out[0].transpose(0, 1), more.lse[0].transpose(0, 1)


def attention_step(call: Call, run: Callable) -> Step:
    mask = _blocks(baselines.usable_keys(call))
    return lambda x: _attend(run, x["q"], x["k"], x["v"], mask)[: call.differentiable]


def closed_form_step(call: Call, run: Callable) -> Step:
    """KL of every head as sum P log P - scale q . (P k) + lse, the lse from FlexAttention."""
    if call.function is not gk.attention_kl or call.options["heads"] != "each":
        raise Refused("the closed form is that of the KL per head")
    columns, usable = baselines.columns_of(call), baselines.usable_keys(call)
    if call.options["over"] == "columns":
        usable = torch.zeros_like(usable).index_fill(1, columns, True)
    mask = _blocks(usable)

    def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q, k = x["q"], x["k"]
        target = x["target"] / x["target"].sum(-1, keepdim=True)
        center = (target.to(k.dtype) @ k[0].index_select(1, columns)).transpose(0, 1)
        center = center.repeat_interleave(q.shape[1] // k.shape[1], 1)  # [N, Hq, D]
        expected = (q * center).float().sum(-1) * q.shape[-1] ** -0.5  # [N, Hq]
        _, lse = _attend(run, q, k, k, mask)
        return (torch.xlogy(target, target).sum(-1) + (lse - expected).mean(1),)

    return step


def attention(call: Call) -> Step:
    """Gathered rows, compiled, with a block mask and the returned lse."""
    return attention_step(call, compiled(call))


def closed_form_kl(call: Call) -> Step:
    """The closed form per head on top of the compiled kernel's lse."""
    return closed_form_step(call, compiled(call))
