"""How an op's `cases.py` describes its calls. For tests and benchmarks only."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One call of a public function.

    Args:
        function: the public function.
        inputs: float tensors by argument name; those not in `fixed` carry gradient.
        options: every other argument by name.
        fixed: names of inputs without gradient.
        differentiable: how many of the results, the first ones, carry gradient.
    """

    function: Callable
    inputs: dict[str, Tensor]
    options: dict[str, object]
    fixed: tuple[str, ...] = ()
    differentiable: int = 1

    def run(self, function: Callable | None = None, **replaced) -> tuple[Tensor, ...]:
        """The results that are not None, of another function or with some arguments replaced."""
        arguments = {**self.inputs, **self.options, **replaced}
        result = (function or self.function)(**arguments)
        return (
            (result,) if isinstance(result, Tensor) else tuple(x for x in result if x is not None)
        )


def randn(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Seeded normal numbers: on every device and in every dtype the same fp64 draw, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def integers(values, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def coin(seed: int, *shape: int, device: torch.device, chance: float = 0.5) -> Tensor:
    """Seeded bool tensor."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < chance).to(device)
