"""The id of visual tokens is found wherever a family keeps it, or its absence is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from groundkern.hf import attach
from groundkern.hf.data.image_token import image_token_id
from groundkern.hf.model import request
from tests.hf.collating import make_collator
from tests.hf.samples import SAMPLES, make_batch


def test_it_is_found_where_families_keep_it():
    processor = SimpleNamespace(image_token_id=9)
    assert image_token_id(SimpleNamespace(image_token_id=7), processor) == 7
    assert image_token_id(SimpleNamespace(image_token_index=0), processor) == 0
    assert image_token_id(SimpleNamespace(vocabulary_map={"<image>": 5}), processor) == 5
    assert image_token_id(SimpleNamespace(image_token_id=None, vocabulary_map=None), processor) == 9
    assert image_token_id(SimpleNamespace()) is None
    chameleon = transformers.ChameleonConfig(vocabulary_map={"<image>": 711, "IMGIMGAAZ": 4})
    assert image_token_id(chameleon) == 711


def test_images_without_a_known_id_are_refused(qwen, monkeypatch):
    batch = make_batch(qwen, SAMPLES["qwen"])
    attach(qwen)
    monkeypatch.setattr(request, "image_token_id", lambda config: None)
    with pytest.raises(ValueError, match=r"config\.image_token_id`: expected the id of visual"):
        qwen(**batch)


def test_a_collator_asks_the_processor_last():
    collator = make_collator()
    del collator.config.image_token_id
    collator.processor.image_token_id = None
    with pytest.raises(ValueError, match="the id of visual tokens"):
        collator._image_token()
    collator.processor.image_token_id = 9
    assert collator._image_token() == 9
