"""Machine instructions of the C++ kernels, counted by valgrind; unlike times they do not vary.

`python -m benchmarks.counts.instructions record FILE` stores what each case passes to
groundkern._C; `replay FILE [CASE]` passes it again, without torch, which valgrind would take
minutes to load. The kernels' count is that of a replay less that of a replay without a case. One
thread, AVX2 code on any machine (valgrind has no AVX-512), sizes that take valgrind seconds.
"""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"GROUNDKERN_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
BITS = {2: np.int16, 4: np.int32, 8: np.int64}  # by item size: bf16 has no numpy type


def problems():
    """Small calls of every op in fp32 and bf16."""
    import torch

    from benchmarks.problems import ISSUE_5_MODEL, attention_map, linear_cross_entropy
    from benchmarks.problems import side_attention as side

    for dtype in (torch.float32, torch.bfloat16):
        named = {"shape": "counted"}
        yield side(ISSUE_5_MODEL, dtype, rows=16, keys=512, **named)
        yield attention_map(ISSUE_5_MODEL, dtype, rows=8, keys=512, **named)
        yield linear_cross_entropy(ISSUE_5_MODEL, dtype, rows=16, **named)


def record(file: Path) -> None:
    """Stores every call of forward and backward of every case: function, options, tensors as
    bits."""
    import torch

    from benchmarks.contestants import admission
    from groundkern import native

    torch.set_num_threads(1)
    calls: dict[str, list] = {}
    plain = native.call

    def noting(function, tensors, **options):
        arrays = {
            name: None if x is None else (x.detach().view(_bits(x)).numpy(), codes[x.dtype])
            for name, x in tensors.items()
        }
        calls[problem.key].append((function.__name__, arrays, options))
        plain(function, tensors, **options)

    codes = native.dtype_codes()
    for problem in problems():
        calls[problem.key] = []
        call = problem.make(torch.device("cpu"))
        with mock.patch.object(native, "call", noting):
            admission.runner(call, admission.ours(call, "native"), "full")[0]()
    np.savez(file, calls=np.array(calls, dtype=object))


def _bits(x):
    import torch

    return getattr(torch, BITS[x.element_size()].__name__)


def replay(file: Path, case: str) -> None:
    """Makes the recorded calls of a case, or none, in a process without torch."""
    (extension,) = (ROOT / "groundkern").glob("_C*.so")
    loader = importlib.machinery.ExtensionFileLoader("groundkern._C", str(extension))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    calls = np.load(file, allow_pickle=True)["calls"].item()  # pickled by `record` a moment ago
    for name, arrays, options in calls.get(case, []):
        views = {n: None if a is None else _view(*a) for n, a in arrays.items()}
        getattr(module, name)(**views, **options, threads=1)


def _view(array: np.ndarray, code: int) -> tuple:
    strides = tuple(s // array.itemsize for s in array.strides)
    return array.ctypes.data, code, array.shape, strides


def count() -> dict[str, int]:
    """Instructions by case.

    Raises:
        RuntimeError: valgrind is missing or failed.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calls.npz"
        _run([sys.executable, "-m", "benchmarks.counts.instructions", "record", str(file)])
        cases = np.load(file, allow_pickle=True)["calls"].item()
        nothing = _replayed(file, "")
        return {name: _replayed(file, name) - nothing for name in cases}


def _replayed(file: Path, case: str) -> int:
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    command += [sys.executable, __file__, "replay", str(file), case]
    return int(re.search(r"I\s+refs:\s+([\d,]+)", _run(command))[1].replace(",", ""))


def _run(command: list[str]) -> str:
    """What a program writes to stderr."""
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{command[0]} failed: {last}")
    return result.stderr


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        replay(Path(sys.argv[2]), sys.argv[3])
