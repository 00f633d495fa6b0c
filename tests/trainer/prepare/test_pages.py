"""Folders, lone images, and the pages of PDF and TIFF files as inputs of `prepare words`."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from groundkern.hf.data.pictures import ORIENTATION
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.file_kinds import kind_of
from groundkern.trainer.data.images import SampleError, image_size
from groundkern.trainer.prepare.documents import (
    OnPages,
    Page,
    chosen_pages,
    page_frames,
    page_image,
)
from groundkern.trainer.prepare.listing import find_pictures, holds_pictures
from groundkern.trainer.prepare.pipeline import Made, prepare
from groundkern.trainer.records import chat_sample
from tests.trainer.prepare.papers import pdf, with_picture
from tests.trainer.prepare.records import lines_of

pdfium = pytest.importorskip("pypdfium2", reason="needs the package pypdfium2")
PNG = (24, 16)


def said(item) -> Made:
    """A sample for each image."""
    return Made([chat_sample([item.value], "?", "yes")])


def run(path, output, dpi=72, **options):
    """(samples, rejected, what was found) of the inputs below `path`."""
    found = find_pictures(path, output=output, **options)
    work = OnPages(said, found.root, dpi)
    settings = {"command": "words", **options, "root": None}
    out = prepare(found.source, work, output=output, settings=settings, root=found.root)
    rejected = lines_of(out.rejects) if out.rejects.exists() else []
    return lines_of(output), rejected, found


def images(made):
    return [record["images"][0] for record in made]


def picture(path: Path, color="red", kind=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", PNG, color).save(path, kind)
    return path


def tiff(path: Path, *colors, **options) -> Path:
    frames = [Image.new("RGB", PNG, color) for color in colors]
    frames[0].save(path, "TIFF", save_all=True, append_images=frames[1:], **options)
    return path


# Documents


def test_a_pdf_becomes_an_image_a_page(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["one", "two", "three"]))
    made, rejected, found = run(tmp_path / "a.pdf", tmp_path / "out" / "train.jsonl")
    assert images(made) == [f"train_pages/a.pdf/000{n}.png" for n in (1, 2, 3)]
    assert (rejected, found.root, found.source.total) == ([], (tmp_path / "out").resolve(), 3)
    with Image.open(found.root / images(made)[0]) as page:
        assert (page.size, page.mode) == ((200, 100), "RGB")
        assert 0 < np.asarray(page.convert("L")).mean() < 255
    assert len({(found.root / name).read_bytes() for name in images(made)}) == 3


def test_dpi_and_pages(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(list("abcdefgh")))
    made, _, found = run(tmp_path / "a.pdf", tmp_path / "o.jsonl", dpi=144, pages="1-2, 7-")
    names = [name.rpartition("/")[2] for name in images(made)]
    assert names == ["0001.png", "0002.png", "0007.png", "0008.png"]
    assert Image.open(found.root / images(made)[0]).size == (400, 200)
    made, rejected, _ = run(tmp_path / "a.pdf", tmp_path / "p.jsonl", pages="9")
    assert made == []
    assert rejected == [
        {
            "where": "a.pdf",
            "reason": "`--pages`: expected pages of the 8 there, got others",
            "original": "a.pdf",
        }
    ]


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1,,2", "-3", "1-2-3", "1;2", "9999999"])
def test_pages_of_another_form_are_one_sentence(text):
    with pytest.raises(ConfigError, match="--pages: expected numbers such as 1-3,7, got"):
        chosen_pages(text or ",")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (pdf(["a"], locked=True), "expected a PDF without a password, got 'a.pdf'"),
        (pdf(["a"])[:60], "expected a readable PDF, got 'a.pdf'"),
        (b"%PDF-1.7\n", "expected a readable PDF, got 'a.pdf'"),
        (pdf([]), "expected "),
    ],
)
def test_a_pdf_that_cannot_be_opened_is_rejected(tmp_path, data, why):
    (tmp_path / "a.pdf").write_bytes(data)
    picture(tmp_path / "b.png")
    made, (rejected,), _ = run(tmp_path, tmp_path / "out.jsonl")
    assert images(made) == ["b.png"]
    assert rejected["where"] == "a.pdf"
    assert rejected["reason"].startswith(f"`document`: {why}")


def test_a_page_of_absurd_size_is_refused_before_it_is_rendered(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["a"], (14_400, 14_400)))  # 200 inches
    _, (rejected,), _ = run(tmp_path / "a.pdf", tmp_path / "out.jsonl", dpi=150)
    assert rejected["where"] == "a.pdf page 1"
    assert rejected["original"] == {"file": "a.pdf", "page": 1}
    assert rejected["reason"] == (
        "`page`: expected a page of at most 40000000 pixels (a lower --dpi gives fewer), got "
        "30000 x 30000 at 150 dots per inch"
    )
    made, _, _ = run(tmp_path / "a.pdf", tmp_path / "small.jsonl", dpi=2)
    assert len(made) == 1
    (tmp_path / "b.pdf").write_bytes(with_picture((60_000, 60_000)))
    _, (rejected,), _ = run(tmp_path / "b.pdf", tmp_path / "b.jsonl")
    assert "pictures of at most 100000000 pixels on a page, got 60000 x 60000" in rejected["reason"]


def test_a_page_that_the_work_refuses_leaves_no_image(tmp_path):
    def refuse(item):
        raise SampleError(f"{item.where}: no words")

    (tmp_path / "a.pdf").write_bytes(pdf(["a"]))
    (item,) = find_pictures(tmp_path / "a.pdf", output=tmp_path / "o.jsonl").source.read()
    with pytest.raises(SampleError, match=r"a\.pdf page 1: no words"):
        OnPages(refuse, tmp_path, 72)(item)
    assert list((tmp_path / "o_pages" / "a.pdf").iterdir()) == []


def test_tiff_pages_are_those_of_the_file_and_turned_one_by_one(tmp_path):
    frames, asked = [Image.new("RGB", PNG, color) for color in ("red", "lime", "blue")], []
    for turn in (1, 6, 8):
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        asked.append(exif)
    for frame, exif in zip(frames, asked):
        frame.encoderinfo = {"exif": exif, "tiffinfo": exif}
    frames[0].save(tmp_path / "a.tif", "TIFF", save_all=True, append_images=frames[1:])
    made, rejected, found = run(tmp_path, tmp_path / "out.jsonl")
    assert rejected == []
    assert images(made) == [f"out_pages/a.tif/000{n}.png" for n in (1, 2, 3)]
    pages = [Image.open(found.root / name) for name in images(made)]
    assert [page.getpixel((3, 3)) for page in pages] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert [page.size for page in pages] == [PNG, PNG[::-1], PNG[::-1]]


@pytest.mark.parametrize("tag", [{254: 1}, {254: 4}, {255: 2}])
def test_smaller_copies_in_a_tiff_are_no_pages(tmp_path, tag):
    frames = [Image.new("RGB", size, "red") for size in (PNG, (12, 8))]
    frames[1].encoderinfo = {"tiffinfo": tag}
    frames[0].save(tmp_path / "a.tif", "TIFF", save_all=True, append_images=frames[1:])
    assert page_frames(tmp_path / "a.tif", "TIFF", where="a.tif") == [0]
    made, _, _ = run(tmp_path, tmp_path / "out.jsonl")
    assert images(made) == ["a.tif"]  # as it is: nothing has to be made


def test_what_was_made_is_no_input_of_the_next_run(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.pdf").write_bytes(pdf([name + "1", name + "2"]))
    picture(tmp_path / "in" / "c.png")
    one, _, found = run(tmp_path / "in", tmp_path / "one" / "x.jsonl")
    two, _, other = run(tmp_path / "in", tmp_path / "two" / "x.jsonl")
    assert found.root == other.root == tmp_path.resolve()
    assert images(one)[-1] == images(two)[-1] == "in/c.png"
    assert [name.replace("one/", "two/") for name in images(one)] == images(two)
    for first, second in zip(images(one), images(two)):
        assert (tmp_path / first).read_bytes() == (tmp_path / second).read_bytes()
    # within the folder, whichever output it has
    _, _, found = run(tmp_path / "in", tmp_path / "in" / "x.jsonl")
    assert (found.root, found.source.total) == ((tmp_path / "in").resolve(), 5)
    again = find_pictures(tmp_path / "in", output=tmp_path / "in" / "x.jsonl")
    assert again.source.identity == found.source.identity
    assert again.passed_over.told() == []
    other = find_pictures(tmp_path / "in", output=tmp_path / "in" / "y.jsonl")
    assert other.source.total == 5
    assert other.passed_over.found["folder of pages made before"] == (1, ["x_pages"])


def test_workers_can_be_handed_the_work_and_a_page(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["a"]))
    (item,) = find_pictures(tmp_path / "a.pdf", output=tmp_path / "o.jsonl").source.read()
    work, item = pickle.loads(pickle.dumps((OnPages(said, tmp_path, 72), item)))
    assert work(item).samples[0]["images"] == ["o_pages/a.pdf/0001.png"]


def test_the_output_has_to_be_below_a_root_that_is_given(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pdf").write_bytes(pdf(["a"]))
    with pytest.raises(ConfigError, match=r"--root: expected a folder that .* is in, got .*in"):
        find_pictures(tmp_path / "in", output=tmp_path / "o.jsonl", root=tmp_path / "in")
    picture(tmp_path / "in" / "b.png")
    (page, image) = find_pictures(
        tmp_path / "in", output=tmp_path / "o.jsonl", root=tmp_path
    ).source.read()
    assert isinstance(page.value, Page)
    assert (page.value.image, image.value) == ("o_pages/a.pdf/0001.png", "in/b.png")


def test_a_page_is_turned_as_it_says(tmp_path):
    """A page that is turned by 90 degrees is as high as it was wide."""
    turned = pdf(["a"]).replace(b"/Type /Page /", b"/Type /Page /Rotate 90 /")
    (tmp_path / "a.pdf").write_bytes(turned)
    image = page_image(Page(tmp_path / "a.pdf", "PDF", 1, 0, ""), 72, where="a.pdf page 1")
    assert image.size == (100, 200)


# Files and folders


def test_every_file_of_a_folder_is_an_input_or_counted(tmp_path):
    for name in ("a.PNG", "sub/b.jpg", "c.jpg_large", "d"):
        picture(tmp_path / name, kind="PNG")
    for name in (".thumbnails/t.png", "__MACOSX/._a.jpg", "sub/.hidden.png", "._x.jpg"):
        picture(tmp_path / name, kind="PNG")
    for name in (".DS_Store", "notes.txt", "more.TXT", "b.json", "README"):
        (tmp_path / name).write_text("text")
    (tmp_path / "plan.svg").write_text('<?xml version="1.0"?>\n<svg xmlns="x"></svg>')
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(40))
    picture(tmp_path.parent / "outside" / "o.png")
    (tmp_path / "out.png").symlink_to(tmp_path.parent / "outside" / "o.png")
    (tmp_path / "in.png").symlink_to("a.PNG")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "round").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.png")
    made, rejected, found = run(tmp_path, tmp_path / "out.jsonl")
    assert (images(made), rejected) == (
        ["a.PNG", "c.jpg_large", "d", "in.png", "sub/b.jpg"],
        [],
    )
    counts = {reason: number for reason, (number, _) in found.passed_over.found.items()}
    svg = "an SVG, which is a drawing and has to be rendered to pixels first"
    assert counts == {
        "hidden": 5,
        "no image, .txt": 2,
        "no image, .json": 1,
        "no image, without extension": 1,
        svg: 1,
        "a video, which belongs into `videos`": 1,
        "link that leads out of the folder": 1,
        "file that cannot be read": 1,
        "linked folder": 1,
        "pipe, socket or device": 1,
    }
    record = json.loads((tmp_path / "out.jsonl.prepare.json").read_text())
    assert record["passed_over"][svg] == {"count": 1, "first": ["plan.svg"]}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_counted(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "shut").mkdir(mode=0)
    found = find_pictures(tmp_path, output=tmp_path / "out.jsonl")
    assert found.passed_over.found["folder that cannot be read"] == (1, ["shut"])


def test_a_folder_without_images_says_what_is_there(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"without; passed over, no image, \.txt: 1 \(a\.t"):
        find_pictures(tmp_path, output=tmp_path / "out.jsonl")


def test_a_lone_image_is_an_input(tmp_path):
    path = picture(tmp_path / "a.jpeg")
    assert holds_pictures(path)
    made, _, found = run(path, tmp_path / "out" / "o.jsonl")
    assert (images(made), found.root) == (["a.jpeg"], tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert not holds_pictures(tmp_path / "data.jsonl")
    assert not holds_pictures(tmp_path / "none.jsonl")


# Formats that need something


def refused(path) -> str:
    with pytest.raises(SampleError) as error:
        image_size(path, where="x:1", field="images[0]")
    return str(error.value)


def test_a_format_that_pillow_does_not_open_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf(["a"]))
    assert refused(tmp_path / "a.pdf") == (
        "x:1: `images[0]`: expected an image in a known format, got 'a.pdf', a PDF, whose pages "
        "`groundkern prepare words FILE.pdf` makes into images"
    )
    (tmp_path / "a.png").write_text("<svg></svg>")
    assert "an SVG, which is a drawing and has to be rendered" in refused(tmp_path / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.eps")  # Ghostscript would run what is in it
    assert "an EPS, which is a drawing and has to be rendered" in refused(tmp_path / "a.eps")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [each for each in Image.ID if each != "HEIF"])
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40))
    assert "needs the package pillow-heif (pip install pillow-heif)" in refused(tmp_path / "a.heic")
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(SampleError, match=r"a\.pdf: a PDF needs the package pypdfium2"):
        page_frames(tmp_path / "a.pdf", "PDF", where="a.pdf")


def test_heic_is_opened_without_being_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.heic")
    shutil.copy(tmp_path / "a.heic", tmp_path / "b.jpg")
    monkeypatch.delitem(Image.OPEN, "HEIF")  # as in a new process
    monkeypatch.setattr(Image, "ID", [each for each in Image.ID if each != "HEIF"])
    made, rejected, _ = run(tmp_path, tmp_path / "out.jsonl")
    assert (images(made), rejected) == (["a.heic", "b.jpg"], [])


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"RIFF\0\0\0\0WAVEfmt ", None),
        (b"BM\x36\0\0\0\0\0\0\0", "BMP"),
        (b"BM is a company", None),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x1cftypqt  \0\0\0\0qt  heic", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isom", "video"),
        (b"junk of a mail server\n%PDF-1.4", "PDF"),
        (b"<html><svg></svg></html>", None),
        (b"\xef\xbb\xbf<svg>", "SVG"),
        (b'{"messages": []}', None),
        (b"", None),
    ],
)
def test_kinds_by_their_first_bytes(head, kind):
    assert kind_of(head) == kind


def test_a_drawn_page_can_be_read(tmp_path):
    """What is written is what the document shows: black letters on white."""
    page = Image.new("L", (300, 80), "white")
    ImageDraw.Draw(page).text((10, 10), "Total 41.80", fill="black")
    page.save(tmp_path / "a.pdf", resolution=72)
    image = page_image(Page(tmp_path / "a.pdf", "PDF", 1, 0, ""), 72, where="x")
    assert image.size == (300, 80)
    assert np.abs(np.asarray(image.convert("L")).astype(int) - np.asarray(page)).mean() < 3
