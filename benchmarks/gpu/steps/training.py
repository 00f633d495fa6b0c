"""Step `training_step`: what grounding adds to a whole step of a 7B model at 8k tokens."""

from __future__ import annotations

from benchmarks.gpu.steps.worker import Cases, Context
from benchmarks.timing import results
from benchmarks.training_step import step as training_step

ARGUMENTS = ["--shape", "qwen2.5-vl-7b", "--dtype", "bfloat16", "--lora", "64", "--checkpointing"]
TIMED = ["--seconds", "6", "--least", "3"]
PLAYED = 45.0  # guessed seconds of a length on a card: building, a step of each, three rounds


def cases(context: Context) -> Cases:
    for tokens in (8192, 2048):
        yield f"{tokens} tokens", lambda tokens=tokens: _step(context, tokens)


def _step(context: Context, tokens: int) -> None:
    path = context.scratch / f"training_step_{tokens}.csv"
    arguments = [*ARGUMENTS, "--tokens", str(tokens), *TIMED, "--csv", str(path)]
    if context.device.rehearsed:
        training_step.parser().parse_args(arguments)
        context.device.spend(PLAYED)
        arguments = ["--shape", "tiny", "--tokens", "256", "--device", "cpu", "--no-memory"]
        arguments += ["--seconds", "0", "--least", "2", "--csv", str(path)]
    status = training_step.main(arguments)
    for row in results.read(path):
        context.write("training", case=row["problem"], row=row)
    if status:
        raise RuntimeError("a contestant disagreed or failed: its row says which")
