"""The optimizer and the scheduler of a run, tried on two toy weights before any work.

A missing package, an argument that an optimizer does not take, or a device that it cannot work on
then costs seconds and not a loaded model. The same toy measures whether bfloat16 weights would keep
small updates.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import check_target_module_exists

from groundkern.hf.watching.untouched import random_states_kept
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.wording import cut

logger = logging.getLogger(__name__)

STEPS = 256  # of the toy
RATE = 1e-4  # bfloat16 rounds 1 - RATE to 1; the sum of all steps is six of its numbers away
SIDE = 128  # of the toy's weight: 8-bit optimizers leave small weights in fp32


def try_arguments(config: Config) -> None:
    """Refuse what `training.arguments` names but cannot be used here, before any work.

    Args:
        config: validated settings.

    Raises:
        ConfigError: with what transformers or the optimizer says.
    """
    given = config.training.arguments
    if not given:
        return
    args = _arguments(config)
    if "optim" in given or "optim_args" in given or any(name.startswith("adam_") for name in given):
        try:
            _moved(args, torch.float32, steps=2)
        except _OF_OPTIMIZERS as error:
            raise ConfigError(f"`training.arguments.optim`: {_said(args.optim, error)}") from None
    if "lr_scheduler_type" in given or "lr_scheduler_kwargs" in given:
        try:
            _scheduled(args)
        except _OF_OPTIMIZERS as error:
            name = "training.arguments.lr_scheduler_type"
            raise ConfigError(f"`{name}`: {_said(args.lr_scheduler_type, error)}") from None
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (given.get(name) or {}).get("offload") and not torch.accelerator.is_available():
            wanted = "a GPU, since activations are kept in pinned memory"
            raise ConfigError(f"`training.arguments.{name}`: offload: expected {wanted}, got none")


_OF_OPTIMIZERS = (ArithmeticError, AttributeError, ImportError, LookupError, NotImplementedError)
_OF_OPTIMIZERS += (RuntimeError, TypeError, ValueError, AssertionError)


def _said(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{getattr(name, 'value', name)!s} cannot be used: {cut(reason, 300)}"


def _arguments(config: Config) -> TrainingArguments:
    """TrainingArguments of what was given.

    Raises:
        ConfigError: TrainingArguments does not take it.
    """
    given = dict(config.training.arguments)
    training, every = config.training, config.evaluation.every
    given.setdefault("lr_scheduler_type", training.scheduler)
    try:
        with warnings.catch_warnings(action="ignore"):
            return TrainingArguments(
                output_dir=str(Path(training.output)),
                max_steps=STEPS,
                warmup_steps=training.warmup,
                learning_rate=RATE,
                eval_strategy="no" if every is None else "steps",
                eval_steps=every,
                dataloader_num_workers=training.workers,
                use_cpu=not torch.accelerator.is_available(),
                **given,
            )
    except (ValueError, TypeError, ImportError, OSError) as error:
        reason = cut(" ".join(str(error).split()), 300)
        raise ConfigError(f"`training.arguments`: {reason}") from None


def _toy(device: torch.device, dtype: torch.dtype) -> nn.Linear:
    toy = nn.utils.skip_init(nn.Linear, SIDE, SIDE, device=device, dtype=dtype)  # no random number
    for parameter in toy.parameters():
        nn.init.ones_(parameter)
    return toy


def _moved(args: TrainingArguments, dtype: torch.dtype, steps: int) -> float:
    """How far weights of 1 are from it after so many steps down the same slope."""
    toy = _toy(args.device, dtype)
    args = copy.copy(args)
    args.weight_decay = 0.0
    if args.optim_target_modules is not None:
        args.optim_target_modules = "all-linear"
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, toy)
    optimizer = kind(options.pop("params", list(toy.parameters())), **options)
    getattr(optimizer, "train", lambda: None)()  # schedulefree's
    with random_states_kept(args.device), torch.compiler.set_stance("force_eager"):
        for _ in range(steps):
            for parameter in toy.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    return float((toy.weight.detach().float() - 1).abs().mean())


def _scheduled(args: TrainingArguments) -> None:
    """Makes the scheduler, and takes a step with it."""
    optimizer = torch.optim.SGD(_toy(torch.device("cpu"), torch.float32).parameters(), lr=RATE)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(STEPS),
        num_training_steps=STEPS,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    optimizer.step()
    by_metric = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*([1.0] if by_metric or args.lr_scheduler_type == "greedy" else []))


def refuse_no_target(model: nn.Module, config: Config) -> None:
    """Refuse `optim_target_modules` that name no linear layer of the model.

    Args:
        model: of the run.
        config: its settings.

    Raises:
        ConfigError: they name none.
    """
    target = config.training.arguments.get("optim_target_modules")
    if target is None or target in ("all-linear", "all_linear"):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not any(check_target_module_exists(target, name) for name in linear):
        raise ConfigError(
            f"`training.arguments.optim_target_modules`: expected names of linear layers, such as "
            f"{linear[0]}, got {target}"
        )


def warn_of_lost_updates(model: nn.Module, args: TrainingArguments, *, fp32_copies: bool) -> bool:
    """Warn if bfloat16 weights are trained by an optimizer that rounds small updates away.

    Args:
        model: of the run.
        args: of its trainer.
        fp32_copies: DeepSpeed keeps them of the weights, or FSDP has mixed precision, for which
            accelerate makes the shards fp32.

    Returns:
        Whether it warned.
    """
    low = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    if not low or fp32_copies:
        return False
    kept = _moved(args, torch.bfloat16, STEPS) > STEPS * RATE / 2
    if not kept:
        logger.warning(
            "%s bfloat16 weights are trained without an fp32 copy: %s rounds updates below 1/512 "
            "of a weight away; use model.dtype float32 with training.bf16, LoRA, or an optimizer "
            "that keeps them (docs/scale/scale.md, Precision)",
            f"{sum(p.numel() for p in low):,}",
            getattr(args.optim, "value", args.optim),
        )
    return not kept
