"""Main attention by torch's ring: `torch.distributed.tensor.experimental.context_parallel`.

It is what accelerate's `cp_size` switches on. Here it is on around the main attention alone, and
around its backward: within, torch's attention of a rank's part is that of the whole. Its kernels
are those of CUDA (`benchmarks/ranks/ring_on_cpu.py` has it run on CPUs, for tests).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from groundkern.checks import fail, require
from groundkern.hf.model.engines.demands import Demands
from groundkern.hf.model.engines.engine import implementation_of, refuse_call
from groundkern.hf.model.rows import Window
from groundkern.parallel import Shard, Sharding

NAME = "ring"
DEVICES = {"cuda"}  # that torch has ring attention for
# Where none of these takes a call, torch would compute matrix products of the tokens in the order
# in which ranks hold them, with a causal mask of that order.
KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
OURS = ("position_ids", "is_causal")  # keywords that are not handed on


class RingEngine:
    """The engine `ring`: zigzag order, equal shards, causal, everything before a token seen."""

    def __init__(self) -> None:
        self._demands = Demands(NAME, "zigzag", Sharding.zigzag, pieces=2)
        self._meshes: dict[tuple[dist.ProcessGroup, str], DeviceMesh] = {}

    def __call__(
        self,
        attention: Callable,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: Shard,
        first_key: Tensor,
        window: Window,
        kwargs: dict,
    ) -> Tensor:
        """See `Engine`."""
        refuse_call(NAME, module, kwargs)
        _refuse(module, q)
        self._demands.check(shard, first_key, window)
        kwargs = {name: x for name, x in kwargs.items() if name not in OURS}
        ring = _Ring(self._mesh(shard, q.device.type))
        q, k, v = _Last.apply(ring, q, k, v)
        with ring.on(), sdpa_kernel(KERNELS):
            out = attention(module, q, k, v, None, is_causal=True, **kwargs)[0]
        return _First.apply(ring, out)

    def _mesh(self, shard: Shard, device: str) -> DeviceMesh:
        """The group, as torch's context parallelism wants it."""
        group = dist.group.WORLD if shard.group is None else shard.group
        if (group, device) not in self._meshes:
            self._meshes[group, device] = DeviceMesh.from_group(group, device)
        return self._meshes[group, device]


class _Ring:
    """torch's context parallelism of one call: on while it computes, and while its backward does.

    Args:
        mesh: of the ranks.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.backward = mesh, ExitStack()

    def on(self) -> AbstractContextManager[None]:
        """The context. It is made to split a batch: here it splits a tensor that nobody reads."""
        split = torch.zeros(2 * self.mesh.size(), dtype=torch.bool, device=self.mesh.device_type)
        buffers = {"buffers": [split], "buffer_seq_dims": [0], "no_restore_buffers": {split}}
        return context_parallel(self.mesh, **buffers)


class _First(torch.autograd.Function):
    """The first step of a call's backward."""

    @staticmethod
    def forward(ctx, ring: _Ring, out: Tensor) -> Tensor:
        ctx.ring = ring
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.ring.backward.enter_context(ctx.ring.on())
        return None, gradient


class _Last(torch.autograd.Function):
    """The last step of a call's backward."""

    @staticmethod
    def forward(ctx, ring: _Ring, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ring = ring
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        ctx.ring.backward.close()
        return None, *gradients


def _refuse(module: nn.Module, q: Tensor) -> None:
    """Refuse by name what torch's ring does not compute, and a context that is on already."""
    implementation = implementation_of(module)
    wanted = f"'sdpa' with the engine {NAME!r}"
    require(implementation == "sdpa", "attn_implementation", wanted, repr(implementation))
    if q.device.type not in DEVICES:
        wanted = f"{' or '.join(sorted(DEVICES))} with the engine {NAME!r}, or the engine 'gather'"
        fail("device", wanted, q.device.type)
    place = F.scaled_dot_product_attention.__module__ or ""
    if place.startswith("torch.distributed.tensor.experimental"):
        wanted = f"none around the model: the engine {NAME!r} opens it around the main attention"
        fail("context_parallel", wanted, "an open one")
