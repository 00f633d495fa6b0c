"""A sequence split over the ranks of a process group: who holds which tokens, and their way.

Every rank of the group is given the same batch. Tower and embeddings run on all of it; the split
is made where hidden states enter the text decoder, because the body of a vision-language model puts
image features into them before. From there on a rank has its own tokens, then the side tokens of
its own aligned rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from groundkern import checks
from groundkern.checks import fail, require
from groundkern.hf.model.engines import ENGINES, ORDER, Engine
from groundkern.hf.model.engines.ulysses import mark_whole
from groundkern.hf.model.layers import text_decoder
from groundkern.hf.model.support import base_model, refuse_context
from groundkern.parallel import Shard, Sharding
from groundkern.parallel.agreement import number, require_same

CONTEXT = "_groundkern_context"  # in the __dict__ of a model
ORDERS: dict[str, Callable[[int, int], Sharding]] = {
    "zigzag": Sharding.zigzag,
    "contiguous": lambda length, ranks: Sharding.contiguous(
        [len(piece) for piece in torch.arange(length).tensor_split(ranks)]
    ),
    "striped": Sharding.striped,
}
# Keywords of a decoder that are not split as those with an entry for each token are.
_OWN_WAY = ("attention_mask", "position_ids", "cache_position")
# Features with an entry for each visual token, by layer, and the mask that says which these are:
# Qwen3-VL's and Granite 4 Vision's.
_OF_VISUAL = {
    "deepstack_visual_embeds": "visual_pos_masks",
    "deepstack_features": "vision_mask",
}


@dataclass(frozen=True)
class Context:
    """What `context_parallel` left on a model."""

    group: dist.ProcessGroup
    order: str
    engine: Engine


def context_parallel(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    *,
    order: str = "zigzag",
    engine: str = "gather",
) -> nn.Module:
    """Split the sequences of grounded batches over the ranks of a group.

    All ranks of the group must be given the same batches. The loss has the value of the whole batch
    on each of them, and the gradient of the rank's own part: gradients of weights are to be summed
    over the group (DDP and FSDP average over their ranks: multiply the loss by that number).

    Args:
        model: an attached model, bare or inside PEFT.
        group: whose ranks share each sequence; None: every rank has whole ones again.
        order: which tokens a rank holds: "zigzag", "contiguous" or "striped"
            (`groundkern.parallel.Sharding`).
        engine: what computes attention of the main tokens: "gather" (keys and values come to every
            rank), "ring" (torch's `context_parallel`, CUDA) or "ulysses" (DeepSpeed's, once it is
            registered with transformers).

    Returns:
        The same `model`.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown order or engine; a model that cannot be split, with the reason.
    """
    base = base_model(model)
    base.__dict__.pop(CONTEXT, None)
    mark_whole(base, False)
    if group is None:
        return model
    require(order in ORDERS, "order", " or ".join(map(repr, ORDERS)), repr(order))
    require(engine in ENGINES, "engine", " or ".join(map(repr, ENGINES)), repr(engine))
    only = ORDER.get(engine, order)
    require(order == only, "order", f"{only!r} with the engine {engine!r}", repr(order))
    refuse_context(base)
    base.__dict__[CONTEXT] = Context(group, order, ENGINES[engine]())
    mark_whole(base, engine == "ulysses")
    return model


def is_split(model: nn.Module) -> bool:
    """Whether the sequences of a model are split over ranks.

    Args:
        model: a transformers model, bare or inside PEFT.
    """
    return CONTEXT in base_model(model).__dict__


class Split:
    """How the tokens of one batch are split.

    Args:
        context: of the model.
        input_ids: [B, S], the same on every rank.
        side_position: [B, Rs], rows of side tokens, padded with -1.

    Raises:
        ValueError: fewer tokens than ranks; (checked if that needs no sync) ranks with different
            batches.
    """

    def __init__(self, context: Context, input_ids: Tensor, side_position: Tensor) -> None:
        self.engine = context.engine
        if checks.values_visible(input_ids):
            wanted = "the same batch on all ranks of a context group"
            digest = number(input_ids.flatten()), *input_ids.shape
            require_same("input_ids", wanted, digest, context.group, input_ids.device)
        ranks, length = dist.get_world_size(context.group), input_ids.shape[1]
        sharding = ORDERS[context.order](length, ranks)
        least = int(sharding.owner.bincount(minlength=ranks).min())
        wanted = f"a token for each of {ranks} ranks, without which layers cannot run"
        require(least > 0, "input_ids", wanted, f"sequences of {length}")
        self.shard = Shard(sharding, context.group, device=input_ids.device)
        self._own = self._is_own(side_position)  # [B, Rs]
        most = int(self._own.sum(1).max()) if self._own.numel() else 0
        first = self._own.int().argsort(dim=1, descending=True, stable=True)
        self.slots = first[:, :most]  # int64 [B, R_r], which of the Rs side tokens are here

    @property
    def ranks(self) -> int:
        """How many ranks share the batch."""
        return self.shard.ranks

    @cached_property
    def index(self) -> Tensor:
        """int64 [B, S_r + R_r]: this rank's tokens among S + Rs."""
        main = self.shard.positions.expand(len(self.slots), -1)
        return torch.cat((main, self.shard.length + self.slots), 1)

    def local(self, position: Tensor) -> Tensor:
        """Where rows of whole sequences are on this rank.

        Args:
            position: [B, R], padded with -1.

        Returns:
            [B, R]; -1 for padding and for rows of other ranks.
        """
        before = self.shard.before(position.clamp(min=0))
        return torch.where(self._is_own(position), before, -1)

    def _is_own(self, position: Tensor) -> Tensor:
        """bool [B, R]: positions of this rank's tokens; not padding."""
        owner = self.shard.owner[position.clamp(min=0).long()]
        return (position >= 0) & (owner == self.shard.rank)

    def side_slots(self, x: Tensor) -> Tensor:
        """[B, Rs, ...] -> [B, R_r, ...]: of the side tokens that are here."""
        return _entries(x, self.slots)

    def all_side(self, x: Tensor) -> Tensor:
        """[B, R_r, D] -> [B, Rs, D]; what side tokens of other ranks have is not used."""
        batch, rows = self._own.shape
        index = self.slots[..., None].expand(*self.slots.shape, x.shape[-1])
        return x.new_zeros(batch, rows, x.shape[-1]).scatter(1, index, x)

    @contextmanager
    def decoder(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the text decoder of a model runs on this rank's tokens.

        Args:
            model: the attached model, without wrappers.
        """
        decoder = text_decoder(model)
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]

        def split(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[()], dict[str, Any]]:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return (), self._inputs(given)

        hook = decoder.register_forward_pre_hook(split, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a decoder's keywords.

        Raises:
            ValueError: one with an entry for each token that is not known.
        """
        batch, total = len(self.slots), self.shard.length + self._own.shape[1]
        found = dict(given)
        for name, x in given.items():
            if name in _OWN_WAY or x is None:
                continue
            if isinstance(x, Tensor) and x.shape[:2] == (batch, total):
                found[name] = _entries(x, self.index)
            elif isinstance(x, Tensor) and total in x.shape:
                fail(name, f"[{batch}, {total}, ...], an entry for each token", list(x.shape))
            elif name not in _OF_VISUAL and _has_tensors(x):
                wanted = "no tensors in it where a sequence is split over ranks"
                fail(name, wanted, type(x).__name__)
        positions = given.get("position_ids")
        if positions is None:
            found["position_ids"] = self.index
        else:
            whole = positions.expand(*positions.shape[:-2], batch, -1)
            index = self.index.expand(*whole.shape[:-1], -1)
            found["position_ids"] = whole.gather(-1, index)
        if given.get("cache_position") is not None:
            found["cache_position"] = None
        for name, of in _OF_VISUAL.items():
            if given.get(name) is not None:
                found[name] = self._visual(given[name], given[of])
        # A mask of four dimensions is handed on as it is; the engine has its own.
        device = self.index.device
        found["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return found

    def _visual(self, features: Any, visual: Tensor) -> Any:
        """Of features with an entry for each visual token, by layer, those that are here.

        Args:
            features: a list or a dict of [V, ...].
            visual: bool [B, T] or [B, T, 1], which tokens are visual.
        """
        visual = visual.flatten(2)[..., 0] if visual.dim() > 2 else visual
        place = (visual.flatten().cumsum(0) - 1).view_as(visual)  # among the V
        chosen = _entries(place, self.index)[_entries(visual, self.index)]
        if isinstance(features, dict):
            return {layer: x[chosen] for layer, x in features.items()}
        return [x[chosen] for x in features]


def split_of(model: PreTrainedModel, input_ids: Tensor, side_position: Tensor) -> Split | None:
    """How a batch of a model is split; None: it is not.

    Args, Raises: as `Split`.
    """
    context = model.__dict__.get(CONTEXT)
    return None if context is None else Split(context, input_ids, side_position)


def _has_tensors(x: Any) -> bool:
    """Whether a list, a tuple or a dict has tensors in it."""
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return any(isinstance(one, Tensor) for one in inside)


def _entries(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...] at index [B, T_r], differentiably."""
    batch = torch.arange(len(x), device=x.device)[:, None]
    return x[batch, index]
