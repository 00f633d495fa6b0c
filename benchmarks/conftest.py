"""Options of `pytest benchmarks/microbenchmarks.py`, and the machine in its JSON."""

import pytest
import torch

from benchmarks import choosing
from benchmarks.timing import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("groundkern", "what to measure")
    choosing.add_arguments(group.addoption)
    group.addoption(
        "--backend", default="auto", choices=["auto", "reference", "triton", "native"], help="ours"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.threads:
        torch.set_num_threads(config.option.threads)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["groundkern"] = machine.stamp(torch.device(config.option.device))
