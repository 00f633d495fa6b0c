"""Draws one call and checks it, in whichever process."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Checked:
    """One call: its place in the summary, what is wrong with it, how long it took."""

    number: int
    op: str
    dtype: str
    kind: str
    sentences: list[str]
    seconds: float


def check(number: int, *, seed: int, op: str | None, backend: str, twice: float) -> Checked:
    """Draw call `number` and check it."""
    from tests.ops.random_calls import checking, drawing, losses

    begun = time.perf_counter()
    of_loss = op == "loss"
    try:
        drawn = losses.draw(seed, number) if of_loss else drawing.draw(seed, number, op)
    except Exception as error:
        return Checked(number, "drawing", "", "", [f"{type(error).__name__}: {error}"], 0.0)
    again = drawing.Dice(seed + 1, number).chance(twice)
    sentences = (losses if of_loss else checking).wrong(drawn, backend, twice=again)
    dtype = str(drawn.dtype).removeprefix("torch.")
    seconds = time.perf_counter() - begun
    return Checked(number, drawn.op, dtype, drawn.kind, sentences, seconds)


def start_worker() -> None:
    import torch

    torch.set_num_threads(1)
