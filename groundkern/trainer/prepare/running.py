"""Runs the pipeline with the arguments of a prepare command, and prints a summary."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.arguments import settings_of
from groundkern.trainer.prepare.chat import (
    FREE_TO_CHANGE,
    ChatSettings,
    EndpointError,
    show_usage,
    usage_so_far,
)
from groundkern.trainer.prepare.gathering import gather
from groundkern.trainer.prepare.output import Output
from groundkern.trainer.prepare.pipeline import Work, prepare
from groundkern.trainer.prepare.sources import Source


def run_work(
    arguments: argparse.Namespace,
    source: Source,
    work: Work,
    *,
    root: Path | None = None,
    unit: str = "input",
) -> Output:
    """`groundkern.trainer.prepare.pipeline.prepare` with the common arguments, or `gather`, and a
    summary at its end."""
    common = {"output": arguments.output, "settings": settings_of(arguments)}
    common["overwrite"] = arguments.overwrite
    try:
        if arguments.gather is not None:
            out = gather(source, shards=arguments.gather, **common)
        else:
            out = prepare(
                source,
                work,
                root=root,
                workers=arguments.workers,
                on_bad_sample=arguments.on_bad_sample,
                unit=unit,
                shard=arguments.shard,
                **common,
            )
    except OSError as error:
        raise SampleError(f"{error}; the same command continues from what is done") from None
    print(f"{out.path}: {out.samples:,} samples of {out.inputs:,} {unit}s")
    if out.rejected:
        print(f"{out.rejects}: {out.rejected:,} {unit}s that were not used, each with its reason")
    if root is not None and root.resolve() != out.path.parent.resolve():
        print(f"Image paths start from {root}: train with --data.root {root}")
    return out


def run_asking(
    arguments: argparse.Namespace,
    source: Source,
    work: Work,
    *,
    root: Path,
    chat: ChatSettings | None,
    titles: Mapping[str, str],
) -> int:
    """`run_work` on samples, with the counts of `titles` and, if a model was asked, what it cost.

    Returns:
        The exit status: 1 if the endpoint failed.
    """
    deciding = {k: v for k, v in vars(arguments).items() if k not in FREE_TO_CHANGE}
    before = usage_so_far(chat.cache) if chat is not None else {}
    try:
        out = run_work(argparse.Namespace(**deciding), source, work, root=root, unit="sample")
        show_counts(out.counts, titles)
    except EndpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if chat is not None:
            show_usage(arguments, chat.cache, before)
    return 0


def show_counts(counts: Mapping[str, float], titles: Mapping[str, str]) -> None:
    """Prints the counts that have a title, aligned, then what was noted or passed over."""
    passed = {name: name for name in counts if name.startswith(("noted: ", "passed over: "))}
    for name, title in {**titles, **passed}.items():
        if name in counts:
            print(f"{counts[name]:>12,}  {title}")
