"""Adapters of forms, receipts and screenshots: each sample by hand, what is passed over by kind."""

import io
import json

import pytest
from PIL import Image

from tests.trainer.prepare.reading_samples import picture, prepared, said, write

WIDTH, HEIGHT = 200, 100


def adapt(root, dataset, data, *words):
    out = root / "out.jsonl"
    return prepared(out, "adapt", dataset, data, "--overwrite", *words)


def word(text, x, y=10) -> dict:
    return {"text": text, "box": [x, y, x + 10, y + 10]}


def entity(number, label, *words, links=(), text=None) -> dict:
    text = " ".join(each["text"] for each in words) if text is None else text
    box = [5, 5, 150, 90]
    linking = [list(link) for link in links]
    return {
        "id": number, "text": text, "label": label, "box": box, "words": words, "linking": linking
    }  # fmt: skip


FORM = [
    entity(0, "question", word("Name:", 10), links=[(0, 1), (0, 2)]),
    entity(1, "answer", word("Ada", 30), word("B.", 50), links=[(0, 1)]),
    entity(2, "answer", word("Lovelace", 70), links=[(0, 2)]),
    entity(3, "question", word("Date:", 90), links=[(3, 4)]),
    entity(4, "answer", word(" ", 110), links=[(3, 4)], text=" "),
    entity(5, "question", word("Sign:", 120), links=[(6, 5)]),
    entity(6, "header", word("FORM", 130), links=[(6, 5)]),
    entity(7, "question", links=[(7, 1)], text=""),
    entity(8, "question", word("Sum:", 150), links=[(9, 8)]),
    entity(9, "answer", word("4", 160), {**word("1", 170), "box": [170, 10, 300, 20]}, text="4.1"),
]
ANSWERS = [
    {"char_span": [0, 3], "box": [30, 10, 40, 20]},
    {"char_span": [4, 6], "box": [50, 10, 60, 20]},
    {"char_span": [7, 15], "box": [70, 10, 80, 20]},
]


def test_funsd_questions_and_the_words_of_their_answers(tmp_path, capsys):
    data = tmp_path / "data"
    picture(data / "training_data" / "images" / "p.png", WIDTH, HEIGHT)
    write(data / "training_data" / "annotations" / "p.json", {"form": FORM})
    write(data / "testing_data" / "annotations" / "q.json", {"forms": []})
    status, (name, total), rejected = adapt(tmp_path, "funsd", data)
    assert status == 0
    assert said(name) == ('What is filled in for "Name:"?', "Ada B.\nLovelace")
    assert name["regions"] == ANSWERS
    assert name["images"] == ["training_data/images/p.png"]
    assert [each["text"] for each in name["words"]][:3] == ["Name:", "Ada", "B."]
    # "4.1" is not what its words print, so it has the place of the whole
    assert total["regions"] == [{"char_span": [0, 3], "box": [5, 5, 150, 90]}]
    reasons = [each["reason"] for each in rejected]
    assert reasons[0].startswith("expected JSON with a form, got KeyError")
    assert reasons[2] == "`linking`: expected an answer, got header"
    printed = capsys.readouterr().out
    assert "1  passed over: questions with an empty answer" in printed
    assert "1  passed over: questions without an answer" in printed
    assert "1  passed over: questions without text" in printed
    assert "2  words of the OCR outside" in printed
    _, samples, rejected = adapt(tmp_path, "funsd", data, "--split", "train")
    assert (len(samples), len(rejected)) == (2, 3)
    words = ("--question", "{question}", "--answer", "It says {answer}!")
    _, (name, _), _ = adapt(tmp_path, "funsd", data, "--split", "train", *words)
    assert said(name) == ("Name:", "It says Ada B.\nLovelace!")
    assert [r["char_span"] for r in name["regions"]] == [[8, 11], [12, 14], [15, 23]]


def test_answers_of_a_form_are_in_reading_order(tmp_path):
    boxes = [[50, 42, 60, 52], [10, 60, 60, 70], [10, 40, 40, 50], [80, 38, 90, 48]]
    answers = [{**entity(i, "answer", word(f"a{i}", 0)), "box": box} for i, box in enumerate(boxes)]
    asked = entity(9, "question", word("Sizes:", 10), links=[(9, i) for i in range(4)])
    data = tmp_path / "data"
    picture(data / "training_data" / "images" / "p.png", WIDTH, HEIGHT)
    write(data / "training_data" / "annotations" / "p.json", {"form": [asked, *answers]})
    _, (sample,), _ = adapt(tmp_path, "funsd", data)
    assert said(sample)[1] == "a2\na0\na3\na1"


def test_questions_that_a_page_asks_several_times_are_passed_over(tmp_path, capsys):
    form = [
        entity(0, "question", word("Date:", 10), links=[(0, 3)]),
        entity(1, "question", word(" DATE: ", 30), links=[(1, 4)]),
        entity(2, "question", word("Name:", 50), links=[(2, 3)]),
        entity(3, "answer", word("May", 70)),
        entity(4, "answer", word("June", 90)),
        entity(5, "question", word("name:", 120)),
    ]
    data = tmp_path / "data"
    picture(data / "training_data" / "images" / "p.png", WIDTH, HEIGHT)
    write(data / "training_data" / "annotations" / "p.json", {"form": form})
    _, (sample,), rejected = adapt(tmp_path, "funsd", data)
    assert said(sample) == ('What is filled in for "Name:"?', "May")
    assert "to be asked once, got 2 times" in rejected[0]["reason"]
    assert "2  passed over: questions that a page asks several times" in capsys.readouterr().out


def test_xfund_files_by_split(tmp_path):
    picture(tmp_path / "x" / "zh_train_0.jpg", WIDTH, HEIGHT)
    form = [
        entity(0, "question", word("姓名：", 10), links=[(0, 1)]),
        entity(1, "answer", word("王", 30), word("小明", 50), links=[(0, 1)], text="王小明"),
    ]
    page = {"id": "zh_train_0", "img": {"fname": "zh_train_0.jpg"}, "document": form}
    bad = {"id": "zh_train_1", "document": form}
    write(tmp_path / "x" / "zh.train.json", {"lang": "zh", "documents": [page, bad, 3]})
    write(tmp_path / "x" / "zh.val.json", {"lang": "zh", "documents": []})
    _, (sample,), rejected = adapt(tmp_path, "xfund", tmp_path / "x", "--split", "train")
    assert said(sample) == ('What is filled in for "姓名："?', "王小明")
    assert [r["char_span"] for r in sample["regions"]] == [[0, 1], [1, 3]]
    assert [each["where"] for each in rejected] == [
        "zh.train.json: documents[1]",
        "zh.train.json: documents[2]",
    ]
    assert adapt(tmp_path, "xfund", tmp_path / "x", "--split", "test")[0] == 2


# SROIE

LINES = """10,10,110,10,110,20,10,20,ACME, SDN BHD
10,20,60,20,60,30,10,30,1 HIGH ROAD,
10,30,60,30,60,40,10,40,TOWN.
10,40,110,40,110,50,10,50,DATE: 1/2/2019 9PM
10,50,50,50,50,60,10,60,TOTAL
60,50,90,50,90,60,60,60,19.00
10,60,50,60,50,70,10,70,CASH
60,60,90,60,90,70,60,70,19.00
60,70,90,70,90,80,60,80,119.00
"""
VALUES = {
    "company": "Acme SDN BHD", "date": "1/2/2019", "address": "1 HIGH ROAD, TOWN.",
    "total": "19.00",
}  # fmt: skip


def receipt(root, lines=LINES, key="key", name="r", **values):
    picture(root / "img" / f"{name}.jpg", WIDTH, HEIGHT)
    (root / "box").mkdir(exist_ok=True)
    (root / "box" / f"{name}.csv").write_text(lines)
    write(root / key / f"{name}.json", {**VALUES, **values})
    return root


def test_sroie_values_are_where_their_lines_print_them(tmp_path):
    _, samples, rejected = adapt(tmp_path, "sroie", receipt(tmp_path / "d"))
    assert rejected == []
    company, date, address, total = samples
    assert said(company) == ("What is the company of this receipt?", "Acme SDN BHD")
    assert company["regions"] == [{"char_span": [0, 12], "box": [10, 10, 110, 20]}]
    assert [r["box"] for r in address["regions"]] == [[10, 20, 60, 30], [10, 30, 60, 40]]
    # characters 6 to 14 of 18, of a line of 100 pixels
    assert date["regions"][0]["box"] == pytest.approx([10 + 600 / 18, 40, 10 + 1400 / 18, 50])
    assert [r["box"] for r in total["regions"]] == [[60, 50, 90, 60]]


def test_sroie_passes_over_what_it_cannot_place(tmp_path, capsys):
    root = receipt(tmp_path / "d", LINES.replace("TOTAL", "SUM"), key="entities", company=" ")
    receipt(root, "1,2,x", key="entities", name="s")
    _, samples, rejected = adapt(tmp_path, "sroie", root)
    assert len(samples) == 2
    printed = capsys.readouterr().out
    assert "1  passed over: totals that are printed several times" in printed
    assert "1  passed over: values that are empty" in printed
    assert "line 1: expected 8 numbers and a text" in rejected[-1]["reason"]
    _, samples, _ = adapt(tmp_path, "sroie", receipt(tmp_path / "e", date="9.00", total="9.00"))
    assert len(samples) == 2
    assert "2  passed over: values that no lines print" in capsys.readouterr().out


# CORD


def quad(x, y, width=10) -> dict:
    right, bottom = x + width, y + 10
    return {
        "x1": x, "y1": y, "x2": right, "y2": y, "x3": right, "y3": bottom, "x4": x, "y4": bottom
    }  # fmt: skip


def line(category, group, *words, y=10) -> dict:
    words = [
        {"text": text, "is_key": key, "quad": quad(10 + 20 * i, y), "row_id": 1}
        for i, (text, key) in enumerate(words)
    ]
    return {"category": category, "group_id": group, "words": words}


RECEIPT = {
    "valid_line": [
        line("menu.nm", 3, ("Iced", 0), ("tea", 0)),
        line("menu.price", 3, ("15,000", 0)),
        line("menu.nm", 4, ("Rice", 0), y=30),
        line("menu.cnt", 4, ("2", 0), y=30),
        line("menu.nm", 5, ("Rice", 0), y=40),
        line("menu.price", 6, ("9", 0), y=40),
        line("menu.etc", 4, ("!", 0), y=40),
        line("total.total_price", 7, ("TOTAL", 1), ("Rp", 0), ("15,000", 0), y=50),
        line("total.cashprice", 8, ("20,000", 0), y=60),
        line("total.cashprice", 9, ("20,000", 0), y=70),
        line("subtotal.tax_price", 9, ("TAX", 1), y=80),
        {**line("total.changeprice", 9, ("5", 0)), "words": [{"text": "5", "quad": quad(190, 90)}]},
    ]
}


def test_cord_values_ask_by_item_or_by_what_they_are(tmp_path, capsys):
    picture(tmp_path / "d" / "train" / "image" / "r.png", WIDTH, HEIGHT)
    outside = {"text": "5", "is_key": 0, "quad": quad(190, 90, 40)}
    receipt = {"valid_line": [*RECEIPT["valid_line"][:-1], {**line("total.changeprice", 9)}]}
    receipt["valid_line"][-1]["words"] = [outside]
    write(tmp_path / "d" / "train" / "json" / "r.json", receipt)
    (tmp_path / "d" / "train" / "json" / "s.json").write_text("{")
    _, (tea, total), (lost,) = adapt(tmp_path, "cord", tmp_path / "d", "--split", "train")
    assert said(tea) == ('What is the price of "Iced tea"?', "15,000")
    assert tea["regions"] == [
        {"char_span": [0, 6], "polygon": [[10, 10], [20, 10], [20, 20], [10, 20]]}
    ]
    assert said(total) == ("What is the total?", "Rp 15,000")
    assert [r["char_span"] for r in total["regions"]] == [[0, 2], [3, 9]]
    assert total["regions"][0]["polygon"][0] == [30, 50]
    assert len(total["words"]) == 14
    assert lost["where"] == "train/json/s.json"
    printed = capsys.readouterr().out
    assert "2  passed over: values of items whose name is not there once" in printed
    assert "1  passed over: lines of menu.etc" in printed
    assert "2  passed over: values of several lines" in printed
    assert "1  passed over: lines without a value" in printed
    assert "1  passed over: values outside of their image" in printed


def test_cord_rows_of_the_hub(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    truths = [json.dumps({"gt_parse": {}, **RECEIPT}), "{", None]
    table = pyarrow.table({"image": [image] * 3, "ground_truth": truths})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    _, samples, rejected = adapt(tmp_path, "cord", tmp_path / "train-0.parquet")
    assert [said(s)[1] for s in samples] == ["15,000", "Rp 15,000", "5"]
    assert samples[0]["images"] == ["out_images/00000000.png"]
    assert [each["where"] for each in rejected] == ["train-0.parquet[1]", "train-0.parquet[2]"]


# Screenshots


@pytest.mark.parametrize(
    "record",
    [
        {"img_filename": "a.png", "instruction": "open it", "bbox": [20, 10, 40, 20]},
        {"img_filename": "x/a.png", "instruction": "open it", "bbox": [0.1, 0.1, 0.3, 0.3]},
        {
            "img_filename": "a.png",
            "elements": [{"instruction": "open it", "bbox": [0.1, 0.1, 0.3, 0.3]}],
        },
        {"img_url": "a.png", "element": [{"instruction": "open it", "bbox": [0.1, 0.1, 0.3, 0.3]}]},
    ],
)
def test_screenshots_in_pixels_or_fractions(tmp_path, record):
    picture(tmp_path / "img" / "a.png", WIDTH, HEIGHT)
    data = write(tmp_path / "d.json", [record])
    _, (sample,), rejected = adapt(tmp_path, "screenspot", data, "--images", tmp_path / "img")
    assert rejected == []
    assert said(sample) == ("open it", "[100, 100, 300, 300]")
    (region,) = sample["regions"]
    assert region["box"] == pytest.approx([20, 10, 60, 30])
    assert region["char_span"] == [0, 20]


def test_screenshots_that_are_wrong(tmp_path, capsys):
    picture(tmp_path / "a.png", WIDTH, HEIGHT)
    good = {"img_filename": "a.png", "instruction": "open it", "bbox": [20, 10, 40, 20]}
    bad = [
        {**good, "bbox": [0.5, 0.1, 1.4, 0.3]},
        {**good, "bbox": [20, 10, 400, 20]},
        {**good, "bbox": [float("nan"), 10, 4, 2]},
        {**good, "instruction": ""},
        {"img_filename": "a.png", "elements": [3]},
        {"img_filename": "../a.png", "elements": []},
        5,
    ]
    data = write(tmp_path / "d.json", [good, *bad])
    _, samples, rejected = adapt(tmp_path, "screenspot", data)
    assert (len(samples), len(rejected)) == (1, 7)
    assert "coordinates within 1 x 1" in rejected[0]["reason"] + rejected[1]["reason"]
    assert "1  passed over: images without annotations" in capsys.readouterr().out


def test_instructions_of_several_elements_are_passed_over(tmp_path, capsys):
    picture(tmp_path / "a.png", WIDTH, HEIGHT)
    names = ("Read more", "Home", "Read more ")
    elements = [
        {"instruction": name, "bbox": [0.1, 0.1 * i, 0.3, 0.1 * i + 0.1]}
        for i, name in enumerate(names)
    ]
    data = write(tmp_path / "d.json", [{"img_filename": "a.png", "elements": elements}])
    _, (sample,), rejected = adapt(tmp_path, "screenspot", data)
    assert (said(sample)[0], len(rejected)) == ("Home", 2)
    assert "2  passed over: instructions that several elements have" in capsys.readouterr().out


def test_objects_of_visual_genome_by_name(tmp_path):
    picture(tmp_path / "VG_100K" / "7.jpg", WIDTH, HEIGHT)
    tree = {"names": ["tree", "plant"], "x": 20, "y": 10, "w": 40, "h": 20, "object_id": 1}
    objects = [tree, {**tree, "x": 100}, {**tree, "names": ["sky"]}, {**tree, "names": []}]
    data = write(tmp_path / "objects.json", [{"image_id": 7, "objects": objects}])
    words = ("--question", "Where is the {label}?", "--answer", "{box}")
    _, (trees, sky), (lost,) = adapt(tmp_path, "visual_genome", data, *words)
    assert said(trees) == ("Where is the tree?", "[100, 100, 300, 300] [500, 100, 700, 300]")
    assert [r["box"] for r in trees["regions"]] == [[20, 10, 60, 30], [100, 10, 140, 30]]
    assert said(sky)[0] == "Where is the sky?"
    assert lost["where"] == "objects.json[0].objects[3]"
