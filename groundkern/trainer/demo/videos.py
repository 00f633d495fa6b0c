"""Videos of Qwen2-VL and Qwen2.5-VL without torchvision, which transformers' own class needs.

Each frame goes through the family's image processor on PIL, and the patches of as many frames as a
temporal patch has are put together in the order of the family's video processor. Its numbers are
the same; where frames have to be resized, they are as close as PIL's bicubic is to torchvision's.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin, VideosKwargs
from transformers.video_utils import make_batched_metadata, make_batched_videos

from groundkern.hf.data.processor import pil_image_processor

_SAVED_AS = "Qwen2VLVideoProcessor"  # where torchvision is installed, this one is loaded


class PilVideoProcessor(ImageProcessingMixin):
    """Frames to `pixel_values_videos` and `video_grid_thw`, as `Qwen2VLVideoProcessor` makes them.

    Args:
        patch_size, merge_size, temporal_patch_size: pixels of a patch's side, patches of a visual
            token's side, and frames of a visual token.
        min_pixels, max_pixels: of a frame.
    """

    valid_kwargs = VideosKwargs
    # a list: older transformers add others to it
    model_input_names: ClassVar = ["pixel_values_videos", "video_grid_thw"]
    do_sample_frames = False

    def __init__(
        self,
        *,
        patch_size: int = 14,
        merge_size: int = 2,
        temporal_patch_size: int = 2,
        min_pixels: int = 128 * 28 * 28,
        max_pixels: int = 768 * 28 * 28,
    ) -> None:
        super().__init__()
        self.patch_size, self.merge_size = patch_size, merge_size
        self.temporal_patch_size = temporal_patch_size
        self.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}

    def to_dict(self) -> dict[str, Any]:
        """What is saved: a configuration of the family's own video processor."""
        names = ("patch_size", "merge_size", "temporal_patch_size", "size")
        return {"video_processor_type": _SAVED_AS} | {name: getattr(self, name) for name in names}

    def __call__(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """The patches of every video.

        Args:
            videos: a list of videos, each a list of frames (PIL) or an array [frames, H, W, C].
            video_metadata: of each: total_num_frames, fps, frames_indices.
            do_sample_frames: frames are taken as they are, so True is an error.
            return_metadata: with the metadata as `video_metadata`.
            return_tensors: "pt" or None; patches are a tensor in any case.

        Returns:
            "pixel_values_videos" fp32 [patches, C frames patch patch], "video_grid_thw" int64
            [videos, 3].

        Raises:
            ValueError: frames are to be sampled.
        """
        if do_sample_frames:
            raise ValueError(f"`do_sample_frames`: expected False, got {do_sample_frames}")
        videos = make_batched_videos(videos)
        metadata = make_batched_metadata(videos, video_metadata)
        patches, grids = zip(*(self._patches(video) for video in videos), strict=True)
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        found = BatchFeature(data, tensor_type=return_tensors)
        if return_metadata:
            found["video_metadata"] = metadata
        return found

    def _patches(self, frames: Any) -> tuple[Tensor, list[int]]:
        """Patches [T rows columns, C n P P] of one video, n frames to each, and [T, rows, columns].

        The last frame is repeated until the frames fill the last temporal patch.
        """
        frames, together = list(frames), self.temporal_patch_size
        frames += frames[-1:] * (-len(frames) % together)
        images = pil_image_processor("qwen2_vl", "Qwen2VL")(
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=1,
            size=dict(self.size),
        )(frames, return_tensors="pt")
        _, rows, columns = images["image_grid_thw"][0].tolist()
        values = images["pixel_values"].unflatten(0, (-1, together, rows * columns))
        values = values.unflatten(-1, (3, -1)).permute(0, 2, 3, 1, 4)  # [T, patches, C, n, P P]
        grid = [len(values), rows, columns]
        return values.flatten(2).flatten(0, 1), grid


@cache
def with_pil_videos(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor, whose video part may be a `PilVideoProcessor`; it saves alike.

    Args:
        processor_class: of Qwen2-VL or Qwen2.5-VL.

    Returns:
        A subclass of the same name, one for each class.
    """
    members = {"__module__": __name__}
    return type(processor_class.__name__, (_PilVideos, processor_class), members)


class _PilVideos:
    """Stands before a processor class, which would take nothing but transformers' own videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, PilVideoProcessor):
            return PilVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)
