"""Main attention by torch's ring: `torch.distributed.tensor.experimental.context_parallel`.

It is what accelerate's `cp_size` switches on. Here it is on around the main attention alone, and
around its backward: within, torch's attention of a rank's part is that of the whole. Its kernels
are those of CUDA (`benchmarks/ranks/ring_on_cpu.py` has it run on CPUs, for tests).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from groundkern.checks import fail, require
from groundkern.hf.model.engines.engine import implementation_of, refuse_call
from groundkern.hf.model.rows import Window
from groundkern.kept import versions
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


class RingEngine:
    """The engine `ring`: zigzag order, equal shards, causal, everything before a token seen."""

    def __init__(self) -> None:
        self._meshes: WeakKeyDictionary[Shard, DeviceMesh] = WeakKeyDictionary()
        self._plain: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

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
        _refuse(module, q, window)
        self._refuse_keys(first_key)
        ring = Ring(self._mesh(shard, q.device))
        kwargs = {name: x for name, x in kwargs.items() if name not in ("position_ids", "is_causal")}
        q, k, v = _Last.apply(ring, q, k, v)
        with ring.on(), sdpa_kernel(KERNELS):
            out = attention(module, q, k, v, None, is_causal=True, **kwargs)[0]
        return _First.apply(ring, out)

    def _mesh(self, shard: Shard, device: torch.device) -> DeviceMesh:
        """torch's name for the group; checks once that a shard is as torch's ring wants it."""
        if shard not in self._meshes:
            length, ranks = shard.length, shard.ranks
            wanted = f"a length divisible by {2 * ranks} with the engine {NAME!r} on {ranks} ranks"
            require(length % (2 * ranks) == 0, "input_ids", f"{wanted} (pad on the right)", length)
            zigzag = Sharding.zigzag(length, ranks).owner.to(shard.owner.device)
            wanted = f"'zigzag' with the engine {NAME!r}"
            require(bool((shard.owner == zigzag).all()), "order", wanted, "another")
            group = dist.group.WORLD if shard.group is None else shard.group
            self._meshes[shard] = DeviceMesh.from_group(group, device.type)
        return self._meshes[shard]

    def _refuse_keys(self, first_key: Tensor) -> None:
        """Asks once a batch."""
        now = versions((first_key,))
        if now is not None and self._plain.get(first_key) == now:
            return
        if bool(first_key.any()):
            wanted = f"no padding on the left and no packed documents with the engine {NAME!r}"
            fail("attention_mask", wanted, "some")
        self._plain[first_key] = now


class Ring:
    """torch's context parallelism of one call, on while it computes and while its backward does.

    Args:
        mesh: of the ranks.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.backward = mesh, ExitStack()

    def on(self) -> AbstractContextManager[None]:
        """The context; it wants to split a tensor, and splits this one."""
        split = torch.zeros(2 * self.mesh.size(), dtype=torch.bool, device=self.mesh.device_type)
        return context_parallel(
            self.mesh, buffers=[split], buffer_seq_dims=[0], no_restore_buffers={split}
        )


class _First(torch.autograd.Function):
    """The first step of a call's backward."""

    @staticmethod
    def forward(ctx, ring: Ring, out: Tensor) -> Tensor:
        ctx.ring = ring
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.ring.backward.enter_context(ctx.ring.on())
        return None, gradient


class _Last(torch.autograd.Function):
    """The last step of a call's backward."""

    @staticmethod
    def forward(ctx, ring: Ring, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ring = ring
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        ctx.ring.backward.close()
        return None, *gradients


def _refuse(module: nn.Module, q: Tensor, window: Window) -> None:
    """Refuse by name what torch's ring does not compute."""
    implementation = implementation_of(module)
    require(implementation == "sdpa", "attn_implementation", f"'sdpa' with {NAME!r}", implementation)
    if window is not None:
        fail("sliding_window", f"no windows or chunks with the engine {NAME!r}", window)
    if q.device.type not in DEVICES:
        wanted = f"a device of {sorted(DEVICES)} with the engine {NAME!r} ('gather' runs on any)"
        fail("device", wanted, q.device.type)
    if F.scaled_dot_product_attention.__module__ == context_parallel.__module__ or (
        getattr(F.scaled_dot_product_attention, "__name__", "") == "inner_fn"
    ):
        wanted = f"not around the model: the engine {NAME!r} opens it around the main attention"
        fail("context_parallel", wanted, "an open one")
