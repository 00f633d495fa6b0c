"""Running a module of the tests as several CPU processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.ranks.launching import ON_CPU

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
)
FORKED = (sys.executable, "-m", "tests.hf.forked")  # of a module: cheaper than torchrun
DEEPSPEED = ROOT / "build" / "deepspeed"  # where make puts it, so that other tests do without


def deepspeed() -> dict[str, str]:
    """The environment of processes that import DeepSpeed; skips the test where there is none."""
    environment = deepspeed_if_installed()
    if environment is None:
        pytest.skip("DeepSpeed is not installed")
    return environment


def deepspeed_if_installed() -> dict[str, str] | None:
    """The same; None where there is none."""
    if find_spec("deepspeed") is not None:
        return {"DS_ACCELERATOR": "cpu"}
    if not (DEEPSPEED / ".installed").exists():
        return None
    ahead = {"PYTHONPATH": DEEPSPEED, "PATH": DEEPSPEED / "bin"}
    paths = {name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in ahead.items()}
    return {"DS_ACCELERATOR": "cpu", **paths}


def accelerate_launch(config: str, processes: int = 2) -> tuple[str, ...]:
    """The launcher of `run` for a file of examples/accelerate; sharded as CPUs can be."""
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0")
    where = ("--config_file", f"examples/accelerate/{config}.yaml")
    stand_in = (ON_CPU[config],) if config in ON_CPU else ()
    return (*launch, *where, "--num_processes", str(processes), "-m", *stand_in)


def run(*arguments: str, launcher: tuple[str, ...] = TORCHRUN, **environment: str) -> str:
    """What the two processes of `launcher arguments` wrote to stdout; fails with their stderr."""
    done = subprocess.run(
        [*launcher, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
