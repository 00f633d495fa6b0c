"""`training.arguments`: what goes to transformers' TrainingArguments as it is, and what may not.

Names and types are those of the installed TrainingArguments; a name that it gets later passes too.
Two tables hold the exceptions: names that a field of ours sets, and names that would break a run or
do nothing in it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from groundkern.trainer.wording import VALUE, cut, short

OURS = {
    "output_dir": "training.output",
    "overwrite_output_dir": "training.resume",
    "resume_from_checkpoint": "training.resume",
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup",
    "warmup_ratio": "training.warmup",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "seed": "training.seed",
    "data_seed": "training.seed",
    "bf16": "training.bf16",
    "fp16": "training.fp16",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "dataloader_num_workers": "training.workers",
    "train_sampling_strategy": "data.group_by_length",
    "group_by_length": "data.group_by_length",
    "length_column_name": "data.group_by_length",
    "logging_strategy": "training.log_every",
    "logging_steps": "training.log_every",
    "report_to": "training.report_to",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "do_eval": "evaluation.every",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "load_best_model_at_end": "evaluation.best",
    "metric_for_best_model": "evaluation.best",
    "greater_is_better": "evaluation.best",
}

_BATCHES = "the record, the log and a continued run count batches of training.batch_size"
_COMMAND = "`groundkern train` trains, evaluates and saves"
_HELD_OUT = "held-out losses are exact means; there are no predictions to keep"
_LAUNCHED = "training.strategy or accelerate's config file shards (docs/scale/scale.md, Launching)"
_LIGER = "Liger's kernels need a GPU and were not tried with these losses"
_HUB = "a run sends nothing away; push the folder `model` when it is done"
REFUSED = {
    "accelerator_config": _BATCHES,
    "auto_find_batch_size": _BATCHES,
    "batch_eval_metrics": _HELD_OUT,
    "bf16_full_eval": "evaluations run in the dtype that training.bf16 or model.dtype gives",
    "dataloader_drop_last": "every sample of a pass is trained on",
    "dataloader_in_order": "a continued run needs batches in their order",
    "ddp_backend": "gloo on CPUs, and on accelerators what torch takes for them",
    "ddp_static_graph": "which weights take part depends on what a batch holds",
    "debug": "a NaN or infinite step is found and named anyway (training.max_nonfinite)",
    "deepspeed": _LAUNCHED,
    "disable_tqdm": "the program has its own progress bar",
    "do_predict": _COMMAND,
    "do_train": _COMMAND,
    "enable_jit_checkpoint": "SIGTERM saves and ends a run already",
    "eval_accumulation_steps": _HELD_OUT,
    "eval_do_concat_batches": _HELD_OUT,
    "eval_on_start": "evaluation-before.json is that evaluation",
    "eval_use_gather_object": _HELD_OUT,
    "fp16_full_eval": "evaluations run in the dtype that training.fp16 or model.dtype gives",
    "fsdp": _LAUNCHED,
    "fsdp_config": _LAUNCHED,
    "ignore_data_skip": "a continued run goes on where it stopped",
    "include_for_metrics": _HELD_OUT,
    "label_names": "the batch's `gk_` tensors are the labels",
    "label_smoothing_factor": "the text loss is not smoothed",
    "liger_kernel_config": _LIGER,
    "local_rank": "torchrun and accelerate launch set it",
    "logging_nan_inf_filter": "a loss that is NaN must be seen",
    "parallelism_config": "training.context_parallel says what is shared, and tensors are whole",
    "prediction_loss_only": _HELD_OUT,
    "remove_unused_columns": "the batch's `gk_` tensors are needed",
    "restore_callback_states_from_checkpoint": "callbacks find their state by themselves",
    "save_on_each_node": "rank 0 writes the checkpoints, whole or not at all",
    "save_only_model": "a run could not be continued",
    "skip_memory_metrics": "its bytes would stand among held-out losses",
    "use_cache": "training keeps no cache",
    "use_cpu": "hide the GPUs instead: CUDA_VISIBLE_DEVICES=''",
    "use_liger_kernel": _LIGER,
}

# Weights that change while gradients are still being made.
_IN_BACKWARD = ("lomo", "adalomo")
_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_OF_TORCH = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop")
_OF_TRANSFORMERS = ("every_n_layers", "offload")  # since 5.23
_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
GREEDY_LEAST = 1e-3  # transformers' default of min_lr; a rate below it never goes down


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their names and types checked, as TrainingArguments takes them.

    Args:
        values: by name, as YAML or the command line gives them.

    Raises:
        ValueError: "`name`: sentence" of the first that cannot be used.
    """
    return {name: _checked(name, value) for name, value in values.items()}


def _checked(name: str, value: Any) -> Any:
    if name in OURS:
        raise ValueError(f"`{name}`: give `{OURS[name]}` instead")
    if name.startswith(("push_to_hub", "hub_")):
        raise ValueError(f"`{name}`: not supported: {_HUB}")
    if name in REFUSED:
        raise ValueError(f"`{name}`: not supported: {REFUSED[name]}")
    hints = get_type_hints(TrainingArguments)
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    if name not in known:
        close = difflib.get_close_matches(name[:100], known, n=1)
        hint = f"; did you mean `{OURS.get(close[0], close[0])}`?" if close else ""
        raise ValueError(f"`{cut(name, VALUE)}`: no such argument of TrainingArguments{hint}")
    match name:
        case "optim":
            _one_of(name, value, [each.value for each in OptimizerNames])
            if value in _IN_BACKWARD or value.endswith("layerwise"):
                why = "it steps in the backward pass, where no gradient can be clipped or refused"
                raise ValueError(f"`{name}`: {value} is not supported: {why}")
        case "lr_scheduler_type":
            _one_of(name, value, [each.value for each in SchedulerType])
        case "include_num_input_tokens_seen" if not isinstance(value, bool):
            _one_of(name, value, ["all", "non_padding", "no"])
    value = _typed(name, value, hints[name])
    if name == "ddp_timeout" and value <= 0:
        raise ValueError(f"`{name}`: expected seconds above 0, got {value}")
    if name == "lr_scheduler_kwargs" and isinstance(value, dict):
        value = {key: _number(x) for key, x in value.items()}
    if name == "neftune_noise_alpha" and value is not None and value <= 0:
        raise ValueError(f"`{name}`: expected a number above 0, got {value}")
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the type that TrainingArguments declares."""
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        found = adapter.validate_python(value)
    except ValidationError as error:
        said = " or ".join(
            dict.fromkeys(
                problem["msg"].removeprefix("Input should be ").split(", unable")[0]
                for problem in error.errors(include_url=False)
            )
        )
        raise ValueError(f"`{name}`: expected {said}, got {short(value)}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"`{name}`: expected a finite number, got {found}")
    return found


def _number(value: Any) -> Any:
    """The number that YAML takes for a text, such as 1e-6 without a point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _one_of(name: str, value: Any, known: list[str]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value)[:100], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        raise ValueError(f"`{name}`: no such name, {short(value)}; {hint}")


def conflicts(config: BaseModel) -> Iterator[tuple[str, str]]:
    """(field, sentence) of arguments that need or exclude other settings.

    Args:
        config: of the run.
    """
    given, training = config.training.arguments, config.training
    prefix = "training.arguments."
    default = type(training).model_fields["scheduler"].default
    if "lr_scheduler_type" in given and training.scheduler != default:
        wanted = "training.scheduler left out beside it"
        yield f"{prefix}lr_scheduler_type", f"expected {wanted}, got {training.scheduler}"
    if given.get("lr_scheduler_type") in _BY_EVALUATION and config.evaluation.every is None:
        wanted = f"evaluation.every beside {given['lr_scheduler_type']}"
        yield f"{prefix}lr_scheduler_type", f"expected {wanted}, got none"
    if given.get("lr_scheduler_type") == "greedy":
        least = (given.get("lr_scheduler_kwargs") or {}).get("min_lr", GREEDY_LEAST)
        if isinstance(least, (int, float)) and least > training.learning_rate:
            wanted = f"min_lr of at most training.learning_rate, {training.learning_rate:g}"
            yield f"{prefix}lr_scheduler_kwargs", f"expected {wanted}, beside greedy, got {least:g}"
    for name in _CHECKPOINTING:
        if given.get(name) and not config.model.gradient_checkpointing:
            yield prefix + name, "expected model.gradient_checkpointing true beside it, got false"
        elif said := _of_checkpointing(given.get(name), config):
            yield prefix + name, said
    if all(given.get(name) for name in _CHECKPOINTING):
        yield prefix + _CHECKPOINTING[1], f"expected {_CHECKPOINTING[0]} alone, got both"
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if given.get(name) and training.workers == 0:
            yield prefix + name, "expected training.workers above 0 beside it, got 0"
    if given.get("eval_delay") and config.evaluation.every is None:
        yield f"{prefix}eval_delay", "expected evaluation.every beside it, got none"
    if given.get("include_num_input_tokens_seen") == "non_padding" and config.data.pack_to:
        wanted = "all beside data.pack_to, whose rows have no attention mask"
        yield f"{prefix}include_num_input_tokens_seen", f"expected {wanted}, got non_padding"


def _of_checkpointing(how: Any, config: BaseModel) -> str | None:
    """The sentence about keywords of checkpointing that cannot be used; None: they can."""
    if how is None:
        return None
    if not isinstance(how, dict):
        return f"expected a mapping, got {short(how)}"
    known = {*_OF_TORCH, *(_OF_TRANSFORMERS if _CHECKPOINTING[0] in _fields() else ())}
    if unknown := sorted(map(str, how.keys() - known)):
        return f"expected some of {', '.join(sorted(known))}, got {cut(unknown[0], VALUE)}"
    dropout = 0.0 if config.model.lora is None else config.model.lora.dropout
    if not how.get("preserve_rng_state", True) and dropout:
        return f"expected preserve_rng_state true beside model.lora.dropout, got {dropout}"
    return None


def _fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments)}


def further(config: BaseModel) -> dict[str, Any]:
    """What `training.arguments` adds to or changes of the arguments that our fields give.

    Args:
        config: validated settings.
    """
    given = dict(config.training.arguments)
    if config.model.gradient_checkpointing:
        asked = [given.pop(name, None) or {} for name in _CHECKPOINTING]
        new = _CHECKPOINTING[0] in _fields()  # transformers < 5.23 has the old names only
        given["activation_checkpointing" if new else "gradient_checkpointing"] = True
        given[_CHECKPOINTING[not new]] = {"use_reentrant": False, **asked[0], **asked[1]}
    return given
