"""The index of a data file (issue 17, item 18): what it says, and when it may be believed."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundkern.trainer import durable
from groundkern.trainer.data import index as data_index
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.index import Rules
from tests.sources import imported, modules


def line(answer: str, image: str = "a.png", **more) -> bytes:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"images": [image], "messages": messages, **more}).encode()


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """60 samples in 6 batches, every tenth without its image, and some blank lines."""
    monkeypatch.setattr(data_index, "LINES", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = []
    for i in range(60):
        region = {"text": f"{i}", "box": [0, 0, 4, 4]}
        more = {"task": f"t{i % 7}", "regions": [region] * (i % 3)}
        lines.append(line(f"{i}", "none.png" if i % 10 == 5 else "a.png", **more))
        if i % 9 == 0:
            lines.append(b" ")
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "data.jsonl"


def same(a: JsonLinesDataset, b: JsonLinesDataset) -> bool:
    kept = all(np.array_equal(a.counts[name], b.counts[name]) for name in data_index.COUNTS)
    names = [[each.sample(i).where for i in range(len(each))] for each in (a, b)]
    return kept and names[0] == names[1] and a.tasks == b.tasks and a.bad == b.bad


def parsed(monkeypatch) -> list[int]:
    """The numbers of the lines that are parsed from now on, in this process."""
    numbers, parse = [], Rules.parse

    def noting(self, content, number):
        numbers.append(number)
        return parse(self, content, number)

    monkeypatch.setattr(Rules, "parse", noting)
    return numbers


def test_several_processes_find_what_one_does(path):
    one, several = (JsonLinesDataset(path, processes=n) for n in (1, 3))
    several_again = data_index.check_all(one._rules, [], 2**30, 3)
    assert list(several_again) == []
    assert same(one, several)
    assert len(one) == 54
    assert [bad.where for bad in one.bad][:2] == ["data.jsonl:7", "data.jsonl:18"]
    assert one.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert multiprocessing.active_children() == []


def test_large_files_are_checked_by_several_processes_and_small_ones_are_not(path, monkeypatch):
    monkeypatch.setattr(data_index, "SMALL", path.stat().st_size // 2)
    monkeypatch.setattr(data_index, "cores", lambda: 2)
    numbers = parsed(monkeypatch)
    large = JsonLinesDataset(path)
    assert numbers == []
    monkeypatch.undo()
    numbers = parsed(monkeypatch)
    small = JsonLinesDataset(path)
    assert len(numbers) == 60
    assert same(large, small)


def test_counts_of_each_sample(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    place = {"text": "two", "box": [0, 0, 4, 4]}
    wide = {"text": "two", "box": [0, 0, 8, 5], "weight": 0}
    full = line(
        "one two", regions=[place, place, wide], words=[place] * 2, phrases=[{"text": "one"}]
    )
    several = {"messages": [{"role": "assistant", "content": text} for text in ("a", "", " \n")]}
    (tmp_path / "d.jsonl").write_bytes(full + b"\n" + json.dumps(several).encode())
    counts = JsonLinesDataset(tmp_path / "d.jsonl").counts
    assert {name: values.tolist() for name, values in counts.items()} == {
        "images": [1, 0],
        "videos": [0, 0],
        "regions": [3, 0],
        "words": [2, 0],
        "phrases": [1, 0],
        "answers": [1, 3],
        "answers_empty": [0, 2],
        "regions_wide": [1, 0],
        "words_twice": [1, 0],
        "gated": [1, 0],
        "characters": [8, 3],
        "width": [8, 0],
        "height": [8, 0],
        "frames": [0, 0],
        "frame_width": [0, 0],
        "frame_height": [0, 0],
    }


def test_a_second_start_checks_bad_lines_alone(path, tmp_path, monkeypatch):
    first = JsonLinesDataset(path, cache=tmp_path / "run")
    numbers = parsed(monkeypatch)
    second = JsonLinesDataset(path, cache=tmp_path / "run")
    assert numbers == [int(bad.where.rpartition(":")[2]) for bad in first.bad]
    assert same(first, second)
    assert first.digest == second.digest
    with pytest.raises(SampleError, match=r"^data.jsonl:7: `images\[0\]`"):
        JsonLinesDataset(path, cache=tmp_path / "run", on_bad_sample="stop")


def test_a_repaired_image_is_found_and_kept(path, tmp_path, monkeypatch):
    JsonLinesDataset(path, cache=tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
    repaired = JsonLinesDataset(path, cache=tmp_path / "run")
    assert len(repaired) == 60
    assert repaired.bad == []
    fresh = JsonLinesDataset(path)
    numbers = parsed(monkeypatch)
    assert same(JsonLinesDataset(path, cache=tmp_path / "run"), fresh)
    assert len(numbers) == 2 * 60  # of `same` itself


@pytest.mark.parametrize("what", ["bytes", "root", "max_pixels", "max_line", "format", "place"])
def test_an_index_of_something_else_is_not_believed(path, tmp_path, monkeypatch, what):
    JsonLinesDataset(path, cache=tmp_path / "run")
    options = {}
    if what == "bytes":  # as many of them, at the same time
        content, time = path.read_bytes(), path.stat().st_mtime_ns
        path.write_bytes(content.replace(b'"content": "59"', b'"content": "58"'))
        os.utime(path, ns=(time, time))
    elif what == "root":
        (tmp_path / "other").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / "a.png")
        options = {"root": tmp_path / "other"}
    elif what == "format":
        module = tmp_path / "sample.py"
        module.write_text("# another parser\n")
        monkeypatch.setattr(data_index.sample, "__file__", str(module))
    elif what == "place":
        path = path.rename(tmp_path / "moved.jsonl")
    else:
        options = {what: 10_000}
    numbers = parsed(monkeypatch)
    JsonLinesDataset(path, cache=tmp_path / "run", **options)
    assert len(numbers) == 60


def test_the_code_of_the_format_is_all_that_a_sample_is_parsed_with():
    sources = modules("groundkern")
    reached, waiting = set(), {"groundkern.trainer.data.sample"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        known = imported(sources[name], set(sources))
        waiting |= {each for each in known if each.startswith("groundkern.trainer.data.")} - reached
    assert "groundkern.trainer.data.arrays" in reached
    assert reached <= {module.__name__ for module in data_index._CODE}


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    return {
        "empty": b"",
        "cut": content[:middle],
        "one byte short": content[:-1],
        "longer": content + b"\0",
        "a bit": content[:middle] + flipped + content[middle + 1 :],
        "other": b"\x80\x04cos\nsystem\n",  # what a pickle could do
        "zeros": bytes(len(content)),
    }


@pytest.mark.parametrize("how", damaged(b"12345678"))
def test_a_damaged_index_is_made_anew_and_said(path, tmp_path, caplog, monkeypatch, how):
    first = JsonLinesDataset(path, cache=tmp_path / "run")
    (file,) = (tmp_path / "run" / "index").iterdir()
    content = file.read_bytes()
    file.write_bytes(damaged(content)[how])
    numbers = parsed(monkeypatch)
    with caplog.at_level(logging.WARNING):
        again = JsonLinesDataset(path, cache=tmp_path / "run")
    assert len(numbers) == 60
    assert f"{file} is damaged: the data is checked again" in caplog.text
    assert same(first, again)
    assert file.read_bytes() == content


def test_nothing_is_kept_without_a_folder_and_a_full_disk_is_only_said(
    path, tmp_path, monkeypatch, caplog
):
    before = set(tmp_path.rglob("*"))
    JsonLinesDataset(path)
    assert set(tmp_path.rglob("*")) == before

    def full(file, content):
        raise durable.StorageError(f"{file} cannot be written: No space left on device")

    monkeypatch.setattr(durable, "write_bytes", full)
    assert len(JsonLinesDataset(path, cache=tmp_path / "run")) == 54
    assert "No space left on device (the data will be checked again" in caplog.text


def test_an_error_ends_the_processes(path):
    with pytest.raises(SampleError, match=r"^data.jsonl:7: "):
        JsonLinesDataset(path, on_bad_sample="stop", processes=2)
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_one_sentence(path, monkeypatch):
    own, parse = os.getpid(), Rules.parse

    def killed(self, content, number):
        if number == 30 and os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return parse(self, content, number)

    monkeypatch.setattr(Rules, "parse", killed)
    monkeypatch.setattr(data_index, "SMALL", 0)
    with pytest.raises(SampleError, match=r"^data.jsonl: a process that checks it was killed"):
        JsonLinesDataset(path, processes=2)
    assert multiprocessing.active_children() == []


def test_hashes_are_of_lines_without_their_ends():
    assert data_index.line_hash(b"{}\r\n") == data_index.line_hash(b"{}")
    assert data_index.line_hash(b"{} ") != data_index.line_hash(b"{}")
