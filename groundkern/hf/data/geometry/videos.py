"""Where and when in its video each visual token is, one table per processor family.

A table row is `(video, t0, t1, x0, y0, x1, y1)`: the video's index within its sample, the seconds
from which and up to which the token shows it, and a rectangle in fractions of the frame. A token of
several frames shows them from the first of them until the next token's begin; those of the last
step end a frame later than the last frame was taken (`Video.steps`). A visual token without a place
(a newline) has -1 in all but the first column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.geometry import TRANSFORMERS
from groundkern.hf.data.geometry.cells import even, grid
from groundkern.hf.data.geometry.crops import cropped_cells
from groundkern.hf.data.video import Video
from groundkern.maps import patch_grid


class Clips(NamedTuple):
    """The videos of a batch, and how they were processed.

    Args:
        processor: the model's processor.
        config: the model's config.
        videos: all of them, in their order.
        batch: what the processor returned.
    """

    processor: Any
    config: Any
    videos: Sequence[Video]
    batch: Mapping[str, Any]


class VideoFamily(NamedTuple):
    """A family whose videos are known.

    Args:
        rule: of `Clips` the fp64 [n, 6] (t0, t1, x0, y0, x1, y1) of every video.
        since: the transformers that it needs.
        alike: whether the videos of a batch must have one number of frames.
    """

    rule: Callable[[Clips], list[Tensor]]
    since: str
    alike: bool = False


def temporal_patches(clips: Clips) -> list[Tensor]:
    """Qwen: a grid of merged patches for each few frames, its size from `video_grid_thw`."""
    settings = clips.processor.video_processor
    together, merge_size = settings.temporal_patch_size, settings.merge_size
    grids = torch.as_tensor(clips.batch.get("video_grid_thw", ())).reshape(-1, 3).tolist()
    require(len(grids) == len(clips.videos), "video_grid_thw", f"{len(clips.videos)} videos", grids)
    tables = []
    for (steps, height, width), video in zip(grids, clips.videos):
        wanted = ceil(len(video.frames) / together)
        where = "video_grid_thw"
        require(steps == wanted, where, f"t = {wanted}, every {together} frames", f"t = {steps}")
        rects = patch_grid(height // merge_size, width // merge_size)
        tables.append(_in_steps(rects, video, together))
    return tables


def pooled_squares(clips: Clips) -> list[Tensor]:
    """LLaVA-OneVision: each frame a square of half as many patches, and one newline behind all."""
    vision = clips.config.vision_config
    size = clips.processor.video_processor.size
    patch, tile = vision.patch_size, vision.image_size
    wanted = f"{tile} x {tile} pixels, its vision tower's"
    sides = size["height"], size["width"]
    require(sides == (tile, tile), "processor.video_processor.size", wanted, dict(size))
    patches = tile // patch
    along = even(ceil(patches / 2)) * patches * patch / float(tile)
    rects = grid(along, along)
    newline = torch.full((1, 6), -1.0, dtype=torch.float64)
    return [torch.cat([_in_steps(rects, video), newline]) for video in clips.videos]


def pooled_crops(clips: Clips) -> list[Tensor]:
    """LLaVA-NeXT-Video: each frame is resized and cropped, and its patches are pooled."""
    pixels = clips.processor.patch_size * clips.config.spatial_pool_stride
    settings = clips.processor.video_processor
    return [
        _in_steps(cropped_cells(settings, video.frames[0].size, pixels), video)
        for video in clips.videos
    ]


VIDEO_FAMILIES = {
    "llava_next_video": VideoFamily(pooled_crops, "5.1", alike=True),
    "llava_onevision": VideoFamily(pooled_squares, "5.1", alike=True),
    "qwen2_5_vl": VideoFamily(temporal_patches, "5.1"),
    "qwen2_vl": VideoFamily(temporal_patches, "5.1"),
    "qwen3_vl": VideoFamily(temporal_patches, "5.20"),
}
"""Values of `config.model_type` whose videos are known.

If a video becomes more than its visual tokens (times of frames), the processor must report what it
became: `text_replacement_offsets`.
"""


def check_videos(kind: str, videos: Sequence[Video]) -> None:
    """Refuse videos that a family does not take, or whose geometry is not known.

    Args:
        kind: the `config.model_type`.
        videos: of one batch.

    Raises:
        ValueError: a family whose videos are not known, or whose processor reports enough only in
            a later transformers; other numbers of frames where the family wants one.
    """
    if not videos:
        return
    if kind not in VIDEO_FAMILIES:
        wanted = f"one whose videos are known: {', '.join(VIDEO_FAMILIES)}"
        fail("config.model_type", wanted, repr(kind))
    family = VIDEO_FAMILIES[kind]
    if Version(family.since) > TRANSFORMERS:
        wanted = f"transformers >= {family.since}, whose processor tells what a video became"
        fail("config.model_type", wanted, f"{kind!r} with transformers {TRANSFORMERS}")
    frames = sorted({len(video.frames) for video in videos})
    if family.alike and len(frames) > 1:
        wanted = f"one number of frames for all videos of a batch ({kind} takes no other)"
        fail("videos", wanted, frames)


def video_geometry(
    processor: Any,
    config: Any,
    videos: Sequence[Sequence[Video]],
    batch: Mapping[str, Any],
) -> list[Tensor]:
    """The place and time of every visual token of the videos of every sample.

    Args:
        processor: the model's processor.
        config: the model's config; its `model_type` names the family.
        videos: of each sample.
        batch: what the processor returned for all of them (Qwen: `video_grid_thw`).

    Returns:
        fp64 [C, 7] for each sample: `(video, t0, t1, x0, y0, x1, y1)`, in the order of the visual
        tokens in the sequence.

    Raises:
        ValueError: see `check_videos`; a grid that does not fit the videos.

    Source: the video processors of transformers.
    """
    flat = [video for sample in videos for video in sample]
    check_videos(config.model_type, flat)
    empty = torch.zeros(0, 7, dtype=torch.float64)
    if not flat:
        return [empty for _ in videos]
    rule = VIDEO_FAMILIES[config.model_type].rule
    tables = iter(rule(Clips(processor, config, flat, batch)))
    numbered = []
    for sample in videos:
        own = [next(tables) for _ in sample]
        rows = [torch.cat([x.new_full((len(x), 1), i), x], 1) for i, x in enumerate(own)]
        numbered.append(torch.cat([empty, *rows]))
    return numbered


def _in_steps(rects: Tensor, video: Video, together: int = 1) -> Tensor:
    """[n, 6]: the same rectangles in every step of `together` frames."""
    edges = video.steps
    starts = torch.tensor(edges[:-1:together], dtype=torch.float64)
    stops = torch.cat([starts[1:], starts.new_tensor(edges[-1:])])
    times = torch.stack([starts, stops], 1)
    return torch.cat([times.repeat_interleave(len(rects), 0), rects.repeat(len(times), 1)], 1)
