"""training.strategy: what accelerate is told, what is refused, and how the processes end."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from groundkern.trainer import checkpoints, launching
from groundkern.trainer.config import ConfigError
from tests.trainer.tiny_run import config, losses, make_data, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def alone(monkeypatch):
    """Nothing launched this process, and it has no GPU."""
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def launched(monkeypatch, **environment):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def settings(data, tmp_path, **training):
    return config(data, tmp_path, training=training)


def test_accelerate_is_told_processes_and_precision(alone, data, tmp_path):
    found = launching.accelerate_settings(
        settings(data, tmp_path, strategy="ddp", processes=3, bf16=True)
    )
    assert found["num_processes"] == 3
    assert found["mixed_precision"] == "bf16"
    assert found["distributed_type"] == "MULTI_GPU"


def test_a_gpu_gives_the_number_of_processes_and_fsdp2(alone, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    found = launching.accelerate_settings(settings(data, tmp_path, strategy="fsdp2"))
    assert found["num_processes"] == 4
    assert found["fsdp_config"]["fsdp_version"] == 2
    found = launching.accelerate_settings(settings(data, tmp_path, strategy="ddp"))
    assert found["distributed_type"] == "MULTI_XPU"


RING = {"context_parallel": 2, "context_engine": "ring"}


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        ({"strategy": "ddp"}, "`training.processes`: required"),
        ({"strategy": "fsdp2", "processes": 2}, "expected ddp or zero3 where there is no GPU"),
        ({"strategy": "zero3", "processes": 2}, "pip install deepspeed"),
        (
            {"strategy": "ddp", "processes": 4, "context_parallel": 3},
            "`training.context_parallel`: expected a divisor of 4, the number of processes, got 3",
        ),
        (
            {"strategy": "ddp", "processes": 2, "context_order": "striped", **RING},
            "`training.context_order`: expected zigzag, torch's order",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused(alone, data, tmp_path, training, sentence, monkeypatch):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=sentence):
        launching.launch(settings(data, tmp_path / "out", **training), ["train"])
    assert not (tmp_path / "out").exists()


CONTEXT = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("training", "environment", "sentence"),
    [
        ({"strategy": "ddp"}, FSDP, "expected fsdp2, which launched this process, got ddp"),
        ({"strategy": "fsdp2"}, {}, "expected ddp, which launched this process, got fsdp2"),
        ({"strategy": "ddp", "processes": 3}, {}, "expected 2, which were launched, got 3"),
        ({}, {**FSDP, "FSDP_VERSION": "1"}, "`fsdp_version`: expected 2"),
        ({"processes": 2}, {}, "`training.processes`: expected training.strategy beside it"),
        ({"context_parallel": 3}, {}, "`training.context_parallel`: expected a divisor of 2"),
        ({"context_parallel": 2}, CONTEXT, "expected 4, the cp_size of what launched this process"),
        ({}, CONTEXT, "expected 4, the cp_size of what launched this process, got 1"),
    ],
)
def test_another_launcher_than_the_settings_name(
    alone, data, tmp_path, monkeypatch, training, environment, sentence
):
    launched(monkeypatch, **environment)
    found = settings(data, tmp_path, **training)
    assert not launching.wanted(found)
    with pytest.raises(ConfigError, match=sentence):
        launching.check(found)


def test_every_process_loads_the_weights_under_fsdp2(alone, data, tmp_path, monkeypatch):
    """Places of visual tokens may be measured before it is sharded: every process has weights."""
    launched(monkeypatch, **FSDP, FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    found = settings(data, tmp_path, strategy="fsdp2", processes=2)
    launching.check(found)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(("device", "compiles"), [("cpu", False), ("cuda", True)])
def test_deepspeed_compiles_nothing_to_start_on_cpus(
    alone, data, tmp_path, monkeypatch, device, compiles
):
    operators = {"deepspeed_shm_comm": True, "cpu_adam": True}
    ops = SimpleNamespace(__compatible_ops__=operators)
    accelerator = SimpleNamespace(get_accelerator=lambda: accelerator, device_name=lambda: device)
    fake = SimpleNamespace(ops=ops, accelerator=accelerator)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
    launched(monkeypatch, ACCELERATE_USE_DEEPSPEED="true")
    launching.check(settings(data, tmp_path, strategy="zero3"))
    assert operators == {"deepspeed_shm_comm": compiles, "cpu_adam": True}


def test_accelerate_is_told_who_shares_sequences(alone, data, tmp_path, monkeypatch):
    found = launching.parallelism(settings(data, tmp_path, context_parallel=2), 6)
    assert (found.cp_size, found.dp_shard_size, found.total_size) == (2, 3, 6)
    assert launching.parallelism(settings(data, tmp_path), 6) is None
    launched(monkeypatch, **CONTEXT)  # whose file may also say how weights are replicated
    assert launching.parallelism(settings(data, tmp_path, context_parallel=4), 8) is None


def test_a_strategy_without_a_launcher_is_refused(alone, data, tmp_path):
    """By the demo, and by a program that calls `train` itself."""
    found = settings(data, tmp_path, strategy="ddp", processes=2)
    assert launching.wanted(found)
    with pytest.raises(ConfigError, match="which starts the processes"):
        launching.check(found)


@pytest.mark.long
@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)]
)
def test_a_signal_to_the_launcher_is_every_process_s(data, tmp_path, numbers):
    """The step is finished and saved; a second signal ends all at once."""
    output = tmp_path / "run"
    flags = {
        "model.path": data / "model",
        "data.train": data / "train.jsonl",
        "training.output": output,
        "training.steps": 500,
        "training.log_every": 1,
        "training.strategy": "ddp",
        "training.processes": 2,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = run(["train", *words])
    until = time.monotonic() + 300
    while len(losses(output) if output.exists() else []) < 3:
        assert started.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    for number in numbers:
        started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 128 + numbers[-1]
    assert "Running: accelerate launch" in out
    assert "Traceback" not in err
    if len(numbers) == 1:
        assert err.count(f"Stopped by {numbers[0].name}: saved in") == 1
        assert [checkpoints.fault(path) for path in checkpoints.listed(output)] == [None]
    else:
        assert "Stopped at once" in err
