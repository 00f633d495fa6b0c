"""`training.strategy`: one process starts the others by `accelerate launch`, and ends as they do.

accelerate's command runs in this process. Its own way with signals, which ends the processes after
30 seconds, gives way to handing them on: each process finishes its step and saves.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import yaml

from groundkern.trainer import durable
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.stopping import SIGNALS_OF_TORCHRUN

SETTINGS = "accelerate.yaml"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def wanted(config: Config) -> bool:
    """Whether this process is to start those of `training.strategy`."""
    return config.training.strategy is not None and not _launched()


def launch(config: Config, words: Sequence[str]) -> int:
    """Start the processes, which are given the same words, and wait for their end.

    Args:
        config: with `training.strategy`; what accelerate is told is written into its output.
        words: of `groundkern`.

    Returns:
        The exit status of the process that ended first with one that is not 0.

    Raises:
        ConfigError: a strategy that cannot run here.
        StorageError: the output folder cannot be written.
    """
    settings = accelerate_settings(config)
    output = config.training.output
    durable.make_folder(output)
    durable.write_text(output / SETTINGS, yaml.safe_dump(settings, sort_keys=False))
    command = ["--config_file", str(output / SETTINGS), "-m", "groundkern", *words]
    print(f"Running: accelerate launch {shlex.join(command)}", flush=True)
    return _run(command)


def _run(command: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[SIGNALS_OF_TORCHRUN] = "SIGHUP"  # the others are handed on
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes speak
    handed: list[int] = []
    hand_on = partial(_hand_on, handed)
    handlers = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        ended = {each.exitcode for each in error.failures.values()}
        if handed and 128 + handed[-1] in ended:  # others may have missed the one that it ended
            return 128 + handed[-1]
        _, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {failure.local_rank} was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _hand_on(handed: list[int], number: int, frame: object) -> None:
    """Each process is in a session of its own, where Ctrl-C does not reach it."""
    import psutil  # of accelerate

    handed.append(number)
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def accelerate_settings(config: Config) -> dict[str, Any]:
    """What accelerate's config file says for `training.strategy`.

    Args:
        config: with a strategy.

    Raises:
        ConfigError: the strategy cannot run here.
    """
    import torch

    training = config.training
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    processes = training.processes
    if processes is None and device is None:
        raise ConfigError("`training.processes`: required where there is no GPU, but not given")
    processes = processes or torch.accelerator.device_count()
    _check_context(config, processes)
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        **_OF_STRATEGY[training.strategy],
        "num_machines": 1,
        "num_processes": processes,
        "main_process_port": 0,  # a free one
        "mixed_precision": precision,
    }
    if training.strategy == "ddp" and device is not None and device.type != "cuda":
        settings["distributed_type"] = f"MULTI_{device.type.upper()}"
    if training.strategy == "fsdp2" and device is None:
        raise ConfigError(
            "`training.strategy`: expected ddp or zero3 where there is no GPU, since accelerate "
            "shards by FSDP2 on accelerators only, got fsdp2"
        )
    if training.strategy == "zero3" and find_spec("deepspeed") is None:
        raise ConfigError("`training.strategy`: zero3 needs DeepSpeed: pip install deepspeed")
    return settings


_OF_STRATEGY: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the model says which layers
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # any number of processes reads it
            "fsdp_cpu_ram_efficient_loading": False,
        },
    },
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": 3,
            "gradient_accumulation_steps": "auto",
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero3_init_flag": False,
            "zero3_save_16bit_model": True,
        },
    },
}


def check(config: Config) -> None:
    """Make sure that what launched this process is what the settings ask for.

    Args:
        config: of the run.

    Raises:
        ConfigError: another strategy, another number of processes, or one that trains otherwise.
    """
    training, own = config.training, _own_strategy()
    if training.strategy is None and training.processes is not None:
        raise ConfigError("`training.processes`: expected training.strategy beside it, got none")
    if training.strategy is not None and not _launched():
        raise ConfigError(
            "`training.strategy`: expected `groundkern train`, which starts the processes, "
            "or accelerate launch"
        )
    if training.strategy not in (None, own):
        raise ConfigError(
            f"`training.strategy`: expected {own}, which launched this process, "
            f"got {training.strategy}"
        )
    world = os.environ.get("WORLD_SIZE", "1")
    if training.processes is not None and training.processes != int(world):
        raise ConfigError(
            f"`training.processes`: expected {world}, which were launched, got {training.processes}"
        )
    _check_context(config, int(world))
    asked = _context_of_launcher()
    if asked is not None and asked != training.context_parallel:
        raise ConfigError(
            f"`training.context_parallel`: expected {asked}, the cp_size of what launched this "
            f"process, got {training.context_parallel}"
        )
    if own == "fsdp1":
        raise ConfigError("accelerate's `fsdp_version`: expected 2, got 1")
    if own == "fsdp2":  # else only the first process has weights until the model is sharded
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if own.startswith("zero"):
        without_compiling()


def without_compiling() -> None:
    """Let DeepSpeed start on CPUs without its operator for shared memory; before a process joins.

    It compiles that one for minutes, on every new machine, and needs ninja and a compiler for it;
    inference with split layers alone calls it. Nothing where there is an accelerator.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_context(config: Config, processes: int) -> None:
    """Refuse a context that so many processes cannot have."""
    training = config.training
    if processes % training.context_parallel:
        raise ConfigError(
            f"`training.context_parallel`: expected a divisor of {processes}, the number of "
            f"processes, got {training.context_parallel}"
        )
    if training.context_engine == "ring" and training.context_order != "zigzag":
        raise ConfigError(
            "`training.context_order`: expected zigzag, torch's order, with "
            f"training.context_engine ring, got {training.context_order}"
        )


def parallelism(config: Config, processes: int) -> Any | None:
    """accelerate's `ParallelismConfig`; None: sequences are whole, or it has its settings already.

    Args:
        config: of the run.
        processes: how many there are.
    """
    shared = config.training.context_parallel
    if shared == 1 or _context_of_launcher() is not None:
        return None
    from accelerate import ParallelismConfig

    return ParallelismConfig(cp_size=shared, dp_shard_size=processes // shared)


def multiple(config: Config) -> int:
    """What the length of a batch is a multiple of: the ring wants two equal pieces of a process.

    Args:
        config: of the run.
    """
    training = config.training
    return 2 * training.context_parallel if training.context_engine == "ring" else 1


def _context_of_launcher() -> int | None:
    """The cp_size of accelerate's config file; None: it has no parallelism_config."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return None
    return int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1"))


def _launched() -> bool:
    return "WORLD_SIZE" in os.environ


def _own_strategy() -> str:
    """What accelerate launch told this process by its environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '3')}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return "ddp"
