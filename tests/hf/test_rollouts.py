"""TRL's GRPOTrainer with RolloutMixin: the same policy loss, and the objectives on completions."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import AttentionReward, Evidence, Klal, RolloutMixin, attach, detach

trl = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
pytest.importorskip("datasets")

GENERATIONS = 4


class GroundedGRPOTrainer(RolloutMixin, trl.GRPOTrainer):
    pass


def image(index: int) -> Image.Image:
    picture = Image.new("RGB", (84, 56), "white")
    picture.paste("red", (28 * index, 0, 28 * index + 28, 28))
    return picture


def samples(count: int = 2) -> list[dict]:
    regions = [[{"boxes": [[i / 3, 0.0, (i + 1) / 3, 0.5]]}] for i in range(3)]
    ask = [{"role": "user", "content": "Where is the red patch?"}]
    return [{"prompt": ask, "images": [image(i)], "regions": regions[i]} for i in range(count)]


def long_answers(completions, completion_ids, **_) -> list[float]:
    """A toy reward: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make_trainer(folder, *, mixin=True, rewards=(long_answers,), attached=None, given=None, **own):
    from datasets import Dataset

    model = tiny_qwen_model()
    if mixin:
        attach(model, **(attached or {}))
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": GENERATIONS,
        "gradient_accumulation_steps": 2,
        "num_generations": GENERATIONS,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 0.01,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **own,
    }
    kind = GroundedGRPOTrainer if mixin else trl.GRPOTrainer
    return kind(
        model,
        list(rewards),
        args=trl.GRPOConfig(**options),
        train_dataset=Dataset.from_list(samples()),
        processing_class=tiny_qwen_processor(),
        **(given or {}),
    )


def test_without_objectives_it_trains_as_trl_does(tmp_path):
    logs = []
    for mixin in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, mixin=mixin)
        trainer.train()
        logs.append((trainer.state.log_history[:2], dict(trainer.model.named_parameters())))
        if mixin:
            detach(trainer.model)
    for ours, theirs in zip(logs[1][0], logs[0][0], strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for name, parameter in logs[0][1].items():
        torch.testing.assert_close(logs[1][1][name], parameter, rtol=1e-4, atol=1e-6)


def test_klal_on_completions_that_passed_the_gate(tmp_path):
    """Rows and targets of a generation batch, and a step's loss against the same by hand."""
    trainer = make_trainer(tmp_path, attached={"klal": Klal(weight=0.5)})
    seen = {}
    compute = trainer._compute_loss

    def watched(model, inputs):
        seen.setdefault("inputs", inputs)
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    inputs = seen["inputs"]
    kept = (inputs["advantages"] > 0).long()
    rows = (inputs["gk_map_position"] >= 0).sum(1)
    assert rows.tolist() == (kept * inputs["completion_mask"].sum(1)).tolist()
    assert 0 < int(kept.sum()) < len(kept)  # both kinds are there
    log = trainer.state.log_history[0]
    assert log["grounding/map_kl"] > 0
    detach(trainer.model)


def test_a_reward_of_attention_and_a_region_that_is_none(tmp_path):
    reward = AttentionReward(tiny_qwen_processor())
    trainer = make_trainer(tmp_path, rewards=(reward,))
    trainer.train()
    log = trainer.state.log_history[0]
    assert -1 < log["rewards/attention/mean"] < 1 and log["rewards/attention/std"] > 0
    ask, answer = samples(1)[0]["prompt"], [{"role": "assistant", "content": "The red patch."}]
    rewards = reward([ask] * 2, [answer] * 2, regions=[samples(1)[0]["regions"], []], images=[
        [image(0)], [image(0)]])
    assert rewards[1] is None and -1 < rewards[0] < 1
    with pytest.raises(ValueError, match="regions.0..0..*boxes"):
        reward([ask], [answer], regions=[[{"box": [0, 0, 1, 1]}]], images=[[image(0)]])
    detach(trainer.model)


def test_evidence_needs_completions_and_regions(tmp_path):
    from groundkern.hf import DvSft

    with pytest.raises(ValueError, match="dv_sft.*rows of completions"):
        make_trainer(tmp_path, attached={"dv_sft": DvSft()})
    trainer = make_trainer(
        tmp_path, attached={"klal": Klal()}, given={"evidence": Evidence(above=None, rows=2)}
    )
    trainer.train()
    assert trainer.state.log_history[0]["grounding/map_kl"] > 0
