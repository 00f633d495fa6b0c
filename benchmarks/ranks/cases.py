"""What is trained on several processes: each strategy with each kind of batch, model and share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

STRATEGIES = ("ddp", "fsdp2", "zero3")
RANKS = (2, 4)
SHARES = {
    "alike": "all ranks alike",
    "imageless": "a rank without images",
    "rowless": "a rank without rows",
}
OPTIMIZERS = ("sgd", "adamw_torch")


@dataclass(frozen=True)
class Case:
    """One run of a few steps.

    Args:
        strategy: one of STRATEGIES; None: one process.
        ranks: the processes that share a step; of one process, those that it stands for.
        packed: the samples of a batch are packed into rows.
        lora: adapters are trained, instead of all weights.
        share: one of SHARES, what the second rank gets.
        optimizer: one of OPTIMIZERS.
    """

    strategy: str | None
    ranks: int
    packed: bool
    lora: bool
    share: str
    optimizer: str = "sgd"

    @property
    def key(self) -> str:
        """Its name on disk and on command lines."""
        batch, model = "packed" if self.packed else "padded", "lora" if self.lora else "full"
        where = self.strategy or "alone"
        return "-".join((where, str(self.ranks), batch, model, self.share, self.optimizer))

    @property
    def alone(self) -> Case:
        """One process on the same samples, padded."""
        return replace(self, strategy=None, packed=False)


def parsed(key: str) -> Case:
    """The case of a key.

    Args:
        key: `Case.key`.
    """
    where, ranks, batch, model, share, optimizer = key.split("-")
    strategy = None if where == "alone" else where
    return Case(strategy, int(ranks), batch == "packed", model == "lora", share, optimizer)


def cases(
    strategies: tuple[str, ...], ranks: tuple[int, ...], optimizers: tuple[str, ...]
) -> list[Case]:
    """All of these, with every kind of batch, model and share.

    Args:
        strategies, ranks, optimizers: of those above.
    """
    every = product(optimizers, strategies, ranks, (False, True), (False, True), SHARES)
    return [Case(s, n, packed, lora, share, o) for o, s, n, packed, lora, share in every]
