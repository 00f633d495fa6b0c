"""`--shard i/n` and `--gather n`: what the shards make is what one process makes, byte for byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from groundkern.trainer.config import ConfigError, validate
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare import output as output_module
from groundkern.trainer.prepare.gathering import gather
from groundkern.trainer.prepare.listing import find_pictures
from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.reading import OcrWord
from groundkern.trainer.prepare.pipeline import Made, prepare, write_image
from groundkern.trainer.prepare.shards import Shard
from groundkern.trainer.prepare.sources import Unusable, listed, values
from groundkern.trainer.program import main
from groundkern.trainer.training_data import training_data
from tests.trainer.prepare.test_pipeline import SETTINGS, answers, sample


@pytest.mark.parametrize("total", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("of", [1, 2, 3, 7, 64])
def test_every_input_is_in_one_shard_and_sizes_differ_by_one(total, of):
    shards = [Shard(number, of) for number in range(1, of + 1)]
    if of > max(total, 1):
        with pytest.raises(ConfigError, match=rf"one shard for each of the {total} inputs, got 1/"):
            shards[0].part(total)
        return
    parts = [shard.part(total) for shard in shards]
    assert [index for part in parts for index in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "-1/4", "1", "1/", "1/4/2", "a/b", "1.0/4"])
def test_a_shard_that_makes_no_sense_is_one_sentence(tmp_path, capsys, text):
    words = ["prepare", "maps", "--task", "grid_patch", "--output", str(tmp_path / "o.jsonl")]
    with pytest.raises(SystemExit) as stop:
        main([*words, f"--shard={text}"])
    assert stop.value.code == 2
    wanted = "expected I/N with I from 1 to N and N up to 99,999, such as 3/64"
    assert f"{wanted}, got {text!r}" in capsys.readouterr().err


def test_shard_and_gather_exclude_each_other(tmp_path, capsys):
    words = ["prepare", "maps", "--task", "grid_patch", "--output", str(tmp_path / "o.jsonl")]
    for more, told in (
        (["--shard", "1/2", "--gather", "2"], "not allowed with"),
        (["--gather", "0"], "the number of shards"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert told in capsys.readouterr().err
    assert main([*words, "--count", "2", "--shard", "1/3", "--workers", "1"]) == 2
    assert "one shard for each of the 2 inputs, got 1/3" in capsys.readouterr().err


def squad() -> bytes:
    questions = [
        {
            "id": f"q{i % 5}",  # the sixth and seventh have an id for the second time
            "question": "How much?",
            "answers": [{"text": f"{i}.80", "answer_start": 4}] if i != 3 else [],
        }
        for i in range(7)
    ]
    paragraphs = [{"context": f"Not {i}.80", "qas": [q]} for i, q in enumerate(questions)]
    return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}).encode()


def chats() -> bytes:
    """Samples with words, one with an id for the second time, and a line that is no JSON."""
    lines = []
    for i in range(7):
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        told = {"role": "assistant", "content": f"The red car costs {i}00 euros."}
        words = [{"text": f"{i}00", "box": [2, 2, 30, 20]}, {"text": "car", "box": [2, 30, 30, 50]}]
        made = {"id": f"s{i % 6}", "images": ["a.png"], "messages": [asked, told], "words": words}
        lines.append(json.dumps(made))
    return "\n".join([*lines[:4], "no JSON", *lines[4:]]).encode()


def places() -> bytes:
    box = {"box": [1, 1, 20, 20]}
    lines = [{"image": "a.png", "label": f"thing {i}", "places": [box] * i} for i in range(6)]
    return "\n".join(map(json.dumps, lines)).encode()


def texts() -> bytes:
    lines = [{"text": f"page {i} " + "word " * i} if i != 2 else {"no": 1} for i in range(6)]
    return "\n".join(map(json.dumps, lines)).encode()


COMMANDS = {
    "adapt": (["adapt", "squad", "data"], squad),
    "marks": (["marks", "data"], chats),
    "phrases": (["phrases", "data", "--by", "rules"], chats),
    "places": (["maps", "data", "--overhang", "0.0"], places),
    "drawn": (["maps", "--task", "grid_patch", "two_objects", "--count", "3"], None),
    "render": (["render", "data", "--columns", "6", "--light-on-dark", "0.5"], texts),
    "words": (["words", "scans"], None),
}


def scans(folder: Path) -> None:
    """Pictures, one of them unreadable, and a TIFF of three pages."""
    colors = ("white", "silver", "snow", "gold", "pink")
    first, second, *pages = (Image.new("RGB", (60, 40), color) for color in colors)
    write_image(folder / "a.png", first)
    (folder / "b.png").write_bytes(b"no picture")
    write_image(folder / "c.png", second)
    pages[0].save(folder / "d.tif", save_all=True, append_images=pages[1:])


def tree(folder: Path) -> dict[str, bytes]:
    """All pictures that a command wrote."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_shards_of_a_command_are_what_one_process_makes(tmp_path, monkeypatch, name):
    words, data = COMMANDS[name]
    monkeypatch.setattr(engines, "version", lambda settings: "test 1")
    monkeypatch.setattr(engines, "engine", lambda settings: read_mean)
    (tmp_path / "whole").mkdir()
    Image.new("RGB", (56, 56), "white").save(tmp_path / "whole/a.png")
    (tmp_path / "whole/data").write_bytes(data() if data else b"")
    scans(tmp_path / "whole/scans")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")

    def run(folder: str, *more: str) -> int:
        monkeypatch.chdir(tmp_path / folder)
        return main(["prepare", *words, "--output", "made/train.jsonl", "--workers", "1", *more])

    assert run("whole") == 0
    for number in (3, 1, 2):
        assert run("parts", "--shard", f"{number}/3") == 0
    whole, parts = tmp_path / "whole/made", tmp_path / "parts/made"
    for ending in ("", ".rejected.jsonl"):
        files = [parts / f"train-0000{i}-of-00003.jsonl{ending}" for i in (1, 2, 3)]
        joined = b"".join(file.read_bytes() for file in files if file.exists())
        there = whole / f"train.jsonl{ending}"
        assert joined == (there.read_bytes() if there.exists() else b"")
        assert bool(joined) == (ending == "" or name != "drawn")
    assert tree(parts) == tree(whole)
    assert bool(tree(whole)) == (name in ("drawn", "render", "words"))
    assert run("parts", "--gather", "3") == 0
    for ending in ("", ".rejected.jsonl", ".prepare.json"):
        one, gathered = (made / f"train.jsonl{ending}" for made in (whole, parts))
        assert one.exists() == gathered.exists()
        assert not one.exists() or one.read_bytes() == gathered.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))
    assert run("parts") == 0  # the whole is finished


def read_mean(image: Image.Image) -> list[OcrWord]:
    """An engine that reads how bright the image is."""
    return [OcrWord(str(sum(image.resize((1, 1)).getpixel((0, 0)))), (2, 2, 30, 20), 0.9, 0)]


def numbered(total: int, **identity):
    return values(
        lambda: ((f"n{i}", i) for i in range(total)), total=total, identity={"n": total, **identity}
    )


def dies_at_5(item) -> Made:
    """The process is gone when input 5 comes, unless a file says that it may live."""
    if item.value == 5 and not Path(os.environ["MAY_LIVE"]).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    name = f"pages/{item.index}.png"
    return Made([sample(str(item.index), images=[name])], {name: Image.new("L", (4, 4))}, {"n": 1})


def test_a_shard_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    """SIGKILL between inputs 4 and 5 of shard 2/3 (inputs 3 to 5)."""
    monkeypatch.setenv("MAY_LIVE", str(tmp_path / "may_live"))
    monkeypatch.setattr(output_module, "SAVE_EVERY", -1.0)  # after each input
    common = {"output": tmp_path / "out.jsonl", "settings": SETTINGS}
    second = {**common, "shard": Shard(2, 3)}
    process = multiprocessing.get_context("fork").Process(
        target=prepare, args=(numbered(9), dies_at_5), kwargs=second
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    path = Shard(2, 3).output(tmp_path / "out.jsonl")
    state = json.loads(path.with_name(path.name + ".prepare.json").read_text())
    assert (state["inputs"], state["settings"]["shard"], path.exists()) == (2, "2/3", False)
    for number in (1, 3):
        prepare(numbered(9), dies_at_5, shard=Shard(number, 3), **common)
    with pytest.raises(ConfigError, match=r"expected 3 shards that are done, got 2; missing: 2/3"):
        gather(numbered(9), shards=3, **common)
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "may_live").touch()
    with path.with_name(path.name + ".partial").open("ab") as file:
        file.write(b'{"half')  # what was written after the last record is not trusted
    pictures = {p: p.stat().st_mtime_ns for p in tmp_path.glob("pages/[34].png")}
    again = prepare(numbered(9), dies_at_5, **second)
    assert (again.inputs, again.counts["n"]) == (3, 3)
    assert answers(path) == ["3", "4", "5"]
    assert {p: p.stat().st_mtime_ns for p in pictures} == pictures  # not made again
    before = path.stat().st_mtime_ns
    assert prepare(numbered(9), dies_at_5, **second).finished  # as a rerun of the whole array does
    assert path.stat().st_mtime_ns == before
    assert gather(numbered(9), shards=3, **common).samples == 9
    assert answers(tmp_path / "out.jsonl") == [*map(str, range(9))]


def make(item) -> Made:
    return Made([sample(str(item.value))])


def test_what_does_not_belong_together_is_not_gathered(tmp_path):
    common = {"output": tmp_path / "out.jsonl", "settings": SETTINGS}
    for number in (1, 2):
        prepare(numbered(4), make, shard=Shard(number, 2), **common)
    with pytest.raises(ConfigError, match=r"other settings or inputs \(level: 3 -> 4\)"):
        gather(numbered(4), shards=2, output=common["output"], settings={**SETTINGS, "level": 4})
    with pytest.raises(ConfigError, match=r"00001-of-00002.jsonl: .*input.n: 4 -> 5"):
        gather(numbered(5), shards=2, **common)
    for ending in ("", ".prepare.json"):
        name = "out-00001-of-0000{}.jsonl" + ending
        os.link(tmp_path / name.format(2), tmp_path / name.format(3))
    with pytest.raises(ConfigError, match=r"other settings or inputs \(shard: 1/2 -> 1/3\)"):
        gather(numbered(4), shards=3, **common)
    second = tmp_path / "out-00002-of-00002.jsonl"
    kept = second.read_bytes()
    second.write_bytes(kept[:-5])
    with pytest.raises(ConfigError, match=r"expected \d+ bytes, as its record says, got \d+"):
        gather(numbered(4), shards=2, **common)
    second.write_bytes(kept)
    assert not (tmp_path / "out.jsonl").exists()
    assert gather(numbered(4), shards=2, **common).samples == 4
    with pytest.raises(ConfigError, match="other settings or inputs"):
        gather(numbered(5), shards=2, **common)


def test_inputs_without_a_number_are_counted_and_damaged_ones_stay_in_their_places(tmp_path):
    def read():
        for i in range(7):
            yield f"n{i}", i if i % 3 else Unusable({"i": i}, "expected another", "crowds")

    source = listed(read, [])
    assert source.total is None
    common = {"output": tmp_path / "out.jsonl", "settings": SETTINGS}
    for number in (1, 2):
        prepare(source, make, shard=Shard(number, 2), **common)
    out = gather(source, shards=2, **common)
    assert answers(tmp_path / "out.jsonl") == ["1", "2", "4", "5"]
    assert (out.inputs, out.rejected, out.counts["passed over: crowds"]) == (7, 3, 3)
    rejected = [json.loads(line)["where"] for line in out.rejects.read_text().splitlines()]
    assert rejected == ["n0", "n3", "n6"]


def test_a_folder_is_the_same_for_every_shard(tmp_path, monkeypatch):
    """Whatever order the disk lists it in, and while others write their shards beside it."""
    for name in ("b.png", "a.png", "c/d.png", "c/a.png"):
        write_image(tmp_path / name, Image.new("L", (4, 4)))
    output = tmp_path / "train.jsonl"
    before = find_pictures(tmp_path, output=output)
    for ending in ("", ".partial", ".prepare.json", ".readings"):
        (tmp_path / f"train-00001-of-00002.jsonl{ending}").write_bytes(b"x")
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as found:
                self.found = iter(list(found)[::-1])

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self):
            return self.found

        def __next__(self):
            return next(self.found)

        close = __exit__

    monkeypatch.setattr(os, "scandir", Backwards)
    after = find_pictures(tmp_path, output=output)
    assert list(after.source.read()) == list(before.source.read())
    assert [item.where for item in after.source.read()] == ["a.png", "b.png", "c/a.png", "c/d.png"]
    assert after.source.identity == before.source.identity
    assert not after.source.passed_over
    monkeypatch.undo()
    write_image(tmp_path / "train_pages" / "a.pdf" / "0001.png", Image.new("L", (4, 4)))
    others = find_pictures(tmp_path, output=tmp_path / "other.jsonl")
    assert list(others.source.read()) == list(before.source.read())
    passed = others.source.passed_over["folder of pages made before"]
    assert passed == {"count": 1, "first": ["train_pages"]}


def test_the_shards_are_training_data_in_their_order(tmp_path):
    """As a list in `data.train`, which takes no empty file: a shard that made no sample is one."""

    def all_but_2_and_3(item) -> Made:
        return make(item) if item.value not in (2, 3) else Made([])

    shards = [Shard(number, 3) for number in (1, 2, 3)]
    for shard in shards:
        common = {"output": tmp_path / "out.jsonl", "settings": SETTINGS}
        prepare(numbered(6), all_but_2_and_3, shard=shard, **common)
    gather(numbered(6), shards=3, **common)
    first, empty, last = (str(shard.output(tmp_path / "out.jsonl")) for shard in shards)
    assert not Path(empty).read_bytes()

    def read(*files: str) -> list[str]:
        config = {"model": {"path": "m"}, "data": {"train": [{"path": file} for file in files]}}
        config["training"] = {"output": str(tmp_path / "run"), "steps": 1}
        found = training_data(validate(config, where=lambda loc: "test"))
        return [found.sample(i).messages[0]["content"] for i in range(len(found))]

    assert read(first, last) == read(str(tmp_path / "out.jsonl")) == [*"0145"]
    with pytest.raises(SampleError, match=r"out-00002-of-00003.jsonl: no usable sample"):
        read(first, empty, last)
