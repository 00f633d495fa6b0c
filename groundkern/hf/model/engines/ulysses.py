"""Main attention by DeepSpeed's Ulysses (ALST): the heads are split instead of the tokens.

`UlyssesSPAttentionHF.register_with_transformers` puts its attention into transformers' registry;
accelerate's `sp_size` calls that. In every layer an all-to-all gives each rank all tokens of its
share of the heads, the attention function runs on these, and another brings the output back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch.distributed as dist
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.model.engines.demands import Demands
from groundkern.hf.model.engines.engine import implementation_of, refuse_call
from groundkern.hf.model.rows import Window
from groundkern.parallel import Shard, Sharding

NAME = "ulysses"
DEEPSPEED = "deepspeed.runtime.sequence_parallel.ulysses_sp"
GROUPS = "num_key_value_groups"  # of an attention module
WHOLE = "_groundkern_whole"  # in the __dict__ of modules that always see whole sequences


class UlyssesEngine:
    """The engine `ulysses`: contiguous order, equal shards, causal, no padding on the left."""

    def __init__(self) -> None:
        self._demands = Demands(NAME, "contiguous", Sharding.even, pieces=1)

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
        implementation = implementation_of(module)
        wanted = f"'sdpa' with the engine {NAME!r}"
        require(implementation == "sdpa", "attn_implementation", wanted, repr(implementation))
        self._demands.check(shard, first_key, window)
        ulysses = ulysses_of(attention)
        if ulysses is None:
            wanted = (
                "one that UlyssesSPAttentionHF.register_with_transformers put into the registry"
            )
            fail("attention function", f"{wanted}, with the engine {NAME!r}", attention.__name__)
        _refuse(ulysses, (q, k, v), shard)
        positions = shard.positions.expand(len(q), -1).contiguous()
        with _as_it_was(ulysses, module):
            out = attention(module, q, k, v, None, **{**kwargs, "position_ids": positions})[0]
        return out.unflatten(-1, (q.shape[1], v.shape[-1]))  # it returns heads side by side


@lru_cache(maxsize=16)
def ulysses_of(attention: Callable) -> nn.Module | None:
    """DeepSpeed's attention behind a function of transformers' registry; None: it is another.

    Args:
        attention: the function.
    """
    if getattr(attention, "__module__", None) != DEEPSPEED:
        return None
    return inspect.getclosurevars(attention).nonlocals.get("uattn")


def mark_whole(model: nn.Module, whole: bool) -> None:
    """Say whether a model's attention sees whole sequences wherever no engine is asked.

    DeepSpeed's function takes whatever comes for its ranks' parts of a sequence, also what a vision
    tower computes and what comes without supervision; under `context_parallel` these are whole.

    Args:
        model: without wrappers.
        whole: whether it is so.
    """
    for module in model.modules():
        if whole:
            module.__dict__[WHOLE] = True
        else:
            module.__dict__.pop(WHOLE, None)


def function_for(attention: Callable, module: nn.Module) -> Callable:
    """The function that computes attention for a module where no engine is asked.

    Args:
        attention: of transformers' registry, or the one that was wrapped.
        module: that calls it.

    Returns:
        It, or what DeepSpeed put itself around.
    """
    if WHOLE not in module.__dict__:
        return attention
    ulysses = ulysses_of(attention)
    return attention if ulysses is None else ulysses.attn


@contextmanager
def _as_it_was(ulysses: nn.Module, module: nn.Module) -> Iterator[None]:
    """Ulysses in evaluation too, and what it sets on the module for its share of the heads only
    within the block."""
    off, groups = ulysses.disable_in_eval, getattr(module, GROUPS, None)
    ulysses.disable_in_eval = False
    try:
        yield
    finally:
        ulysses.disable_in_eval = off
        if groups is not None:
            setattr(module, GROUPS, groups)


def _refuse(ulysses: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], shard: Shard) -> None:
    """Refuse by name what it was not registered for."""
    q, k, v = tensors
    registered = "as register_with_transformers was told"
    own, theirs = (dist.get_process_group_ranks(x) for x in (shard.group, ulysses.process_group))
    require(own == theirs, "group", f"ranks {theirs}, {registered}", own)
    batch = ulysses.batch_size
    require(len(q) == batch, "input_ids", f"{batch} sequences, {registered}", len(q))
    if not ulysses.seq_length_is_variable:
        length = ulysses.global_seq_length
        wanted = f"{length} tokens, {registered}"
        require(shard.length == length, "input_ids", wanted, shard.length)
    heads = (ulysses.attn_head_count, ulysses.global_kv_head_count, ulysses.attn_head_size)
    got = (q.shape[1], k.shape[1], q.shape[3])
    wanted = f"query heads, key heads and head size {heads}, {registered}"
    require(got == heads, "model", wanted, got)
    wanted = f"values of the size of keys, {k.shape[3]}, with the engine {NAME!r}"
    require(v.shape[3] == k.shape[3], "value", wanted, v.shape[3])
