"""Peak memory of native linear cross entropy and of plain torch, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.timing import memory
from groundkern import available_backends

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import json, sys
import torch
import torch.nn.functional as F
import groundkern as gk
from benchmarks.timing import memory

name, dtype, trained = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "trained"
torch.set_num_threads(1)
hidden = torch.randn(2048, 64, dtype=dtype, requires_grad=True)
weight = torch.randn(65_536, 64, dtype=dtype, requires_grad=trained)
target = torch.randint(65_536, (2048,))

def step(rows):
    if name == "ours":
        loss = gk.linear_cross_entropy(hidden[:rows], weight, target[:rows], backend="native").loss
    else:
        loss = F.cross_entropy((hidden[:rows] @ weight.T).float(), target[:rows])
    return loss, torch.autograd.grad(loss, [hidden, weight] if trained else [hidden])

step(8)  # what a first call loads and keeps
print(json.dumps(memory._of_cpu(lambda: step(2048))))
"""


def peak(*arguments: str) -> int:
    """Bytes that a call adds to the resident set of a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env={**os.environ, **memory.ALLOCATOR, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not memory.RESET.exists(), reason="the peak is read from /proc")
@pytest.mark.skipif(
    available_backends()["native"] is not None, reason="groundkern._C is not built: no C++ compiler"
)
@pytest.mark.long
@pytest.mark.parametrize(("dtype", "head"), [("float32", "trained"), ("bfloat16", "frozen")])
def test_an_eighth_of_eager_at_2048_rows_of_65536_logits(dtype: str, head: str) -> None:
    """A hidden size of 64 makes the W-shaped buffers small; ours are counted too."""
    assert 8 * peak("ours", dtype, head) < peak("eager", dtype, head)
