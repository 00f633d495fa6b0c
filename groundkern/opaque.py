"""Ops that torch.compile does not look into, registered at little cost to their callers.

`custom_op` is `torch.library.custom_op` for ops that mutate nothing and whose arguments have no
defaults. torch's own reads an op's whole schema twice for each of its arguments whenever a graph is
recorded, and looks for aliases among inputs and results of every call: for an op of 25 arguments
that takes longer than the launches of its kernels (`python -m benchmarks.host`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

BODIES: dict[str, Callable] = {}  # by qualified name, e.g. "groundkern::side_attention"


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")  # its ops live as long as it does


class Op:
    """A registered op. Call it like the function that it was made from."""

    def __init__(self, qualified: str, schema: str, body: Callable) -> None:
        namespace, self._name = qualified.split("::")
        self._qualified, self._library = qualified, _library(namespace)
        self._library.define(self._name + schema, tags=[torch.Tag.pt2_compliant_tag])
        self.overload = getattr(getattr(torch.ops, namespace), self._name).default
        BODIES[qualified] = body
        # A call that was not traced must not be traced below the dispatcher either.
        run = torch._disable_dynamo(lambda *args: BODIES[qualified](*args))
        self._library.impl(self._name, run, "CompositeExplicitAutograd")

    def __call__(self, *args):
        return self.overload(*args)

    def register_fake(self, fake: Callable) -> Callable:
        """Decorates the function that makes empty results for torch.compile."""
        torch.library.register_fake(self._qualified, fake, lib=self._library)
        return fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Make the op differentiable.

        Args:
            backward: `(ctx, *upstream)` -> a gradient or None for each argument.
            setup_context: `(ctx, inputs, output)`, saves what `backward` needs.
        """
        function = _function(self.overload, backward, setup_context)

        def run(keyset, *args):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return function.apply(*args, keyset)
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        self._library.impl(self._name, run, "Autograd", with_keyset=True)


def _function(
    overload: torch._ops.OpOverload, backward: Callable, setup_context: Callable
) -> type[torch.autograd.Function]:
    """What `torch.library.register_autograd` makes of the same functions."""

    def forward(ctx, *args_and_keyset):
        *args, keyset = args_and_keyset
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            setup_context(ctx, args, output)
        return output

    def gradients(ctx, *upstream):
        return *backward(ctx, *upstream), None  # autograd passes over more Nones than inputs

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    name = f"{overload._opname}_backward"
    return type(name, (torch.autograd.Function,), methods)


def custom_op(qualified: str, *, schema: str, mutates_args: tuple = ()) -> Callable[[Callable], Op]:
    """Decorates an op's body.

    Args:
        qualified: "namespace::name".
        schema: the op's arguments, without defaults, and results.
        mutates_args: there for the form of `torch.library.custom_op`; has to be empty.
    """
    if mutates_args:
        raise ValueError(f"`mutates_args`: expected none, got {mutates_args}")
    return lambda body: Op(qualified, schema, body)
