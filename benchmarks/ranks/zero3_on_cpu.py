"""ZeRO-3 on CPU processes: `python -m benchmarks.ranks.zero3_on_cpu MODULE WORDS`.

The module runs as it is, but DeepSpeed does not compile for minutes first, on every new machine.
"""

from __future__ import annotations

import runpy
import sys

from groundkern.trainer.launching import without_compiling

if __name__ == "__main__":
    without_compiling()
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
