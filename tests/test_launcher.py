"""Launches that are found again hand a compiled kernel what Triton itself would hand it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.host import stand_in as device
from groundkern import kept
from groundkern.ops.attention_map import cases as attention_map
from groundkern.ops.side_attention import cases as side_attention

given, by_triton = [], []
plain = JITFunction.run

def looked_up(kernel, *args, **options):
    by_triton.append(kernel.__name__)
    return plain(kernel, *args, **options)

def described(x):
    if isinstance(x, tuple):
        return tuple(map(described, x))
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.data_ptr() % 16
    return type(x), x

def noted(self, g0, g1, g2, stream, function, packed, metadata, enter, leave, *arguments):
    given.append((g0, g1, g2, *map(described, arguments)))

JITFunction.run, device._Nothing.run = looked_up, noted
with device.stand_in():
    for op in (side_attention, attention_map):
        for name, make in op.CASES.items():
            for dtype in (torch.float32, torch.bfloat16):
                call = make(dtype, torch.device("cpu"))
                kept._of_key.cache_clear()  # the launches of a case that was like this one
                seen = []
                for _ in range(2):
                    given.clear(), by_triton.clear()
                    x = {
                        n: x if n in call.fixed else x.detach().requires_grad_()
                        for n, x in call.inputs.items()
                    }
                    results = call.run(**x, backend="triton")[: call.differentiable]
                    sum(y.sum() for y in results).backward()
                    seen.append((list(given), list(by_triton)))
                (first, looked), (again, none) = seen
                assert not none, (name, none)
                made = len(first) - len(again)  # the plan is made once
                assert first[made:] == again, (name, dtype)
                assert len(looked) == len(first) and made >= 0, name
                print(op.__name__.split(".")[-2], name, dtype, len(again))
"""


@pytest.mark.long
def test_what_is_launched_again() -> None:
    pytest.importorskip("triton", reason="needs the triton package")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    launches = [int(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(launches) > 40 and max(launches) >= 5, "cases and their launches"
