"""A module of ours, one of whose ranks is killed at a moment of its own choosing.

    torchrun -m benchmarks.ranks.dying RANK MOMENT FILE MODULE WORDS

Rank RANK sends itself SIGKILL at MOMENT and leaves the time in FILE; the others know nothing.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

STEP = 3  # of the optimizer, counted from 1: two checkpoints are whole by then
MOMENTS = {
    "start": "before the first step",
    "forward": "in a forward pass",
    "backward": "in a backward pass",
    "between": "between micro-batches",
    "writing": "while a checkpoint is written",
    "written": "when it has just been renamed",
    "final": "in the final save",
}
_LAYER = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLDecoderLayer.forward"
_BATCHES = "groundkern.hf.trainer:GroundingMixin.get_batch_samples"
_SAVE = "transformers.trainer:Trainer.save_model"


def die_at(moment: str, rank: int, death: Path) -> None:
    """Patch what happens at a moment, so that this process does not survive it.

    Args:
        moment: of MOMENTS.
        rank: of this process; the first one renames checkpoints.
        death: gets the time.
    """
    begun: list[None] = []  # an entry to each step that began
    _patch(_BATCHES, before=lambda *_: begun.append(None))

    def die(*_: Any) -> None:
        if len(begun) >= STEP:
            _die(death)

    match moment:
        case "start":
            _patch(_BATCHES, before=lambda *_: _die(death))
        case "forward":
            _patch(_LAYER, before=die)
        case "backward":
            _patch(_LAYER, after=lambda out, _: _hooked(out, die))
        case "between":
            _patch("accelerate:Accelerator.backward", after=die)
        case "writing":
            _patch("transformers.trainer:Trainer._save_rng_state", before=die)
        case "written":
            renamed = "groundkern.trainer.durable:replace_folder"
            _patch(
                renamed
                if rank == 0
                else "groundkern.trainer.counting:CountingTrainer._write_checkpoint",
                die,
            )
        case "final":
            _patch(_SAVE, before=lambda given, named: _of_a_checkpoint(given, named) or _die(death))


def _of_a_checkpoint(given: tuple, named: dict) -> bool:
    """Whether `Trainer.save_model(self, output_dir, _internal_call)` is called for a checkpoint."""
    return bool(named.get("_internal_call") or any(given[2:]))


def _hooked(out: Any, die: Callable) -> None:
    hidden = out[0] if isinstance(out, tuple) else out
    if hidden.requires_grad:
        hidden.register_hook(die)


def _patch(
    name: str, after: Callable | None = None, *, before: Callable[[tuple, dict], Any] | None = None
) -> None:
    """Call `before(args, kwargs)` and `after(result, args)` around a function `module:a.b`."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    owner = import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original = getattr(owner, last)

    @wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(args, kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(result, args)
        return result

    setattr(owner, last, patched)


def _die(death: Path) -> None:
    death.write_text(repr(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    chosen, moment, file, module, *words = sys.argv[1:]
    own = os.environ.get("RANK", "0")
    if own == chosen:
        die_at(moment, int(own), Path(file))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
