"""Grounding losses in a loop of one's own: accumulation with the right denominators.

Each term is a mean over its rows, and micro-batches have different numbers of them. `gk_totals`,
the counts of the whole accumulated batch, makes the gradient that of one large batch.

python examples/bare_loop.py
"""

import argparse

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForImageTextToText

from groundkern.hf import DvSft, GroundingCollator, Klal, attach, doctor, load_processor, row_counts
from groundkern.trainer import demo

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; without it a tiny model is made")
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()

path = options.model or demo.small_model()
model = AutoModelForImageTextToText.from_pretrained(path).train()
attach(model, dv_sft=DvSft(), klal=Klal())
collate = GroundingCollator(load_processor(path), model.config)
examples = demo.examples(32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if options.model else 2e-3)


def gradients(micro_batches):
    """Add up the gradient of an accumulated batch, and the parts of its loss."""
    totals = sum(row_counts(batch) for batch in micro_batches)  # over ranks: all_reduce(totals)
    parts = {}
    for batch in micro_batches:
        output = model(**batch, gk_totals=totals)
        output.loss.backward()  # of several ranks: times their number, since DDP averages
        parts = {name: parts.get(name, 0.0) + float(x) for name, x in output.parts.items()}
    return parts


print(doctor(model, collate(examples[:4])))
norms = []
for size in (8, 2):  # one batch of 8, and 4 of 2: the same gradient
    gradients([collate(examples[i : i + size]) for i in range(0, 8, size)])
    norms.append(float(clip_grad_norm_(model.parameters(), torch.inf)))
    optimizer.zero_grad()
print(f"gradient of 8 samples: {norms[0]:.5f} at once, {norms[1]:.5f} in micro-batches")

for step in range(options.steps):
    start = step * 8 % len(examples)
    parts = gradients([collate(examples[i : i + 2]) for i in range(start, start + 8, 2)])
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in parts.items()))
