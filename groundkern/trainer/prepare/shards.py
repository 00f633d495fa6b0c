"""A prepare command divided among processes, on one machine or many: `--shard 3/64`.

A shard takes a run of the inputs, so that the files of all shards, one behind the other, are what
one process would have written, byte for byte. Nothing is agreed on between shards: which inputs one
takes follows from its number and from how many inputs there are.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from groundkern.trainer.config import ConfigError

MOST = 99_999  # shards: their files sort by name in the order of the shards


@dataclass(frozen=True)
class Shard:
    """One of several parts of the inputs.

    Args:
        number: from 1 to `of`.
        of: how many there are.
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def output(self, whole: Path) -> Path:
        """`train.jsonl` as `train-00003-of-00064.jsonl`."""
        return whole.with_name(f"{whole.stem}-{self.number:05d}-of-{self.of:05d}{whole.suffix}")

    def part(self, total: int) -> range:
        """The inputs that are this shard's, by number; sizes of shards differ by one at most.

        Args:
            total: of all inputs.

        Raises:
            ConfigError: fewer inputs than shards.
        """
        if self.of > max(total, 1):
            wanted = f"at most one shard for each of the {total} inputs"
            raise ConfigError(f"--shard: expected {wanted}, got {self}")
        return range((self.number - 1) * total // self.of, self.number * total // self.of)


def add_shards(parser: argparse.ArgumentParser) -> None:
    """Adds `--shard` and `--gather`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="do part I of N, from 1/N to N/N, and write OUT-0000I-of-0000N (docs/data/prepare.md)",
    )
    group.add_argument(
        "--gather", type=_number, metavar="N", help="make OUT of N shards that are all done"
    )


def own_output(arguments: argparse.Namespace) -> Path:
    """The file that this process makes: that of its shard, else `--output`."""
    shard: Shard | None = arguments.shard
    return arguments.output if shard is None else shard.output(arguments.output)


def is_shard_of(name: str, whole: Path) -> bool:
    """Whether a file's name begins as those of the shards of an output in the same folder."""
    pattern = rf"{re.escape(whole.stem)}-\d{{5}}-of-\d{{5}}{re.escape(whole.suffix)}"
    return re.match(pattern, name) is not None


def _shard(text: str) -> Shard:
    """`3/64`; there is no shard 0."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    number, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= of <= MOST:
        wanted = f"I/N with I from 1 to N and N up to {MOST:,}, such as 3/64"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return Shard(number, of)


def _number(text: str) -> int:
    """How many shards there are."""
    of = int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0
    if not 1 <= of <= MOST:
        wanted = f"the number of shards, 1 to {MOST:,}"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return of
