"""What tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.tiny_run import make_data


@pytest.fixture(scope="module")
def one_thread():
    """As a run in a process of its own: another number of threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with the data and the model of a tiny run."""
    return make_data(tmp_path_factory.mktemp("data"))
