"""`prepare teach`: where a teacher looks when it answers, as heats that another model can learn.

The teacher's attention over an image or video, mean of layers, heads and rows of the answer, is
spread over the pixels of a heat by exact areas (K9). So the student may cut the image into other
tokens.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.prepare.arguments import add_choice, add_common, add_samples, positive

if TYPE_CHECKING:
    from torch import Tensor

    from groundkern.hf import GroundedExample
    from groundkern.trainer.prepare.pipeline import Made
    from groundkern.trainer.prepare.sources import Item
    from groundkern.trainer.visual_places import VisualPlaces

HELP = "where a teacher model looks, as target maps of the answers (KLAL)"
TITLES = {
    "samples_taught": "samples with a teacher's heats",
    "samples_with_regions": "samples left as they were: they have regions (--replace takes these)",
    "samples_untaught": "samples left as they were: nothing to look at, or no text in the answer",
    "heats": "heats",
}
_ROWS = ("answer_predictor", "answer", "predictor", "last")
_WHOLE = (0.0, 0.0, 1.0, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare teach`."""
    add_samples(parser)
    parser.add_argument("--model", required=True, help="the teacher: a model folder or hub name")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument("--layers", help="layers that count, for example 0,8,15-20; default: all")
    add_choice(parser, "--rows", _ROWS, "of the answer, as supervision.map_rows")
    parser.add_argument(
        "--side", type=positive(int), default=64, help="pixels of a heat's longer side"
    )
    parser.add_argument("--replace", action="store_true", help="regions that samples have already")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Looks, writes, and prints the counts; one process, since the model is in it."""
    from groundkern.hf import GroundingCollator, attach
    from groundkern.trainer.geometry import geometry_of
    from groundkern.trainer.loading import open_model
    from groundkern.trainer.look import parse_layers
    from groundkern.trainer.prepare.running import run_work, show_counts
    from groundkern.trainer.prepare.sources import open_source

    source = open_source(arguments.input)
    root = arguments.root or arguments.input.parent
    model, processor = open_model(arguments.model, attn_implementation=None, dtype=arguments.dtype)
    layers = parse_layers(arguments.layers, model.config.get_text_config().num_hidden_layers)
    attach(model.to(arguments.device).eval())
    geometry = geometry_of(model, processor)
    collator = GroundingCollator(
        processor, model.config, geometry=geometry, map_rows=arguments.rows
    )
    folder = f"{arguments.output.stem}_heats"
    work = Teach(root, folder, model, collator, layers, arguments.side, arguments.replace)
    arguments.workers = 1
    out = run_work(arguments, source, work, root=root, unit="sample")
    show_counts(out.counts, TITLES)
    return 0


@dataclass(frozen=True)
class Teach:
    """Adds a region with a heat for each answer and each image or video before it.

    Args:
        root: the data root.
        folder: below it, for the heats.
        model: the teacher, attached, in evaluation mode.
        collator: its `map_rows` says which rows count.
        layers: those that count.
        side: pixels of a heat's longer side.
        replace: whether samples that have regions get others.
    """

    root: Path
    folder: str
    model: Any
    collator: Any
    layers: list[int]
    side: int
    replace: bool

    def __call__(self, item: Item) -> Made:
        from groundkern.hf.data.example import is_trained, message_text
        from groundkern.trainer.data.sample import parse_sample
        from groundkern.trainer.prepare.pipeline import Made

        record = item.value
        sample = parse_sample(record, root=self.root, where=item.where)
        if sample.regions and not self.replace:
            return Made([record], counts={"samples_with_regions": 1})
        example = sample.load()
        regions, files = [], {}
        for turn, message in enumerate(sample.messages):
            text = message_text(message)
            if not is_trained(message) or not text.strip():
                continue
            for number, content in self._heats(example, turn, len(text)):
                name = f"{self.folder}/{item.index:08d}_{turn}_{number}.npz"
                files[name] = content
                of_video = number - len(example.images)
                place = {"video": of_video} if of_video >= 0 else {"image": number}
                region = {"char_span": [0, len(text)], "turn": turn, **place, "heat": name}
                regions.append(region)
        if not regions:
            return Made([record], counts={"samples_untaught": 1})
        counts = Counter(samples_taught=1, heats=len(regions))
        return Made([{**record, "regions": regions}], files, counts)

    def _heats(self, example: GroundedExample, turn: int, length: int) -> list[tuple[int, bytes]]:
        """(the image, or behind these the video, and its heat) of one answer."""
        import torch

        from groundkern.hf import Region
        from groundkern.trainer.metrics.held_out import device_of, to_device
        from groundkern.trainer.visual_places import visual_places

        images = [Region(turn, 0, length, i, (_WHOLE,)) for i in range(len(example.images))]
        videos = [
            Region(turn, 0, length, -1, (_WHOLE,), video=i) for i in range(len(example.videos))
        ]
        asked = replace(example, regions=(*images, *videos), words=(), phrases=())
        batch = self.collator([asked])
        if not bool((batch["gk_map_position"] >= 0).any()):
            return []
        places = visual_places(self.collator, example, batch)
        with torch.no_grad():
            given = to_device(batch, device_of(self.model))
            output = self.model(**given, gk_record=("maps", "layers"))
        maps = output.maps[0][:, self.layers].mean(1).double().cpu()[:, : len(places.number)]
        found = []
        for number in batch["gk_map_image"][0].unique().tolist():
            if number < 0:  # padding
                continue
            values = maps[batch["gk_map_image"][0] == number].mean(0)
            first = number - len(example.images)
            shown = example.images[number] if first < 0 else example.videos[first].frames[0]
            found.append((number, self._heat(values, places, number, shown.size)))
        return found

    def _heat(
        self, values: Tensor, places: VisualPlaces, number: int, size: tuple[int, int]
    ) -> bytes:
        """The `.npz` of a map over the visual tokens of one image or video."""
        import numpy as np
        import torch

        from groundkern import maps

        scale = self.side / max(size)
        width, height = (max(1, round(side * scale)) for side in size)
        own = places.of(number)
        starts = places.times[own, 0].unique()  # -1 alone of an image
        heats = []
        for start in starts:
            step = own & (places.times[:, 0] == start)
            rects, mass = places.rects[step], values[step]
            heats.append(maps.heat_of(rects, mass, height=height, width=width))
        buffer, heat = io.BytesIO(), torch.stack(heats).numpy()
        if float(starts[0]) < 0:
            np.savez_compressed(buffer, heat=heat[0])
        else:
            np.savez_compressed(buffer, heat=heat, times=starts.numpy())
        return buffer.getvalue()
