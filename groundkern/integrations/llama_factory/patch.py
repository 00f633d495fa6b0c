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
from groundkern.integrations.llama_factory.data import (
    CARRYING,
    CarryingProcessor,
    GroundingDataCollator,
)
from groundkern.integrations.shared.settings import Settings, read_settings
from groundkern.integrations.shared.training import ProgramMixin, refuse

SECTION = "groundkern"  # of the arguments
_OWN = {"train": tuner._training_function, "sft": tuner.run_sft, "load": workflow.load_model}
OFF = (
    "packing",
    "neat_packing",
    "tokenized_path",
    "shift_attn",
    "mixture_of_depths",
    "use_unsloth",
    "enable_liger_kernel",
    "use_kt",
    "block_diag_attn",
    "use_mca",
    "use_hyper_parallel",
    "use_dft_loss",
    "use_asft_loss",
    "use_eaft_loss",
    "use_badam",
    "predict_with_generate",
    "fp8",
    "use_ray",
)
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
    settings: Settings = read_settings(args.pop(SECTION), SECTION)
    _refuse(args)
    args.setdefault("use_reentrant_gc", False)
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


def _refuse(args: Mapping[str, Any]) -> None:
    """Refuse options that do not go together with the losses, before anything is loaded."""
    problems = [(name, "it off", args[name]) for name in OFF if args.get(name)]
    if (stage := args.get("stage", "sft")) != "sft":
        problems.append(("stage", "sft", stage))
    if args.get("use_reentrant_gc") and not args.get("disable_gradient_checkpointing"):
        wanted = "false: reentrant checkpointing drops the gradient of attention maps"
        problems.append(("use_reentrant_gc", wanted, True))
    refuse(problems, "LLaMA-Factory")


def _run_sft(settings: Settings, model_args: Any, *rest: Any) -> Any:
    """`run_sft` with our collator, which is told whose model it makes batches for."""
    own = workflow.SFTDataCollatorWith4DAttentionMask
    workflow.SFTDataCollatorWith4DAttentionMask = partial(
        GroundingDataCollator, settings=settings, model_path=model_args.model_name_or_path
    )
    try:
        return _OWN["sft"](model_args, *rest)
    finally:
        workflow.SFTDataCollatorWith4DAttentionMask = own


def _load_model(settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """LLaMA-Factory's model, with PEFT and what else it puts on it, and then our losses."""
    model = _OWN["load"](*args, **kwargs)
    attach(model, **settings.attached)
    return model
