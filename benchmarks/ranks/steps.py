"""A few steps of GroundingTrainer for each case that is named: what a launcher starts.

    torchrun --nproc-per-node 2 -m benchmarks.ranks.steps DIR KEY ...

Rank 0 leaves `KEY.pt` (log and final weights) in the folder; a rank that fails, `KEY.RANK.json`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from benchmarks.ranks.cases import Case, parsed
from benchmarks.ranks.samples import ACCUMULATION, BATCH, examples
from groundkern.hf import (
    DvSft,
    GroundingCollator,
    GroundingTrainer,
    Hist,
    Klal,
    LogitLens,
    Margins,
    PatchText,
    Smam,
    attach,
)

PACK_TO = 128  # tokens of a packed row: two or three samples
LINEARS = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)|.*lm_head"
LEARNING_RATES = {"sgd": 0.05, "adamw_torch": 1e-3}
AGREEING = 20  # seconds that a rank which failed waits for the others


class _InOrder(GroundingTrainer):
    """Takes the samples as they lie."""

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def model_of(case: Case) -> nn.Module:
    """A tiny Qwen2.5-VL with every method that works on sharded weights, the same on all ranks.

    Args:
        case: says whether it has adapters.
    """
    model = attach(
        tiny_qwen_model(),
        smam=Smam(weight=0.7, divide_by="aligned"),
        dv_sft=DvSft(weight=0.5, average="image"),
        klal=Klal(average_layers=True, head_weight="learned"),
        hist=Hist(),
        margins=Margins(),
        logit_lens=LogitLens(),
        patch_text=PatchText(),
    )
    if not case.lora:
        return model
    torch.manual_seed(3)
    config = LoraConfig(r=3, target_modules=LINEARS, init_lora_weights=False)
    return get_peft_model(model, config)


def collator_of(case: Case, model: nn.Module) -> GroundingCollator:
    """Of padded or of packed batches.

    Args:
        case: says which.
        model: gives its config.
    """
    packing = {"pack_to": PACK_TO} if case.packed else {}
    config = model.config if not case.lora else model.get_base_model().config
    multiple = case.context if case.ulysses else 1
    options = {"lens": True, "contrast": True, "pad_to_multiple_of": multiple, **packing}
    return GroundingCollator(tiny_qwen_processor(), config, **options)


def parallelism_of(case: Case) -> ParallelismConfig | None:
    """What accelerate is told of sequences that processes share; None: there are none.

    Args:
        case: says how many do.
    """
    if case.context == 1:
        return None
    if case.ulysses:
        handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
        sizes = {"sp_size": case.context, "dp_shard_size": case.readers}
        return ParallelismConfig(**sizes, sp_handler=handler)
    return ParallelismConfig(cp_size=case.context, dp_shard_size=case.readers)


def _without_compiling() -> None:
    """On CPUs DeepSpeed would build an operator for shared memory, which takes minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def _ulysses() -> Iterator[None]:
    """DeepSpeed's sequence parallelism, which Trainers start, as it was before when the block ends;
    on CPUs accelerate leaves DeepSpeed without its processes."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    deepspeed.init_distributed("gloo", verbose=False)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        parallel_state_sp._release_sequence_parallel_groups()


def trained(case: Case, folder: Path) -> dict:
    """Train a case in this process, or in its share of the processes.

    Args:
        case: what to train.
        folder: for the trainer's files.

    Returns:
        The log, the weights before and after, as far as this rank is told.
    """
    torch.manual_seed(0)
    model = model_of(case)
    begun = {k: x.detach().clone() for k, x in model.state_dict().items()}
    trainer = _InOrder(
        model,
        TrainingArguments(
            str(folder / "trainer"),
            per_device_train_batch_size=BATCH * (1 if case.strategy else case.readers),
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=case.steps,
            learning_rate=LEARNING_RATES[case.optimizer],
            lr_scheduler_type="constant",
            optim=case.optimizer,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            gradient_checkpointing=case.checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            parallelism_config=parallelism_of(case),
        ),
        train_dataset=examples(case.readers, case.share, case.steps),
        data_collator=collator_of(case, model),
    )
    with _ulysses() if case.ulysses else nullcontext():
        trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    found = {"log": trainer.state.log_history, "begun": begun, "weights": _plain(weights)}
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    return found


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("module."): x.detach().cpu().clone() for k, x in weights.items()}


def main(folder: Path, keys: list[str]) -> None:
    """Train the cases one after the other; ends the process when ranks no longer agree.

    Args:
        folder: gets the results.
        keys: of the cases.
    """
    rank = int(os.environ.get("RANK", "0"))
    agreeing = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _without_compiling()
    for key in keys:
        if rank == 0:
            (folder / f"{key}.begun").touch()
        try:
            found = trained(parsed(key), folder)
        except Exception as error:  # whatever the machinery raises is a finding
            kind = "refused" if isinstance(error, ValueError) else "failed"
            reason = {"kind": kind, "error": f"{type(error).__name__}: {error}"}
            _write(folder / f"{key}.{rank}.json", json.dumps(reason))
            failed = True
        else:
            failed = False
            if rank == 0:
                partial = folder / f"{key}.partial"
                torch.save(found, partial)
                partial.rename(folder / f"{key}.pt")
        if dist.is_initialized():
            if agreeing is None:
                agreeing = dist.new_group(backend="gloo", timeout=timedelta(seconds=AGREEING))
            try:
                dist.monitored_barrier(agreeing, timeout=timedelta(seconds=AGREEING))
            except RuntimeError:  # some are elsewhere, in a collective of this case
                os._exit(1)
        elif failed and "WORLD_SIZE" in os.environ:
            os._exit(1)
        gc.collect()
        AcceleratorState._reset_state()
        GradientState._reset_state()
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
    os._exit(0)  # results are on disk; threads of torch may end the interpreter badly


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
