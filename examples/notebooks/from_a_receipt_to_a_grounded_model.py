# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a receipt to a grounded model
#
# Images and questions come in, a model that looks at the right place comes out. The steps are those
# of any project: read the words by OCR, link answers to printed words, look at the data, train,
# look where the model looks, evaluate.
#
# It runs on one CPU core in less than a minute, since the receipts are small and the model is a
# Qwen2.5-VL of 1.2 million random weights. Give a real model's folder and your own file, and the
# commands are the same. `%run -m groundkern` is the command `groundkern`, run in this notebook's
# process, so that torch is imported once.

# %%
import json
import os
import random
from pathlib import Path
from tempfile import mkdtemp

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from groundkern.trainer import demo

os.chdir(mkdtemp())
demo.small_model("model")  # yours: leave this out, and write its folder for `model` below
plt.rcParams["figure.dpi"] = 70

# %% [markdown]
# ## Receipts
#
# We draw 32 of them. Where the total stands depends on how many lines there are. All we write down
# is a question and its answer, as chat files have them: no words, no boxes.

# %%
GOODS = "Apples Bread Butter Cheese Coffee Eggs Flour Honey Juice Milk Onions Pasta Rice Salt Tea"
FONT = ImageFont.truetype(
    str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), 15
)


def receipt(rng):
    """An image of 224 x 280 pixels, and its total."""
    items = [(name, rng.randint(50, 999)) for name in rng.sample(GOODS.split(), rng.randint(2, 7))]
    total = sum(price for _, price in items)
    image = Image.new("RGB", (224, 280), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    draw.text((112, 22), "CORNER SHOP", font=FONT, fill=(30, 30, 30), anchor="mm")
    for number, (name, price) in enumerate([*items, ("TOTAL", total)]):
        y = 64 + 26 * number
        draw.text((16, y), name, font=FONT, fill=(30, 30, 30), anchor="lm")
        draw.text((208, y), f"{price / 100:.2f}", font=FONT, fill=(30, 30, 30), anchor="rm")
    draw.line((16, y - 13, 208, y - 13), fill=(90, 90, 90))
    return image, f"{total / 100:.2f}"


Path("receipts").mkdir()
rng = random.Random(0)
for split, count in (("train", 24), ("test", 8)):
    with open(f"{split}-chats.jsonl", "w") as file:
        for number in range(count):
            image, total = receipt(rng)
            path = f"receipts/{split}-{number}.png"
            image.save(path)
            asked = {"role": "user", "content": "What is the total?"}
            chat = [asked, {"role": "assistant", "content": total}]
            file.write(json.dumps({"images": [path], "messages": chat}) + "\n")

figure, axes = plt.subplots(1, 4, figsize=(9, 3), layout="constrained")
for number, axis in enumerate(axes):
    axis.imshow(Image.open(f"receipts/train-{number}.png"))
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Read the words
#
# `prepare words` reads each image by OCR (RapidOCR, whose models are in its wheel) and writes the
# words and their boxes into the samples. With `--model` it keeps only words that label a visual
# token of that model by DV-SFT's rules; here all are kept, because the next step needs them.
# `--scale 1` reads these clean little images as they are, which is quicker than enlarging them.

# %%
HOW = "--scale 1 --workers 1"
# %run -m groundkern prepare words train-chats.jsonl --output train-words.jsonl {HOW}
# %run -m groundkern prepare words test-chats.jsonl --output test-words.jsonl {HOW}

# %% [markdown]
# ## Link the answers to what is printed
#
# `prepare marks` finds the printed words that an answer speaks of. They become its `regions`.

# %%
# %run -m groundkern prepare marks train-words.jsonl --output train.jsonl --workers 1
# %run -m groundkern prepare marks test-words.jsonl --output test.jsonl --workers 1

# %%
figure, axes = plt.subplots(1, 4, figsize=(9, 3), layout="constrained")
samples = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
for axis, sample in zip(axes, samples, strict=False):
    image = Image.open(sample["images"][0])
    draw = ImageDraw.Draw(image)
    for word in sample["words"]:
        draw.rectangle(word["box"], outline=(120, 160, 220))
    for region in sample["regions"]:
        draw.rectangle(region["box"], outline=(220, 60, 20), width=3)
    axis.imshow(image)
    axis.axis("off")
    axis.set_title(sample["messages"][-1]["content"])
plt.show()

# %% [markdown]
# Blue are the words, red the regions: OCR found them, not we. `groundkern inspect` makes a page of
# samples as the model gets them, with each row and each label; its summary is printed.

# %%
# %run -m groundkern inspect train.jsonl --model model --output inspect

# %% [markdown]
# ## Before
#
# Where does the untrained model look when it writes the total of a receipt that it will not be
# trained on? The table has a line for each token of the answer, the picture their mean: attention,
# GradCAM and logit contributions (docs/running/look.md). The region is outlined in blue.

# %%
test = json.loads(Path("test.jsonl").read_text().splitlines()[0])
image, (question, answer) = test["images"][0], (x["content"] for x in test["messages"])
box = ",".join(str(edge) for edge in test["regions"][0]["box"])
WHAT = f"--image {image} --prompt '{question}' --answer {answer} --region {box}"


def show(path):
    """A picture of `look` at a size that fits a notebook."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((700, 700))
    return picture


# %%
# %run -m groundkern look --model model {WHAT} --output before.png

# %%
show("before.png")

# %% [markdown]
# ## Train
#
# DV-SFT gives each visual token that a word ends on that word as its label; KLAL pulls the answer's
# attention towards the region. The weights are for a model that starts from nothing; the defaults
# are for one that can read.

# %%
Path("grounded.yaml").write_text("""\
model:
  path: model
data:
  train: train.jsonl
  test: test.jsonl
supervision:
  map_levels: [1.0, 0.1, 0.001]  # on the region, beside it, elsewhere
objectives:
  dv_sft:
    weight: 0.5
  klal:
    weight: 1.0
training:
  output: grounded
  steps: 80
  batch_size: 4
  learning_rate: 0.003
""")

# %%
# %run -m groundkern train --config grounded.yaml

# %% [markdown]
# ## After

# %%
# %run -m groundkern look --model grounded/model {WHAT} --output after.png

# %% figure="example_receipt.png"
show("after.png")

# %% [markdown]
# ## Evaluate
#
# `groundkern evaluate` asks the questions of the held-out receipts, scores the answers and measures
# where the model looks; `--compare` puts another evaluation beside it.

# %%
HELD_OUT = "--data test.jsonl --max-new-tokens 8"
# %run -m groundkern evaluate --model model {HELD_OUT} --output before
# %run -m groundkern evaluate --model grounded/model {HELD_OUT} --output after --compare before

# %% [markdown]
# ## What it shows
#
# An *attention ratio* of 1 is indifference: the region gets as much attention as any place of its
# size. The trained model looks at the total of receipts that it has never seen. It does not read
# them yet: no answer is right, and 80 steps on 24 receipts do not teach random weights their
# digits. For that start from a model that can read, with the default weights of the losses.
#
# The pages for each step: docs/data/prepare.md, docs/data/prepare-marks.md, docs/methods,
# docs/running/look.md and docs/running/evaluate.md.
