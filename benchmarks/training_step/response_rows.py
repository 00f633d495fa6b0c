"""python -m benchmarks.training_step.response_rows: attention of all response rows beside a step of
plain fine-tuning, against attention that the model returns; CPU seconds in alternating rounds, and
peak memory of each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import memory, rounds
from benchmarks.training_step.losses import EAGER, SKIPPING, losses
from benchmarks.training_step.model import SHAPES, Rows, build, sample
from benchmarks.training_step.step import runner
from groundkern.hf import AttentionPolicy, attach, policy_rows
from groundkern.losses import policy_divergence

POLICY = "groundkern, policy"
RETURNED = "SFT + policy, output_attentions"
NAMES = (SKIPPING, POLICY, RETURNED)
Run = Callable[[], tuple[list[Tensor], list[Tensor]]]


def returned(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(R2) of the last layer, from attention that the model returns."""
    inputs = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    output = model(**inputs, use_cache=False, output_attentions=True)
    position = batch["gk_policy_position"][0].long()
    attention = output.attentions[-1][0][:, position].float().mean(0)  # [N, S]
    seen = torch.arange(attention.shape[1]) < position[:, None]
    reference = batch["gk_policy_reference"][0, :, 0]
    rows = policy_divergence(attention, reference, seen)
    return output.loss + (batch["gk_policy_weight"][0] * rows).mean()


def runs(settings: argparse.Namespace) -> dict[str, Run]:
    """A step of each contestant, by name."""
    shape, cpu = SHAPES[settings.shape], torch.device("cpu")
    model = build(shape, cpu, torch.float32)
    rows = Rows(text=settings.rows, side=0, word=0, map=0)
    batch = sample(shape, settings.tokens, rows, cpu)
    plain = losses(model, batch)[SKIPPING]
    text = {k: x for k, x in batch.items() if not k.startswith("gk_") or k == "gk_text_position"}
    text |= policy_rows(text, torch.ones(1), rows="own")
    with torch.no_grad():
        maps = attach(model, policy=AttentionPolicy())(**text, gk_record="policy").policy_maps
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2))
    text["gk_policy_reference"] = maps * noise.exp()

    return {
        SKIPPING: runner(model, SKIPPING, plain),
        POLICY: runner(model, POLICY, lambda: model(**text).loss),
        RETURNED: runner(model, EAGER, lambda: returned(model, text)),
    }


def peak(settings: argparse.Namespace, name: str) -> int:
    """Bytes that a step of one contestant adds, in this process."""
    run = runs(settings)[name]
    run()
    return memory._of_cpu(run)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--shape", default="small", choices=SHAPES)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--rows", type=int, default=512, help="tokens of the response")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--peak-of", choices=NAMES, help="print the peak of one contestant, in bytes")
    return p


def main() -> None:
    settings = parser().parse_args()
    torch.set_num_threads(1)
    if settings.peak_of:
        print(peak(settings, settings.peak_of))
        return
    found = runs(settings)
    losses_of = {name: float(run()[0][0]) for name, run in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(settings.rounds):
        for name, run in found.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    for name in found:
        own = ["--shape", settings.shape, "--tokens", str(settings.tokens)]
        own += ["--rows", str(settings.rows), "--peak-of", name]
        command = [sys.executable, "-m", "benchmarks.training_step.response_rows", *own]
        bytes_ = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        ratio = rounds.ratio(seconds[name], seconds[SKIPPING])
        line = {"contestant": name, "loss": round(losses_of[name], 5)}
        line["cpu_ms_p50"] = round(1000 * rounds.quantiles(seconds[name])[1], 1)
        line |= {"to_skipping": [round(x, 3) for x in ratio], "peak_mib": round(bytes_ / 2**20, 1)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
