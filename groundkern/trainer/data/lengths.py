"""About how many tokens a sample has, from its characters and the sizes of images and frames.

For batches of samples of about the same length: no pixel is decoded and no text tokenised, but for
a few that say how many characters a token has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from groundkern.hf.data.example import message_text
from groundkern.hf.data.image_token import image_token_id
from groundkern.trainer.data.sample import Sample

LOOKS = 64  # samples whose text is tokenised
AREA = 28 * 28  # pixels to a visual token, if a processor says nothing
STEP = 64  # pixels to which sizes are rounded where an image is processed to count its tokens


class Indexed(Protocol):
    """What `LengthEstimate.of_all` needs of a data set."""

    counts: dict[str, np.ndarray]

    def __len__(self) -> int: ...
    def sample(self, index: int) -> Sample: ...


class LengthEstimate:
    """Lengths of samples in tokens, roughly.

    Args:
        processor: the model's.
        config: the model's.
        samples: a few, whose texts say how many characters a token has.
    """

    def __init__(self, processor: Any, config: Any, samples: Sequence[Sample]) -> None:
        self._processor, self._token = processor, image_token_id(config)
        texts = [_text(sample) for sample in samples]
        found = processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        self._per_character = sum(map(len, found)) / max(1, sum(map(len, texts))) or 0.25
        videos = getattr(processor, "video_processor", None)
        self._together = getattr(videos, "temporal_patch_size", None) or 1
        self._images: dict[tuple[int, int], int] = {}

    def image(self, width: int, height: int) -> int:
        """The visual tokens of an image of a size: as the processor says, or of an empty one."""
        told = hasattr(self._processor, "_get_num_multimodal_tokens")
        size = (width, height) if told else (_rounded(width), _rounded(height))
        if size not in self._images:
            try:
                self._images[size] = self._told(*size) if told else self._made(*size)
            except (AttributeError, IndexError, TypeError, ValueError):  # a processor of its own
                self._images[size] = size[0] * size[1] // AREA
        return self._images[size]

    def video(self, frames: int, width: int, height: int) -> int:
        """The visual tokens of a video: as many as images of its frames' size have."""
        return -(-frames // self._together) * self.image(width, height)

    def of(self, sample: Sample) -> float:
        """The length of a sample."""
        visual = sum(self.image(*size) for size in sample.sizes)
        visual += sum(self.video(video.planned, *video.size) for video in sample.videos)
        return visual + self._per_character * len(_text(sample))

    def of_all(self, data: Indexed) -> np.ndarray:
        """The length of every sample of an indexed data set, fp64; all of a sample's images count
        as its largest, and so do the frames of its videos."""
        counts = data.counts
        images = counts["images"] * self._of_sizes(counts["width"], counts["height"])
        frames = self._of_sizes(counts["frame_width"], counts["frame_height"])
        videos = -(-counts["frames"].astype(np.int64) // self._together) * frames
        return images + videos + self._per_character * counts["characters"]

    def _of_sizes(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """The visual tokens of an image of each size, int64; of none where that is 0."""
        sizes, where = np.unique(np.stack([width, height], 1), axis=0, return_inverse=True)
        tokens = [self.image(*size) if size[0] else 0 for size in sizes.tolist()]
        return np.array(tokens, np.int64)[where.reshape(-1)]

    def _told(self, width: int, height: int) -> int:
        told = self._processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
        return int(told.num_image_tokens[0])

    def _made(self, width: int, height: int) -> int:
        text, blank = self._processor.image_token, Image.new("RGB", (width, height))
        made = self._processor(text=[text], images=[[blank]])["input_ids"][0]
        return int(sum(token == self._token for token in made))


def looked_at(data: Indexed) -> list[Sample]:
    """A few samples of a data set, evenly spaced."""
    places = np.unique(np.linspace(0, len(data) - 1, min(LOOKS, len(data))).round())
    return [data.sample(int(place)) for place in places]


def _text(sample: Sample) -> str:
    return "".join(message_text(message) for message in sample.messages)


def _rounded(pixels: int) -> int:
    return max(STEP, round(pixels / STEP) * STEP)
