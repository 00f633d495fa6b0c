"""A model's own forward, run with stand-ins for its body and its output head.

What a forward does before its head and after it is code of its class, or of whoever patched it. It
runs here as it is, on a body's output and on logits of our choice, so that nothing of it has to be
read or guessed. No layer runs and no weight is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.model.layers import body_of

ATTACHMENT = "_groundkern"  # in the __dict__ of an attached model


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a model has without what `attach` put on it.

    Args:
        model: a transformers model without wrappers, attached or not.

    Returns:
        The forward, bound to the model.
    """
    attachment = vars(model).get(ATTACHMENT)
    replaced = vars(model).get("forward") if attachment is None else attachment.replaced
    return replaced or partial(type(model).forward, model)


def run_own(
    model: nn.Module,
    inputs: dict,
    *,
    body: Callable[..., Any],
    head: Callable[[Tensor], Tensor],
    loss: Callable[..., Tensor] | None = None,
) -> Any:
    """Run a model's own forward around stand-ins, as in evaluation.

    Args:
        model: a transformers model without wrappers.
        inputs: keywords of the forward.
        body: is called in the place of its body (`body_of`).
        head: is called in the place of the output embeddings.
        loss: is called in the place of `model.loss_function`; None: that stays.

    Returns:
        What the forward returns.

    Raises:
        ValueError: a model whose forward cannot be run so.
    """
    with ExitStack() as stack:
        for module, call in ((body_of(model), body), (model.get_output_embeddings(), head)):
            owner, name = _place(model, module)
            stack.enter_context(_shadowed(owner, name, _StandIn(module, call)))
        if loss is not None:
            stack.enter_context(_shadowed(model, "_loss_function", loss))
        stack.enter_context(_shadowed(model, "training", False))  # Liger's skip logits in training
        return own_forward(model)(**inputs)


class _Reached(Exception):
    """The body was called."""


def body_inputs(model: nn.Module, inputs: dict) -> tuple[tuple, dict]:
    """What a model's own forward hands to its body: some names are other ones there, some settings
    come from the config, and older forwards put the images in themselves.

    Args:
        model: a transformers model without wrappers.
        inputs: keywords of the forward.

    Returns:
        Arguments and keywords of `body_of(model)`.

    Raises:
        ValueError: a forward that does not call its body.
    """
    found: list[tuple[tuple, dict]] = []

    def body(*args: Any, **kwargs: Any) -> None:
        found.append((args, kwargs))
        raise _Reached

    with suppress(_Reached):
        run_own(model, inputs, body=body, head=model.get_output_embeddings())
    require(len(found) == 1, "model", "a forward that calls its body", type(model).__name__)
    return found[0]


class _StandIn:
    """Is called in the place of a module, and has the module's attributes."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _place(model: nn.Module, module: nn.Module | None) -> tuple[nn.Module, str]:
    """The module that holds another, and the name under which it does."""
    places = (
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if child is module
    )
    found = next(places, None)
    if found is None:
        fail("model", "a forward that runs a body, then an output head", type(model).__name__)
    return found


@contextmanager
def _shadowed(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module hidden by another; its hooks and registered modules stay."""
    attributes = vars(owner)
    before = attributes.get(name, attributes)
    attributes[name] = value
    try:
        yield
    finally:
        if before is attributes:
            del attributes[name]
        else:
            attributes[name] = before
