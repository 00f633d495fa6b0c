"""Settings every test shares: the Triton interpreter without a GPU, few threads, fixed seeds."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from tests import interpreter

# Triton reads this when a kernel module is imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        interpreter.install()

# One process per pytest-xdist worker: their threads share the cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a sentence, the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and none is visible to torch")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _shared_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give memory back after a GPU test: others use the card. After an illegal access every
    further call of this process fails, so a worker of pytest-xdist ends, and another takes over."""
    yield
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
