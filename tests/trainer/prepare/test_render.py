"""`prepare render`: the grid, several pages, what is left out, fonts, seeds, perplexity."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.words import WordLabeler
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.drawing.pages import Face, Placed, load_font, set_lines, undrawable, visible
from groundkern.trainer.drawing.texts import texts
from groundkern.trainer.prepare.grid import visual_grid
from groundkern.trainer.prepare.pipeline import prepare
from groundkern.trainer.prepare.render import Render
from groundkern.trainer.prepare.sources import values
from groundkern.trainer.program import main
from tests.trainer.prepare.records import lines_of

ALICE = " ".join(texts()[0][:150])


def render(folder, *records, **options):
    """Output and lines of the records."""
    source = values(
        lambda: ((f"t{i}", record) for i, record in enumerate(records)),
        total=len(records),
        identity={"records": [str(record) for record in records]},
    )
    work = Render(folder="pages", **{"fonts": ("DejaVu Sans",), **options})
    output = folder / "out.jsonl"
    out = prepare(source, work, output=output, settings={"command": "render"}, overwrite=True)
    return out, lines_of(output)


def face(size: float = 14, cell: int = 28) -> Face:
    return Face(load_font("DejaVu Sans", size), cell)


def test_every_word_ends_in_a_visual_token_of_its_own(tmp_path, model):
    """And nothing of it is drawn beyond its box: the last token alone is labelled."""
    out, (made,) = render(tmp_path, {"text": ALICE}, model=model, grid=(14, 18), max_pages=1)
    assert [w["text"] for w in made["words"]] == ALICE.split()
    assert made["messages"][1]["content"] == ALICE
    sample = parse_sample(made, root=tmp_path, where="")
    ((width, height),) = sample.sizes
    table = visual_grid(model).table(*sample.sizes)
    assert len(table) == (width // 28) * (height // 28) == out.counts["visual_tokens"]
    counts = Counter()
    tokenizer = visual_grid(model).processor.tokenizer
    labeler = WordLabeler(WordEncoder(tokenizer), max_tokens=99)
    placed = labeler.place(sample.words, table, counts)
    assert len(placed) == len(sample.words)
    for label in placed:
        _, _, top, right, bottom = table[label.token].tolist()
        x0, y0, x1, y1 = sample.words[label.words[0]].box
        assert top <= y0 and y1 <= bottom + 1e-9
        assert right - 6 / width <= x1 <= right + 1e-9
    pixels = np.asarray(Image.open(tmp_path / made["images"][0]).convert("RGB"), dtype=int)
    ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 100
    for word in made["words"]:
        x0, y0, x1, y1 = (round(edge) for edge in word["box"])
        assert ink[y0:y1, x0:x1].any()
        ink[y0 : y1 + 1, x0 : x1 + 1] = False
    assert not ink.any()


def test_pages_of_an_answer_and_samples_of_a_long_text(tmp_path):
    question = {"text": ALICE, "question": "Who?", "answer": "Alice"}
    options = {"grid": (10, 6), "max_pages": 9}
    _, (made,) = render(tmp_path, question, **options)
    pages = len(made["images"])
    assert pages > 2
    content = made["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image"] * pages + ["text"]
    assert content[-1]["text"] == "Who?"
    assert [w["text"] for w in made["words"]] == ALICE.split()
    assert [w["image"] for w in made["words"]] == sorted(w["image"] for w in made["words"])
    assert sorted({w["image"] for w in made["words"]}) == list(range(pages))
    out, made = render(tmp_path, question, {"text": ALICE}, grid=(10, 6), max_pages=2)
    assert len(made) == math.ceil(pages / 2)
    assert " ".join(one["messages"][1]["content"] for one in made) == ALICE
    (rejected,) = lines_of(out.rejects)
    assert f"at most 2 pages (--max-pages), got {pages} pages" in rejected["reason"]


def test_a_word_longer_than_a_line_is_broken_and_not_labelled(tmp_path):
    word = "Donaudampfschifffahrtsgesellschaft"
    out, (made,) = render(tmp_path, {"text": f"Die {word} fährt"}, grid=(5, 9))
    assert [w["text"] for w in made["words"]] == ["Die", "fährt"]
    assert made["messages"][1]["content"] == f"Die {word} fährt"
    assert out.counts["words_broken"] >= 2
    lines = list(set_lines(["a", "b"], face(), 1))
    assert lines == [[Placed("a", 1)], [Placed("b", 1)]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "`text`: expected a text to draw, got none"),
        ({"text": 7}, "`text`: expected a text, got int"),
        ({"text": "\u200b \u00ad"}, "`text`: expected visible words, got none"),
        ({"text": "x", "question": "y"}, "`answer`: expected an answer to the question"),
        ({"text": "漢字"}, "'漢', which DejaVu Sans has no glyph for"),
        ({"text": "שלום"}, "of a script from right to left"),
        (["x"], "`text`: expected a text to draw, got none"),
    ],
)
def test_records_that_cannot_be_drawn_say_why(tmp_path, record, reason):
    out, made = render(tmp_path, record)
    assert made == []
    (rejected,) = lines_of(out.rejects)
    assert reason in rejected["reason"]
    assert rejected["original"] == record
    assert not (tmp_path / "pages").exists()


def test_fields_inside_fields(tmp_path):
    """SQuAD's own form."""
    record = {"context": "Mars is red.", "question": "?", "answers": {"text": ["red", "Red"]}}
    fields = ("context", "question", "answers.text")
    _, (made,) = render(tmp_path, record, fields=fields)
    assert made["messages"][1]["content"] == "red"


def passage(text: str, answer: str, **more) -> dict:
    """A text-only sample, as `adapt squad` makes it."""
    parts = [{"type": "text", "text": text}, {"type": "text", "text": "\n\nWho?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def test_squad_s_samples_become_pages_with_the_answer_s_words_as_regions(tmp_path):
    """`adapt squad` and `render`, one after the other; of two 41.80 the right one is the region."""
    context = "Not 41.80 but a total of (41.80 euros)."
    answers = [{"text": "41.80 euros", "answer_start": 26}, {"text": "41.80", "answer_start": 4}]
    question = {"id": "q7", "question": "How much?", "answers": answers}
    article = {"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}
    raw, texts, pages = (tmp_path / name for name in ("squad.json", "s.jsonl", "pages.jsonl"))
    raw.write_text(json.dumps({"data": [article]}))
    one = ("--workers", "1")
    assert main(["prepare", "adapt", "squad", str(raw), "--output", str(texts), *one]) == 0
    assert main(["prepare", "render", str(texts), "--output", str(pages), *one]) == 0
    (made,) = lines_of(pages)
    words = made.pop("words")
    assert [word["text"] for word in words] == context.split()
    assert made == {
        "id": "q7",
        "meta": {"answer_start": 26},
        "task": "squad",
        "answers": ["41.80"],
        "images": ["pages/0000/0000000-0.png"],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "How much?"}],
            },
            {"role": "assistant", "content": "41.80 euros"},
        ],
        "regions": [
            {"text": "41.80", "box": words[6]["box"]},
            {"text": "euros", "box": words[7]["box"]},
        ],
    }


def test_a_sample_keeps_what_it_has_beside_its_passage(tmp_path):
    """Other turns, metrics, and a place on the second page; without a place no region."""
    known = passage(ALICE, ALICE.split()[-1], meta={"answer_start": ALICE.rindex(" ") + 1})
    known["messages"].insert(0, {"role": "system", "content": "Be brief."})
    known["messages"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    known["metrics"] = ["squad_match"]
    unknown = passage("Mars is red.", "red", answers=["Red"])
    options = {"grid": (10, 6), "max_pages": 9}
    _, (first, second) = render(tmp_path, known, unknown, **options)
    assert [message["role"] for message in first["messages"]] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    last = len(first["images"]) - 1
    place = {"turn": 2, "image": last, "box": first["words"][-1]["box"]}
    assert first["regions"] == [{"text": ALICE.split()[-1], **place}]
    assert first["metrics"] == ["squad_match"]
    assert second["answers"] == ["Red"]
    assert "regions" not in second


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (passage("Mars", "red", meta={"answer_start": 1}), "'red' at character 1 of the passage"),
        (passage("Mars", "red", meta={"answer_start": -1}), "'red' at character -1"),
        (passage(" ", "red"), "a passage and a question, got an empty one"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "`messages`: expected a user message of two texts, a passage and a question about it",
        ),
        ({"messages": 3}, "`messages`: expected a valid list"),
        (passage("Mars", "red", images=["a.png"]), "a sample without images, got ['a.png']"),
    ],
)
def test_samples_that_have_no_passage_say_why(tmp_path, record, reason):
    out, made = render(tmp_path, record)
    assert made == []
    (rejected,) = lines_of(out.rejects)
    assert reason in rejected["reason"]


def test_an_answer_s_word_that_is_broken_is_no_region(tmp_path):
    word = "Donaudampfschifffahrtsgesellschaft"
    text = f"Die {word} fährt\u200b gern"
    options = {"grid": (5, 9)}
    sample = passage(text, f"{word} fährt", meta={"answer_start": 4})
    _, (made,) = render(tmp_path, sample, **options)
    assert made["regions"] == [{"text": "fährt", "box": made["words"][1]["box"]}]


def test_same_seed_same_bytes_dark_or_light(tmp_path):
    pages = {}
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"light_on_dark": 1.0}}.items():
        (tmp_path / name).mkdir()
        render(tmp_path / name, {"text": "one two"}, **options)
        pages[name] = tmp_path / name / "pages/0000/0000000-0.png"
    content = {name: path.read_bytes() for name, path in pages.items()}
    assert content["a"] == content["b"] != content["c"]
    light, dark = (Image.open(pages[name]).convert("L").getpixel((0, 0)) for name in "ad")
    assert light > 180
    assert dark < 100


def test_fonts_by_name_and_sizes_that_fit():
    assert load_font("DejaVu Serif", 14).getname()[0] == "DejaVu Serif"
    with pytest.raises(ConfigError, match="expected an installed font or a font file, got 'Nope'"):
        load_font("Nope", 14)
    with pytest.raises(ConfigError, match="fit a visual token of 28 pixels"):
        face(size=28)
    assert undrawable("naïve", load_font("DejaVu Sans", 14)) is None
    assert visible("a\u200bb \x07 c") == ["ab", "c"]


def test_settings_that_cannot_be_met_are_one_sentence(tmp_path, model, write, capsys):
    data = str(write({"text": "x"}))
    render = ["prepare", "render", data, "--output", str(tmp_path / "o.jsonl"), "--workers", "1"]
    assert main([*render, "--max-perplexity", "5"]) == 2
    assert "give both" in capsys.readouterr().err
    assert main([*render, "--model", str(model), "--cell", "10"]) == 2
    assert (
        "to get 18 visual tokens a line, got cells of 10 pixels and 1 to 18 lines"
        in capsys.readouterr().err
    )
    assert main([*render, "--model", str(tmp_path / "none")]) == 2
    assert "expected a model's processor" in capsys.readouterr().err


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, model):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("lm")
    tokenizer = visual_grid(model).processor.tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_perplexity_is_that_of_the_model_in_windows(language_model):
    from groundkern.trainer.prepare.perplexity import scorer

    score = scorer(language_model)
    assert score.window == 8
    ids = torch.tensor([score.tokenizer(ALICE)["input_ids"]])[:, :15]
    text = score.tokenizer.decode(ids[0])
    with torch.no_grad():  # 14 predictions in windows of 8 tokens that share one
        losses = [
            score.model(part).logits.log_softmax(-1)[0, :-1].gather(1, part[0, 1:, None])
            for part in (ids[:, :8], ids[:, 7:15])
        ]
    assert score(text) == pytest.approx(math.exp(-torch.cat(losses).mean().item()), rel=1e-5)
    assert score("a") == math.inf


def test_texts_above_the_perplexity_are_left_out(tmp_path, language_model, capsys):
    from groundkern.trainer.prepare.perplexity import scorer

    pair = [ALICE[:60], "zqx" * 20]
    low, high = sorted(map(scorer(language_model), pair))
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in pair))
    between = str((low + high) / 2)
    words = ["prepare", "render", str(data), "--output", str(tmp_path / "o.jsonl")]
    words += ["--perplexity-model", str(language_model), "--max-perplexity", between]
    assert main([*words, "--workers", "1", "--on-bad-sample", "stop"]) == 0
    assert "1 samples of 2 texts" in capsys.readouterr().out
    (rejected,) = lines_of(tmp_path / "o.jsonl.rejected.jsonl")
    assert "(--max-perplexity), got" in rejected["reason"]
