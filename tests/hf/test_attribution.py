"""Logit contributions beyond the families: biases, adapters, logit rules, norms, refusals."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.families.zoo.first import tiny_llava_model
from groundkern.hf import Smam, attach, detach, doctor
from groundkern.hf.model.attribution import through_norm
from groundkern.hf.model.logit_rule import logit_rule
from tests.hf.logit_decoders import DECODERS, every_key_a_column, text_batch
from tests.hf.residual import ResidualParts
from tests.hf.rows import rows_of
from tests.hf.samples import SAMPLES, make_batch


@pytest.fixture(params=DECODERS)
def decoder(request):
    model = attach(DECODERS[request.param](), smam=Smam())
    yield model
    detach(model)


@torch.no_grad()
def test_logits_are_processed_as_the_models_own_forward_does(decoder):
    batch = text_batch()
    report = doctor(decoder, batch)
    assert report.main <= 1e-5
    plain = decoder(batch["input_ids"]).logits
    ours = decoder(**batch)
    token = batch["input_ids"][:, [5, 9, 11]]
    wanted = rows_of(plain, batch["gk_text_position"]).log_softmax(-1).gather(2, token[..., None])
    torch.testing.assert_close(ours.text_log_prob, wanted[..., 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "cohere2"])
def test_the_sum_rule_holds_before_the_softcap(name):
    """Post-norms, an attention softcap, sliding windows, layer norms and a logit scale."""
    model, batch = attach(DECODERS[name]()), text_batch()
    parts = ResidualParts(model)
    with parts.recorded():
        ours = model(**batch, gk_record="contributions").contributions.sum(-1)
    position, token = batch["gk_side_position"], batch["input_ids"][:, [5, 9]]
    hidden = model.get_decoder().norm(rows_of(parts.last, position))
    scale = logit_rule(model).scale
    logits = scale * model.get_output_embeddings()(hidden)
    logit = logits.gather(2, token[..., None])[..., 0]
    off = ours + scale * parts.along_the_logit(position, token) - logit
    assert float(off.abs().max() / logits.abs().max()) < 1e-4
    detach(model)


@torch.no_grad()
def test_biases_and_adapters_enter_g():
    """LoRA on the output projections and on the head, and projections with a bias."""
    model = attach(tiny_llava_model(attention_bias=True))
    model = get_peft_model(model, LoraConfig(target_modules=["o_proj", "lm_head"])).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.3)
    batch = make_batch(model, SAMPLES["llava"][:1])
    batch |= every_key_a_column(batch["input_ids"])
    parts = ResidualParts(model)
    with parts.recorded():
        ours = model(**batch, gk_record=("contributions", "logits"))
    position = batch["gk_side_position"]
    token = batch["input_ids"].gather(1, position.long() + 1)
    logit = ours.main_logits.gather(2, token[..., None])[..., 0]
    off = ours.contributions.sum(-1) + parts.along_the_logit(position, token) - logit
    assert float(off.abs().max() / ours.main_logits.abs().max()) < 1e-4
    detach(model)


def test_multiplied_residual_branches_and_training_are_refused_by_name():
    model, batch = attach(DECODERS["granite"]()), text_batch()
    with pytest.raises(ValueError, match=r"GraniteDecoderLayer"):
        model(**batch, gk_record="contributions")
    assert model(**batch, gk_record="gradcam").gradcam.shape == (1, 2, 12)
    with pytest.raises(ValueError, match="eval mode"):
        model.train()(**batch, gk_record="gradcam")
    detach(model)


class Gated(nn.RMSNorm):
    """Not a norm: its output is not proportional to a scaled input."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_direction_passes_a_norm_whose_statistic_is_held(kind):
    torch.manual_seed(0)
    norm = kind(10, eps=1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(4, 10), torch.randn(4, 10)
    d = through_norm(norm, x, y)
    bias = getattr(norm, "bias", None)
    shift = 0.0 if bias is None else (y * bias).sum(-1)
    torch.testing.assert_close((x * d).sum(-1) + shift, (norm(x) * y).sum(-1))


def test_other_norms_are_refused_by_name():
    with pytest.raises(ValueError, match="RMS or layer norms, got Gated"):
        through_norm(Gated(10, eps=1e-3), torch.randn(4, 10), torch.randn(4, 10))


@torch.no_grad()
def test_all_records_come_from_one_run(qwen):
    batch, runs = make_batch(attach(qwen), SAMPLES["qwen"]), []
    hook = qwen.model.register_forward_hook(lambda *_: runs.append(1))
    together = qwen(**batch, gk_record=("maps", "contributions", "gradcam", "logits"))
    assert len(runs) == 1
    hook.remove()
    for name in ("maps", "contributions", "gradcam"):
        alone = qwen(**batch, gk_record=name)[name]
        assert torch.equal(together[name], alone)
        layers = qwen(**batch, gk_record=(name, "layers"))[name]
        assert layers.dim() == 4
        joined = layers.mean(2) if name == "maps" else layers.sum(2)
        torch.testing.assert_close(joined, alone)


def test_gradcam_needs_no_trainable_parameter(qwen):
    batch = make_batch(attach(qwen), SAMPLES["qwen"])
    wanted = qwen(**batch, gk_record="gradcam").gradcam
    with torch.no_grad():
        frozen = qwen.requires_grad_(False)(**batch, gk_record="gradcam").gradcam
    torch.testing.assert_close(frozen, wanted)
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad for gradcam"):
        qwen(**batch, gk_record="gradcam")
