"""`--video-fps` and `--video-frames`: which frames of videos a command takes."""

from __future__ import annotations

import argparse

from groundkern.trainer.data.videos import RULES, VideoRules
from groundkern.trainer.prepare.arguments import positive


def add_videos(parser: argparse.ArgumentParser) -> None:
    """The options; by default what training takes by default."""
    parser.add_argument(
        "--video-fps",
        type=positive(float),
        default=RULES.fps,
        metavar="N",
        help=f"frames taken of a second of a video ({RULES.fps:g}), as data.video_fps of the run",
    )
    parser.add_argument(
        "--video-frames",
        type=positive(int),
        default=RULES.frames,
        metavar="N",
        help=f"frames taken of a video at most ({RULES.frames}), as data.video_frames",
    )


def rules_of(arguments: argparse.Namespace) -> VideoRules:
    """What the options say."""
    return VideoRules(fps=arguments.video_fps, frames=arguments.video_frames)
