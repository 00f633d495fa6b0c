"""Steps `compile` and `compile_tiles`: kernels into Triton's cache, by all cores, without the GPU.

Compiled one by one when they are first launched, the kernels of the next steps would take a minute
of the card's time.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from benchmarks.gpu import calls
from benchmarks.gpu.devices import dry_runs
from benchmarks.gpu.devices.stand_in import CORES, PLAYED
from benchmarks.gpu.steps.sweep import candidates, replaced
from benchmarks.gpu.steps.worker import Cases, Context
from benchmarks.launches.noting import Launch
from groundkern.tiles import Tile

WORK: list[Launch] = []  # forked processes read it by index


def cases(context: Context) -> Cases:
    name = "kernels of the tile sweep" if context.step.name == "compile_tiles" else "kernels"
    yield name, lambda: _compile(context)


def capability() -> int:
    """Of the first GPU, according to the driver's own tool: this process never opens the device."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(text.splitlines()[0].strip().replace(".", ""))


def wanted(tiles: bool, few: int | None = None) -> list[Launch]:
    """One launch of every piece of code, in the order in which they will be needed.

    Args:
        few: in a short rehearsal, the number of calls or tiles.
    """
    found: list[Launch] = []
    if tiles:
        for bucket, kind, tile in swept()[:few]:
            with replaced(bucket, kind, tile):
                some = dry_runs.dry(bucket.call.real, bucket.kinds()[kind])
            found += [x for x in some if bucket.uses(kind, x)]
    else:
        for sized in [*calls.smoke(), *calls.attention(), *calls.loss()][:few]:
            found += dry_runs.dry(sized.real)
    return dry_runs.distinct(found)


def swept() -> list[tuple[calls.Bucket, str, Tile]]:
    """Every tile of the sweep once: buckets differ only in sizes for which kernels are not
    recompiled."""
    found = {
        (bucket.op, kind, tile): (bucket, kind, tile)
        for bucket in calls.buckets()
        for kind in bucket.kinds()
        for tile in candidates(bucket, kind)
    }
    return list(found.values())


def _job(place: int, launcher: bool) -> tuple[int, str]:
    try:
        WORK[place].compile(launcher)
    except Exception as error:
        return place, f"{type(error).__name__}: {error}"
    return place, ""


def _compile(context: Context) -> None:
    rehearsed = context.device.rehearsed
    dry_runs.compile_for(90 if rehearsed else capability())
    WORK[:] = wanted(context.step.name == "compile_tiles", context.few)
    count = len(WORK)
    context.write("note", text=f"{count} kernels to compile")
    if rehearsed:
        context.device.spend(count * PLAYED["compile"] / CORES)
        del WORK[2:]
    jobs = 1 if rehearsed else max(1, (os.cpu_count() or 2) - 2)
    failed = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork"), initializer=_behind) as pool:
        for future in as_completed([pool.submit(_job, i, not rehearsed) for i in range(len(WORK))]):
            place, wrong = future.result()
            if wrong:
                failed += 1
                name = f"{WORK[place].name} {sorted(WORK[place].options.items())}"
                context.write(
                    "error", case=name, kind="does not compile", message=wrong[:500], traceback=""
                )
    context.write("note", text=f"{len(WORK)} kernels compiled, {failed} failed")


def _behind() -> None:
    """Lowers this process's priority: the steps that time things come first."""
    os.nice(10)
