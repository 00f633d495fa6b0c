"""Where does a model look when it writes an answer? A picture for each token.

python examples/look.py --model my/model --image scan.png --question "What is the total?"
"""

import argparse

import matplotlib.pyplot as plt
from PIL import Image
from transformers import AutoModelForImageTextToText

from groundkern.hf import load_processor
from groundkern.trainer import demo
from groundkern.trainer.look import generate
from groundkern.trainer.looks import look
from groundkern.trainer.pictures import heated

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; without it a tiny model is made")
parser.add_argument("--image", help="a file; without it a page is drawn")
parser.add_argument("--question", default="Read the highlighted line.")
parser.add_argument("--answer", help="the text that is looked at; default: what the model says")
parser.add_argument("--output", default="look.png")
options = parser.parse_args()

path = options.model or demo.small_model()
model = AutoModelForImageTextToText.from_pretrained(path).eval()
processor = load_processor(path)
if options.image:
    image = Image.open(options.image).convert("RGB")
else:
    image = demo.examples(1, tasks=["page"], seed=4)[0].images[0]
answer = options.answer or generate(model, processor, image, options.question, 4)

seen = look(model, processor, image, options.question, answer)
layers = list(range(model.config.get_text_config().num_hidden_layers))
figure, axes = plt.subplots(1, len(seen.tokens) + 1, figsize=(2.6 * len(seen.tokens) + 2.6, 2.3))
axes[0].imshow(image)
for number, token in enumerate(seen.tokens):
    attention = seen.over("attention", [number], layers)  # [visual tokens], the mean of layers
    place = [f"{x:.2f}" for x in seen.rects[attention.argmax()].tolist()]
    chance = float(seen.log_prob[number].exp())
    print(f"{token!r}: probability {chance:.2f}, most attention in {', '.join(place)}")
    heat = heated(image, seen.rects.tolist(), attention.numpy(), float(attention.max()))
    axes[number + 1].imshow(heat)
    axes[number + 1].set_title(repr(token))
plt.setp(axes, xticks=[], yticks=[])
figure.savefig(options.output, dpi=100, bbox_inches="tight")
print(f"wrote {options.output}")
