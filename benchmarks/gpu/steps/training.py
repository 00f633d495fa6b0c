"""Step `training_step`: what grounding adds to a whole step of a 7B model at 8k tokens, of full
fine-tuning and of LoRA. `to_skipping_p50` of "groundkern, KLAL" is 1 + KLAL's share."""

from __future__ import annotations

from benchmarks.gpu.steps.worker import Cases, Context
from benchmarks.timing import results
from benchmarks.training_step import step as training_step

ARGUMENTS = ["--shape", "qwen2.5-vl-7b", "--dtype", "bfloat16", "--checkpointing"]
TIMED = ["--seconds", "6", "--least", "3"]
PLAYED = 45.0  # guessed seconds of a length on a card: building, a step of each, three rounds


def cases(context: Context) -> Cases:
    for kind, lora in (("every weight trained", []), ("LoRA", ["--lora", "64"])):
        name = f"8192 tokens, {kind}"
        yield name, lambda name=name, lora=lora: _step(context, name, lora)


def _step(context: Context, name: str, lora: list[str]) -> None:
    path = context.scratch / f"training_step_{'lora' if lora else 'full'}.csv"
    arguments = [*ARGUMENTS, *lora, "--tokens", "8192", *TIMED, "--csv", str(path)]
    if context.device.rehearsed:
        training_step.parser().parse_args(arguments)
        context.device.spend(PLAYED)
        arguments = ["--shape", "tiny", "--tokens", "256", "--device", "cpu", "--no-memory"]
        arguments += ["--seconds", "0", "--least", "2", "--csv", str(path)]
    status = training_step.main(arguments)
    for row in results.read(path):
        context.write("training", case=name, row=row)
    if status:
        raise RuntimeError("a contestant disagreed or failed: its row says which")
