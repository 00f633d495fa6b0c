"""Programs of one launch in any order: Triton's interpreter runs them one after the other, a GPU at
the same time. Here each runs in a thread of its own, one at a time, and at every atomic operation
another may go on."""

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

from triton.runtime import interpreter

Added = list[tuple[tuple[int, ...], int]]  # (program, what it added to a counter), in their order


class _Programs:
    """The programs of one launch, which take turns."""

    def __init__(self, draw: random.Random, added: Added) -> None:
        self.draw, self.added = draw, added
        self.turn = threading.Condition()
        self.waiting: list[tuple[int, ...]] = []
        self.now: tuple[int, ...] | None = None
        self.errors: list[BaseException] = []

    def wait(self, place: tuple[int, ...]) -> None:
        """Until it is this program's turn again."""
        with self.turn:
            self.waiting.append(place)
            self.now = None
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.now == place)
        interpreter.interpreter_builder.grid_idx = place

    def start(self, place: tuple[int, ...], run: Callable[[], None]) -> None:
        def whole() -> None:
            self.wait(place)
            try:
                run()
            except BaseException as error:
                self.errors.append(error)
            with self.turn:
                self.now = None
                self.turn.notify_all()

        threading.Thread(target=whole, daemon=True).start()

    def finish(self, count: int) -> None:
        """Lets all go on, in an order that is drawn, until none is left."""
        with self.turn:
            self.turn.wait_for(lambda: len(self.waiting) == count)
            while self.waiting:
                self.now = self.waiting.pop(self.draw.randrange(len(self.waiting)))
                self.turn.notify_all()
                self.turn.wait_for(lambda: self.now is None)
        if self.errors:
            raise self.errors[0]


@contextmanager
def interleaved(kernel: str, seed: int) -> Iterator[Added]:
    """Launches of a kernel run in an order drawn from a seed; what atomics add is taken down."""
    draw, added, builder = random.Random(seed), [], interpreter.interpreter_builder
    call, atomic = interpreter.GridExecutor.__call__, type(builder).create_atomic_rmw
    current: list[_Programs] = []

    def create_atomic_rmw(self, op, pointer, value, mask, sem, scope):
        if current:
            place = self.grid_idx
            current[-1].wait(place)
            added.append((place, int(value.data.item())))
        return atomic(self, op, pointer, value, mask, sem, scope)

    def launch(self, *arguments, **options):
        if self.fn.__name__ != kernel:
            return call(self, *arguments, **options)
        program, programs, started = self.fn, _Programs(draw, added), []

        def run(**given) -> None:
            place = builder.grid_idx
            started.append(place)
            programs.start(place, lambda: program(**given))
            if len(started) == prod(self.grid):
                current.append(programs)
                programs.finish(len(started))
                current.pop()

        run.__signature__ = inspect.signature(program)
        run.__name__ = kernel
        self.fn = run
        return call(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = launch
    type(builder).create_atomic_rmw = create_atomic_rmw
    try:
        yield added
    finally:
        interpreter.GridExecutor.__call__ = call
        type(builder).create_atomic_rmw = atomic
