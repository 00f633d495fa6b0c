"""Steps whose loss or gradient is not finite: skipped, counted on the device, named when read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Verdict(NamedTuple):
    """What the steps came to.

    Args:
        streak: the last steps, all of them not finite; 0: the last one was.
        since: the first step of the newest such streak.
        total: all steps that were not finite.
        reached: whether a streak was as long as it may be.
        terms: what was not finite in the newest streak, by name; empty: the gradient alone.
    """

    streak: int
    since: int
    total: int
    reached: bool
    terms: list[str]

    def sentence(self, step: int, why: str) -> str:
        """The error of a run that stops at a step.

        Args:
            step: the newest step.
            why: what follows from it.
        """
        named = " and ".join(f"`{name}`" for name in self.terms) or "the gradient"
        steps = f"step {step}" if self.since == step else f"steps {self.since} to {step}"
        return f"`loss`: expected finite values, got NaN or infinity in {named} at {steps}; {why}"


class FiniteSteps:
    """Counts steps that were not finite without asking the device about any of them.

    Args:
        limit: the length of a streak that is one too many.
        device: where the counts are kept.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit: int = limit
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)  # as in Verdict
        self._seen: dict[str, Tensor] = {}  # not finite in the step that is running
        self._terms: dict[str, Tensor] = {}  # not finite in the newest streak

    def add(self, name: str, value: Tensor) -> None:
        """Looks at a part of the loss of a micro-batch, or at several.

        Args:
            name: of the part; names of several are joined by spaces.
            value: fp32 scalar, or [n] of n parts.
        """
        bad = ~value.detach().reshape(-1).isfinite()
        self._seen[name] = self._seen[name] | bad if name in self._seen else bad

    def step(self, norm: Tensor, number: int, scale: Tensor | None = None) -> Tensor:
        """Ends a step before its optimizer step.

        Args:
            norm: the gradient's norm.
            number: of the step.
            scale: a GradScaler's; a gradient that overflows while it is above 1 does not count.

        Returns:
            Bool scalar on the device: whether the gradient is not finite, so that the optimizer
            must not see it.
        """
        skip = ~norm.isfinite().reshape(())
        bad = skip if scale is None else skip & (scale <= 1)
        for seen in self._seen.values():
            bad = bad | seen.any()
        streak, since, total, reached = self._counts.unbind()
        streak = torch.where(bad, streak + 1, 0)
        first = streak == 1
        since = torch.where(first, number, since)
        reached = reached | (streak >= self.limit).long()
        self._counts = torch.stack((streak, since, total + bad, reached))
        for name, seen in self._seen.items():
            known = self._terms.get(name, torch.zeros_like(seen))
            self._terms[name] = torch.where(first, seen, known | (seen & bad))
        self._seen = {}
        return skip

    def read(self, gather: Callable[[Tensor], Tensor] | None = None) -> Verdict:
        """What the steps came to: one copy from the device, and one reduction over ranks.

        Args:
            gather: of accelerate, with several ranks.
        """
        names = [part for joined in self._terms for part in joined.split()]
        values = torch.cat((self._counts, *(bad.long() for bad in self._terms.values())))
        if gather is not None:
            values = gather(values[None]).amax(0)
        streak, since, total, reached, *bad = values.tolist()
        terms = sorted(name for name, there in zip(names, bad, strict=True) if there)
        return Verdict(streak, since, total, bool(reached), terms)

    def state(self) -> list[int]:
        """The counts, for a checkpoint."""
        return self._counts.tolist()

    def load(self, counts: list[int]) -> None:
        """Continues from the counts of a checkpoint."""
        self._counts = torch.tensor(counts, dtype=torch.int64, device=self._counts.device)


def skip_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Lets an optimizer's next step do nothing if `skip` is true.

    Fused optimizers decide on the device, as they do for a GradScaler; the others lose their
    gradients, which costs a look at the device.

    Args:
        optimizer: torch's own or one wrapped by accelerate.
        skip: bool scalar.
    """
    inner = inner_optimizer(optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    sharded = any(isinstance(p, DTensor) for p in parameters)
    if getattr(inner, "_step_supports_amp_scaling", False) and not sharded:
        inner.grad_scale, inner.found_inf = None, skip.float()
    elif bool(skip):
        for parameter in parameters:
            parameter.grad = None  # no update, no momentum, no decay


def step_taken(optimizer: torch.optim.Optimizer) -> None:
    """Takes back what `skip_step` set.

    Args:
        optimizer: as it was given to `skip_step`.
    """
    inner = inner_optimizer(optimizer)
    for name in ("grad_scale", "found_inf"):
        vars(inner).pop(name, None)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, also of sharded ones.

    Args:
        parameters: those without a gradient count nothing.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def whole(x: Any) -> Any:
    """A sharded tensor put together, on every rank; all ranks have to ask. Else what it was given.

    Args:
        x: a tensor, sharded or not, or anything else.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Bool scalar: whether every number is finite; of sharded tensors, this rank's.

    Args:
        tensors: of any dtype.
    """
    local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    checks = [x.detach().isfinite().all() for x in local if x.is_floating_point()]
    if not checks:
        return torch.tensor(True)
    return torch.stack([check.to(checks[0].device) for check in checks]).all()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state.

    Args:
        optimizer: torch's own or one wrapped by accelerate.
    """
    states = inner_optimizer(optimizer).state.values()
    return [x for state in states for x in state.values() if isinstance(x, Tensor)]


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """torch's optimizer inside of those that wrap it.

    Args:
        optimizer: torch's own or one wrapped by accelerate.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
