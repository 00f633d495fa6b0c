"""How an op's `cases.py` describes one call. For tests and benchmarks only."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One call of a public function.

    Args:
        function: the public function.
        inputs: float tensors by argument name, in positional order; those in `fixed` carry no gradient.
        options: everything else by argument name.
        fixed: names of inputs without gradient.
        outputs: how many of the results carry gradient (the first ones).
    """

    function: Callable
    inputs: dict[str, Tensor]
    options: dict[str, object]
    fixed: tuple[str, ...] = ()
    outputs: int = 1
    notes: dict[str, object] = field(default_factory=dict)

    def run(self, inputs: dict[str, Tensor] | None = None, **options) -> tuple[Tensor, ...]:
        """The results as a tuple; `inputs` and `options` replace the call's own."""
        result = self.function(**(inputs or self.inputs), **{**self.options, **options})
        return (result,) if isinstance(result, Tensor) else tuple(result)
