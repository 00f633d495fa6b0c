"""Where does a model look when it writes an answer? One picture for each token.

python examples/look.py --model my/model --image scan.png --question "What is the total?"
"""

import argparse

import matplotlib.pyplot as plt
from PIL import Image
from transformers import AutoModelForImageTextToText

from groundkern.hf import load_processor
from groundkern.maps import heat_of
from groundkern.trainer import demo
from groundkern.trainer.look import generate
from groundkern.trainer.looks import look

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; without it a tiny model is made")
parser.add_argument("--image", help="a file; without it a grid with a red patch is drawn")
parser.add_argument("--question", default="Where is the red patch?")
parser.add_argument("--answer", help="the text that is looked at; default: what the model says")
parser.add_argument("--output", default="look.png")
options = parser.parse_args()

path = options.model or demo.small_model()
model = AutoModelForImageTextToText.from_pretrained(path).eval()
processor = load_processor(path)
if options.image:
    image = Image.open(options.image).convert("RGB")
else:
    image = demo.examples(1, tasks=["pointing"], seed=1)[0].images[0]
answer = options.answer or generate(model, processor, image, options.question, 8)

seen = look(model, processor, image, options.question, answer)
layers = range(model.config.get_text_config().num_hidden_layers)
heats = []
for number, token in enumerate(seen.tokens):
    attention = seen.over("attention", [number], list(layers))  # [visual tokens]
    heats.append(heat_of(seen.rects, attention, height=image.height, width=image.width))
    probability = float(seen.log_prob[number].exp())
    peak = [f"{x:.2f}" for x in seen.rects[attention.argmax()].tolist()]
    print(f"{token!r}: probability {probability:.2f}, looks most at {', '.join(peak)}")

figure, axes = plt.subplots(1, len(heats), figsize=(2 * len(heats), 2.4), squeeze=False)
for axis, heat, token in zip(axes[0], heats, seen.tokens, strict=True):
    axis.imshow(image)
    axis.imshow(heat, alpha=0.6)
    axis.set_title(repr(token))
    axis.axis("off")
figure.tight_layout()
figure.savefig(options.output, dpi=100)
print(f"wrote {options.output}")
