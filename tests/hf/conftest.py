"""Fixtures of the transformers tests: tiny models of each family, detached after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers

from benchmarks.families.zoo.first import tiny_llava_model, tiny_qwen_model
from groundkern.hf import DvSft, Klal, Smam, detach
from tests.hf.samples import SAMPLES

MODELS = {"qwen": tiny_qwen_model, "llava": tiny_llava_model}
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=["qwen", "llava"])
def family(request) -> str:
    return request.param


@pytest.fixture
def samples(family):
    return SAMPLES[family]


@pytest.fixture
def model(family) -> Iterator:
    """A tiny model in eval mode, without grounding."""
    model = MODELS[family]()
    yield model
    detach(model)


@pytest.fixture
def qwen() -> Iterator:
    """A tiny Qwen2.5-VL, for what does not depend on the family."""
    model = tiny_qwen_model()
    yield model
    detach(model)


@pytest.fixture
def terms() -> dict:
    """All three objectives, with weights that make each one felt."""
    return {
        "smam": Smam(weight=0.7, gamma=1.3),
        "dv_sft": DvSft(weight=0.5),
        "klal": Klal(weight=0.8),
    }
