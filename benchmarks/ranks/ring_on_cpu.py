"""torch's ring attention on CPU processes: a stand-in for GPUs, for tests and benchmarks.

torch's `context_parallel` sends keys and values around and merges what a rank computes with them by
kernels of CUDA: on CPUs it knows none. This gives it torch's flash attention for CPUs, so that the
same ring, torch's own, runs over gloo; what differs from CUDA is the kernel of a block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.experimental._context_parallel import _attention as torchs

from groundkern.hf.model.engines import ring

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
TOKENS = 2  # the dimension of [B, H, S, D]


@cache
def ring_on_cpu() -> None:
    """Let torch's context parallelism take CPU tensors, and the engine `ring` with it."""
    for op, ring_of in ((FORWARD, _forward), (BACKWARD, _backward)):
        results = len(op._schema.returns)
        register_sharding(op)(_placements(results, 3 if op is FORWARD else 6))
        torchs.custom_ops[op] = _handler(ring_of)
    ring.DEVICES.add("cpu")


def _placements(results: int, tensors: int):
    """How DTensor may split the tensors of an op: along the tokens, or not at all."""

    def placements(*arguments: object, **keywords: object):
        rest = [None] * (len(arguments) - tensors)
        kinds = Shard(TOKENS), Replicate()
        return [([kind] * results, [kind] * tensors + rest) for kind in kinds]

    return placements


def _handler(ring_of):
    """What DTensor calls for the op, as torch's `_sdpa_handler` is for those of CUDA."""

    def handler(op, args, kwargs):
        dispatcher = DTensor._op_dispatcher
        info = dispatcher.unwrap_to_op_info(op, args, kwargs)
        dispatcher.sharding_propagator.propagate(info)
        found = ring_of(info.compute_mesh, *info.local_args, **info.local_kwargs)
        return dispatcher.wrap(found, info.output_sharding.output_spec)

    return handler


def _forward(
    mesh: DeviceMesh,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    tensors = {"query": query, "key": key, "value": value}
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "scale": scale}
    return torchs._templated_ring_attention(mesh.get_group(), TOKENS, FORWARD, **tensors, **options)


def _backward(
    mesh: DeviceMesh,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    tensors = {"query": query, "key": key, "value": value, "out": out, "logsumexp": logsumexp}
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "scale": scale}
    gradient = {"grad_out": grad_out, "grad_out_name": "grad_out"}
    return torchs._templated_ring_attention_backward(
        mesh.get_group(), TOKENS, BACKWARD, **gradient, **tensors, **options
    )
