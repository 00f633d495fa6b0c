"""Watching a run: steps that are not finite, exact held-out means, the terms' gradients."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import DivergedError, GroundingTrainer, Klal, attach, detach, row_counts
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.model import terms
from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.terms import part_rules
from groundkern.hf.watching.term_norms import term_norms
from tests.hf.methods import METHODS
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import PARTS, arguments, attached_model, make_trainer


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Each training collects garbage first, which looks at all that pytest has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


QWEN = SAMPLES["qwen"]
LORA = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", lora_dropout=0.5)


class Weights(TrainerCallback):
    """The trained weights after every step, and the steps at which something is done."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        own = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
        self.after[state.global_step] = own


def same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[name], x) for name, x in right.items())


@pytest.fixture
def poison(monkeypatch):
    """KLAL's term becomes NaN in the forwards of these numbers, from 1."""
    bad, count, klal = set(), [0], terms.TERMS["klal"]

    def poisoned(request, body, scores):
        weighted, parts = klal(request, body, scores)
        count[0] += 1
        if count[0] not in bad:
            return weighted, parts
        return weighted * float("nan"), {"map_kl": parts["map_kl"] * float("nan")}

    monkeypatch.setitem(terms.TERMS, "klal", poisoned)
    return bad


SMALL = {"per_device_train_batch_size": 1}  # of the four samples, the first has every kind of row


def small_model():
    """The text loss and KLAL only."""
    return attach(tiny_qwen_model(), klal=Klal())


def run(folder, *, model=None, callbacks=(), resume=None, options=None, **overrides):
    """A trainer that has trained."""
    model = small_model() if model is None else model
    overrides = {**SMALL, **overrides}
    trainer = GroundingTrainer(
        model,
        arguments(folder, **overrides),
        train_dataset=[QWEN[0], QWEN[1]],
        eval_dataset=list(QWEN),
        data_collator=lambda samples: make_batch(_bare(model), tuple(samples)),
        examine=False,
        callbacks=list(callbacks),
        **(options or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _bare(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- item 7: NaN and infinity ----


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_step_with_a_nan_gradient_is_not_taken(tmp_path, poison, optim):
    """Also not by momentum or weight decay: bit for bit the weights of the step before."""
    poison.add(2)
    weights = Weights()
    trainer = run(tmp_path, callbacks=[weights], optim=optim, weight_decay=0.1)
    assert same(weights.after[1], weights.after[2])
    assert not same(weights.after[2], weights.after[3])
    assert all(p.isfinite().all() for p in weights.after[3].values())
    steps = trainer.state.log_history
    assert [row.get("nonfinite_steps") for row in steps[:3]] == [None, 1, None]
    assert steps[1]["loss"] is None
    assert steps[1]["map_kl"] is None
    assert steps[1]["text"] > 0
    json.dumps(steps, allow_nan=False)
    detach(trainer.model)


def test_too_many_such_steps_end_the_run_and_name_the_term(tmp_path, poison):
    poison.update(range(3, 20))
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "logging_steps": 5}
    with pytest.raises(DivergedError) as stopped:
        run(tmp_path, options={"max_nonfinite": 2}, **saving)
    assert str(stopped.value).startswith(
        "`loss`: expected finite values, got NaN or infinity in `map_kl` at steps 3 to 4; "
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    state = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    assert "NaN" not in state


def test_training_cannot_end_with_such_a_step(tmp_path, poison):
    poison.add(3)
    with pytest.raises(DivergedError, match="`map_kl` at step 3; training cannot end so"):
        run(tmp_path, max_steps=3)


def test_a_streak_is_counted_over_an_interruption(tmp_path, poison):
    """Steps 2 and 3 are not finite: no checkpoint at 2, one at 4 that knows of both."""
    poison.update((2, 3))
    trainer = run(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    kept = json.loads((tmp_path / "checkpoint-4" / "groundkern_trainer.json").read_text())
    assert kept["nonfinite"] == [0, 2, 2]
    detach(trainer.model)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Ruin(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = torch.inf

    with pytest.raises(DivergedError):
        run(tmp_path, callbacks=[Ruin()], save_strategy="steps", save_steps=1, max_steps=6)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fp16(monkeypatch):
    """A trainer in fp16 on the CPU, which accelerate itself has on accelerators only."""
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")

    def make(folder, scale: float, **overrides):
        trainer = make_trainer(small_model(), folder, examine=False, **SMALL, **overrides)
        trainer.accelerator.native_amp = True
        made = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-20)
        trainer.accelerator.scaler = made
        trainer.watch.finite.limit = 1
        return trainer

    return make


def test_an_overflow_that_a_grad_scaler_mends_does_not_count_and_is_saved(tmp_path, fp16):
    """The scale falls until gradients fit: those steps are skipped, and the run goes on."""
    weights = Weights()
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    trainer = fp16(tmp_path, 2.0**30, **settings)
    trainer.add_callback(weights)
    trainer.train()
    assert same(weights.after[1], dict(small_model().named_parameters()))
    assert not same(weights.after[3], weights.after[4])
    assert trainer.watch.verdict().total == 0
    again, after = fp16(tmp_path / "again", 1.0, **settings), Weights()
    again.add_callback(after)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.accelerator.scaler.get_scale() == trainer.accelerator.scaler.get_scale() < 2**30
    assert same(after.after[4], weights.after[4])
    for each in (trainer, again):
        detach(each.model)


# ---- a checkpoint within a log window ----


def test_a_log_line_whose_steps_a_restart_interrupts_is_the_same(tmp_path):
    settings = {"max_steps": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    settings["gradient_accumulation_steps"] = 2
    whole = run(tmp_path, **settings)
    checkpoint = str(tmp_path / "checkpoint-2")
    again = run(tmp_path / "again", resume=checkpoint, **settings)
    assert again.state.log_history[0] == whole.state.log_history[0]
    for trainer in (whole, again):
        detach(trainer.model)


# ---- item 2: what trains beside an adapter ----


def adapted(*, before: bool):
    klal = Klal(head_weight="learned", weight=5.0)
    model = tiny_qwen_model()
    torch.manual_seed(0)
    if before:
        return get_peft_model(attach(model, klal=klal), LORA)
    return attach(get_peft_model(model, LORA), klal=klal)


@pytest.mark.parametrize("before", [True, False], ids=["attach, PEFT", "PEFT, attach"])
def test_learned_head_weights_beside_lora_are_trained_saved_and_restored(tmp_path, before):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "optim": "adamw_torch"}
    whole, weights = adapted(before=before), Weights()
    run(tmp_path, model=whole, callbacks=[weights], **settings)
    name = next(k for k in weights.after[2] if k.endswith("groundkern_head_weight"))
    assert weights.after[2][name].abs().max() > 1e-3  # zeros at the start
    again, after = adapted(before=before), Weights()
    resume = str(tmp_path / "checkpoint-2")
    run(tmp_path / "again", model=again, resume=resume, callbacks=[after], **settings)
    assert same(after.after[3], weights.after[3])
    for model in (whole, again):
        detach(model)


def test_a_checkpoint_without_the_learned_weights_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    model = adapted(before=False)
    run(tmp_path, model=model, **settings)
    checkpoint = tmp_path / "checkpoint-1"
    attach(model, klal=Klal())
    with pytest.raises(ValueError, match="groundkern_head_weight, not trained here"):
        run(tmp_path / "a", model=model, resume=str(checkpoint), **settings)
    attach(model, klal=Klal(head_weight="learned"))
    (checkpoint / "groundkern_trained.safetensors").unlink()
    with pytest.raises(ValueError, match="groundkern_head_weight, trained outside"):
        run(tmp_path / "b", model=model, resume=str(checkpoint), **settings)
    detach(model)


def test_running_statistics_and_unfrozen_weights_beside_lora_are_kept(tmp_path):
    """The kind, not the case: whatever training changes outside of the adapters."""

    def make():
        model = adapted(before=False)
        model.get_base_model().norm = torch.nn.BatchNorm1d(3)
        model.get_base_model().lm_head.requires_grad_(True)
        return model

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    model = make()
    model.get_base_model().norm.running_mean += 7
    run(tmp_path, model=model, **settings)
    again = make()
    resume = str(tmp_path / "checkpoint-1")
    trainer = make_trainer(again, tmp_path / "again", **settings)
    trainer._load_from_checkpoint(resume)
    assert torch.equal(again.get_base_model().norm.running_mean, torch.full((3,), 7.0))
    for name in ("lm_head.weight", "norm.weight"):
        ours, theirs = (dict(m.get_base_model().named_parameters())[name] for m in (again, model))
        assert torch.equal(ours, theirs)
    for each in (model, again):
        detach(each)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_the_best_model_is_loaded_whole(tmp_path, lora):
    """Of Qwen2.5-VL, the Trainer's own loading finds the head and nothing else."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "text"}
    model = adapted(before=False) if lora else small_model()
    weights = Weights()
    greater = {"greater_is_better": True}  # the worst: step 1
    trainer = run(tmp_path, model=model, callbacks=[weights], **saving, **best, **greater)
    assert trainer.state.best_global_step == 1
    found = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert same(found, weights.after[1])
    assert not same(found, weights.after[3])
    detach(model)


# ---- evaluation ----


def test_the_rules_say_how_the_parts_make_the_loss():
    model = attach(tiny_qwen_model(), **METHODS["attention"]).train()
    batch, rules = make_batch(model, QWEN), part_rules(objectives_of(model))
    counts = row_counts(batch)
    with torch.no_grad():
        whole = model(**batch, gk_totals=counts)
        assert whole.parts.keys() == rules.keys()
        parts = {name: float(part) for name, part in whole.parts.items()}
        weighted = sum(rule.weight * parts[name] for name, rule in rules.items())
        assert float(whole.loss) == pytest.approx(weighted, rel=1e-6)
        for name in ("text", "composition", "lens_suppress"):
            rule = rules[name]
            alone = model(**batch, gk_totals=counts, gk_part=name).loss
            assert float(alone) == pytest.approx(rule.weight * parts[name], rel=1e-6), name
        factors = torch.arange(2, 2 + len(COUNTS))  # one for each count
        divided = model(**batch, gk_totals=counts * factors).parts
        for name, rule in rules.items():
            factor = int(factors[COUNTS.index(rule.count)])
            assert float(divided[name]) == pytest.approx(parts[name] / factor, rel=1e-5), name
    detach(model)


@pytest.fixture(scope="module")
def held_out():
    """Every part of the four samples in one batch, in evaluation."""
    model = attached_model().eval()
    with torch.no_grad():
        output = model(**make_batch(model, QWEN))
    detach(model)
    return {"loss": float(output.loss), **{k: float(x) for k, x in output.parts.items()}}


@pytest.mark.parametrize("size", [1, 3])
def test_an_evaluation_is_exact_whatever_the_batch_size(tmp_path, held_out, size):
    model = attached_model()
    found = make_trainer(model, tmp_path, per_device_eval_batch_size=size).evaluate()
    for name, value in held_out.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert 0 <= found["eval_token_accuracy"] <= 1
    assert 0 <= found["eval_word_accuracy"] <= 1
    detach(model)


def test_what_has_no_row_has_no_figure(tmp_path):
    model = attached_model()
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=1)
    found = trainer.evaluate([QWEN[2]])  # text only
    assert {"eval_loss", "eval_text", "eval_token_accuracy"} <= found.keys()
    assert not {f"eval_{name}" for name in (*PARTS[1:], "word_accuracy")} & found.keys()
    assert found["eval_loss"] == found["eval_text"]
    detach(model)


def test_an_evaluation_leaves_training_bit_equal(tmp_path):
    """With dropout: the loader of the held-out set draws from torch's generator."""
    logs = []
    for every in (None, 1):
        model = adapted(before=False)
        evaluation = {"eval_strategy": "steps", "eval_steps": every} if every else {}
        trainer = run(tmp_path, model=model, **evaluation)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        logs.append(rows)
        detach(model)
    assert logs[0] == logs[1]


# ---- the terms' gradients ----


def test_term_norms_change_nothing_and_are_those_of_the_terms(tmp_path):
    logs, weights = [], []
    accumulated = {"gradient_accumulation_steps": 2}
    for every in (None, 2):
        model, seen = adapted(before=False), Weights()
        model.get_base_model().register_buffer("counter", torch.zeros(()))
        options = {"term_norms_every": every}
        trainer = run(tmp_path, model=model, callbacks=[seen], options=options, **accumulated)
        logs.append([row for row in trainer.state.log_history if "loss" in row])
        weights.append(seen.after)
        detach(model)
    assert same(weights[0][3], weights[1][3])
    names = {f"grad_norm_{part}" for part in ("text", "map_kl")}
    assert [names <= row.keys() for row in logs[1]] == [False, True, False]
    for plain, row in zip(*logs, strict=True):
        assert plain == {k: x for k, x in row.items() if k not in names}


def test_term_norms_are_those_of_the_accumulated_batch():
    model = attached_model().train()
    whole = make_batch(model, QWEN[:2])
    counts = row_counts(whole)
    halves = [{**make_batch(model, (part,)), "gk_totals": counts} for part in QWEN[:2]]
    found = term_norms(model, halves)
    rules = part_rules(objectives_of(model))
    assert found.keys() == {f"grad_norm_{name}" for name in rules}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in trained)
    for name in rules:
        loss = model(**whole, gk_part=name).loss
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        assert float(found[f"grad_norm_{name}"]) == pytest.approx(float(norm), rel=1e-4), name
        assert float(norm) > 0, name
    detach(model)


def test_buffers_that_a_forward_changes_are_put_back():
    model = small_model().train()
    model.register_buffer("seen", torch.zeros(()))

    def count(module, inputs, output):
        model.seen.add_(1)

    model.model.register_forward_hook(count)
    batch = make_batch(model, QWEN[:1])
    term_norms(model, [batch])
    assert float(model.seen) == 0
    detach(model)
