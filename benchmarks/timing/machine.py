"""Where and with what a number was measured, and what the device can do at best."""

import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

import groundkern
from benchmarks.contestants import peers
from benchmarks.timing.commit import commit

COPY_BYTES = 2**31
MATMUL_SIZE = 8192


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


def stamp(device: torch.device) -> dict[str, object]:
    """Columns that every row of results has."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": gpu or "cpu",
        "processor": f"{_processor()} ({platform.machine()}, {os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": peers.version("triton") or "",
        "groundkern": groundkern.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def load() -> float | None:
    """The one-minute load average: how busy other programs kept the machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _median(run: Callable[[], object], device: torch.device, rounds: int = 15) -> float:
    timer = rounds.cuda_timer(device)
    for _ in range(3):
        timer(run)
    return median(timer(run) for _ in range(rounds))


def ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, float]:
    """Copy bandwidth in bytes/s (read plus written); the matmul rate of each dtype in FLOP/s."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=device).random_(-100, 100)
    target = torch.empty_like(source)
    seconds = _median(lambda x=source, y=target: y.copy_(x), device)
    found = {"bandwidth": 2 * COPY_BYTES / seconds}
    del source, target
    for dtype in dtypes:
        n = MATMUL_SIZE if dtype.itemsize < 4 else MATMUL_SIZE // 2
        x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        z = torch.empty_like(x)
        seconds = _median(lambda x=x, y=y, z=z: torch.mm(x, y, out=z), device)
        found[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    return found
