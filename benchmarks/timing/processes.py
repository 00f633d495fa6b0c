"""Questions answered by a module in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def answer(module: str, *arguments: str, environment: dict[str, str]) -> object:
    """What `python -m module ...` prints as JSON on its last line.

    Args:
        environment: variables beside those of this process.

    Raises:
        RuntimeError: the process failed; with the last line of its errors.
    """
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"python -m {module} failed: {last}")
    return json.loads(result.stdout.strip().splitlines()[-1])
