"""DeepSpeed's Ulysses as the engine of main attention, beside the attention of the whole:

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 -m tests.hf.ulysses OUT

Writes the largest error over numbers of heads, and what is refused, to OUT/RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groundkern.hf import attach, detach
from groundkern.hf.model.engines.ulysses import UlyssesEngine
from groundkern.trainer.launching import without_compiling
from tests.hf.context import THREE, Case, compared
from tests.hf.engines import FP64, Call, error, plain_call, refusals

SEQUENCES = 4  # of a batch of whole models
PLAIN = ALL_ATTENTION_FUNCTIONS["sdpa"]


def register(model: object, batch: int) -> None:
    """Have DeepSpeed put its attention around the registry's, as accelerate does."""
    parallel_state_sp._release_sequence_parallel_groups()
    UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", dist.get_world_size(), batch, disable_in_eval=True
    )


def registered(call: Call, batch: int = 2) -> Callable:
    """The function that is registered for a model with a call's heads."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = PLAIN
    q, k, _ = call.tensors
    text = SimpleNamespace(
        num_attention_heads=q.shape[1],
        num_key_value_heads=k.shape[1],
        head_dim=q.shape[3],
        hidden_size=q.shape[1] * q.shape[3],
        num_hidden_layers=1,
    )
    config = SimpleNamespace(_attn_implementation="sdpa", get_text_config=lambda: text)
    register(SimpleNamespace(config=config), batch)
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def engine_of(call: Call, batch: int = 2) -> Callable:
    """The engine, for a module in evaluation, on the function that is registered for the call."""
    function, engine = registered(call, batch), UlyssesEngine()

    def run(_: Callable, module: nn.Module, *arguments: object) -> Tensor:
        groups = module.num_key_value_groups
        out = engine(function, module.eval(), *arguments)
        assert module.num_key_value_groups == groups
        return out

    return run


def first(model: nn.Module) -> None:
    """DeepSpeed registers before the model is attached."""
    detach(model)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = PLAIN
    register(model, SEQUENCES)
    attach(model, **THREE)


def last(model: nn.Module) -> None:
    """It registers after that, as in a Trainer."""
    register(model, SEQUENCES)


def whole_models() -> dict[str, dict[str, float]]:
    """Split batches beside whole ones, in either order of registering and attaching."""
    found = {}
    for prepare in (first, last):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = PLAIN
        checkpointed = prepare is last
        case = Case(THREE, "contiguous", engine="ulysses", multiple=4, checkpointed=checkpointed)
        found[prepare.__name__] = compared(case, prepare)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = PLAIN
    return found


def main(out: str) -> None:
    """Writes {"float64": error, ...}, what is refused, and how far whole models are off."""
    without_compiling()
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for dtype in (torch.float64, torch.float32):
        shapes = ((2, ranks), (1, ranks), (2 * ranks, 1))  # queries of a key head, key heads
        calls = [plain_call(dtype, ranks, group, "contiguous", keys) for group, keys in shapes]
        found[str(dtype)] = max(error(call, engine_of(call)) for call in calls)
    call = plain_call(FP64, ranks, 1, "contiguous", ranks)
    found["refused"] = refusals(engine_of(call), call)
    for name, engine in (("batch", engine_of(call, 3)), ("plain", UlyssesEngine())):
        try:
            error(call, engine)
        except ValueError as refusal:
            found["refused"][name] = str(refusal)
    found["models"] = whole_models() if ranks == 2 else {}
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
