"""Hostile inputs end as one sentence with file and line in the rejected file, or are read rightly.

All go through `prepare words` with an engine that reads one word; the pipeline, its sources and the
checks are those of every command.
"""

from __future__ import annotations

import base64
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundkern.trainer.prepare.listing import find_pictures
from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.settings import OcrWord
from groundkern.trainer.prepare.pipeline import Made, prepare
from groundkern.trainer.prepare.sources import json_lines
from groundkern.trainer.prepare.words import ReadWords
from tests.trainer.prepare.records import lines_of, readings, sample

BOX = (1, 1, 5, 5)


@pytest.fixture
def seen(monkeypatch) -> list[Image.Image]:
    """What the engine was handed."""
    images: list[Image.Image] = []

    def read(image):
        images.append(image)
        return [OcrWord("word", BOX, 1.0, 0)]

    monkeypatch.setattr(engines, "engine", lambda settings: read)
    return images


def run(path: Path, source=None, **options):
    """(output lines, rejected lines); every input is in one of them."""
    source = source or json_lines(path)
    root = path if path.is_dir() else path.parent
    work = ReadWords(root, readings(root))
    output = root / "out.jsonl"
    out = prepare(source, work, output=output, settings={"command": "words"}, root=root, **options)
    rejected = lines_of(out.rejects) if out.rejects.exists() else []
    assert out.inputs == source.total == out.samples + len(rejected)
    return lines_of(output), rejected


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_hostile_lines(write, seen):
    """Each bad line between good ones: reason, file, line and original."""
    long = b'{"messages": "' + b"x" * (17 * 2**20) + b'"}'
    records = {
        b'{"messages": [{"role": "\xff"': "expected UTF-8 text, got invalid start byte at byte 24",
        b'{"messages": ': "expected a JSON object, got invalid JSON",
        b"[" * 100_000: "invalid JSON",
        b"7": "expected a JSON object, got 7",
        b'{"messages": "\\ud800"}': "got half a surrogate pair",
        long: f"expected a line of at most {16 * 2**20} bytes, got more",
    }
    lines = [line for bad in records for line in (bad, sample())]
    path = write(*lines)
    made, rejected = run(path)
    assert len(made) == len(records)
    for number, (entry, (line, reason)) in enumerate(zip(rejected, records.items(), strict=True)):
        assert entry["where"] == f"data.jsonl:{2 * number + 1}"
        assert reason in entry["reason"]
        assert "\n" not in entry["reason"]
        original = entry["original"]
        if line is long:
            offset = path.read_bytes().index(long)
            assert original == {"file": "data.jsonl", "offset": offset}
        elif b"\xff" in line:
            assert base64.b64decode(original["base64"]) == line
        elif isinstance(original, str):
            assert original.encode() == line
        else:
            assert original == json.loads(line)


def test_a_line_of_100_megabytes_costs_the_limit_and_no_more(tmp_path, seen):
    path = tmp_path / "data.jsonl"
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    with path.open("wb") as file:
        file.write(json.dumps(sample()).encode() + b"\n")
        file.write(b'{"messages": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}\n' + json.dumps(sample()).encode())
    tracemalloc.start()
    made, rejected = run(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made) == 2
    assert [entry["where"] for entry in rejected] == ["data.jsonl:2"]
    assert peak < 3 * 16 * 2**20


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([5, 5, 5, 9], "expected x0 < x1, y0 < y1, got [5.0, 5.0, 5.0, 9.0]"),
        ([9, 5, 5, 9], "expected x0 < x1, y0 < y1"),
        ([1, 1, float("nan"), 9], "`words[0].box[2]`: expected a finite number, got nan"),
        ([1, 1, float("inf"), 9], "`words[0].box[2]`: expected a finite number, got inf"),
        ([1, 1, 57, 9], "expected pixel coordinates within image 0, 56 x 56"),
        ([-1, 1, 7, 9], "expected pixel coordinates within image 0, 56 x 56"),
        ([1, 1, 7], "expected a value, got nothing"),
        (["1", 1, 7, 9], "expected a valid number, got '1'"),
    ],
)
def test_hostile_boxes(write, seen, box, reason):
    bad = sample(words=[{"text": "x", "box": box}])
    made, (entry,) = run(write(sample(), bad))
    assert len(made) == 1
    assert entry["where"] == "data.jsonl:2"
    assert reason in entry["reason"]
    assert str(entry["original"]).lower() == str(bad).lower()


def test_hostile_images(write, seen):
    """Rejected ones: named with their line; nothing of a bomb is decoded."""
    path = write(sample())
    folder = path.parent
    whole = (folder / "a.png").read_bytes()
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "large.png").write_bytes(png_header(10_001, 10_000))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "strip.png").write_bytes(png_header(1, 201))
    Image.new("F", (8, 8)).save(folder / "float.tiff")
    (folder.parent / "outside.png").write_bytes(whole)
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    os.symlink("loop.png", folder / "loop.png")
    reasons = {
        "bomb.png": "expected an image of ordinary size",
        "large.png": "expected at most 100000000 pixels, got 10001 x 10000",
        "cut.png": "expected an image that can be decoded",
        "text.png": "expected an image in a known format",
        "empty.png": "expected an image in a known format",
        "strip.png": "a longer side of at most 200 times the shorter",
        "float.tiff": "mode F with values beyond 16 bits",
        "none.png": "which is not there",
        "../outside.png": "expected a relative path inside the data root",
        str(folder / "a.png"): "expected a relative path inside the data root",
        "link.png": "a link to",
        "loop.png": "expected",
        "a\0b.png": "expected a relative path inside the data root",
        "x" * 5000: "expected a readable file",
        ".": "which is not there",
    }
    records = [sample(image=name) for name in reasons]
    made, rejected = run(write(sample(), *records))
    assert len(made) == len(seen) == 1
    for number, (entry, (name, reason)) in enumerate(
        zip(rejected, reasons.items(), strict=True), 2
    ):
        assert entry["where"] == f"data.jsonl:{number}"
        assert entry["reason"].startswith("`images[0]`: ")
        assert reason in entry["reason"]
        assert entry["original"] == sample(image=name)


def test_odd_but_good_images(write, seen):
    """EXIF rotation, 16 bit, CMYK, palette, transparency, an extension that lies: read rightly."""
    path = write(sample())
    folder = path.parent
    turned = Image.new("RGB", (30, 60), "black")
    turned.paste("white", (0, 0, 30, 10))  # the white strip is on the right when turned
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "print.jpg", quality=95)
    Image.new("P", (20, 20), 1).save(folder / "palette.gif")
    Image.new("LA", (20, 20), (0, 0)).save(folder / "clear.png")
    Image.new("RGB", (20, 20), "blue").save(folder / "really.png")
    (folder / "really.png").rename(folder / "lies.jpg")
    names = ["turned.jpg", "deep.png", "print.jpg", "palette.gif", "clear.png", "lies.jpg"]
    made, rejected = run(write(*(sample(image=name) for name in names)))
    assert rejected == []
    assert len(made) == len(names)
    assert {image.mode for image in seen} == {"RGB"}
    assert seen[0].size == (60, 30)
    assert seen[0].getpixel((57, 15))[0] > 240 > 20 > seen[0].getpixel((20, 15))[0]
    assert seen[1].getpixel((3, 3)) == (156, 156, 156)
    red, green, blue = seen[2].getpixel((3, 3))
    assert red > 200 > 80 > max(green, blue)
    assert seen[4].getpixel((3, 3)) == (255, 255, 255)
    assert seen[5].getpixel((3, 3)) == (0, 0, 255)


def test_a_folder_with_hostile_files(tmp_path, seen):
    """The same checks for images that no line names, odd names included."""
    Image.new("RGB", (20, 20)).save(tmp_path / "good one.png")
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    os.symlink("/etc/hostname", tmp_path / "link.png")
    (tmp_path / os.fsdecode(b"b\xffd.png")).write_bytes((tmp_path / "good one.png").read_bytes())
    found = find_pictures(tmp_path, output=tmp_path / "out.jsonl")
    made, rejected = run(tmp_path, found.source)
    assert [record["images"] for record in made] == [["good one.png"]]
    assert [entry["where"] for entry in rejected] == ["bomb.png", "b\udcffd.png"]
    assert "expected UTF-8 text" in rejected[1]["reason"]
    assert found.passed_over.told() == [
        "passed over, link that leads out of the folder: 1 (link.png)"
    ]


def only_text(item) -> Made:
    messages = [{"role": "assistant", "content": item.value["text"]}]
    return Made([{"messages": messages}])


def test_duplicate_ids(write):
    """The second is rejected and names the first; 1, "1" and true are three ids."""
    ids = [1, "1", True, None, 1, "1", [1], [1]]
    path = write(*({"id": each, "text": str(n)} for n, each in enumerate(ids)), {"text": "none"})
    output = path.parent / "out.jsonl"
    out = prepare(json_lines(path), only_text, output=output, settings={"command": "test"})
    rejected = lines_of(out.rejects)
    assert [entry["where"] for entry in rejected] == [f"data.jsonl:{n}" for n in (5, 6, 8)]
    assert rejected[0]["reason"] == "`id`: expected an id of its own, got 1, which data.jsonl:1 has"
    assert rejected[1]["original"] == {"id": "1", "text": "5"}
    assert len(lines_of(output)) == 6
