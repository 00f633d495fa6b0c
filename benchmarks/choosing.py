"""The options that choose problems, shared by `python -m benchmarks` and pytest-benchmark."""

from argparse import Namespace
from collections.abc import Callable
from typing import get_args

import torch

from benchmarks import problems
from benchmarks.problems import Problem

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(add: Callable[..., object]) -> None:
    """Declares the options with `add`, an argparse parser's or a pytest group's function."""
    add("--shape", nargs="+", default=[problems.ISSUE_5], choices=problems.SHAPES)
    add("--mode", nargs="+", default=["full"], choices=get_args(problems.Mode))
    add("--dtype", nargs="+", default=list(DTYPES[:2]), choices=DTYPES)
    add(
        "--sweep",
        nargs="+",
        default=[],
        choices=list(problems.SWEEPS),
        help="let one size grow alone, and print how cost grows with it; --keys and --rows choose",
    )
    add("--keys", nargs="+", type=int, default=[], help="S of a model's shapes")
    add("--rows", nargs="+", type=int, default=[], help="N of a model's attention")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; all cores by default")
    add("--no-compile", action="store_true", help="leave torch.compile's rows out")
    add("--no-whole", action="store_true", help="leave the [S, S] problem out")


def chosen(options: Namespace, ops: list[str]) -> list[Problem]:
    """The problems of some ops that the options choose."""
    found = problems.problems(
        shapes=options.shape,
        ops=ops,
        dtypes=[getattr(torch, name) for name in options.dtype],
        keys=options.keys,
        rows=options.rows,
        sweep=options.sweep,
    )
    return [x for x in found if not (options.no_whole and x.whole)]
