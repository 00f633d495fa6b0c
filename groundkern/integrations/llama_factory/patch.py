"""Puts groundkern into LLaMA-Factory's modules, by the names that these look up when they run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llamafactory.data import converter, loader
from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from groundkern.hf import attach
from groundkern.integrations.llama_factory import SECTION
from groundkern.integrations.llama_factory.data import (
    CARRYING,
    CarryingProcessor,
    GroundingDataCollator,
)
from groundkern.integrations.run_settings import Settings, read_settings
from groundkern.integrations.training import ProgramMixin, refuse

_OWN = {"train": tuner._training_function, "sft": tuner.run_sft, "load": workflow.load_model}
OFF = {
    "model_args": (
        "shift_attn",
        "mixture_of_depths",
        "use_unsloth",
        "enable_liger_kernel",
        "use_kt",
        "block_diag_attn",
    ),
    "finetuning_args": (
        "use_mca",
        "use_hyper_parallel",
        "use_dft_loss",
        "use_asft_loss",
        "use_eaft_loss",
        "use_badam",
    ),
    "data_args": ("packing", "neat_packing", "tokenized_path"),
    "training_args": ("predict_with_generate", "fp8"),
}
"""Options that replace the forward, the loss, the batches or their data, and have to be off."""


class GroundingSeq2SeqTrainer(ProgramMixin, CustomSeq2SeqTrainer):
    """LLaMA-Factory's trainer of supervised fine-tuning with grounding losses."""


def install() -> None:
    """Take the places of LLaMA-Factory's functions; a second call changes nothing."""
    tuner._training_function = _training


def _training(config: dict[str, Any]) -> None:
    """LLaMA-Factory's training function, of arguments with our section."""
    args = config.get("args")
    if not isinstance(args, Mapping):
        wanted = "arguments of a YAML or JSON file, which has a section `groundkern`"
        raise ValueError(f"LLaMA-Factory with groundkern: expected {wanted}, got options alone")
    args = dict(args)
    if SECTION not in args:
        raise ValueError(f"LLaMA-Factory with groundkern: expected a section `{SECTION}`, got none")
    settings = read_settings(args.pop(SECTION), SECTION)
    if args.get("use_ray"):
        refuse([("use_ray", "false, whose workers are not patched", True)], "LLaMA-Factory")
    if (stage := args.get("stage", "sft")) != "sft":
        refuse([("stage", "sft", stage)], "LLaMA-Factory")
    checkpoints = not args.get("disable_gradient_checkpointing")
    if args.setdefault("use_reentrant_gc", False) and checkpoints:
        wanted = "false: reentrant checkpointing drops the gradient of attention maps"
        refuse([("use_reentrant_gc", wanted, True)], "LLaMA-Factory")
    kept = {
        (workflow, "load_model"): partial(_load_model, settings),
        (workflow, "CustomSeq2SeqTrainer"): partial(GroundingSeq2SeqTrainer, settings=settings),
        (tuner, "run_sft"): partial(_run_sft, settings),
        (loader, "SupervisedDatasetProcessor"): CarryingProcessor,
    }
    own = {place: getattr(*place) for place in kept}
    converters = dict(converter.DATASET_CONVERTERS)
    try:
        for (module, name), value in kept.items():
            setattr(module, name, value)
        converter.DATASET_CONVERTERS.update(CARRYING)
        _OWN["train"]({**config, "args": args})
    finally:
        for (module, name), value in own.items():
            setattr(module, name, value)
        converter.DATASET_CONVERTERS.update(converters)


def _run_sft(settings: Settings, model_args, data_args, training_args, finetuning_args, *rest):
    """`run_sft`, if all options go together with the losses."""
    given = {
        "model_args": model_args,
        "data_args": data_args,
        "training_args": training_args,
        "finetuning_args": finetuning_args,
    }
    problems = [
        (name, "it off", getattr(given[group], name))
        for group, names in OFF.items()
        for name in names
        if getattr(given[group], name, None)
    ]
    refuse(problems, "LLaMA-Factory")
    own = workflow.SFTDataCollatorWith4DAttentionMask
    workflow.SFTDataCollatorWith4DAttentionMask = partial(
        GroundingDataCollator, settings=settings, model_path=model_args.model_name_or_path
    )
    try:
        return _OWN["sft"](model_args, data_args, training_args, finetuning_args, *rest)
    finally:
        workflow.SFTDataCollatorWith4DAttentionMask = own


def _load_model(settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """LLaMA-Factory's model, with PEFT and what else it puts on it, and then our losses."""
    model = _OWN["load"](*args, **kwargs)
    attach(model, **settings.attached)
    return model
