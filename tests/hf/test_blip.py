"""HIST in BLIP: its two heads written out, and GradCAM of cross-attention in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipProcessor,
)

from groundkern.hf import GroundedExample, Phrase
from groundkern.hf.blip import BlipHist, blip_hist, blip_hist_batch
from groundkern.hf.data.processor import pil_image_processor
from groundkern.losses import composition
from tests.hf.closeness import assert_same_gradients, gradients

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "two",
    "dogs",
    "and",
    "a",
    "cat",
    "the",
    "sofa",
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("blip") / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY))
    images = pil_image_processor("blip", "Blip")(size={"height": 16, "width": 16})
    return BlipProcessor(images, BertTokenizer(str(vocabulary)))


@pytest.fixture
def model():
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    config = BlipConfig(
        text_config={**small, **heads, "vocab_size": len(VOCABULARY), "encoder_hidden_size": 16}
        | {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "max_position_embeddings": 32},
        vision_config={**small, **heads, "image_size": 16, "patch_size": 4},
        image_text_hidden_size=8,
    )
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)  # BLIP starts near 0, where attention is flat
    return model


def span(text: str, words: str, subject: str | None = None) -> Phrase:
    start = text.index(words)
    own = None if subject is None else (text.index(subject), text.index(subject) + len(subject))
    return Phrase(1, start, start + len(words), own)


@pytest.fixture
def batch(processor):
    examples = []
    for seed, text, phrases in (
        (
            1,
            "two dogs and a cat",
            [("two dogs and a cat", None), ("two dogs", "dogs"), ("a cat", "cat")],
        ),
        (2, "the sofa", [("the sofa", "sofa")]),
        (3, "a cat", [("a cat", "cat")]),
    ):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed))
        image = Image.fromarray(pixels.byte().numpy())
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
        marked = tuple(span(text, *phrase) for phrase in phrases)
        examples.append(GroundedExample((image,), messages, phrases=marked))
    found = blip_hist_batch(processor, examples)
    return found | {"pixel_values": found["pixel_values"].double()}


def test_batch_holds_phrases_subjects_and_the_composite(batch):
    assert batch["phrase_image"].tolist() == [0, 0, 0, 1, 2]
    assert batch["subject_image"].tolist() == [0, 0, 1, 2]
    assert batch["composite"].tolist() == [[0, 1, 2]]
    assert batch["phrase_content"].sum(1).tolist() == [5, 2, 2, 2, 2]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_heads_are_those_written_out(model, batch):
    """ITC over all images and phrases, ITM with the hardest other image and phrase."""
    ours = blip_hist(model, batch, BlipHist(temperature=0.5))
    with torch.no_grad():
        ids, mask, own = (batch[f"phrase_{n}"] for n in ("input_ids", "attention_mask", "image"))
        pixels = batch["pixel_values"]
        cosine = model(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score  # [3, 5]
        match = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 1]]).bool()
        score, itc = cosine / 0.5, 0.0
        for s, m in ((score, match), (score.t(), match.t())):
            itc = itc - (m / m.sum(1, keepdim=True) * s.log_softmax(1)).sum(1).mean() / 2
        torch.testing.assert_close(ours.parts["phrase_itc"], itc, rtol=1e-9, atol=0)
        apart = cosine.masked_fill(match, -9.0)
        pairs = [(int(own[p]), p, 1) for p in range(5)]
        pairs += [(int(apart[:, p].argmax()), p, 0) for p in range(5)]
        pairs += [(int(own[p]), int(apart[own[p]].argmax()), 0) for p in range(5)]
        losses = []
        for i, p, label in pairs:
            logits = model(ids[p][None], pixels[i][None], attention_mask=mask[p][None]).itm_score
            losses.append(F.cross_entropy(logits[0], torch.tensor(label)))
        wanted = torch.stack(losses).mean()
        torch.testing.assert_close(ours.parts["phrase_itm"], wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("layers", [None, (0,)])
def test_composition_equals_double_autograd(model, batch, layers):
    how = BlipHist(phrase=0.0, subject=0.0, layers=layers)
    ours = blip_hist(model, batch, how)
    found = gradients(model, ours.loss)
    stored = []
    handles = [
        model.text_encoder.encoder.layer[n].crossattention.self.register_forward_hook(
            lambda _, __, output: stored.append(output[1])  # [P, H, T, S]
        )
        for n in layers or (0, 1)
    ]
    own = batch["phrase_image"]
    logits = model(
        batch["phrase_input_ids"],
        batch["pixel_values"][own],
        attention_mask=batch["phrase_attention_mask"],
    ).itm_score
    for handle in handles:
        handle.remove()
    slopes = torch.autograd.grad(logits[:, 1].sum(), stored, create_graph=True)
    maps = torch.stack([(a * da.relu()).mean(1) for a, da in zip(stored, slopes)]).mean(0)
    content = batch["phrase_content"][..., None]
    maps = ((maps * content).sum(1) / content.sum(1))[:, 1:]  # without the class token
    torch.testing.assert_close(ours.maps, maps, rtol=1e-9, atol=1e-15)
    wanted = composition(maps[0], maps[1], maps[2])
    assert float(wanted.detach()) > 1e-4
    torch.testing.assert_close(ours.loss.detach(), wanted.detach(), rtol=1e-9, atol=0)
    expected = gradients(model, wanted * 1e3)
    found = {k: found[k] * 1e3 for k in expected}
    assert_same_gradients(found, expected, share=1e-9)


def test_one_image_has_no_negative_and_no_composite_no_map(model, batch):
    alone = {k: v[3:4] if k.startswith("phrase") else v for k, v in batch.items()}
    alone |= {k: v[:0] for k, v in batch.items() if k.startswith("subject") or k == "composite"}
    alone["phrase_image"] = torch.zeros(1, dtype=torch.int64)
    alone["pixel_values"] = batch["pixel_values"][1:2]
    output = blip_hist(model, alone, BlipHist())
    assert output.parts.keys() == {"phrase_itc", "phrase_itm"}
    assert float(output.parts["phrase_itc"]) == pytest.approx(0.0, abs=1e-12)
    assert output.maps is None
    output.loss.backward()


def test_what_it_cannot_serve_is_refused(model, batch, processor):
    with pytest.raises(TypeError, match="BlipForImageTextRetrieval"):
        blip_hist(torch.nn.Linear(2, 2), batch, BlipHist())
    with pytest.raises(ValueError, match="layers"):
        blip_hist(model, batch, BlipHist(layers=(2,)))
    model.config.text_config.attention_probs_dropout_prob = 0.1
    with pytest.raises(ValueError, match="dropout"):
        blip_hist(model.train(), batch, BlipHist())
    with pytest.raises(ValueError, match="one image"):
        blip_hist_batch(processor, [GroundedExample((), [{"role": "assistant", "content": "a"}])])
    for bad in ({"phrase": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            BlipHist(**bad)
