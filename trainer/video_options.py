"""`--video-fps` and `--video-frames`: which frames of videos a command takes."""

from __future__ import annotations

import argparse
import math

from trainer.data.videos import RULES, VideoRules


def add_videos(parser: argparse.ArgumentParser) -> None:
    """The options; by default what training takes by default."""
    parser.add_argument(
        "--video-fps",
        type=_rate,
        default=RULES.fps,
        metavar="N",
        help=f"frames taken of a second of a video ({RULES.fps:g}), as data.video_fps of the run",
    )
    parser.add_argument(
        "--video-frames",
        type=_count,
        default=RULES.frames,
        metavar="N",
        help=f"frames taken of a video at most ({RULES.frames}), as data.video_frames",
    )


def rules_of(arguments: argparse.Namespace) -> VideoRules:
    """What the options say."""
    return VideoRules(fps=arguments.video_fps, frames=arguments.video_frames)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value
