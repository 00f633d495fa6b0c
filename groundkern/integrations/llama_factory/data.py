"""What samples of LLaMA-Factory supervise, from its data file to its batches.

Its data sets keep the columns it knows. So its converters also write one more, the messages and
what the row says of regions, words and phrases as JSON, which preprocessing passes on and the
collator takes out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
from llamafactory.data.converter import DATASET_CONVERTERS
from llamafactory.data.processor import SupervisedDatasetProcessor
from PIL import Image

from groundkern.integrations.shared.records import (
    COLUMN,
    grounded_example,
    supervision_of,
    with_boxes,
)
from groundkern.integrations.shared.sequences import SequenceRows
from groundkern.integrations.shared.settings import Settings
from groundkern.trainer.data.images import wrong
from groundkern.trainer.prepare.boxes.settings import BoxSettings

MEDIA = ("_videos", "_audios")


def carrying(converter: type) -> type:
    """A converter of LLaMA-Factory's that keeps what a row supervises.

    Args:
        converter: of `DATASET_CONVERTERS`.
    """

    class Carrying(converter):
        def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
            made = super().__call__(example)
            messages = [*made["_prompt"], *made["_response"][:1]]
            record = {"messages": messages, **supervision_of(example)}
            return {**made, f"_{COLUMN}": json.dumps(record)}

    Carrying.__name__ = Carrying.__qualname__ = f"Carrying{converter.__name__}"
    return Carrying


CARRYING = {name: carrying(kind) for name, kind in DATASET_CONVERTERS.items()}


class CarryingProcessor(SupervisedDatasetProcessor):
    """Tokenises as the class does; what each sample supervises goes with it."""

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """As the class does.

        Args:
            examples: columns of rows that a converter made.

        Returns:
            Columns of samples, with one more.
        """
        made: dict[str, list[Any]] = defaultdict(list)
        for i in range(len(examples["_prompt"])):
            one = super().preprocess_dataset({name: [col[i]] for name, col in examples.items()})
            for name, column in one.items():
                made[name] += column
            made[COLUMN] += [examples[f"_{COLUMN}"][i]] * len(one["input_ids"])  # 0: dropped
        return made


@dataclass
class GroundingDataCollator(SFTDataCollatorWith4DAttentionMask):
    """LLaMA-Factory's collator, with the rows of what its samples supervise.

    Args:
        settings: of the run.
        model_path: whose processor says what resized pixels are, if boxes count these.

    Raises:
        ValueError, SampleError: in a call, a sample that does not fit, which the message names.
    """

    settings: Settings | None = None  # a default, because fields of the class have one
    model_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.settings is not None
        config = self.model.config
        self.rows = SequenceRows(self.processor, config, **self.settings.collating)
        chosen = self.settings.boxes, self.settings.coord, self.model_path
        self.boxes = BoxSettings.read_as(*chosen, prefix="groundkern.")
        self._number = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch with its rows.

        Args:
            features: samples that `CarryingProcessor` made.
        """
        records = [self._record(feature) for feature in features]
        images = [list(feature.get("images") or ()) for feature in features]
        with self._given() as given:
            batch = super().__call__(features)
        if any(images) and len(given) != sum(map(len, images)):
            wanted = "one that resizes each image of a batch once"
            raise wrong("batch", "template", wanted, f"{len(given)} of {sum(map(len, images))}")
        examples, at = [], 0
        for (record, where), own in zip(records, images, strict=True):
            sizes = [_size(image) for image in own]
            boxed = with_boxes(record, sizes, where, self.boxes)
            examples.append(grounded_example(boxed, sizes, given[at : at + len(own)], where))
            at += len(own)
        batch.pop("rope_deltas", None)  # of generation alone
        return self.rows(examples, batch)

    def _record(self, feature: dict[str, Any]) -> tuple[dict[str, Any], str]:
        self._number += 1
        where = f"sample {self._number} of this worker"
        if COLUMN not in feature:
            wanted = "one that was tokenised with groundkern (remove tokenized_path)"
            raise wrong(where, "dataset", wanted, "none of its columns")
        for kind in ("videos", "audios"):
            if feature.get(kind):
                raise wrong(where, kind, "images only", f"{len(feature[kind])}")
        record = json.loads(feature.pop(COLUMN))
        answer = record["messages"][-1]["content"]
        return record, f"{where} ({answer[:60]!r})"

    @contextmanager
    def _given(self) -> Iterator[list[tuple[int, int]]]:
        """The sizes of the images that the processor is given, as they come."""
        plugin = self.template.mm_plugin
        sizes: list[tuple[int, int]] = []
        own = plugin._regularize_images

        def regularize(images: list[Any], **options: Any) -> Any:
            made = own(images, **options)
            sizes.extend(image.size for image in made["images"])
            return made

        plugin._regularize_images = regularize
        try:
            yield sizes
        finally:
            del plugin._regularize_images


def _size(image: Any) -> tuple[int, int]:
    """(width, height) of an image as LLaMA-Factory loads it, which leaves EXIF as it is."""
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        image = BytesIO(image)
    return image.size if isinstance(image, Image.Image) else Image.open(image).size


__all__ = ["CARRYING", "CarryingProcessor", "GroundingDataCollator"]
