"""The id of visual tokens is found wherever a family keeps it, or its absence is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from groundkern.hf import attach
from groundkern.hf.data.image_token import image_token_id, video_token_id, visual_token_ids
from groundkern.hf.model import request
from tests.hf.collating import make_collator, make_example
from tests.hf.samples import SAMPLES, make_batch


def test_that_of_videos_is_found_beside_it():
    assert video_token_id(SimpleNamespace(video_token_id=7)) == 7
    assert video_token_id(SimpleNamespace(video_token_index=3)) == 3
    assert video_token_id(SimpleNamespace(), SimpleNamespace(video_token_id=9)) == 9
    assert video_token_id(SimpleNamespace(video_token_id=None)) is None
    assert visual_token_ids(SimpleNamespace(image_token_id=5, video_token_id=7)) == {5, 7}
    assert visual_token_ids(SimpleNamespace()) == set()


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
        collator([make_example()])
    collator.processor.image_token_id = 9
    with pytest.raises(ValueError, match=r"ids=\[0\] and text=\[20\]|20 visual tokens"):
        collator([make_example()])  # whose images have another id
