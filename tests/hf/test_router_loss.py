"""A mixture of experts keeps the auxiliary loss of its routers."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.families.zoo.making import build_model
from groundkern.hf import DvSft, Klal, Smam, attach, detach, objectives_of, row_counts
from groundkern.hf.model.router import ROUTER
from groundkern.hf.watching.held_out import HeldOutMeans
from groundkern.hf.watching.term_norms import term_norms
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.logit_decoders import TEXT, build_moe, padded_batch, text_batch

TERMS = {"smam": Smam(weight=0.7), "dv_sft": DvSft(), "klal": Klal()}
EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 1.0,
    "output_router_logits": True,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [1, 1, 2],
    "partial_rotary_factor": 1.0,
}


def vision_moe(name: str):
    """An image-text model on text alone, at its own default vision tower's smallest."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    tower |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    text = {**TEXT, **EXPERTS, "rope_parameters": ROPE}
    config = kind(text_config=text, vision_config=tower, tie_word_embeddings=False)
    return build_model(AutoModelForImageTextToText._model_mapping[kind], config, 0, "sdpa")


MODELS = {
    "mixtral": lambda: build_moe("MixtralForCausalLM"),
    "qwen3_moe": lambda: build_moe("Qwen3MoeForCausalLM"),
    "qwen3_vl_moe": lambda: vision_moe("Qwen3VLMoeConfig"),
    "glm4v_moe": lambda: vision_moe("Glm4vMoeConfig"),
}


def own(model, batch: dict):
    labels = torch.full_like(batch["input_ids"], -100)
    for b, row in enumerate(batch["gk_text_position"].tolist()):
        for p in row:
            if p >= 0:
                labels[b, p + 1] = batch["input_ids"][b, p + 1]
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own_with_its_auxiliary_loss(name):
    model, batch = MODELS[name](), padded_batch()
    plain = own(model, batch)
    coefficient = model.config.get_text_config().router_aux_loss_coef
    wanted = gradients(model, plain.loss)
    without_side = {k: x for k, x in batch.items() if "_side_" not in k}
    ours = attach(model)(**without_side)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-6, atol=1e-6)
    aux = coefficient * plain.aux_loss.detach()
    torch.testing.assert_close(ours.parts[ROUTER], aux, rtol=1e-6, atol=1e-6)
    found = gradients(model, ours.loss)
    assert_same_gradients(found, wanted, share=1e-4)
    assert any("gate" in key and gradient.any() for key, gradient in found.items())
    with_side = attach(model, **TERMS).train()(**batch)  # their router logits are left out
    torch.testing.assert_close(with_side.parts[ROUTER], aux, rtol=1e-6, atol=1e-6)
    detach(model)


@pytest.fixture
def model():
    model = attach(MODELS["qwen3_moe"](), **TERMS).train()
    yield model
    detach(model)


def test_checkpointing_trains_the_routers_alike(model):
    batch = padded_batch()
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(model, model(**batch).loss), plain, share=1e-5)
    alone = model(**batch, gk_part=ROUTER)
    assert gradients(model, alone.loss)["model.layers.1.mlp.gate.weight"].any()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    attach(model)
    with pytest.raises(ValueError, match="drops the gradient of the routers"):
        model(**batch)


def test_norms_and_held_out_means_have_it(model):
    batch = padded_batch()
    norms = term_norms(model, [batch])
    assert norms[f"grad_norm_{ROUTER}"] > 0
    with torch.no_grad():
        output = model.eval()(**batch)
    held_out = HeldOutMeans(objectives_of(model), torch.device("cpu"))
    held_out.add(batch, output)
    means = held_out.means()
    assert means[ROUTER] == pytest.approx(float(output.parts[ROUTER]), rel=1e-6)
    assert means["loss"] == pytest.approx(float(output.loss), rel=1e-5)


def test_micro_batches_weigh_as_much_as_their_trained_tokens(model):
    first, second = text_batch(), text_batch()
    second["input_ids"] = second["input_ids"].flip(1)
    second["gk_text_position"] = second["gk_text_position"][:, :1]
    totals = row_counts(first) + row_counts(second)
    alone = [float(model(**b).parts[ROUTER]) for b in (first, second)]
    shares = [float(model(**b, gk_totals=totals).parts[ROUTER]) for b in (first, second)]
    assert shares == pytest.approx([alone[0] * 0.75, alone[1] * 0.25], rel=1e-5)


def test_it_is_there_when_the_model_says_so_and_only_then(model):
    batch = padded_batch()
    assert ROUTER in model(**batch).parts
    assert ROUTER not in model(**batch, output_router_logits=False).parts
    model.config.output_router_logits = False  # as TRL sets it on a model that is attached
    assert ROUTER not in model(**batch).parts
    found = model(**batch, output_router_logits=True)
    assert found.parts[ROUTER] > 0
    model.router_aux_loss_coef *= 2.0
    twice = model(**batch, output_router_logits=True)
    torch.testing.assert_close(twice.parts[ROUTER], 2 * found.parts[ROUTER])
    plain = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert plain.router_logits is None  # batches without rows are the model's own


def test_a_loss_that_cannot_be_told_from_the_text_loss_is_refused(model):
    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    detach(model)
    model.forward = forward.__get__(model)
    attach(model)
    with pytest.raises(ValueError, match="calls its loss function once"):
        model(**padded_batch())
