"""Overfit one image with LoRA, and see the attention of the answer move onto the region.

python examples/lora_one_image.py  # writes the image, the map before and the map after
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from groundkern.hf import GroundingCollator, Klal, attach, load_processor
from groundkern.metrics import mass_on_target
from groundkern.trainer import demo
from groundkern.trainer.pictures import heated
from groundkern.trainer.visual_places import visual_places

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; without it a tiny model is made")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--output", default="lora_one_image.png")
options = parser.parse_args()

path = options.model or demo.small_model()
model = AutoModelForImageTextToText.from_pretrained(path)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]))
attach(model, klal=Klal(weight=1.0))
collate = GroundingCollator(load_processor(path), model.config, map_kind="uniform")
example = demo.examples(1, tasks=["page"], seed=3)[0]  # "Read the highlighted line."
batch = collate([example])


def look():
    """The map of the answer's last row, and how much of it is on the region."""
    model.eval()
    with torch.no_grad():
        attention = model(**batch, gk_record=("maps",)).maps[:, -1]  # [1, visual tokens]
    target = batch["gk_map_target"][:, -1]
    return attention[0], float(mass_on_target(attention, target > 0.5 * target.max()))


before, mass_before = look()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(options.steps):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
after, mass_after = look()
print(f"attention on the region: {mass_before:.3f} before, {mass_after:.3f} after")

rects = visual_places(collate, example, batch).rects.tolist()
image = example.images[0]
maps = [heated(image, rects, x.numpy(), float(after.max())) for x in (before, after)]
sheet = Image.new("RGB", (3 * image.width + 20, image.height), "white")
for number, picture in enumerate([image, *maps]):
    sheet.paste(picture, (number * (image.width + 10), 0))
sheet.save(options.output)
