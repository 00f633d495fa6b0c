"""What an engine of main attention is given, and what all engines refuse alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from groundkern.checks import fail
from groundkern.hf.model.rows import Window
from groundkern.parallel import Shard


class Engine(Protocol):
    """Computes what a model's attention function would on the whole sequence, for a rank's part.

    Every rank of the group calls it at the same time, and runs its backward.
    """

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
        """Attention of a rank's tokens.

        Args:
            attention: the model's attention function, with transformers' signature.
            module: the attention module that calls it.
            q: [B, Hq, S_r, D], of this rank's tokens.
            k: [B, Hkv, S_r, D].
            v: [B, Hkv, S_r, Dv].
            shard: which tokens of the whole sequence these are.
            first_key: int32 [B, S], the first key that each token of the whole may see: of its
                sequence, without the padding, or of its document.
            window: of the layer.
            kwargs: the call's other keywords.

        Returns:
            [B, S_r, Hq, Dv], differentiable.

        Raises:
            ValueError: what the engine does not compute, by name; on all ranks alike.
        """


def refuse_call(name: str, module: nn.Module, kwargs: dict) -> None:
    """Refuse what no engine computes.

    Args:
        name: of the engine.
        module: the attention module.
        kwargs: of the call.

    Raises:
        ValueError: dropout; attention that is not causal, or that gives its weights away.
    """
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        fail("is_causal", f"causal attention with the engine {name!r}", "another")
    if kwargs.get("dropout"):
        fail("attention_dropout", f"0 in training with the engine {name!r}", kwargs["dropout"])
    if kwargs.get("output_attentions"):
        fail("output_attentions", f"False with the engine {name!r}", True)


def implementation_of(module: nn.Module) -> str:
    """The name of the attention function that a module calls."""
    return module.config._attn_implementation
