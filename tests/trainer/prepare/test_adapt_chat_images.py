"""Images of chat data: how they are named, where they may be; placeholders; ms-swift's objects."""

from __future__ import annotations

import base64
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare.adapt.chat.turns import Slot, split_text, turn_of
from tests.trainer.prepare.reading_samples import picture, prepared, write

SLOT = {"type": "image"}
HI = {"role": "assistant", "content": "Hi."}


def chat(*images, **more) -> dict:
    return {"messages": [{"role": "user", "content": "Hello?"}, HI], "images": [*images], **more}


def run(folder, *records, words=(), out="out.jsonl"):
    data = write(folder / "data.json", list(records))
    return prepared(folder / out, "adapt", "chat", data, *words)


def test_names_of_files(tmp_path):
    picture(tmp_path / "in it" / "a.png", 20, 10)
    whole = tmp_path / "in it" / "a.png"
    names = (
        "in it/a.png",
        "./in it/a.png",
        "in it\\a.png",
        str(whole),
        whole.as_uri(),
        f"file:{whole}",
        {"path": "in it/a.png", "bytes": None},
        {"url": "in it/a.png"},
        {"image_url": {"url": whole.as_uri()}},
    )
    status, samples, rejected = run(tmp_path, *(chat(name) for name in names))
    assert (status, rejected) == (0, [])
    assert [sample["images"] for sample in samples] == [["in it/a.png"]] * len(names)


def test_images_inside_records_are_written_beside_the_output(tmp_path):
    pixels = picture(tmp_path / "a.jpg", 200, 100).read_bytes()
    code = base64.b64encode(pixels).decode()
    held = (
        f"data:image/jpeg;base64,{code}",
        {"url": f"data:image/jpeg;base64,{code}"},
        code,
        {"bytes": code, "path": "x.jpg"},
        {"type": "base64", "media_type": "image/jpeg", "data": code},
    )
    parts = [{"type": "image", "source": held[-1]}, {"type": "text", "text": "Hello?"}]
    anthropic = {"messages": [{"role": "user", "content": parts}, HI]}
    records = [*(chat(image) for image in held[:3]), anthropic]
    status, samples, rejected = run(tmp_path, *records, out="made/out.jsonl")
    assert (status, rejected) == (0, [])
    for i, sample in enumerate(samples):
        assert sample["images"] == [f"out_images/{i:08d}_0.jpg"]
        assert (tmp_path / "made" / sample["images"][0]).read_bytes() == pixels
    assert samples[-1]["messages"][0]["content"] == [SLOT, {"type": "text", "text": "Hello?"}]


def test_files_and_images_inside_records_have_one_root(tmp_path):
    pixels = picture(tmp_path / "data" / "a.png", 20, 10).read_bytes()
    code = f"data:image/png;base64,{base64.b64encode(pixels).decode()}"
    data = write(tmp_path / "data" / "data.json", [chat("a.png", code), chat(code)])
    status, samples, _ = prepared(tmp_path / "out" / "o.jsonl", "adapt", "chat", data)
    assert status == 0
    assert samples[0]["images"] == ["data/a.png", "out/o_images/00000000_1.png"]
    for sample in samples:
        parse_sample(sample, root=tmp_path, where="x")


def test_what_is_no_image_below_an_allowed_folder(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    picture(own / "a.png", 20, 10)
    hidden = picture(other / "b.png", 20, 10)
    os.symlink(hidden, own / "link.png")
    (own / "text.png").write_text("no image")
    unusable = {
        "https://example.com/a.png": "expected a file (the network is never used)",
        "s3://bucket/a.png": "the network is never used",
        str(hidden): f"expected a path below {own} (--image-root or data.image_roots allows ",
        hidden.as_uri(): "data.image_roots allows others)",
        "../other/b.png": "expected a relative path inside the data root",
        "link.png": "a link to",
        "c.png": "which is not there",
        "text.png": "expected an image in a known format",
        "data:image/png;base64,AAAA": "expected an image in a known format, got '3 bytes'",
        "data:image/png;base64,?": "expected an image in base64",
        "": "expected an image or its path, got ''",
        "\ud800.png": "expected a path in Unicode",
        "a\0.png": "expected a relative path inside the data root",
        "x\\" * 3000: "images[0]",
    }
    others = (5, None, [], {}, {"bytes": None, "path": None}, {"url": {"url": {"url": {}}}})
    records = [chat(each) for each in (*unusable, *others)]
    status, samples, rejected = run(own, chat("a.png"), *records)
    assert (status, len(samples)) == (0, 1)
    reasons = [lost["reason"] for lost in rejected]
    for reason, wanted in zip(reasons, unusable.values(), strict=False):
        assert reason.startswith("`images[0]`: ")
        assert wanted in reason
    for reason in reasons[len(unusable) :]:
        assert "expected an image or its path, got" in reason


def test_absolute_paths_below_an_allowed_folder(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    picture(own / "a.png", 20, 10)
    hidden = picture(other / "deep" / "b.png", 20, 10)
    words = ("--image-root", other)
    status, samples, rejected = run(own, chat("a.png"), chat(str(hidden)), words=words)
    assert (status, rejected) == (0, [])
    assert [sample["images"] for sample in samples] == [["own/a.png"], ["other/deep/b.png"]]
    status, samples, _ = run(own, chat(str(hidden)), words=words, out="one.jsonl")
    assert (status, samples[0]["images"]) == (0, ["deep/b.png"])


def test_a_relative_path_is_tried_below_every_folder(tmp_path):
    picture(tmp_path / "other" / "b.png", 20, 10)
    words = ("--image-root", tmp_path / "other")
    status, samples, _ = run(tmp_path / "own", chat("b.png"), words=words)
    assert (status, samples[0]["images"]) == (0, ["b.png"])


def test_an_image_root_that_is_not_there(tmp_path, capsys):
    assert run(tmp_path, chat(), words=("--image-root", tmp_path / "no"))[0] == 2
    assert "`--image-root`: expected what is there" in capsys.readouterr().err


words = st.text("ab \n<>é", min_size=1, max_size=6).map(lambda text: text.strip("\n") or "x")


@settings(max_examples=60)
@given(st.lists(st.one_of(st.just(Slot()), words), max_size=6))
def test_texts_and_placeholders_round_trip(parts):
    joined = [parts[0]] if parts else []
    for part in parts[1:]:  # neighbouring texts are one
        if isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    for between in ("<image>", "<image>\n", "\n<image>", "\n<image>\n"):
        written = "".join(part if isinstance(part, str) else between for part in joined)
        assert list(split_text(written)) == joined
    assert list(turn_of("user", written, "x").pieces) == joined


@settings(max_examples=60)
@given(st.text(max_size=8))
def test_an_answer_is_kept_to_the_character(said):
    assert turn_of("assistant", said, "x").pieces == (said,)
    halves = [{"type": "text", "text": said[:3]}, {"type": "text", "text": said[3:]}]
    assert turn_of("assistant", halves, "x").pieces == (said,)


# ms-swift's objects


def grounded(asked: str, said: str, **objects) -> dict:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": messages, "images": ["a.png"], "objects": objects}


def places(sample: dict) -> list[tuple]:
    """(words, place) of the regions."""
    answer = sample["messages"][-1]["content"]
    return [
        (answer[slice(*region["char_span"])], region.get("box", region.get("points")))
        for region in sample.get("regions", [])
    ]


def test_objects_whose_numbers_may_count_something_else(tmp_path, capsys):
    picture(tmp_path / "a.png", 200, 100)
    small = grounded("<image>Where?", "<bbox>", bbox=[[0.1, 0.1, 0.5, 0.5]])
    as_text = {**small, "objects": json.dumps(small["objects"])}
    status, samples, rejected = run(tmp_path, small, as_text)
    assert (status, samples) == (0, [])
    wanted = '`regions[0].box`: expected pixels, or "coord": "unit" for 0 to 1, got [0.1, '
    assert [each["reason"].startswith(wanted) for each in rejected] == [True, True]
    told = capsys.readouterr().err
    assert told.startswith("warning: data.json[0]: numbers of 2 boxes or points never leave [0, 1]")
    assert "(objects.bbox_type norm1); taken for pixels of the image" in told
    assert told.count("warning") == 1  # not of the texts that stand for them

    plain = grounded("<image>Where?", "<bbox>", bbox=[[20, 10, 40, 20]])
    said = {**small, "objects": {**small["objects"], "bbox_type": "real"}}
    assert run(tmp_path, plain, said, words=("--overwrite",))[0] == 0
    assert capsys.readouterr().err == ""


def test_objects_become_texts_and_regions(tmp_path):
    picture(tmp_path / "a.png", 200, 100)
    picture(tmp_path / "b.png", 100, 100)
    two = {"ref": ["a dog", "a cat"], "bbox": [[20, 10, 40, 20], [100, 50, 201, 100]]}
    records = [
        grounded("<image>Describe.", "<ref-object><bbox> and <ref-object><bbox>.", **two),
        grounded("<image>Find <ref-object>.", "<bbox> <bbox>", **{**two, "ref": ["sheep"]}),
        grounded("<image>Click.", "click('<bbox>')", ref=[], bbox=[[100, 25]]),
        grounded(
            "<image>Find.",
            '[{"bbox_2d": <bbox>, "label": "<ref-object>"}]',
            ref=["dog"],
            bbox=[[0.1, 0.1, 0.2, 0.2]],
            bbox_type="norm1",
        ),
        {
            "query": "<image><image>Where?",
            "response": "<ref-object> <bbox><bbox>",
            "images": ["a.png", "b.png"],
            "objects": {
                "ref": ["dogs"],
                "bbox": [[20, 10, 40, 20], [50, 50, 100, 100]],
                "image_id": [0, 1],
            },
        },
        grounded("<image>A <ref-object>.", "Yes.", ref=["dog"], bbox=None, bbox_type=None),
        grounded("<image>Go.", "<bbox>", bbox=[[100, 100, 200, 200]], bbox_type="norm1000"),
    ]
    status, samples, rejected = run(tmp_path, *records)
    assert (status, rejected) == (0, [])
    first, second = ([20, 10, 40, 20], [100, 50, 200, 100])
    said = [sample["messages"][-1]["content"] for sample in samples]
    assert said == [
        "a dog[100, 100, 200, 200] and a cat[500, 500, 1000, 1000].",
        "[100, 100, 200, 200] [500, 500, 1000, 1000]",
        "click('[500, 250]')",
        '[{"bbox_2d": [100, 100, 200, 200], "label": "dog"}]',
        "dogs [100, 100, 200, 200][500, 500, 1000, 1000]",
        "Yes.",
        "[100, 100, 200, 200]",
    ]
    box, edge = "[100, 100, 200, 200]", "[500, 500, 1000, 1000]"
    assert list(map(places, samples)) == [
        [("a dog", first), (box, first), ("a cat", second), (edge, second)],
        [(box, first), (edge, second)],
        [("[500, 250]", [[100, 25]])],
        [(box, [0.1, 0.1, 0.2, 0.2]), ("dog", [0.1, 0.1, 0.2, 0.2])],
        [("dogs", first), ("dogs", [50, 50, 100, 100]), (box, first), (edge, [50, 50, 100, 100])],
        [],
        [(box, [100, 100, 200, 200])],
    ]
    assert samples[1]["messages"][0]["content"][1]["text"] == "Find sheep."
    parsed = parse_sample(samples[4], root=tmp_path, where="x")
    assert [(r.image, r.boxes) for r in parsed.regions[2:]] == [
        (0, ((0.1, 0.1, 0.2, 0.2),)),
        (1, ((0.5, 0.5, 1.0, 1.0),)),
    ]
    (tied,) = parse_sample(samples[6], root=tmp_path, where="x").regions
    assert tied.boxes == ((0.1, 0.1, 0.2, 0.2),)


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({"bbox": []}, "`objects.bbox`: expected 1, one for each <bbox>, got 0"),
        ({"bbox": [[1, 2, 3, 4]], "ref": ["a"]}, "`objects.ref`: expected 0, one for each"),
        ({"bbox": [[3, 2, 1, 4]]}, "`objects.bbox[0]`: expected x0 < x1, y0 < y1"),
        ({"bbox": [[1, 2, 3]]}, "`objects.bbox[0]`: expected 4 numbers"),
        ({"bbox": [[0, 0, 900, 50]]}, "expected coordinates within 200 x 100"),
        ({"bbox": [5]}, "`objects.bbox[0]`: expected 4 numbers"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "x"}, "expected one of real, norm1, norm1000"),
        ({"bbox": [[1, 2, 3, 4]], "image_id": [1]}, "`objects.image_id[0]`: expected an index"),
        ({"bbox": 5}, "`objects.bbox`: expected a list, got 5"),
        ([1], "`objects`: expected an object with ref and bbox"),
    ],
)
def test_bad_objects(tmp_path, objects, reason):
    picture(tmp_path / "a.png", 200, 100)
    record = grounded("<image>Where?", "<bbox>")
    _, samples, (lost,) = run(tmp_path, {**record, "objects": objects})
    assert samples == []
    assert reason in lost["reason"]


def test_nothing_is_left_of_an_image_whose_record_is_rejected(tmp_path):
    pixels = base64.b64encode(picture(tmp_path / "a.png", 20, 10).read_bytes()).decode()
    bad = {**chat(f"data:image/png;base64,{pixels}"), "phrases": [{"text": "no"}]}
    status, samples, (lost,) = run(tmp_path, bad, out="made/out.jsonl")
    assert (status, samples) == (0, [])
    assert "phrases[0]" in lost["reason"]
    assert [path.name for path in (tmp_path / "made" / "out_images").iterdir()] == []
    assert json.loads(json.dumps(lost["original"])) == bad


# boxes that answers write


def test_boxes_in_answers_become_regions(tmp_path, capsys):
    picture(tmp_path / "a.png", 200, 100)
    box, label = "[20, 10, 40, 20]", '"label": "dog"'
    answer = f'[{{"bbox_2d": {box}, {label}}}]'
    turns = [{"from": "human", "value": "<image>\nFind it."}, {"from": "gpt", "value": answer}]
    record = {"image": "a.png", "conversations": turns}
    status, (sample,), _ = run(tmp_path, record, words=("--coord", "pixel"))
    assert status == 0
    assert places(sample) == [("dog", [20, 10, 40, 20]), (box, [20, 10, 40, 20])]
    capsys.readouterr()

    status, (sample,), _ = run(tmp_path, record, out="unsaid.jsonl")
    assert (status, places(sample)) == (0, [])
    assert "warning: data.json[0]: numbers of 1 boxes" in capsys.readouterr().err

    written = ("--coord", "pixel", "--box-style", "internvl")
    status, (sample,), _ = run(tmp_path, record, words=written, out="written.jsonl")
    assert status == 0
    said = "<ref>dog</ref><box>[[100, 100, 200, 200]]</box>"
    assert sample["messages"][-1]["content"] == said
    assert {words for words, _ in places(sample)} == {"dog", "[100, 100, 200, 200]"}
    assert all(place == [20, 10, 40, 20] for _, place in places(sample))

    status, (sample,), _ = run(tmp_path, record, words=("--boxes", "none"), out="none.jsonl")
    assert (status, sample["messages"][-1]["content"], places(sample)) == (0, answer, [])


def test_objects_are_written_in_a_style(tmp_path):
    picture(tmp_path / "a.png", 200, 100)
    boxes = {"ref": ["dog"], "bbox": [[20, 10, 40, 20]]}
    records = [
        grounded("<image>Find.", "<ref-object><bbox>", **boxes),
        grounded("<image>Find.", '{"bbox_2d": <bbox>, "label": "<ref-object>"}', **boxes),
        grounded("<image>Click.", "<bbox>", bbox=[[20, 10]]),
    ]
    words = ("--box-style", "internvl")
    status, samples, (lost,) = run(tmp_path, *records, words=words)
    assert status == 0
    said = [sample["messages"][-1]["content"] for sample in samples]
    numbers = "[100, 100, 200, 200]"
    assert said[0] == f"dog<box>[{numbers}]</box>"
    assert said[1].startswith('{"bbox_2d": ') and said[1].endswith(', "label": "dog"}')
    for sample in samples:
        found = dict(places(sample))
        assert found["dog"] == found[numbers] == [20, 10, 40, 20]
    assert "`objects.bbox[0]`: expected what the style internvl can write" in lost["reason"]
