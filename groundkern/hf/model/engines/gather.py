"""Main attention with the keys and values of all ranks, by the model's own attention function.

In every layer one all-gather of keys and values, and one reduce-scatter of their gradients; queries
stay. It runs on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from groundkern.checks import fail
from groundkern.hf.model.engines.engine import implementation_of, refuse_call
from groundkern.hf.model.engines.pieces import Form, Piece, Pieces
from groundkern.hf.model.engines.tokens import Layout, all_tokens
from groundkern.hf.model.rows import Window
from groundkern.parallel import Shard

NAME = "gather"
MASKED = ("sdpa", "eager")  # implementations that take any mask as a tensor


class GatherEngine:
    """The engine `gather`."""

    def __init__(self) -> None:
        self._pieces = Pieces()
        self._layouts: WeakKeyDictionary[Shard, Layout] = WeakKeyDictionary()

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
        eager = _implementation(attention, module, kwargs) == "eager"
        kwargs = {name: x for name, x in kwargs.items() if name != "position_ids"}
        k, v = self._gathered(k, v, shard)
        form = Form(q.dtype if eager else None, bias=not eager and q.is_cuda)
        pieces = self._pieces.of(shard, first_key, window, form)
        if not pieces:
            return _nothing(q, k, v)
        outs = [_attend(attention, module, (q, k, v), piece, kwargs) for piece in pieces]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _gathered(self, k: Tensor, v: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        """[B, Hkv, S, D] and [B, Hkv, S, Dv] of all ranks, in the order of the sequence."""
        if shard not in self._layouts:
            self._layouts[shard] = Layout.of(shard)
        parts = [x.permute(2, 0, 1, 3) for x in (k, v)]  # before cat, which lays it out as sent
        both = torch.cat(parts, -1)  # [S_r, B, Hkv, D + Dv]
        whole = all_tokens(both, self._layouts[shard]).permute(1, 2, 0, 3)
        return whole.split((k.shape[-1], v.shape[-1]), -1)


def _implementation(attention: Callable, module: nn.Module, kwargs: dict) -> str:
    """The attention function's name, if it can be served."""
    refuse_call(NAME, module, kwargs)
    implementation = implementation_of(module)
    if implementation not in MASKED:
        wanted = f"{' or '.join(MASKED)} with the engine {NAME!r}: it has masks of its own"
        fail("attn_implementation", wanted, implementation)
    return implementation


def _attend(
    attention: Callable,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    piece: Piece,
    kwargs: dict,
) -> Tensor:
    """[B, S_r, Hq, Dv] of a piece's tokens."""
    q, k, v = tensors
    k, v = k[:, :, piece.keys], v[:, :, piece.keys]
    return attention(module, q[:, :, piece.tokens], k, v, piece.mask, **kwargs)[0]


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, 0, Hq, Dv] of a rank without tokens, whose backward takes part in the collective."""
    empty = q.transpose(1, 2)[..., :1].expand(-1, -1, -1, v.shape[-1])
    return empty + (k.sum() + v.sum()) * 0
