"""`prepare gaze`: fixations of people become regions of what the answer says.

Each fixation is a region of its own: a point with a spread, its duration as its share, and in a
video the time in which it counts. So a row of KLAL has the mixture (K8) of all of them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.prepare.arguments import add_choice, add_common, add_samples, positive
from groundkern.trainer.prepare.gaze.fixations import Fixation, read_fixations

if TYPE_CHECKING:
    from groundkern.trainer.data.sample import Sample
    from groundkern.trainer.data.videos import StoredVideo
    from groundkern.trainer.prepare.pipeline import Made
    from groundkern.trainer.prepare.sources import Item

HELP = "fixations of eye trackers, as target maps of the answers (KLAL)"
TITLES = {
    "samples_with_gaze": "samples with fixations",
    "samples_without_gaze": "samples left as they were: no fixations, or no text in their answer",
    "fixations": "fixations",
    "fixations_outside": "fixations outside of their image or video, left out",
}
_SCALES = {"pixel": None, "unit": 1.0, "per_mille": 1000.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare gaze`."""
    add_samples(parser)
    parser.add_argument(
        "--fixations",
        type=Path,
        required=True,
        help="CSV, JSON or JSON lines: path (as the samples name it), x, y, time or frame of a "
        "video, duration",
    )
    add_choice(parser, "--coord", tuple(_SCALES), "unit of x, y and --spread")
    parser.add_argument(
        "--spread",
        type=positive(float),
        required=True,
        help="standard deviation of a fixation; of the image's width if not in pixels",
    )
    parser.add_argument(
        "--window",
        type=_seconds,
        default=0.2,
        help="videos: seconds for which a fixation still counts",
    )
    add_choice(parser, "--around", ("past", "both"), "frames that have fixations of the window")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Adds the regions, writes, and prints the counts."""
    from groundkern.trainer.prepare.running import run_work, show_counts
    from groundkern.trainer.prepare.sources import open_source

    source = open_source(arguments.input)
    root = arguments.root or arguments.input.parent
    fixations, arguments.fixations_sha256 = read_fixations(arguments.fixations)
    both = arguments.around == "both"
    work = AddGaze(root, fixations, arguments.coord, arguments.spread, arguments.window, both)
    out = run_work(arguments, source, work, root=root, unit="sample")
    print(f"{sum(map(len, fixations.values())):>12,}  fixations in {arguments.fixations}")
    show_counts(out.counts, TITLES)
    return 0


@dataclass(frozen=True)
class AddGaze:
    """Adds a region for each fixation on a sample's images and videos.

    Args:
        root: the data root.
        fixations: by path, as samples name their images and videos.
        coord: unit of points and spread.
        spread: standard deviation of a fixation.
        window: seconds.
        both: whether a fixation counts before it, too.
    """

    root: Path
    fixations: dict[str, list[Fixation]]
    coord: str
    spread: float
    window: float
    both: bool

    def __call__(self, item: Item) -> Made:
        from groundkern.hf.data.example import is_trained, message_text
        from groundkern.trainer.data.sample import parse_sample
        from groundkern.trainer.prepare.pipeline import Made

        record = item.value
        sample = parse_sample(record, root=self.root, where=item.where)
        turn = max(i for i, message in enumerate(sample.messages) if is_trained(message))
        answer = message_text(sample.messages[turn])
        said = {"char_span": [0, len(answer)], "turn": turn}
        counts: Counter[str] = Counter()
        regions = [{**said, **place} for place in self._places(record, sample, item.where, counts)]
        if not regions or not answer.strip():
            return Made([record], counts={"samples_without_gaze": 1})
        counts.update(samples_with_gaze=1, fixations=len(regions))
        return Made([{**record, "regions": [*record.get("regions", ()), *regions]}], counts=counts)

    def _places(
        self, record: dict[str, Any], sample: Sample, where: str, counts: Counter[str]
    ) -> list[dict[str, Any]]:
        """Where and when each fixation is, as a region of the record has it."""
        places = []
        for index, (path, size) in enumerate(zip(record.get("images", ()), sample.sizes)):
            for fixation in self._inside(path, size, counts):
                places.append({"image": index, **self._place(fixation)})
        for index, (named, video) in enumerate(zip(record.get("videos", ()), sample.videos)):
            path = named if isinstance(named, str) else named["path"]
            for fixation in self._inside(path, video.size, counts):
                time = self._time(fixation, path, video, where)
                places.append({"video": index, "time": time, **self._place(fixation)})
        return places

    def _inside(self, path: str, size: tuple[int, int], counts: Counter[str]) -> list[Fixation]:
        """The fixations on an image or video; people look elsewhere, too."""
        scale = _SCALES[self.coord]
        width, height = size if scale is None else (scale, scale)
        found = self.fixations.get(path, [])
        inside = [each for each in found if 0 <= each.x <= width and 0 <= each.y <= height]
        counts["fixations_outside"] += len(found) - len(inside)
        return inside

    def _place(self, fixation: Fixation) -> dict[str, Any]:
        place = {"points": [[fixation.x, fixation.y]], "spread": self.spread, "coord": self.coord}
        return {**place, "share": 1.0 if fixation.duration is None else fixation.duration}

    def _time(self, fixation: Fixation, path: str, video: StoredVideo, where: str) -> list[float]:
        """The seconds in which frames have a fixation of a video in their window."""
        from groundkern.trainer.data.images import wrong

        field = f"fixations of {path}"
        if fixation.frame is not None:
            start, stop = video.moment(fixation.frame, field)
        elif fixation.time is None:
            raise wrong(where, field, "`time` or `frame` of each, on a video", "neither")
        else:
            start, stop = fixation.time, fixation.time
        if start >= video.duration:
            wanted = f"times within the {video.duration:.3f} s of the video"
            raise wrong(where, field, wanted, f"{start:g}")
        if fixation.duration is not None:
            stop = start + fixation.duration
        stop = min(stop + self.window, video.duration)
        start = max(0.0, start - self.window) if self.both else start
        return [start, max(stop, start + 1e-3)]  # without a window: an instant


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text}")
    return value
