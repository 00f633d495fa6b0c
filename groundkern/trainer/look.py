"""`groundkern look`: where a model looks when it answers, over an image or a video.

Three maps of every answer token, each read at the row that predicts it: attention over the image
(mean of heads and layers), GradCAM (attention times its rectified gradient) and logit contributions
(C1) (what each visual token adds to the logit; signed). The last two are sums over layers.
"""

from __future__ import annotations

import io
import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from groundkern.hf import Video
from groundkern.hf.data.calling import rendered
from groundkern.maps import inside
from groundkern.rasters import Raster
from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import MAX_PIXELS, image_size, load_rgb
from groundkern.trainer.data.rasters import RasterField, find_heat, find_mask
from groundkern.trainer.evaluation.generating import Answerer
from groundkern.trainer.evaluation.questions import Question
from groundkern.trainer.loading import open_model
from groundkern.trainer.look_video import Clip, clip_of
from groundkern.trainer.looks import MAPS, Looks, look, scores
from groundkern.trainer.outlines import outlines
from groundkern.trainer.pictures import full_scale, heated, outline
from groundkern.trainer.sheet import Sheet
from groundkern.trainer.video_options import rules_of

SCALES = {"pixel": None, "unit": 1.0, "per_mille": 1000.0}
WHOLE, OF_ROW = 700_000, 130_000  # pixels of a picture: of a few, and where each layer has three
LONGEST = 2400  # pixels of its longer side
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Target:
    """What the answer speaks of: boxes, and masks and heats over the whole image."""

    boxes: list[Box] = field(default_factory=list)
    rasters: list[Raster] = field(default_factory=list)

    def on(self, rects: Tensor) -> Tensor | None:
        """bool [C]: the visual tokens it covers; None if nothing was given."""
        if not self.boxes and not self.rasters:
            return None
        return inside(rects, boxes=self.boxes, rasters=self.rasters)

    def drawn(self) -> dict[str, list]:
        """Its shapes as `pictures.outline` takes them."""
        lines = [line for raster in self.rasters for line in outlines(raster)]
        return {"boxes": self.boxes, "points": [], "polygons": [], "polylines": lines}


def run_look(arguments: Namespace) -> Path:
    """Run the command: print the table, write the picture.

    Returns:
        The picture's path.

    Raises:
        ConfigError, SampleError: bad arguments, a model or an image that cannot be loaded.
    """
    seen, target = _clip(arguments) if arguments.video else _picture(arguments)
    model, processor = open_model(arguments.model, attn_implementation=None, dtype=arguments.dtype)
    model.to(arguments.device).eval()
    layers = parse_layers(arguments.layers, model.config.get_text_config().num_hidden_layers)
    answer = arguments.answer
    if answer is None:
        answer = generate(model, processor, seen, arguments.prompt, arguments.max_new_tokens)
    if not answer.strip():
        raise ConfigError(f"--answer: expected a token at least, got {answer!r}")
    looks = look(model, processor, seen, arguments.prompt, answer)
    tokens = arguments.token or list(range(len(looks.tokens)))
    if not all(0 <= token < len(looks.tokens) for token in tokens):
        raise ConfigError(f"--token: expected numbers below {len(looks.tokens)}, got {tokens}")
    if isinstance(target, Clip):
        on = target.on(looks)
        Console().print(table_of(looks, layers, on))
        for suffix, content in target.pictures(looks, tokens, layers, on):
            durable.write_bytes(arguments.output.with_suffix(suffix), content)
        return arguments.output.with_suffix(".png")
    on = target.on(looks.rects)
    Console().print(table_of(looks, layers, on))
    sheet = draw(looks, seen, tokens, layers, on, target.drawn(), per_layer=arguments.per_layer)
    buffer = io.BytesIO()
    sheet.image.save(buffer, "PNG")
    durable.write_bytes(arguments.output, buffer.getvalue())
    return arguments.output


def _picture(arguments: Namespace) -> tuple[Image.Image, Target]:
    """The image of `--image`, and the target on it."""
    if len(arguments.image) > 1:
        raise ConfigError(
            f"--image: expected one image, got {len(arguments.image)}; maps are drawn over one"
        )
    if arguments.time is not None:
        raise ConfigError("--time: expected a --video, whose seconds it means, got an image")
    where = f"{arguments.image[0]}"
    size = image_size(arguments.image[0], where=where, field="image")
    image = load_rgb(arguments.image[0], size, where=where, field="image")
    boxes = [parse_box(text, arguments.coord, size) for text in arguments.region]
    return image, Target(boxes, rasters_of(arguments, size))


def _clip(arguments: Namespace) -> tuple[Video, Clip]:
    """The video of `--video`, and the target in it."""
    if arguments.per_layer:
        raise ConfigError("--per-layer: expected an --image, got a video, whose frames are rows")
    video = clip_of(arguments.video, rules_of(arguments))
    size = video.frames[0].size
    boxes = [parse_box(text, arguments.coord, size) for text in arguments.region]
    time = None if arguments.time is None else parse_time(arguments.time)
    rasters = rasters_of(arguments, size)
    return video, Clip(video, tuple(boxes), tuple(rasters), time)


def parse_time(text: str) -> tuple[float, float]:
    """A `--time` as seconds."""
    try:
        start, stop = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--time: expected T0,T1 in seconds, got {text!r}") from None
    if not 0 <= start < stop < math.inf:
        raise ConfigError(f"--time: expected 0 <= T0 < T1, got {text!r}")
    return start, stop


def parse_box(text: str, coord: str, size: tuple[int, int]) -> Box:
    """A `--region` as fractions of the image."""
    scale = SCALES[coord]
    whole = size if scale is None else (scale, scale)
    try:
        x0, y0, x1, y1 = (float(n) / whole[i % 2] for i, n in enumerate(text.split(",")))
    except ValueError:
        raise ConfigError(f"--region: expected X0,Y0,X1,Y1, got {text!r}") from None
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ConfigError(f"--region: expected a {coord} box within the image, got {text!r}")
    return x0, y0, x1, y1


def rasters_of(arguments: Namespace, size: tuple[int, int]) -> list[Raster]:
    """The files of `--mask` and `--heat`.

    Raises:
        ConfigError: a `--mask-value` without a mask.
        SampleError: a file that is no such raster, or none of this image.
    """
    if arguments.mask_value is not None and not arguments.mask:
        raise ConfigError("--mask-value: expected a --mask whose pixels it picks, got none")
    masks = [
        find_mask(path.resolve().name, arguments.mask_value, _field(path, "mask", size))
        for path in arguments.mask
    ]
    heats = [find_heat(path.resolve().name, _field(path, "heat", size)) for path in arguments.heat]
    return [stored.load({}) for stored in (*masks, *heats)]


def _field(path: Path, field: str, size: tuple[int, int]) -> RasterField:
    return RasterField(size, path.resolve().parent, MAX_PIXELS, f"{path}", field)


def parse_layers(text: str | None, count: int) -> list[int]:
    """`0,8,15-20` as layer numbers below `count`; None: all."""
    if text is None:
        return list(range(count))
    found = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            if not 0 <= int(last or first) < count:  # before a range of any length is made
                raise ConfigError(f"--layers: expected numbers below {count}, got {text!r}")
            found.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise ConfigError(f"--layers: expected numbers as 0,8,15-20, got {text!r}") from None
    if not found or not 0 <= min(found) <= max(found) < count:
        raise ConfigError(f"--layers: expected numbers below {count}, got {text!r}")
    return sorted(found)


def generate(
    model: torch.nn.Module,
    processor: Any,
    seen: Image.Image | Video,
    prompt: str,
    max_new_tokens: int,
) -> str:
    """The model's own greedy answer.

    Raises:
        ConfigError: it says nothing.
        SampleError: the processor does not take the question.
    """
    kind = "video" if isinstance(seen, Video) else "image"
    content = [{"type": kind}, {"type": "text", "text": prompt}]
    chat = [{"role": "user", "content": content}]
    text = rendered(processor, chat, asks=True)
    answerer = Answerer(model, processor, max_new_tokens=max_new_tokens)
    shown = ((), "--prompt", (seen,)) if kind == "video" else ((seen,), "--prompt")
    question = Question(text, *shown)
    answer = answerer.answer(answerer.inputs([question]))[0].text.strip()
    if not answer:
        raise ConfigError("--answer: the model's own answer is empty; give one")
    return answer


def table_of(looks: Looks, layers: list[int], on: Tensor | None) -> Table:
    """One line per answer token: its probability, the image's part of its logit, the metrics."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for head in ("", "token", "prob", "image"):
        table.add_column(f"\n{head}", no_wrap=True, max_width=14)
    if on is not None:
        table.caption = "A: attention, G: GradCAM, C: contribution, against the region"
        for name in MAPS:
            heads = ("peak", "AUC") if name == "contribution" else ("peak", "AUC", "ratio")
            for head in heads:
                group = name[0].upper() if head == "peak" else ""
                table.add_column(f"{group}\n{head}", no_wrap=True)
    for n, token in enumerate(looks.tokens):
        share = looks.over("contribution", [n], layers).sum()
        cells = [str(n), escape(repr(token)), f"{looks.log_prob[n].exp():.2f}", f"{share:+.2f}"]
        for name in MAPS if on is not None else ():
            found = scores(looks.over(name, [n], layers), name, on)
            cells += [f"{value:.2f}" for value in found.values()]
        table.add_row(*cells)
    return table


def draw(
    looks: Looks,
    image: Image.Image,
    tokens: list[int],
    layers: list[int],
    on: Tensor | None,
    target: dict[str, list],
    *,
    per_layer: bool,
) -> Sheet:
    """The three maps over the image, with the target; `per_layer` adds a row for each layer."""
    rows = [layers, *([layer] for layer in layers if per_layer)]
    shown = enlarged(image, OF_ROW if per_layer else WHOLE)
    said = "".join(looks.tokens[token] for token in tokens)
    lines = 1 if on is None else 2
    sheet = Sheet(shown.size, len(MAPS), len(rows), title=said, lines=lines)
    for row, chosen in enumerate(rows):
        for column, name in enumerate(MAPS):
            values = looks.over(name, tokens, chosen)
            top = full_scale([values.abs().tolist()])
            picture = heated(shown, looks.rects.tolist(), values.numpy(), top)
            outline(picture, target)
            sheet.add(picture, _caption(name, chosen, layers, values, on), row, column)
    return sheet


def enlarged(image: Image.Image, area: int) -> Image.Image:
    """The image at about `area` pixels, larger or smaller than it is."""
    scale = min((area / (image.width * image.height)) ** 0.5, LONGEST / max(image.size))
    return image.resize(tuple(max(1, round(n * scale)) for n in image.size), Image.LANCZOS)


def _caption(
    name: str, chosen: list[int], layers: list[int], values: Tensor, on: Tensor | None
) -> list[str]:
    number = f"{len(layers)} layers" if chosen is layers else f"layer {chosen[0]}"
    caption = [f"{name}, {number}"]
    if name == "contribution":
        caption[0] += f", {values.sum():+.2f}"
    if on is not None:
        found = scores(values, name, on)
        caption.append("  ".join(f"{key} {value:.2f}" for key, value in found.items()))
    return caption
