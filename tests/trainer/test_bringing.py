"""Files of other programs where a canonical one is expected: told apart, converted once, trained on
as if `prepare adapt chat` had been run before."""

from __future__ import annotations

import gzip
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from groundkern.trainer import checkpoints, durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.bringing import bring
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.program import main
from groundkern.trainer.train import train
from tests.trainer.tiny_run import config, losses

QUESTION = {"role": "user", "content": "What is it?"}
PLACED = {"role": "user", "content": "<image>What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}
PLAIN = {"messages": [QUESTION, ANSWER]}
GROUNDED = {"images": ["a.png"], **PLAIN, "regions": [{"text": "cat", "box": [1, 2, 3, 4]}]}
MISSPELT = {**PLAIN, "regoins": []}
ASKED = {"from": "human", "value": "<image>\nWho?"}
LLAVA = {"image": "a.png", "conversations": [ASKED, {"from": "gpt", "value": "I."}]}
CANONICAL = {
    "plain": [PLAIN],
    "grounded": [GROUNDED],
    "a misspelt field first": [MISSPELT, GROUNDED],
    "nothing but a misspelt field": [MISSPELT],
    "another program's line first": [LLAVA, GROUNDED],
    "a placeholder as text": [{**GROUNDED, "messages": [PLACED, ANSWER]}],
    "lines that are no objects": [[1], 5, GROUNDED],
    "context": [{"messages": [QUESTION, {**ANSWER, "train": False}, QUESTION, ANSWER]}],
    "a chat of no known kind": [{"caption": "a", "tags": "b"}],
    "parts": [{"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}],
}
FOREIGN = {
    "conversations": [LLAVA],
    "placeholders": [{"messages": [PLACED, ANSWER], "images": ["a.png"]}],
    "behind texts alone": [PLAIN] * 200 + [{"messages": [PLACED, ANSWER], "images": ["a.png"]}],
    "image": [{**PLAIN, "image": "a.png"}],
    "inside": [{**PLAIN, "images": [{"path": "a.png"}]}],
    "flags": [{"messages": [QUESTION, {**ANSWER, "weight": 1}]}],
    "parts of others": [{"messages": [{"role": "user", "content": ["Hello"]}, ANSWER]}],
}


def written(path: Path, records: list, *, array: bool = False) -> Path:
    Image.new("RGB", (20, 10)).save(path.parent / "a.png")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(json.dumps(records) if array else lines)
    return path


@pytest.mark.parametrize("case", CANONICAL)
def test_a_canonical_file_is_used_as_it_is(tmp_path, case):
    path = written(tmp_path / "data.jsonl", CANONICAL[case])
    found = bring(path, root=None, folder=tmp_path / "made")
    assert (found.path, found.root, found.lost) == (path, tmp_path, ())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_program_is_converted(tmp_path, capsys, case, array):
    path = written(tmp_path / "data.json", FOREIGN[case], array=array)
    found = bring(path, root=None, folder=tmp_path / "made")
    assert found.path == tmp_path / "made" / "data.jsonl"
    count = len(FOREIGN[case])
    samples = [json.loads(line) for line in found.path.read_text().split("\n")[:-1]]
    assert len(samples) == count
    images = [found.root / name for sample in samples for name in sample.get("images", [])]
    assert all(image == tmp_path / "a.png" for image in images)
    titles = ("messages with role and content", "conversations with from and value")
    title = titles[case == "conversations"]
    said = f"{path}: read as {title}: {count} samples of {count} records, {found.path}\n"
    assert capsys.readouterr().out == said


def test_an_array_of_canonical_samples_keeps_what_they_carry(tmp_path):
    path = written(tmp_path / "data.json", [GROUNDED], array=True)
    found = bring(path, root=None, folder=tmp_path / "made", shown=False)
    assert json.loads(found.path.read_text()) == GROUNDED


def test_what_is_no_chat_is_one_sentence(tmp_path):
    path = written(tmp_path / "data.json", [{"caption": "a", "tags": "b"}], array=True)
    with pytest.raises(ConfigError, match=r"data.json: a list of objects with caption, tags; "):
        bring(path, root=None, folder=tmp_path / "made")
    path = written(tmp_path / "data.jsonl", [{**PLAIN, "rejected_response": "no"}])
    with pytest.raises(
        ConfigError, match=r"a preference file .* `prepare adapt chat --take-chosen`"
    ):
        bring(path, root=None, folder=tmp_path / "made")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="expected Parquet or Arrow files in the folder"):
        bring(tmp_path / "empty", root=None, folder=tmp_path / "made")


def test_it_is_converted_once_and_anew_when_the_file_changes(tmp_path):
    bad = {**LLAVA, "image": "b.png"}
    path = written(tmp_path / "data.json", [LLAVA, bad], array=True)
    made = tmp_path / "made"
    first = bring(path, root=None, folder=made)
    state = first.path.stat()
    ((where, reason),) = [(bad.where, bad.reason) for bad in first.lost]
    assert (where, reason[:13]) == ("data.json[1]", "`images[0]`: ")
    assert bring(path, root=None, folder=made) == first
    assert first.path.stat().st_mtime_ns == state.st_mtime_ns
    with pytest.raises(SampleError, match=r"data.json\[1\]: `images\[0\]`"):
        bring(path, root=None, folder=tmp_path / "other", on_bad_sample="stop")
    written(path, [LLAVA] * 3, array=True)
    again = bring(path, root=None, folder=made)
    assert (len(again.path.read_text().split("\n")), again.lost) == (4, ())
    bring(path, root=tmp_path, folder=made)  # another root: anew, to the same samples
    assert again.path.read_text() == bring(path, root=tmp_path, folder=made).path.read_text()


def test_absolute_paths_below_an_allowed_folder(tmp_path):
    path = written(tmp_path / "data.json", [{**LLAVA, "image": str(tmp_path / "a.png")}])
    images = tmp_path / "images"
    images.mkdir()
    (lost,) = bring(path, root=images, folder=tmp_path / "one").lost
    assert "--image-root or data.image_roots allows others" in lost.reason
    found = bring(path, root=images, folder=tmp_path / "two", image_roots=[tmp_path])
    assert (found.root, found.lost) == (tmp_path, ())


def test_images_below_a_folder_above_the_file(tmp_path):
    inner = tmp_path / "data"
    inner.mkdir()
    path = written(inner / "data.json", [{**LLAVA, "image": "data/a.png"}])
    (lost,) = bring(path, root=None, folder=tmp_path / "one").lost
    assert lost.reason.endswith(
        f"not there, but below {tmp_path}: name that with --images, --root or data.root"
    )
    assert bring(path, root=tmp_path, folder=tmp_path / "two").lost == ()
    path = written(inner / "more.json", [{**LLAVA, "image": "../a.png"}])
    shutil.copy(inner / "a.png", tmp_path)
    (lost,) = bring(path, root=None, folder=tmp_path / "one").lost
    assert "name that with" not in lost.reason


def test_boxes_are_read_as_the_command_says(tmp_path, caplog):
    made = tmp_path / "made"

    def asked(numbers: list[int]) -> Path:
        said = {"from": "gpt", "value": json.dumps([{"bbox_2d": numbers, "label": "cat"}])}
        return written(tmp_path / "data.json", [{**LLAVA, "conversations": [ASKED, said]}])

    path = asked([2, 1, 10, 5])

    def regions(name: str, coord: str | None) -> list:
        boxes = partial(BoxSettings.read_as, name, coord, None, prefix="--data.")
        (line,) = bring(path, root=None, folder=made, boxes=boxes).path.open()
        return [region["box"] for region in json.loads(line).get("regions", [])]

    assert regions("auto", None) == []
    assert "probably pixels of the image (--data.coord pixel)" in caplog.text
    assert regions("auto", "pixel") == [[2, 1, 10, 5]] * 2
    path = asked([200, 100, 1000, 500])
    assert regions("qwen3", None) == [[4, 1, 20, 5]] * 2
    with pytest.raises(ConfigError, match=r"`--data.boxes`: expected one of auto, none, .* 'x'"):
        regions("x", None)
    with pytest.raises(ConfigError, match=r"`--data.boxes qwen2.5`: expected --model"):
        regions("qwen2.5", None)


OTHERS = {
    "a.csv": (b"image,question\na.png,Who?\n", "a file that begins with 'image,question'"),
    "a.json.gz": (gzip.compress(b"[]"), "a gzip archive, which has to be unpacked first"),
    "a.json": ("[{}]".encode("utf-16"), "a text in UTF-16, which has to be saved as UTF-8"),
    "a.jsonl": (json.dumps(LLAVA, indent=1).encode(), "an object over several lines, the first"),
    "a.png": (b"\x89PNG\r\n\x1a\n", "a PNG image"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_json_is_named(tmp_path, name):
    data, what = OTHERS[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{name}: expected a JSON array, .*, got {what}"):
        bring(path, root=None, folder=tmp_path / "made")
    assert main(["prepare", "adapt", "chat", str(path), "--output", str(tmp_path / "b.jsonl")]) == 2


def foreign(line: str) -> dict:
    """A sample of the tiny run as LLaMA-Factory would have its chat."""
    sample = json.loads(line)
    sample["messages"][0]["content"] = "<image>Where is the red patch?"
    return sample


@pytest.mark.usefixtures("one_thread")
def test_training_on_another_program_s_file_and_continuing_it(data, tmp_path):
    lines = (data / "train.jsonl").read_text().split("\n")[:-1]
    lost = {**foreign(lines[0]), "images": ["none.png"]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*map(foreign, lines), lost]))
    changed = {"train": str(path), "root": str(data), "test": None}
    settings = {"steps": 2, "accumulation": 1, "save_every": 1, "keep": 2}
    more = {"training": settings, "objectives": {"dv_sft": None, "klal": None}}
    train(config(data, tmp_path / "plain", data={"test": None}, **more))
    wanted = config(data, tmp_path / "run", data=changed, **more)
    train(wanted)
    rows = losses(tmp_path / "plain")
    assert len(rows) == 2
    assert losses(tmp_path / "run") == rows
    record = durable.read_json(tmp_path / "run" / folder.RECORD)["bad_samples"]["train"]
    assert record["count"] == 1
    assert record["first"][0]["where"] == "train.json[9]"

    shutil.rmtree(checkpoints.listed(tmp_path / "run")[-1])
    for name in (folder.RECORD, folder.MODEL):
        there = tmp_path / "run" / name
        shutil.rmtree(there) if there.is_dir() else there.unlink()
    train(wanted)
    assert losses(tmp_path / "run") == rows
    again = durable.read_json(tmp_path / "run" / folder.RECORD)
    assert again["continued_from"].endswith("checkpoint-1")

    few = config(data, tmp_path / "few", data={**changed, "max_bad_fraction": 0.05})
    with pytest.raises(SampleError, match=r"expected at most 0.05 .* the first: train.json\[9\]"):
        train(few)


def test_inspect_takes_the_same_file(tmp_path, capsys):
    path = written(tmp_path / "data.json", [LLAVA, {**LLAVA, "image": "b.png"}], array=True)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "data.json: read as conversations with from and value: 1 samples of 2 records" in said
    assert "1 samples, 1 bad; 1 shown" in said
    assert (tmp_path / "data.inspect" / "data.jsonl").exists()
    assert "data.json[1]" in (tmp_path / "data.inspect.html").read_text(encoding="utf-8")
