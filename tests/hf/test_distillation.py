"""A teacher in the same step (R3): its attention and tokens, its layers, and where it is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import Distillation, Klal, attach, detach
from groundkern.hf.model.attach import ATTACHMENT
from groundkern.hf.model.lesson import token_divergence
from groundkern.hf.model.teacher import layer_pairs
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.packed import packed_batch
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import make_trainer

BOTH = Distillation(attention=0.7, tokens=0.4, layers="all", temperature=2.0)


def taller_teacher(layers: int = 5):
    """Another Qwen, deeper and wider, with twice the heads."""
    config = copy.deepcopy(tiny_qwen_model().config)
    text = config.get_text_config()
    text.num_hidden_layers, text.num_attention_heads, text.hidden_size = layers, 8, 128
    text.layer_types = ["full_attention"] * layers
    config.vision_config.out_hidden_size = 128
    torch.manual_seed(5)
    made = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, weight in made.named_parameters():
        if weight.dim() > 1 and "language_model" in name:
            weight.data.mul_(8)
    return made


def naive_distillation(student, teacher, batch: dict, how: Distillation) -> torch.Tensor:
    """(R3) written out on stored attention and stored logits."""
    pairs, attention, tokens = layer_pairs(student, teacher, how), [], []
    with torch.no_grad():
        taught = run_samples(teacher, batch)
    for own, other in zip(run_samples(student, batch), taught, strict=True):
        for before in own.positions("text"):
            t, terms = before + 1, []
            for mine, theirs in pairs:
                p = own.layers[mine][0][:, t, :t].double().mean(0)
                q = other.layers[theirs][0][:, t, :t].double().mean(0)
                p, q = p / p.sum(), q / q.sum()
                m = (p + q) / 2
                terms.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
            attention.append(sum(terms) / len(pairs))
            s, r = (x.model.get_output_embeddings()(x.main[before]).double() for x in (own, other))
            s, r = ((x / how.temperature).softmax(-1) for x in (s, r.detach()))
            m = how.beta * r + (1 - how.beta) * s
            kl = how.beta * (r * (r / m).log()).sum()
            tokens.append(kl + (1 - how.beta) * (s * (s / m).log()).sum())
    parts = torch.stack(attention).mean(), torch.stack(tokens).mean()
    return how.attention * parts[0] + how.tokens * parts[1]


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.long)])
def test_loss_and_gradients_are_those_written_out(qwen, side):
    teacher, batch = taller_teacher(), make_batch(qwen, SAMPLES["qwen"], side=side)
    attach(qwen, distill=BOTH, teacher=teacher).train()
    output = qwen(**batch)
    ours = BOTH.attention * output.parts["distill_attention"]
    ours = ours + BOTH.tokens * output.parts["distill_tokens"]
    torch.testing.assert_close(output.loss, output.parts["text"] + ours, rtol=1e-5, atol=0)
    found = [qwen(**batch, gk_part=f"distill_{name}").loss for name in ("attention", "tokens")]
    found = gradients(qwen, sum(found))
    wanted = naive_distillation(qwen, teacher, batch, BOTH)
    torch.testing.assert_close(ours, wanted.detach().float(), rtol=2e-4, atol=0)
    expected = gradients(qwen, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=5e-4)
    assert all(p.grad is None for p in teacher.parameters())
    detach(teacher)


def test_packed_rows_have_the_losses_of_padded_ones(qwen):
    teacher, rows = (
        taller_teacher(),
        tuple(tuple(SAMPLES["qwen"][i] for i in row) for row in ((0, 1), (3, 2))),
    )
    attach(qwen, distill=BOTH, teacher=teacher).train()
    padded = make_batch(qwen, tuple(x for row in rows for x in row))
    wanted, ours = (qwen(**x).parts for x in (padded, packed_batch(qwen, rows)))
    for name in ("distill_attention", "distill_tokens"):
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-4, atol=0)
    detach(teacher)


def test_a_copy_teaches_nothing(qwen):
    teacher = copy.deepcopy(qwen)
    attach(qwen, distill=BOTH, teacher=teacher).train()
    parts = qwen(**make_batch(qwen, SAMPLES["qwen"])).parts
    assert abs(float(parts["distill_attention"])) < 1e-6
    assert abs(float(parts["distill_tokens"])) < 1e-6
    detach(teacher)


def test_layers_meet_at_the_same_share_of_the_depth(qwen):
    # layer i of 3, counted from 1, learns from ceil(5 i / 3) of 5: 2, 4, 5; of 5 from ceil(3 i / 5)
    teacher = taller_teacher()
    every = Distillation(layers="all")
    assert layer_pairs(qwen, teacher, every) == ((0, 1), (1, 3), (2, 4))
    assert layer_pairs(teacher, qwen, every) == ((0, 0), (1, 1), (2, 1), (3, 2), (4, 2))
    assert layer_pairs(qwen, teacher, Distillation()) == ((2, 4),)
    chosen = Distillation(layers=(0, 1), teacher_layers=(0, 4))
    assert layer_pairs(qwen, teacher, chosen) == ((0, 0), (1, 4))


def test_the_teacher_is_nowhere_in_the_student(qwen, tmp_path):
    names, teacher = set(qwen.state_dict()), taller_teacher()
    attach(qwen, distill=BOTH, teacher=teacher)
    assert set(qwen.state_dict()) == names
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in qwen.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    trainer = make_trainer(qwen, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    again = type(qwen).from_pretrained(tmp_path / "saved")
    assert set(again.state_dict()) == names
    qwen.train()
    assert not teacher.training
    twin = copy.deepcopy(qwen)
    assert twin.__dict__[ATTACHMENT].teacher.model is teacher
    detach(qwen)
    assert ATTACHMENT not in qwen.__dict__
    detach(teacher)


def test_several_attached_models_and_a_teacher_live_side_by_side(qwen):
    batch, teacher, other = make_batch(qwen, SAMPLES["qwen"]), taller_teacher(), tiny_qwen_model()
    alone = attach(other, klal=Klal()).train()(**batch).loss
    attach(qwen, distill=BOTH, teacher=teacher).train()(**batch)
    assert torch.equal(other(**batch).loss, alone)
    attach(qwen, klal=Klal())  # without a teacher from now on
    assert "distill_attention" not in qwen(**batch).parts
    for model in (teacher, other):
        detach(model)


def test_a_head_with_an_adapter_has_the_same_tokens(qwen):
    batch, teacher = make_batch(qwen, SAMPLES["qwen"]), taller_teacher()
    how = Distillation(attention=0.0, tokens=1.0, token_divergence="reverse")
    wanted = attach(qwen, distill=how, teacher=teacher).train()(**batch).parts
    assert "distill_attention" not in wanted
    head = qwen.get_output_embeddings()
    plain = head.forward
    head.forward = lambda x: plain(x)  # no longer a head that the op may read
    found = qwen(**batch).parts["distill_tokens"]
    torch.testing.assert_close(found, wanted["distill_tokens"], rtol=1e-4, atol=1e-6)
    detach(teacher)


def test_divergences_of_tokens_by_hand():
    # teacher (.95, .05), student (.5, .5): KL(student || teacher) = .830366
    student, teacher = torch.zeros(2), torch.tensor([0.95, 0.05]).log()
    how = {"beta": 0.5, "temperature": 1.0}
    reverse = token_divergence(student, teacher, kind="reverse", **how)
    torch.testing.assert_close(float(reverse), 0.830366, rtol=1e-5, atol=0)
    # the other way .95 ln 1.9 + .05 ln .1 = .494632
    forward = token_divergence(student, teacher, kind="forward", **how)
    torch.testing.assert_close(float(forward), 0.494632, rtol=1e-5, atol=0)


def test_what_cannot_teach_is_refused_by_name(qwen):
    teacher = taller_teacher()
    with pytest.raises(ValueError, match="`teacher`: expected a model beside `distill`"):
        attach(qwen, distill=BOTH)
    with pytest.raises(ValueError, match="`distill`: expected `Distillation"):
        attach(qwen, teacher=teacher)
    with pytest.raises(ValueError, match="another model than the student"):
        attach(qwen, distill=BOTH, teacher=qwen)
    with pytest.raises(ValueError, match="layers in"):
        attach(qwen, distill=Distillation(teacher_layers=(9,)), teacher=teacher)
    with pytest.raises(ValueError, match="one for each"):
        attach(qwen, distill=Distillation(teacher_layers=(1, 2)), teacher=teacher)
    attach(qwen, distill=BOTH, teacher=teacher.train())
    teacher.train()
    with pytest.raises(ValueError, match="eval mode"):
        qwen(**make_batch(qwen, SAMPLES["qwen"]))
    teacher.config.image_token_id += 1
    with pytest.raises(ValueError, match="visual tokens of ids"):
        attach(qwen, distill=BOTH, teacher=teacher)
    teacher.config.get_text_config().vocab_size += 1
    with pytest.raises(ValueError, match="vocabulary of"):
        attach(qwen, distill=BOTH, teacher=teacher)
    detach(teacher)
