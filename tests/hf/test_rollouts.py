"""TRL's GRPOTrainer with RolloutMixin: the same policy loss, and the objectives on completions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import (
    AttentionPolicy,
    AttentionReward,
    Distillation,
    DvSft,
    Evidence,
    Klal,
    RolloutMixin,
    attach,
    detach,
)

trl = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
pytest.importorskip("datasets")

GENERATIONS = 4
VISUAL = [tiny_qwen_model().config.image_token_id, tiny_qwen_model().config.video_token_id]


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
        "generation_kwargs": {"suppress_tokens": VISUAL},
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


def watch(trainer) -> list[dict]:
    """The inputs of each micro-batch, from now on."""
    seen, compute = [], trainer._compute_loss

    def watched(model, inputs):
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = watched
    return seen


def test_klal_on_completions_that_passed_the_gate(tmp_path):
    """Which rows there are, and the logged loss of a step against each micro-batch's own mean."""
    trainer = make_trainer(tmp_path, attached={"klal": Klal(weight=0.5)}, max_steps=1)
    seen = watch(trainer)
    trainer.train()
    model = attach(tiny_qwen_model(), klal=Klal())
    rows, total = 0, 0.0
    for inputs in seen:
        passed, mask = inputs["advantages"] > 0, inputs["completion_mask"]
        own = (inputs["gk_map_position"] >= 0).sum(1)
        assert own.tolist() == (passed * mask.sum(1)).tolist()
        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        batch = {name: x for name, x in inputs.items() if name.startswith("gk_")}
        del batch["gk_totals"]  # of its own rows
        vision = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        batch |= {name: inputs[name] for name in vision}
        attended = torch.cat((inputs["prompt_mask"], mask), 1)
        found = model(input_ids=ids, attention_mask=attended, gk_temperature=1.0, **batch)
        total += found.parts["map_kl"].item() * int(own.sum())
        rows += int(own.sum())
    kept = torch.cat([inputs["advantages"] > 0 for inputs in seen])
    assert 0 < int(kept.sum()) < len(kept) == 2 * GENERATIONS
    log = trainer.state.log_history[0]
    # the log has the mean of two micro-batches, which add up to the mean over rows
    assert log["grounding/map_kl"] * 2 == pytest.approx(total / rows, rel=1e-4)
    detach(trainer.model)
    detach(model)


def test_a_reward_of_attention_and_a_region_that_is_none(tmp_path):
    reward = AttentionReward(tiny_qwen_processor())
    trainer = make_trainer(tmp_path, rewards=(reward,))
    trainer.train()
    log = trainer.state.log_history[0]
    assert -1 < log["rewards/attention/mean"] < 1 and log["rewards/attention/std"] > 0
    ask, answer = samples(1)[0]["prompt"], [{"role": "assistant", "content": "The red patch."}]
    rewards = reward(
        [ask] * 2,
        [answer] * 2,
        regions=[samples(1)[0]["regions"], []],
        images=[[image(0)], [image(0)]],
    )
    assert rewards[1] is None and -1 < rewards[0] < 1
    with pytest.raises(ValueError, match=r"regions\[0\]\[0\].*boxes"):
        reward([ask], [answer], regions=[[{"box": [0, 0, 1, 1]}]], images=[[image(0)]])
    detach(trainer.model)


def test_ranks_of_sharded_weights_take_as_many_passes_for_rewards(monkeypatch):
    """Whether a completion has regions or not; the others' rewards stay what they are."""
    model = attach(tiny_qwen_model())
    reward = AttentionReward(tiny_qwen_processor(), batch_size=1)
    reward.trainer = SimpleNamespace(model=model)
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    ask, answer = samples(1)[0]["prompt"], [{"role": "assistant", "content": "The red patch."}]
    regions = [None, samples(1)[0]["regions"], []]
    found = []
    for parts in (False, True):
        monkeypatch.setattr("groundkern.hf.rewards.sharded", lambda _, parts=parts: parts)
        columns = {"regions": regions, "images": [[image(0)]] * 3}
        found.append(reward([ask] * 3, [answer] * 3, **columns))
    assert len(passes) == 1 + 3
    assert found[0] == found[1] and found[0][0] is found[0][2] is None and found[0][1] is not None
    detach(model)


def test_evidence_needs_completions_and_regions(tmp_path):
    with pytest.raises(ValueError, match=r"dv_sft.*rows of completions"):
        make_trainer(tmp_path, attached={"dv_sft": DvSft()})
    trainer = make_trainer(
        tmp_path, attached={"klal": Klal()}, given={"evidence": Evidence(above=None, rows=2)}
    )
    trainer.train()
    assert trainer.state.log_history[0]["grounding/map_kl"] > 0


def test_visual_tokens_that_a_policy_writes_are_refused_by_name(tmp_path):
    others = [i for i in range(tiny_qwen_model().config.text_config.vocab_size) if i != VISUAL[0]]
    trainer = make_trainer(tmp_path, generation_kwargs={"suppress_tokens": others})
    with pytest.raises(ValueError, match=r"completion_ids.*suppress_tokens"):
        trainer.train()
    detach(trainer.model)


@pytest.mark.long
def test_a_toy_reward_is_learned(tmp_path):
    trainer = make_trainer(
        tmp_path, attached={"klal": Klal(weight=0.5)}, max_steps=60, learning_rate=0.2
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[:5]) / 5 < 0.7 and min(rewards[-5:]) > 0.9
    detach(trainer.model)


def test_attention_policy_on_rollouts_that_are_trained_on_twice(tmp_path):
    """The first update is at the policy that made them: 0; the second moves away from it."""
    trainer = make_trainer(
        tmp_path,
        attached={"policy": AttentionPolicy(divergence="kl")},
        num_iterations=2,
        max_steps=2,
        learning_rate=0.5,
    )
    seen = watch(trainer)
    trainer.train()
    reference = seen[0]["gk_policy_reference"]
    assert reference.shape[1:3] == (6, 1)
    first, second = (line for line in trainer.state.log_history[:2])
    assert first["grounding/policy_divergence"] == pytest.approx(0.0, abs=1e-6)
    assert second["grounding/policy_divergence"] > 1e-4
    detach(trainer.model)


def test_a_teacher_on_the_policys_own_completions(tmp_path):
    """Divided by all their tokens; a teacher with the same weights teaches nothing."""
    found = []
    for seed in (None, 5):
        teacher = tiny_qwen_model()
        if seed is not None:
            torch.manual_seed(seed)
            for parameter in teacher.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        attached = {"distill": Distillation(tokens=1.0), "teacher": teacher}
        trainer = make_trainer(tmp_path, attached=attached, max_steps=1, learning_rate=0.0)
        trainer.train()
        log = trainer.state.log_history[0]
        found.append((log["grounding/distill_attention"], log["grounding/distill_tokens"]))
        detach(trainer.model)
    assert max(found[0]) < 1e-6 and min(found[1]) > 1e-4


def test_a_policy_that_is_used_once_is_told_so(tmp_path, caplog):
    trainer = make_trainer(tmp_path, attached={"policy": AttentionPolicy()}, max_steps=1)
    seen = watch(trainer)
    trainer.train()
    assert "gk_policy_position" not in seen[0]
    assert "num_iterations" in caplog.text
    detach(trainer.model)
