"""The study: curves that continue bit for bit, controls that are wrong on purpose, known tables."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from groundkern.hf.data.batch import COUNTS, row_counts
from groundkern.maps import FIXED_POINT_ONE
from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.evidence import drawings, figures, heads, loop, models, presets, runs
from groundkern.trainer.evidence.plan import METHODS, TEACHERS, Drawings, Preset, Study
from groundkern.trainer.evidence.runs import Desk
from groundkern.trainer.program import main
from groundkern.trainer.stopping import Stopped

(QUICK,) = presets.QUICK.studies


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The quick study with its drawings made."""
    made = Desk(tmp_path_factory.mktemp("study"), QUICK)
    made.train(METHODS["plain"], 0), made.test()
    return made


def curve(desk, state, method="dv_sft", **options):
    chosen = METHODS[method]
    model = models.build(desk.processor(), QUICK.model, seed=0)
    return loop.Curve(
        QUICK, chosen, 0, model, desk.train(chosen, 0), desk.test(), state, {"a": 1}, **options
    )


def test_a_killed_curve_continues_with_the_same_bits(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_WAIT", -1.0)
    whole = curve(desk, tmp_path / "whole.pt")
    made = whole.run(3)
    assert [point["step"] for point in made["points"]] == [0, 1, 2, 3]

    killed, answers, asked = curve(desk, tmp_path / "killed.pt"), loop.answers, []

    def dies(*args):
        asked.append(args)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answers(*args)

    monkeypatch.setattr(loop, "answers", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run(3)
    monkeypatch.setattr(loop, "answers", answers)
    again = curve(desk, tmp_path / "killed.pt")
    assert again.run(3)["points"] == made["points"]
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)
    again.settings = {"a": 2}
    with pytest.raises(ConfigError, match="other settings"):
        again.run(3)
    start = models.build(desk.processor(), QUICK.model, seed=0)
    pairs = zip(whole.model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(left, right) for left, right in pairs)


def test_a_start_ends_between_chance_and_saturation(desk, tmp_path, monkeypatch):
    values = iter([0.0, 0.2, 0.55, 0.9])
    monkeypatch.setattr(loop, "answers", lambda *_: {"accuracy": next(values), "loss": 1.0})
    made = curve(desk, tmp_path / "start.pt", "plain", ends=0.5).run(3)
    assert [point["accuracy"] for point in made["points"]] == [0.0, 0.2, 0.55]


def test_what_starts_from_plain_training_has_its_weights(desk, monkeypatch):
    study = replace(QUICK, start="plain", start_at=0.0)
    own = Desk(desk.output, study)
    path = desk.output / "starts" / study.name / "0.json"
    model = own._model(0)
    assert durable.read_json(path)["points"][-1]["step"] == 0
    fresh = models.build(own.processor(), study.model, seed=0)
    assert torch.equal(model.lm_head.weight, fresh.lm_head.weight)
    monkeypatch.setattr(runs, "_START_STEPS", 3)
    with pytest.raises(ConfigError, match=r"expected plain training to reach 0\.9 within 3"):
        Desk(desk.output, replace(study, name="never", start_at=0.9))._model(0)


def test_a_decoder_learns_pages_as_text_and_sees_at_random(desk, monkeypatch):
    study = replace(QUICK, name="text", start="text", start_at=0.0)
    own = Desk(desk.output, study)
    whole = own._whole("train", "predictor", text=True)
    assert "pixel_values" not in whole
    decode, ids = own.processor().tokenizer.decode, whole["input_ids"]
    for text, answer, record in zip(ids, whole["labels"], own._records("train"), strict=True):
        words = [word["text"] for word in record["words"]]
        page = decode(text).split("\n")[0].split(" * ")
        said = record["messages"][-1]["content"]
        assert said in (page[1], page[1].removesuffix(" *"))
        assert " ".join(page).removesuffix(" *").split() == words
        assert decode(answer[answer >= 0]) == f"{said}<|im_end|>"
    taught = models.build(own.processor(), study.model, seed=5).state_dict()
    monkeypatch.setattr(own, "_start", lambda path, seed: taught)
    model, fresh = own._model(0), models.build(own.processor(), study.model, seed=0)
    seen = {name: value for name, value in model.state_dict().items() if "visual" in name}
    assert seen
    for name, value in model.state_dict().items():
        assert torch.equal(value, (fresh.state_dict() if name in seen else taught)[name]), name
    monkeypatch.undo()
    own._model(0)
    assert durable.read_json(desk.output / "starts" / "text" / "0.json")["points"]


@pytest.mark.parametrize(("start", "teacher"), TEACHERS.items())
def test_a_reader_or_pointer_has_learnt_other_drawings(desk, monkeypatch, start, teacher):
    own = Drawings("asked_line", own=QUICK.drawings.own)
    study = replace(QUICK, name=start, drawings=own, start=start, first=QUICK.drawings)
    reader, trained = Desk(desk.output, replace(study, start_at=0.0)), []
    make = loop.Curve.run
    monkeypatch.setattr(loop.Curve, "run", lambda self, n: trained.append(self) or make(self, n))
    model = reader._model(0)
    (curve,) = trained
    assert curve.method is METHODS[teacher]
    assert torch.equal(model.lm_head.weight, curve.model.lm_head.weight)
    decode, folder = reader.processor().tokenizer.decode, reader.folder / "first"
    highlighted = drawings.draw(folder, study.first, "train", study.samples)
    for record, labels in zip(highlighted, curve.train["labels"], strict=True):
        assert record["task"] == "word_page"
        said = record["messages"][-1]["content"]
        assert decode(labels[labels >= 0]) == f"{said}<|im_end|>"
    asked = reader._records("train")
    assert {record["messages"][0]["content"][-1]["text"] for record in asked} == {"1", "2"}
    assert study.settings("plain", 0)["first"] == study.first.settings()
    assert "first" not in QUICK.settings("plain", 0)
    assert f"{METHODS[teacher].title.split(',')[0]} on word_page (easy" in study.described()


def test_an_epoch_has_every_drawing_once_in_an_order_of_its_own():
    epochs = [
        torch.cat([loop.picked(12, 4, step, seed) for step in range(e, e + 3)])
        for seed, e in ((0, 0), (0, 3), (1, 0))
    ]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(12))
    assert len({tuple(order.tolist()) for order in epochs}) == 3
    assert len(loop.picked(3, 4, 5, 0)) == 3  # fewer drawings than a batch has


def test_rows_of_the_whole_are_what_the_collator_makes(desk):
    folder, index = desk.folder, torch.tensor([3, 0])
    records = drawings.draw(folder, QUICK.drawings, "train", QUICK.samples)
    examples = [parse_sample(records[i], root=folder, where="x").load() for i in index]
    wanted = desk._collator("predictor")(examples)
    whole = desk.train(METHODS["plain"], 0)
    model = models.build(desk.processor(), QUICK.model, seed=0)
    found = drawings.rows(whole, index, loop.positions(model, whole))
    assert found.keys() - {"position_ids"} == wanted.keys()
    for name, values in wanted.items():
        if name == "pixel_values":
            assert torch.allclose(found[name], values, atol=2e-3)
            continue
        inside = found[name][tuple(map(slice, values.shape))]
        assert torch.equal(inside, values), name
    model.eval()
    with torch.no_grad():
        losses = [
            float(model(**{k: v for k, v in batch.items() if k[:3] != "gk_"}).loss)
            for batch in (wanted, found)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_drawings_that_an_older_version_collated_are_collated_again(desk, tmp_path):
    whole, path = desk.test(), tmp_path / "test.pt"
    older = {name: values for name, values in whole.items() if name != "gk_map_token_position"}
    torch.save(older, path)
    for make in (lambda: dict(whole), None):  # once
        found = drawings.kept(path, make)
        assert found["gk_map_token_position"].equal(whole["gk_map_token_position"])


def test_patches_are_embedded_as_the_convolution_does(desk):
    model = models.build(desk.processor(), "quick", seed=0)
    embed, pixels = model.model.visual.patch_embed, torch.randn(8, 3 * models.PATCH**2)
    assert torch.allclose(embed(pixels), type(embed).forward(embed, pixels), atol=1e-5)


@pytest.mark.parametrize("control", ["shuffled regions", "uniform map"])
def test_controls_of_maps_are_wrong_in_every_drawing(desk, control):
    whole = desk.train(METHODS["plain"], 0)
    changed = drawings.CONTROLS[control](whole, 0)
    before, after = whole["gk_map_target"], changed["gk_map_target"]
    assert torch.equal(before < 0, after < 0)
    if control == "uniform map":
        assert set(after[after >= 0].tolist()) == {FIXED_POINT_ONE}
        return
    given = [tuple(map(tuple, target.tolist())) for target in before]
    taken = [given.index(tuple(map(tuple, target.tolist()))) for target in after]
    assert sorted(map(str, after[:, 0].tolist())) == sorted(map(str, before[:, 0].tolist()))
    distinct = len(set(given)) == len(given)
    moved = [i != j for i, j in enumerate(taken)]
    assert all(moved) if distinct else any(moved)
    assert changed.keys() == whole.keys()


def test_a_drawing_without_a_target_keeps_none():
    target = torch.tensor([[[5, 1]], [[-1, -1]], [[1, 5]], [[3, 3]]])
    position = torch.tensor([[4], [-1], [4], [4]])
    inside = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]).bool()
    whole = {"gk_map_target": target, "gk_map_position": position, "gk_side_inside": inside}
    both = drawings.shuffled_regions(whole, 0)
    wanted = [[[0, 1], [0, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]]  # as many sets as it had
    assert both["gk_side_inside"].int().tolist() == wanted
    changed = both["gk_map_target"]
    assert changed[1].tolist() == [[-1, -1]]
    for i in (0, 2, 3):
        assert changed[i].tolist() != target[i].tolist()
    assert sorted(changed.tolist()) == sorted(target.tolist())


def test_shuffled_words_are_others_and_so_are_their_bags(desk):
    whole = desk.train(METHODS["plain"], 0)
    changed = drawings.shuffled_words(whole, 0)
    before, after = whole["gk_word_label"], changed["gk_word_label"]
    there = before >= 0
    assert there.any()
    assert torch.equal(there, after >= 0)
    assert sorted(before[there].tolist()) == sorted(after[there].tolist())
    assert (before != after)[there].float().mean() > 0.8  # a word may come twice
    for labels, bag in zip(after, changed["gk_word_bag"], strict=True):
        assert set(bag[bag >= 0].tolist()) == set(labels[labels >= 0].tolist())


def test_no_permutation_leaves_anything_in_its_place():
    for seed in range(20):
        assert (drawings._derangement(7, seed) != torch.arange(7)).all()


def points(*accuracies, every=10):
    return [{"step": i * every, "accuracy": a, "loss": 1.0} for i, a in enumerate(accuracies)]


def test_figures_of_curves_by_hand():
    values = {
        "plain": {0: points(0, 0.2, 0.4, 0.6), 1: points(0, 0.1, 0.2, 0.3)},
        "klal": {0: points(0, 0.95), 1: points(0, 0.5, 0.9, 0.8)},  # the first ended, saturated
    }
    stored = {m: {s: {"points": p, "at_end": {"x": s}} for s, p in seeds.items()}
              for m, seeds in values.items()}  # fmt: skip
    plain, klal = figures.table(stored, 30, ("plain", "klal", "smam"))
    assert (plain.halfway.value, plain.final.value) == (pytest.approx(0.15), pytest.approx(0.45))
    assert plain.gain is None
    assert (plain.reached[0].steps.value, plain.reached[0].seeds) == (30, 1)
    assert (plain.reached[1].steps.value, plain.reached[1].seeds) == (30, 0)
    assert (klal.reached[0].steps.value, klal.reached[0].seeds) == (10, 2)
    assert (klal.reached[1].steps.value, klal.reached[1].seeds) == (15, 2)
    assert klal.final.value == pytest.approx(0.875)
    assert klal.gain.value == pytest.approx(0.425)
    assert klal.sooner.value == 20
    assert klal.at_end == {"x": 0.5}
    assert figures.steps_to(points(0, 0.2, 0.6), 0.5, 15) is None


@pytest.mark.parametrize(
    ("right", "p_value"),
    [([1, 1, 1, 1, 1], 2 / 32), ([1, 1, 1, 1, -1], 12 / 32), ([0, 0, 0, 0, 0], 1.0), ([1], 1.0)],
)
def test_the_p_value_over_seeds_is_exact(right, p_value):
    found = figures.over_seeds([0.0] * len(right), right)
    assert found.p_value == p_value
    assert found.value == pytest.approx(sum(right) / len(right))


def test_the_most_valuable_curves_are_made_first():
    a = Study("a", Drawings("word_page"), ("plain", "dv_sft", "klal"))
    b = Study("b", Drawings("line_tracing"), ("plain", "klal"))
    order = [(study.name, method, seed) for study, method, seed in Preset("x", (a, b), 2).runs()]
    assert order[:4] == [("a", m, s) for s in (0, 1) for m in ("plain", "dv_sft")]
    assert order[4:8] == [("b", m, s) for s in (0, 1) for m in ("plain", "klal")]
    assert order[8:] == [("a", "klal", 0), ("a", "klal", 1)]


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=str)
def test_presets_name_what_there_is(preset):
    names = [study.name for study in preset.studies]
    assert len(set(names)) == len(names)
    for study in preset.studies:
        assert study.methods[0] == "plain"
        assert set(study.methods) <= METHODS.keys()
        next(drawings.stream(study.drawings.task, count=1, **study.drawings.arguments()))
        assert study.drawings.task in study.described()


OF_ONE_PHRASE = ("word_pages", "asked_line")  # the whole answer: its rows are the phrase's


@pytest.mark.long
@pytest.mark.parametrize("study", presets.CPU.studies, ids=lambda study: study.name)
def test_every_method_takes_a_step_of_its_own_on_its_task(study, tmp_path, monkeypatch):
    small = {"samples": 12, "held_out": 6, "batch_size": 4, "steps": 2, "every": 2}
    own, trained = Desk(tmp_path, replace(study, **small, model="quick", start="scratch")), []
    make, weights = own._model, {}
    monkeypatch.setattr(own, "_model", lambda seed: trained.append(make(seed)) or trained[-1])
    for method in study.methods:  # of chosen heads, a plain run comes before its own
        own.curve(method, 0)
        weights[method] = torch.cat([p.detach().flatten() for p in trained[-1].parameters()])
    for one, other in combinations(study.methods, 2):
        alike = study.name in OF_ONE_PHRASE and (one, other) == ("klal", "klal_phrase")
        assert torch.equal(weights[one], weights[other]) == alike, (one, other)


def test_a_study_may_have_seeds_of_its_own(monkeypatch):
    several = replace(QUICK, methods=("plain", "dv_sft"), seeds=3)
    preset = Preset("x", (several, replace(several, name="other", seeds=None)), seeds=2)
    assert [seed for study, _, seed in preset.runs() if study is several] == [0, 0, 1, 1, 2, 2]
    assert len(list(preset.runs())) == 6 + 4
    assert several.settings("plain", 0) == QUICK.settings("plain", 0)
    monkeypatch.setitem(presets.PRESETS, "x", preset)
    assert len(list(presets.chosen("x", None, None, 1).runs())) == 4
    assert len(list(presets.chosen("x", None, ["dv_sft"], None).runs())) == 10


@pytest.mark.parametrize(
    ("question", "short"),
    [
        ("Read the highlighted line.", "?"),
        ("Where is the red patch?", "?"),
        ("In which cell is the red patch at second 3?", "3"),
        ("How many times do the red line and the blue line cross?", "?"),
        ("Which number does the line from C lead to?", "C"),
        ("Read line 3.", "3"),
        ("Is there a red circle and a blue square?", "red circle and a blue square"),
        ("Point to a red circle and a blue square.", "a red circle and a blue square"),
        ("What is the value of Alice?", "Alice"),
        ("What are the values of Alice and few?", "Alice and few"),
        ("What is the value of the red bar?", "red"),
    ],
)
def test_a_question_keeps_what_differs_between_drawings(question, short):
    """Curves of the page were made with these: another text would be another task."""
    record = {"messages": [{"content": [{"type": "image"}, {"type": "text", "text": question}]}]}
    assert drawings.shortened(record)["messages"][0]["content"][-1]["text"] == short


def test_a_drawing_as_text_has_its_words_and_marks_what_no_question_asks_for():
    def record(asked):
        words = [{"text": text, "box": [0, y, 9, y + 9]} for text, y in zip("abc", (0, 10, 20))]
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
        answer = {"role": "assistant", "content": "b"}
        regions = [{"text": "b", "box": [0, 9, 9, 20]}]
        return {"words": words, "regions": regions, "messages": [question, answer]}

    for asked, text in (("?", " a * b * c\n?"), ("b", " a b c\nb")):
        found = drawings.as_text(record(asked))
        assert found["images"] == []
        assert [message["content"] for message in found["messages"]] == [text, "b"]


def test_bad_settings_are_one_sentence(tmp_path, capsys):
    start = ["evidence", "--output", str(tmp_path), "--preset", "quick"]
    unused = ["--methods", "smam"]  # by no study of this preset
    for words in (["--studies", "maze"], ["--methods", "magic"], unused, ["--seeds", "0"]):
        assert main([*start, *words]) == 2
        assert f"`{words[0][2:]}`: expected" in capsys.readouterr().err


def test_a_curve_is_made_once_and_never_mixed_with_others(desk, monkeypatch, capsys):
    words = ["evidence", "--output", str(desk.output), "--preset", "quick"]
    assert main(words) == 0
    text = (desk.output / "evidence.md").read_text()
    assert "3 of 3 curves are done" in text
    assert "| control: DV-SFT, another drawing's words |" in text
    assert (desk.output / "evidence.png").exists()
    assert not list((desk.output / "curves").rglob("*.pt"))
    (desk.output / "evidence.md").unlink()

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop.Curve, "run", never)
    assert main(words) == 0
    assert (desk.output / "evidence.md").read_text() == text
    (desk.output / "evidence.md").unlink()
    assert main([*words, "--tables"]) == 0
    assert "3 of 3" in (desk.output / "evidence.md").read_text()
    with pytest.raises(ConfigError, match="other settings"):
        Desk(desk.output, replace(QUICK, batch_size=2)).curve("plain", 0)
    assert not list(desk.output.rglob("*.lock"))
    with pytest.raises(ConfigError, match="other drawings"):
        Desk(desk.output, replace(QUICK, held_out=7)).test()
    (desk.output / "curves" / "word_pages" / "plain" / "0.json").unlink()

    def stopped(*args, **kwargs):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(loop.Curve, "run", stopped)
    capsys.readouterr()
    assert main(words) == 128 + signal.SIGTERM
    assert f"saved in {desk.output}; the same command continues" in capsys.readouterr().err


def test_half_of_the_regions_are_wrong_and_gates_leave_them_out(desk):
    whole = desk.train(METHODS["plain"], 0)
    target = whole["gk_map_target"]
    wrong, gated = (desk.train(METHODS[name], 3) for name in ("klal_ungated", "klal_gated"))
    assert torch.equal(wrong["gk_map_target"], gated["gk_map_target"])
    changed = (wrong["gk_map_target"] != target).flatten(1).any(1)
    left = (gated["gk_map_weight"] == 0) & (gated["gk_map_position"] >= 0)
    assert int(left.any(1).sum()) == len(target) // 2
    assert not (changed & ~left.any(1)).any()  # what differs is left out
    assert int(changed.sum()) >= len(target) // 2 - 3  # two drawings may look alike
    assert bool((wrong["gk_map_weight"][wrong["gk_map_position"] >= 0] == 1).all())
    counts = [row_counts(batch)[COUNTS.index("map")] for batch in (wrong, gated)]
    assert counts[1] == counts[0] // 2
    other = drawings.half_gated(whole, 4)["gk_map_weight"]
    assert not torch.equal(other, gated["gk_map_weight"])


def test_the_built_in_control_has_as_many_tokens_of_other_drawings(desk):
    whole, wrong = (desk.train(METHODS[name], 0) for name in ("klal", "klal_shuffled"))
    before, after = whole["gk_map_target"], wrong["gk_map_target"]
    assert (before != after).flatten(1).any(1).float().mean() > 0.5
    for name in ("gk_map_position", "gk_side_inside", "labels"):
        assert torch.equal(whole[name], wrong[name])
    known = {tuple(row) for rows in before.tolist() for row in rows}
    assert {tuple(row) for rows in after.tolist() for row in rows} <= known


def test_heads_are_ranked_by_a_plain_run_of_the_seed(desk):
    names = ("klal_heads", "klal_other_heads")
    best, others = (desk._with_heads(METHODS[name], 0) for name in names)
    picked = [method.objectives["klal"]["chosen_heads"] for method in (best, others)]
    assert sorted(picked[0] + picked[1]) == [[0, 0], [0, 1]]  # of one layer with two
    kept = durable.read_json(desk.output / "heads" / QUICK.name / "0.json")
    (row,) = kept["shares"]
    assert picked[0] == [[0, row.index(max(row))]]
    assert len(row) == 2 and all(0 < value < 1 for value in row) and row[0] != row[1]
    assert METHODS["klal_heads"].settings()["heads"] == "best"
    assert "heads" not in METHODS["klal"].settings()


def test_chosen_heads_by_hand():
    share = [[0.1, 0.5], [0.4, 0.2], [0.3, 0.05], [0.6, 0.0]]
    assert heads.chosen_heads(share, "best", 0) == [[0, 1], [1, 0], [2, 0], [3, 0]]
    rest = [[0, 0], [1, 1], [2, 1], [3, 1]]
    assert heads.chosen_heads(share, "others", 5) == rest
