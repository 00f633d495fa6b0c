"""Adapters of question-and-answer data sets: ChartQA, DocVQA, InfographicVQA, SQuAD."""

import io
import json

import pytest
from PIL import Image

from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.sample import parse_sample
from tests.trainer.prepare.reading_samples import picture, prepared, said, write


def adapt(out, dataset, data, *words):
    return prepared(out / "out.jsonl", "adapt", dataset, data, *words)


def encoded() -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


def chartqa(root):
    picture(root / "train" / "png" / "1.png", 20, 10)
    human = [
        {"imgname": "1.png", "query": "How much? ", "label": "41.8"},
        {"imgname": "1.png", "query": "Which?", "label": ["a", "b"]},
        {"imgname": "2.png", "query": "Which?", "label": "a"},
        {"imgname": "../../out.jsonl", "query": "Which?", "label": "a"},
        {"imgname": "1.png", "query": 3, "label": "a"},
        {"imgname": "1.png", "query": "Which?", "label": []},
        {"imgname": "1.png", "query": "Which?"},
        None,
    ]
    write(root / "train" / "train_human.json", human)
    machine = [{"imgname": "1.png", "query": "What?", "label": 2018}]
    write(root / "train" / "train_augmented.json", machine)
    return root


def test_chartqa_as_it_is_published(tmp_path):
    status, samples, rejected = adapt(tmp_path, "chartqa", chartqa(tmp_path / "c"))
    assert status == 0
    assert [(s["task"], *said(s)) for s in samples] == [
        ("chartqa_augmented", "What?", "2018"),
        ("chartqa_human", "How much?", "41.8"),
        ("chartqa_human", "Which?", "a, b"),
    ]
    assert samples[0]["images"] == ["png/1.png"]
    assert [each["where"] for each in rejected] == [f"train_human.json[{i}]" for i in range(2, 8)]
    root = tmp_path / "c" / "train"
    assert len(JsonLinesDataset(tmp_path / "out.jsonl", root=root, on_bad_sample="stop")) == 3
    words = (root / "train_augmented.json", "--images", root / "png")
    _, (sample,), _ = prepared(tmp_path / "one.jsonl", "adapt", "chartqa", *words)
    assert sample["images"] == ["1.png"]


def test_chartqa_as_hugging_face_has_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": encoded(), "query": "A?", "label": ["1"], "human_or_machine": 0},
        {"image": encoded(), "query": "B?", "label": ["2"], "human_or_machine": 1},
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "query": datasets.Value("string"),
            "label": datasets.List(datasets.Value("string")),
            "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
        }
    )
    data = datasets.Dataset.from_list(rows, features=features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "val"):
        data.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    data.save_to_disk(tmp_path / "saved")
    for source, words in (("hub", ("--split", "val")), ("saved", ())):
        out = tmp_path / source
        status, samples, rejected = adapt(out, "chartqa", tmp_path / source, *words)
        assert (status, rejected) == (0, [])
        assert [(s["task"], *said(s)) for s in samples] == [
            ("chartqa_human", "A?", "1"),
            ("chartqa_augmented", "B?", "2"),
        ]
        assert (out / samples[1]["images"][0]).read_bytes() == rows[1]["image"]["bytes"]


def test_chartqa_splits_that_are_not_there(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    assert adapt(tmp_path, "chartqa", chartqa(tmp_path / "c"), "--split", "dev")[0] == 2
    assert "expected <split>_human.json" in capsys.readouterr().err
    for split in ("a", "b"):
        datasets.Dataset.from_list([{"x": 1}]).to_parquet(tmp_path / "h" / f"{split}-0.parquet")
    assert adapt(tmp_path, "chartqa", tmp_path / "h")[0] == 2
    assert "expected --split, one of a, b, got None" in capsys.readouterr().err
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert adapt(tmp_path, "chartqa", tmp_path / "bad.parquet")[0] == 2
    assert "expected Parquet files" in capsys.readouterr().err
    assert adapt(tmp_path, "chartqa", tmp_path / "c", "--question", "x")[0] == 2
    assert "has questions and answers of its own" in capsys.readouterr().err
    assert adapt(tmp_path, "chartqa", tmp_path / "none")[0] == 2
    assert "expected what is there" in capsys.readouterr().err


def docvqa(root, *records):
    picture(root / "documents" / "p_1.png", 200, 100)
    base = {"questionId": 1, "question": "Total?", "image": "documents/p_1.png", "docId": 9}
    base |= {"answers": ["41.80", "41.8"], "data_split": "train"}
    records = [{**base, **record} for record in records]
    head = {"dataset_name": "docvqa", "dataset_version": "1.0"}
    return write(root / "train_v1.0.json", {**head, "data": records, "dataset_split": "train"})


def test_docvqa_with_the_words_of_its_ocr(tmp_path):
    def word(text, *corners):
        return {"text": text, "boundingBox": list(corners)}

    line = [
        word("Total", 40, 20, 80, 22, 80, 40, 40, 38),
        word("gone", 500, 20, 520, 20, 520, 30, 500, 30),
        word(" 41.80 ", 100, 20, 200, 20, 200, 50, 100, 50),
    ]
    page = {"page": 1, "width": 400, "height": 200, "unit": "pixel", "lines": [{"words": line}]}
    write(tmp_path / "ocr" / "p_1.json", {"status": "Succeeded", "recognitionResults": [page]})
    words = (docvqa(tmp_path, {}), "--ocr", tmp_path / "ocr")
    status, (sample,), rejected = adapt(tmp_path, "docvqa", *words)
    assert (status, rejected) == (0, [])
    assert said(sample) == ("Total?", "41.80")
    assert sample["answers"] == ["41.8"]
    assert sample["words"] == [
        {"text": "Total", "box": [0.1, 0.1, 0.2, 0.2], "coord": "unit"},
        {"text": "41.80", "box": [0.25, 0.1, 0.5, 0.25], "coord": "unit"},
    ]
    parsed = parse_sample(sample, root=tmp_path, where="x")
    assert parsed.words[1].box == (0.25, 0.1, 0.5, 0.25)


def test_infographicvqa_with_the_words_of_textract(tmp_path):
    picture(tmp_path / "pictures" / "20471.jpeg", 200, 100)
    record = {"questionId": 1, "question": "Who?", "answers": ["Ann"]}
    record |= {"image_local_name": "20471.jpeg", "ocr_output_file": "20471.json"}
    path = write(tmp_path / "infographicsVQA_train_v1.0.json", {"data": [record]})
    box = {"Width": 0.25, "Height": 0.5, "Left": 0.5, "Top": 0.25}
    words = [{"BlockType": "WORD", "Text": "Ann", "Geometry": {"BoundingBox": box}}]
    write(tmp_path / "ocr" / "20471.json", {"PAGE": [], "LINE": [], "WORD": words})
    options = ("--images", tmp_path / "pictures", "--ocr", tmp_path / "ocr")
    status, (sample,), rejected = adapt(tmp_path, "infographicvqa", path, *options)
    assert (status, rejected) == (0, [])
    assert sample["task"] == "infographicvqa"
    assert sample["words"] == [{"text": "Ann", "box": [0.5, 0.25, 0.75, 0.75], "coord": "unit"}]
    box = {**box, "Left": 10**400}
    words.append({"Text": "b", "Geometry": {"BoundingBox": box}})
    write(tmp_path / "ocr" / "20471.json", {"WORD": words})
    _, (sample,), _ = prepared(tmp_path / "c.jsonl", "adapt", "infographicvqa", path, *options)
    assert [word["text"] for word in sample["words"]] == ["Ann"]
    write(tmp_path / "ocr" / "20471.json", {"WORD": [{"Text": 3}]})
    _, _, (lost,) = prepared(tmp_path / "b.jsonl", "adapt", "infographicvqa", path, *options)
    assert "20471.json WORD[0]: `Text`: expected a text, got 3" in lost["reason"]


def test_docvqa_bad_questions(tmp_path):
    bad = [
        {"answers": []},
        {"answers": None},
        {"answers": "41.80"},
        {"answers": [7]},
        {"question": " "},
        {"image": "documents/none.png"},
        {"image": "/etc/passwd"},
    ]
    path = docvqa(tmp_path, {}, *bad, {})
    status, samples, rejected = adapt(tmp_path, "docvqa", path)
    assert (status, len(samples)) == (0, 2)
    assert [each["where"] for each in rejected] == [f"train_v1.0.json[{i}]" for i in range(1, 8)]
    assert rejected[6]["original"]["image"] == "/etc/passwd"
    words = (path, "--ocr", tmp_path / "documents")
    _, samples, rejected = prepared(tmp_path / "b.jsonl", "adapt", "docvqa", *words)
    assert samples == []
    assert "expected the OCR file p_1.json" in rejected[0]["reason"]
    path.write_text(path.read_text()[:-200])
    assert prepared(tmp_path / "c.jsonl", "adapt", "docvqa", path)[0] == 1


CONTEXT = "The total is 41.80 euros."


def squad(root, *questions):
    base = {"id": "1", "question": "How much?", "answers": [{"text": "41.80", "answer_start": 13}]}
    questions = [{**base, **question} for question in questions]
    article = {"title": "t", "paragraphs": [{"context": CONTEXT, "qas": questions}]}
    return write(root / "squad.json", {"version": "1.1", "data": [article]})


def test_squad_is_text_with_the_passage_first(tmp_path):
    status, (sample,), rejected = adapt(tmp_path, "squad", squad(tmp_path, {}))
    assert (status, rejected) == (0, [])
    assert (sample["id"], sample["meta"]) == ("1", {"answer_start": 13})
    assert sample["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": CONTEXT},
                {"type": "text", "text": "\n\nHow much?"},
            ],
        },
        {"role": "assistant", "content": "41.80"},
    ]


def test_other_answers_are_kept_once_for_evaluation(tmp_path):
    several = [{"text": text, "answer_start": 13} for text in ("41.80", " 41.80 ", "EUR", "EUR")]
    questions = [{"answers": several}, {"answers": several[:2]}, {"answers": [*several, 7, {}]}]
    status, samples, rejected = adapt(tmp_path, "squad", squad(tmp_path, *questions))
    assert (status, rejected) == (0, [])
    assert [sample.get("answers") for sample in samples] == [["EUR"], None, ["EUR"]]


def test_squad_without_an_answer_and_with_a_wrong_one(tmp_path):
    questions = [
        {"answers": [], "is_impossible": True},
        {"answers": [{"text": "41.80", "answer_start": 12}]},
        {"answers": [{"text": "41.80", "answer_start": -12}]},
        {"answers": [{"text": "41.80"}]},
        {"answers": {"text": ["41.80"], "answer_start": []}},
        {"answers": 3},
        {"question": None},
    ]
    path = squad(tmp_path, *questions)
    status, samples, rejected = adapt(tmp_path, "squad", path)
    assert (status, samples) == (0, [])
    wheres = [each["where"] for each in rejected]
    assert wheres == [f"squad.json[0].paragraphs[0].qas[{i}]" for i in range(7)]
    assert "expected '41.80' at character 12 of the context" in rejected[1]["reason"]
    words = (path, "--unanswerable", "It does not say.")
    _, (sample,), _ = prepared(tmp_path / "b.jsonl", "adapt", "squad", *words)
    assert said(sample)[1] == "It does not say."


def test_squad_says_by_what_a_start_was_counted(tmp_path):
    context = "\U0001f600\u00e9 pays 41.80"
    answers = [{"text": "41.80", "answer_start": start} for start in (12, 9, 8, 10**30)]
    questions = [{"id": str(i), "answers": [answer]} for i, answer in enumerate(answers)]
    path = squad(tmp_path, *questions)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["data"][0]["paragraphs"][0]["context"] = context
    _, (sample,), rejected = adapt(tmp_path, "squad", write(path, data))
    assert sample["id"] == "2"
    assert "there by bytes of UTF-8: count characters" in rejected[0]["reason"]
    assert "there by units of UTF-16: count characters" in rejected[1]["reason"]
    assert "there by" not in rejected[2]["reason"]


@pytest.mark.parametrize(
    ("article", "where"),
    [
        (3, "squad.json[0]"),
        ({"paragraphs": None}, "squad.json[0]"),
        ({"paragraphs": [{"context": "a"}]}, "squad.json[0].paragraphs[0]"),
        ({"paragraphs": [{"qas": ["x"]}]}, "squad.json[0].paragraphs[0].qas[0]"),
        ({"paragraphs": [{"qas": [{}]}]}, "squad.json[0].paragraphs[0].qas[0]"),
    ],
)
def test_squad_articles_that_are_none(tmp_path, article, where):
    path = write(tmp_path / "squad.json", {"data": [article]})
    status, samples, (lost,) = adapt(tmp_path, "squad", path)
    assert (status, samples, lost["where"]) == (0, [], where)


def test_squad_as_hugging_face_has_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"id": "1", "title": "t", "context": CONTEXT, "question": "How much?"}
    row["answers"] = {"text": ["41.80"], "answer_start": [13]}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    status, (sample,), rejected = adapt(tmp_path, "squad", tmp_path / "saved")
    assert (status, rejected, said(sample)) == (0, [], ("\n\nHow much?", "41.80"))
    json.dumps(sample)
