"""Bad supervision and models that the wiring does not support: one clear error each, by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import (
    DvSft,
    Hist,
    Klal,
    LogitLens,
    Margins,
    Objectives,
    Smam,
    attach,
    detach,
)
from groundkern.hf.model.head import ragged_bags
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import map_sets, side_sets, word_images
from groundkern.hf.model.side_tokens import append_side_tokens
from tests.hf.conftest import MODELS
from tests.hf.families import FAMILIES
from tests.hf.samples import SAMPLES, make_batch

BAD = {
    "row outside the sequence": ("gk_text_position", lambda x, b: x + 40, "gk_text_position"),
    "row of the last token": (
        "gk_side_position",
        lambda x, b: torch.full_like(x, b["input_ids"].shape[1] - 1),
        "gk_side_position",
    ),
    "aligned row on an image": (
        "gk_side_position",
        lambda x, b: b["gk_word_position"][:, : x.shape[1]],
        "image token",
    ),
    "set that does not exist": ("gk_side_set", lambda x, b: x + 3, "gk_side_set"),
    "label out of the vocabulary": ("gk_word_label", lambda x, b: x + 10**6, "gk_word_label"),
    "bag out of the vocabulary": ("gk_word_bag", lambda x, b: x + 10**6, "gk_word_bag"),
    "composite of a phrase that is not there": (
        "gk_phrase_composite",
        lambda x, b: x + 9,
        "gk_phrase_composite",
    ),
    "composite of two": ("gk_phrase_composite", lambda x, b: x[..., :2], "gk_phrase_composite"),
    "phrase outside the sequence": ("gk_phrase_position", lambda x, b: x + 40, "gk_phrase_pos"),
    "concept out of the vocabulary": ("gk_lens_label", lambda x, b: x + 10**6, "gk_lens_label"),
    "part of the lens rows": ("gk_lens_inside", lambda x, b: None, "gk_lens_inside"),
    "counts of another kind": ("gk_totals", lambda x, b: torch.ones(3), "gk_totals"),
    "a target of a token two on": (
        "gk_map_token_position",
        lambda x, b: torch.where(x >= 0, b["gk_map_position"] - 2, x),
        "gk_map_token_position.*or the next.*2 away",
    ),
    "float positions": ("gk_map_position", lambda x, b: x.float(), "gk_map_position"),
    "integer mask": ("gk_side_inside", lambda x, b: x.int(), "gk_side_inside"),
    "another width": ("gk_map_image", lambda x, b: x[:, :1], "gk_map_image"),
    "another batch": ("gk_image", lambda x, b: x[:2], "gk_image"),
    "part of a group": ("gk_side_set", lambda x, b: None, "gk_side_set"),
    "an unknown name": ("gk_sides", lambda x, b: torch.zeros(1), "gk_sides"),
    "an unknown record": ("gk_record", lambda x, b: "attention", "gk_record"),
    "no token ids": ("input_ids", lambda x, b: None, "input_ids"),
    "a cache": ("past_key_values", lambda x, b: object(), "past_key_values"),
    "packed by lengths": ("cu_seq_lens_q", lambda x, b: torch.tensor([0, 5]), "packed documents"),
    "packed by positions": (
        "position_ids",
        lambda x, b: (torch.arange(b["input_ids"].shape[1]) % 9).expand(4, -1),
        "packed documents",
    ),
    "padding in the middle": (
        "attention_mask",
        lambda x, b: x * (torch.arange(x.shape[1]) != 7),
        "padding at the ends only",
    ),
    "a mask of four dimensions": (
        "attention_mask",
        lambda x, b: x[:, None, None],
        "attention_mask",
    ),
    "an unknown input per token": ("weights", lambda x, b: b["gk_image"].float(), "weights"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_one_clear_error(qwen, case):
    name, change, message = BAD[case]
    batch = make_batch(attach(qwen, smam=Smam(), dv_sft=DvSft(), klal=Klal()), SAMPLES["qwen"])
    value = change(batch.get(name), batch)
    batch = {**batch, name: value} if value is not None else {**batch}
    if value is None:
        del batch[name]
    with pytest.raises((ValueError, TypeError), match=message):
        qwen(**batch)


def test_objectives_check_their_numbers():
    for make in (
        lambda: Smam(beta=-0.1),
        lambda: Smam(weight=float("nan")),
        lambda: DvSft(smoothing=1.0),
        lambda: Klal(over="image"),
        lambda: Klal(heads="max"),
        lambda: Klal(layers=()),
        lambda: Klal(layers=(2, 1)),
        lambda: Klal(divergence="hellinger"),
        lambda: Klal(heads="each", divergence="js"),
        lambda: Klal(over="visible", divergence="reverse_kl"),
        lambda: Klal(head_weight="fixed"),
        lambda: Smam(divide_by="all"),
        lambda: DvSft(average="tokens"),
        lambda: Hist(subject=-1.0),
        lambda: Hist(maps="rollout"),
        lambda: Hist(distance="cosine"),
        lambda: Hist(over="renormalised"),
        lambda: Margins(inside=0.0),
        lambda: Margins(scale="mean"),
        lambda: LogitLens(raise_weight=float("inf")),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_models_that_are_not_supported_are_refused_by_name(qwen):
    tiny = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        attach(T5ForConditionalGeneration(T5Config(**tiny, d_kv=8, decoder_start_token_id=0)))
    with pytest.raises(TypeError, match="before DDP or FSDP"):
        attach(nn.DataParallel(qwen))
    for name, kind in (("klal", Klal), ("hist", Hist), ("margins", Margins)):
        with pytest.raises(ValueError, match=rf"{name}\.layers"):
            attach(qwen, **{name: kind(layers=(3,))})
    with pytest.raises(ValueError, match="backend"):
        attach(qwen, backend="cudnn")
    qwen.model.language_model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="1 layers of attention with sinks"):
        attach(qwen, smam=Smam())
    with pytest.raises(ValueError, match=r"softmax attention \(0, 2\), got 1, a layer of.*sinks"):
        attach(qwen, klal=Klal(layers=(1,)))


def test_mixers_and_length_dependent_rope_are_refused_by_name():
    config = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope))
    with pytest.raises(ValueError, match="dynamic"):
        attach(model, smam=Smam())
    hybrid = MODELS["qwen"]()
    hybrid.config.text_config.layer_types = ["full_attention", "csa", "hca"]
    with pytest.raises(ValueError, match="1 layers of csa; 1 layers of hca"):
        attach(hybrid, smam=Smam())
    model = LlamaForCausalLM(LlamaConfig(**config))
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    for name, kind in (("smam", Smam), ("klal", Klal), ("margins", Margins)):
        with pytest.raises(ValueError, match=f"{name}.*no attention modules"):
            attach(model, **{name: kind()})
    attach(model, dv_sft=DvSft())


def test_values_are_not_read_if_that_costs_a_sync(qwen):
    """On a meta device every shape check runs, every selection is built, and no value is read."""
    batch = make_batch(qwen, SAMPLES["qwen"], side="left")
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(4, -1)
    request = Request.of(qwen, Objectives(), {k: v.to("meta") for k, v in batch.items()})
    found = request.batch
    for rows in (request.rows(found.side_position), request.rows(found.map_position)):
        assert rows.at(None).stop.device.type == rows.at(3).start.device.type == "meta"
    assert side_sets(found).bits.is_meta
    assert map_sets(found).bits.is_meta
    assert ragged_bags(found.word_bag.flatten(0, 1), word_images(found).flatten()).ids.is_meta
    side = append_side_tokens(request.inputs, found.side_position, {5})
    assert side["input_ids"].shape[1] == batch["input_ids"].shape[1] + 3


def tiny_unsupported(name: str):
    """A tiny model of an architecture whose attention the ops do not compute."""
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    match name:
        case "mllama":
            tower = {"hidden_size": 16, "attention_heads": 2, "vision_output_dim": 32}
            tower |= {"num_hidden_layers": 1, "num_global_layers": 1, "image_size": 28}
            config = transformers.MllamaConfig(
                text_config={**text, "cross_attention_layers": [1]},
                vision_config={**tower, "intermediate_layers_indices": [0]},
            )
            return transformers.MllamaForConditionalGeneration(config)
        case _:
            config = transformers.Gemma3TextConfig(**text, use_bidirectional_attention=True)
            return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mllama", "without cross-attention, got MllamaForConditionalGeneration"),
        ("both_ways", "Gemma3ForCausalLM, which attends both ways"),
    ],
)
def test_architectures_are_refused_by_name_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        attach(tiny_unsupported(name))


def test_a_map_row_on_an_image_that_sees_itself_is_refused():
    """Gemma3's image tokens see later ones: a causal map of such a row would be wrong."""
    model = attach(FAMILIES["gemma3"].model(), klal=Klal())
    ids = torch.full((1, 12), 40)
    ids[0, 2:6] = model.config.image_token_id
    types = (ids == model.config.image_token_id).int()
    batch = {
        "input_ids": ids,
        "token_type_ids": types,
        "gk_image": types - 1,
        "gk_map_position": torch.tensor([[9]]),
        "gk_map_token_position": torch.tensor([[9]]),
        "gk_map_image": torch.tensor([[0]]),
        "gk_map_target": torch.ones(1, 1, 4, dtype=torch.int32),
        "gk_map_columns": torch.arange(2, 6)[None],
    }
    assert model(**batch).parts["map_kl"] > 0
    with pytest.raises(ValueError, match=r"gk_map_position.*sees its whole image"):
        model(
            **{
                **batch,
                "gk_map_position": torch.tensor([[4]]),
                "gk_map_token_position": torch.tensor([[5]]),
            }
        )
    detach(model)


@pytest.mark.parametrize("name", ["gemma4", "molmo2"])
@pytest.mark.parametrize("rows", ["side", "map"])
def test_rows_of_an_images_other_tokens_are_refused(name, rows):
    """Molmo2's markers and line ends have the type of an image, and see every such token."""
    try:
        model = families()[name].model()
    except Unavailable as error:
        pytest.skip(str(error))
    attach(model, smam=Smam(), klal=Klal())
    ids = torch.full((1, 12), 40)
    types = torch.zeros(1, 12, dtype=torch.long)
    types[0, 2:6] = 1  # none of which is the image token itself
    none = torch.zeros(1, 0, dtype=torch.int32)
    batch = {
        "input_ids": ids,
        "mm_token_type_ids": types,
        "gk_image": types.int() - 1,
        "gk_side_position": none,
        "gk_side_set": none,
        "gk_side_inside": torch.zeros(1, 0, 12, dtype=torch.bool),
        "gk_map_position": none,
        "gk_map_token_position": none,
        "gk_map_image": none,
        "gk_map_target": torch.ones(1, 0, 4, dtype=torch.int32),
        "gk_map_columns": torch.arange(2, 6, dtype=torch.int32)[None],
    }

    def with_row(position: int) -> dict:
        row = torch.tensor([[position]], dtype=torch.int32)
        if rows == "side":
            more = {"position": row, "set": torch.full_like(row, -1)}
        else:
            target = torch.ones(1, 1, 4, dtype=torch.int32)
            more = {"position": row, "token_position": row, "image": 0 * row, "target": target}
        return batch | {f"gk_{rows}_{key}": x for key, x in more.items()}

    assert torch.isfinite(model(**with_row(9)).loss)
    with pytest.raises(ValueError, match=rf"gk_{rows}_position.*sees its whole image"):
        model(**with_row(4))
    detach(model)
