"""Which dtype a call computes in: autocast's for the operands, at least fp32 for every sum."""

from typing import cast

import torch
from torch import Tensor
from typing_extensions import TypeVarTuple, Unpack

Operands = TypeVarTuple("Operands")  # each a Tensor or None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 operands, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*operands: Unpack[Operands]) -> tuple[Unpack[Operands]]:
    """Cast matmul operands as torch's autocast casts a matmul's; statistics and weights stay as
    they are.

    A custom op's own autocast registration would cast every float argument, `lse` among them, to 8
    bits of mantissa; so the public functions call this on their operands instead.
    """
    if not torch._C._is_any_autocast_enabled():
        return operands
    return cast("tuple[Unpack[Operands]]", tuple([_cast(x) for x in operands]))


def _cast(x: object) -> object:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return x
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
