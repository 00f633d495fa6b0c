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
STEPS, CONTEXT_STEPS = 4, 20


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
        context: processes that share each sequence.
        checkpointed: layers are computed again in the backward pass.
        steps: of the run.
        ulysses: DeepSpeed's Ulysses computes attention of shared sequences.
    """

    strategy: str | None
    ranks: int
    packed: bool
    lora: bool
    share: str
    optimizer: str = "sgd"
    context: int = 1
    checkpointed: bool = False
    steps: int = STEPS
    ulysses: bool = False

    @property
    def key(self) -> str:
        """Its name on disk and on command lines."""
        batch, model = "packed" if self.packed else "padded", "lora" if self.lora else "full"
        words = [self.strategy or "alone", str(self.ranks), batch, model, self.share]
        words.append(self.optimizer)
        words += [f"context{self.context}"] if self.context > 1 else []
        words += ["ulysses"] if self.ulysses else []
        words += ["checkpointed"] if self.checkpointed else []
        words += [f"steps{self.steps}"] if self.steps != STEPS else []
        return "-".join(words)

    @property
    def readers(self) -> int:
        """How many processes take different samples."""
        return self.ranks // self.context

    @property
    def alone(self) -> Case:
        """One process on the same samples, padded."""
        given = {"ranks": self.readers, "context": 1, "checkpointed": False, "ulysses": False}
        return replace(self, strategy=None, packed=False, **given)


def parsed(key: str) -> Case:
    """The case of a key.

    Args:
        key: `Case.key`.
    """
    where, ranks, batch, model, share, optimizer, *more = key.split("-")
    strategy = None if where == "alone" else where
    case = Case(strategy, int(ranks), batch == "packed", model == "lora", share, optimizer)
    numbers = {
        name: int(word.removeprefix(name))
        for name in ("context", "steps")
        for word in more
        if word.startswith(name)
    }
    words = {name: name in more for name in ("checkpointed", "ulysses")}
    return replace(case, **words, **numbers)


def cases(
    strategies: tuple[str, ...], ranks: tuple[int, ...], optimizers: tuple[str, ...]
) -> list[Case]:
    """All of these, with every kind of batch, model and share.

    Args:
        strategies, ranks, optimizers: of those above.
    """
    every = product(optimizers, strategies, ranks, (False, True), (False, True), SHARES)
    return [Case(s, n, packed, lora, share, o) for o, s, n, packed, lora, share in every]


def context_cases(
    strategies: tuple[str, ...], ranks: tuple[int, ...], optimizers: tuple[str, ...]
) -> list[Case]:
    """Sequences that 2 and 4 processes share, alone and beside others that take other samples.

    Args:
        strategies, ranks, optimizers: of those above.
    """
    made = []
    for optimizer, strategy, n in product(optimizers, strategies, ranks):
        for context in (size for size in RANKS if size <= n):
            plain = Case(strategy, n, False, False, "alike", optimizer, context)
            for packed, checkpointed in product((False, True), (False, True)):
                case = replace(plain, packed=packed, steps=CONTEXT_STEPS)
                made.append(replace(case, checkpointed=checkpointed))
            adapters = replace(plain, lora=True, checkpointed=True)
            made += [replace(adapters, packed=packed) for packed in (False, True)]
            if strategy == "zero3":
                shared = replace(plain, ulysses=True, steps=CONTEXT_STEPS)
                made += [replace(shared, checkpointed=value) for value in (False, True)]
            if n > context:
                made += [replace(plain, share=share) for share in SHARES if share != "alike"]
    return made
