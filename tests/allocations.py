"""What torch's allocator did during a call, ops that are opaque to dispatch modes included."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch


def allocations(step: Callable[[], object], folder: Path) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on CPU while `step` runs, in
    order. `folder` is for the trace."""
    gc.collect()  # what is freed in the step would count as negative
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return [e["args"]["Bytes"] for e in memory]
