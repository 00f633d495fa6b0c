"""What regions of a video are in each of its frames."""

from __future__ import annotations

from collections.abc import Sequence

from groundkern.hf.data.example import Region
from groundkern.hf.data.video import RasterTrack, Track, Video, box_at, raster_at
from groundkern.maps_in_time import Moment

SHAPES = ("boxes", "points", "bells", "polygons", "polylines", "rasters")
"""The fields of a `Region` that say where it is, in an image or in every frame of its time."""
_WHOLE = (0.0, 0.0, 1.0, 1.0)


def moments_of(regions: Sequence[Region], video: Video) -> list[Moment]:
    """The shapes of all regions, frame by frame.

    A region counts in the frames that were taken in its time, a track's box in those between its
    first and its last time, and a raster that changes is what it is when a frame is taken. If none
    was taken then, it counts in the frame that lasts at its start, as a shape too small for a
    hundredth of a patch counts for the patch that it lies in.

    Args:
        regions: of this video.
        video: its frames and their times.

    Returns:
        One for each frame and region, or track, that is there.
    """
    moments = []
    for region in regions:
        start, stop = region.time or (video.steps[0], video.steps[-1])
        shapes = {name: getattr(region, name) for name in SHAPES if getattr(region, name)}
        moving = region.tracks or region.raster_track
        if not shapes and not moving and region.time is not None:
            shapes = {"boxes": (_WHOLE,)}
        if shapes:
            moments += [Moment(video.times[i], shapes) for i in video.frames_within(start, stop)]
        for track in region.tracks:
            moments += _of_track(track, video, start, stop)
        if region.raster_track:
            moments += _of_rasters(region.raster_track, video, start, stop)
    return moments


def _of_rasters(track: RasterTrack, video: Video, start: float, stop: float) -> list[Moment]:
    moments = []
    for i in video.frames_within(start, stop):
        raster = raster_at(track, max(start, video.times[i]))
        if raster is not None:
            moments.append(Moment(video.times[i], {"rasters": (raster,)}))
    return moments


def _of_track(track: Track, video: Video, start: float, stop: float) -> list[Moment]:
    first, last = max(start, track[0][0]), track[-1][0]
    if first > last or first >= stop:
        return []
    frames = [video.times[i] for i in video.frames_within(start, stop)]
    shown = [(time, box_at(track, time)) for time in frames]
    if within := [(time, box) for time, box in shown if box is not None]:
        return [Moment(time, {"boxes": (box,)}) for time, box in within]
    shapes = {"boxes": (box_at(track, first),)}
    return [Moment(video.times[i], shapes) for i in video.frames_within(first, min(stop, last))]
