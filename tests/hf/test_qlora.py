"""QLoRA: a base model in 4 bits under LoRA, from its files to the losses of the naive forward."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import attach, detach, doctor
from tests.hf.closeness import assert_same_gradients, assert_same_losses, gradients
from tests.hf.naive import naive_forward
from tests.hf.samples import SAMPLES, make_batch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)|.*lm_head"


@pytest.fixture
def quantised(tmp_path):
    """The decoder in 4 bits, the head and the vision tower as they were; LoRA on the decoder and
    the head. The CPU kernels need widths that are multiples of 64."""
    tiny_qwen_model(intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, device_map="cpu", quantization_config=config
    )
    layer = model.model.language_model.layers[0]
    assert isinstance(layer.self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    checkpointing = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(2)
    adapter = LoraConfig(r=3, target_modules=LINEARS, init_lora_weights=False)
    model = get_peft_model(model, adapter)
    yield model
    detach(model)


def test_quantised_base_trains_exactly(quantised, terms):
    batch = make_batch(quantised.get_base_model(), SAMPLES["qwen"])
    naive = naive_forward(quantised, batch, **terms)
    wanted = gradients(quantised, naive.loss)
    assert wanted
    assert all("lora_" in name for name in wanted)
    attach(quantised, **terms)
    ours = quantised.train()(**batch)  # checkpointed
    assert_same_losses(ours, naive)
    assert_same_gradients(gradients(quantised, ours.loss), wanted, share=1e-4)
    doctor(quantised, batch, tolerance=1e-5)
