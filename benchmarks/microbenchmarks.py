"""pytest-benchmark for a single case: `pytest benchmarks/microbenchmarks.py -k side_attention`.

It runs cases one after the other: compare its numbers with themselves over time, and take ratios
from `python -m benchmarks`.
"""

import pytest
import torch

from benchmarks import problems
from benchmarks.contestants import admission

CPU = torch.device("cpu")
SHAPE = problems.ISSUE_5
CASES = [
    p
    for p in problems.problems(
        shapes=[SHAPE], ops=list(problems.OPS), dtypes=[torch.float32], keys=[], rows=[]
    )
    if not p.whole
]


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("problem", CASES, ids=lambda p: p.name.removeprefix(f"{SHAPE}/"))
def test_ours(problem: problems.Problem, mode: str, benchmark) -> None:
    call = problem.make(CPU)
    run, _ = admission.runner(call, admission.ours(call, "auto"), mode)
    benchmark(run)
