"""The examples, each in a process of its own. All are forked from one that has imported what they
import and computed nothing: imports are most of what an example costs.

python -m tests.examples_run FOLDER 'raw_ops' 'hf_trainer --steps 4' ...

Each runs in FOLDER with its output in FOLDER/NAME.txt and may take 60 seconds of CPU time. Prints a
JSON object: of each name the exit status and the CPU seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import runpy
import shlex
import socket
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
IMPORTED = (
    *("matplotlib.pyplot", "peft", "transformers.trainer", "torch.distributed", "trl"),
    *("groundkern.hf.public", "groundkern.public", "groundkern.trainer.demo.small"),
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)
SECONDS = 60
RANKS = {"context_parallel": 2}


def start(name: str, words: list[str], folder: Path, place: dict[str, str]) -> int:
    """The id of the process that runs an example; `place`: what torchrun tells one of several."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.chdir(folder)
        suffix = "" if place.get("RANK", "0") == "0" else f"-{place['RANK']}"
        log = os.open(f"{name}{suffix}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= place
        sys.argv = [f"{name}.py", *words]
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(name: str, words: list[str], folder: Path) -> tuple[int, float]:
    """The exit status of an example, and the CPU seconds that it took."""
    places: list[dict[str, str]] = [{}]
    if (ranks := RANKS.get(name, 1)) > 1:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = str(found.getsockname()[1])
        met = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        places = [met | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    pids = [start(name, words, folder, place) for place in places]
    status, seconds = 0, 0.0
    for pid in pids:
        _, ended, used = os.wait4(pid, 0)
        status = status or os.waitstatus_to_exitcode(ended)
        seconds += used.ru_utime + used.ru_stime
    return status, round(seconds, 1)


def main(folder: Path, commands: list[str]) -> None:
    """Run the examples one after another, so that one may use what another has written."""
    for module in IMPORTED:
        if find_spec(module.partition(".")[0]):
            importlib.import_module(module)
    results = {}
    for command in commands:
        name, *words = shlex.split(command)
        results[name] = run(name, words, folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    results["imports"] = (0, round(used.ru_utime + used.ru_stime, 1))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
