"""FSDP2 by accelerate on CPU processes: `python -m benchmarks.ranks.fsdp2_on_cpu MODULE WORDS`.

accelerate shards on accelerators only: on CPUs it takes FSDP's settings and trains as DDP does.
torch's `fully_shard` and gloo have no such rule, so this tells accelerate that its processes are
sharded, and runs a module of ours. A stand-in for GPUs, for tests and benchmarks.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

_original = AcceleratorState.__init__


def shard_on_cpu() -> None:
    """Let FSDP's settings hold on CPU processes too; nothing without ACCELERATE_USE_FSDP."""

    def initialised(self, *args, fsdp_plugin=None, **kwargs):
        known = "distributed_type" in AcceleratorState._shared_state
        _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if not known and self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = self.distributed_type
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialised


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        shard_on_cpu()
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
