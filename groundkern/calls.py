"""What an op is called with besides a layer's tensors, and when the call needs no dispatcher.

A step calls the attention ops in every layer with the same rows, sets, sizes and options. What
follows from these is found once, checks included, and kept as a `Call`. `groundkern.together` runs
it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern.kept import kept, versions
from groundkern.messages import fail
from groundkern.selection import KeySets, QueryRows, Selection

Made = TypeVar("Made")
PLAIN = (Tensor, torch.nn.Parameter)


class Call:
    """A call without its tensors of the layer.

    Args:
        selection: of any strides; kept contiguous.
        plan: the backend's, or the one that says that there is none.
        options: of the op.
        backend: the one that was chosen.
        whole: nothing of what a forward leaves for its backward is left unwritten, because torch
            compares what an op returns.
    """

    def __init__(
        self,
        selection: Selection,
        plan: tuple,
        options: tuple,
        backend: str,
        *,
        whole: bool = False,
    ) -> None:
        self.selection, self.plan = selection.contiguous(), plan
        self.options, self.backend, self.whole = options, backend, whole
        self.prepared: dict[Hashable, Any] = {}  # what all layers share, and nothing writes to
        self.of_one_signature = False  # whether a forward's inputs are known to have the same
        self._read = [x for x in selection if x is not None]
        self._versions = None if torch.compiler.is_compiling() else versions(self._read)

    @property
    def flat(self) -> tuple:
        """As arguments of an op."""
        return (*self.selection, *self.plan, *self.options, self.backend)

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, or what it returned in the layer before."""
        found = self.prepared.get(name)
        if found is None:
            found = self.prepared[name] = make()
        return found

    def refuse_written(self) -> None:
        """Raise, as autograd raises for what it saves, if the selection was written to."""
        if self._versions != versions(self._read):
            wanted = "rows, key sets and columns that nothing is written to before the backward"
            fail("rows", wanted, "ones changed by an inplace operation", RuntimeError)


def called(
    rows: QueryRows,
    others: Sequence[KeySets | Tensor | None],
    inputs: Sequence[Tensor | None],
    options: Hashable,
    make: Callable[[], Call],
) -> tuple[Call, bool]:
    """The call that `make` checks and makes, or the same one as in the layer before; and whether it
    needs no dispatcher.

    Args:
        rows, others: the selection.
        inputs: the other tensors, of which only the `signature` counts.
        options: as the caller gave them, the op's name among them.
        make: without arguments.
    """
    tensors = [x for x in others if not isinstance(x, KeySets)]
    if not is_direct([*inputs, *tensors]):
        return make(), False
    found = kept(rows, others, (options, signature(inputs)), make)
    found.of_one_signature = True
    return found, True


def is_direct(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call of these tensors is a plain eager one: nothing traces, transforms or
    intercepts it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, grad, jvp
        return False
    for x in tensors:
        if x is None:
            continue
        # Batched gradients (`is_grads_batched`) say that they are plain and have no storage.
        if type(x) not in PLAIN or x.is_meta or not torch._C._has_storage(x):
            return False
    return True


def applied(node: type[Function], *arguments: Any) -> Any:
    """`node.apply(*arguments)`, which in Python looks among all arguments for what torch.func may
    have left behind: here only while one of its transforms is active."""
    if torch._C._are_functorch_transforms_active():
        return node.apply(*arguments)
    return super(Function, node).apply(*arguments)


def signature(tensors: Iterable[Tensor | None]) -> tuple:
    """What the checks of a call, its launch and its compiled kernels depend on in tensors."""
    return tuple(
        [
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
            for x in tensors
        ]
    )
