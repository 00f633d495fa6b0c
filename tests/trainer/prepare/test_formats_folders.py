"""`prepare maps --format voc` and `yolo`: a file an image, in the folders of both."""

import numpy as np
import pytest
from PIL import Image

from tests.trainer.prepare.reading_samples import picture, prepared, said

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>
<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>{more}</object>"""


def thing(name, x0, y0, x1, y1, more="", difficult=0) -> str:
    values = {"name": name, "x0": x0, "y0": y0, "x1": x1, "y1": y1}
    return OBJECT.format(**values, more=more, difficult=difficult)


@pytest.fixture
def voc(tmp_path):
    picture(tmp_path / "JPEGImages" / "a.jpg", 200, 100)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)

    def write(*objects, name="a", size="<size><width>200</width><height>100</height></size>"):
        text = f"<annotation><filename>{name}.jpg</filename>{size}{''.join(objects)}</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)

    write.folder = tmp_path
    return write


def made(folder, style, *words, data=None):
    return prepared(
        folder / "out.jsonl", "maps", data or folder, "--format", style, "--overwrite", *words
    )


def test_voc_counts_from_one_and_includes_the_last_pixel(voc, capsys):
    part = thing("head", 21, 11, 25, 15).replace("object>", "part>")
    voc(thing("dog", 21, 11, 60, 30, part, difficult=1), thing("cat", 0, 1, 7, 8.5))
    for data in (voc.folder, voc.folder / "Annotations"):
        status, samples, rejected = made(voc.folder, "voc", data=data)
        assert (status, rejected) == (0, [])
        assert [said(sample) for sample in samples] == [
            ("Where is the dog?", "dog"),
            ("Where is the head?", "head"),
            ("Where is the cat?", "cat"),
        ]
        places = [sample["regions"] for sample in samples]
        assert places[0] == [{"char_span": [0, 3], "box": [20, 10, 60, 30]}]
        assert places[1] == [{"char_span": [0, 4], "box": [20, 10, 25, 15]}]
        assert places[2] == [{"char_span": [0, 3], "box": [0, 0, 7, 8.5]}]
        assert samples[0]["images"] == ["JPEGImages/a.jpg"]
    assert "noted: difficult" in capsys.readouterr().out


def test_voc_lists_and_what_is_wrong_with_some(voc, capsys):
    voc(thing("dog", 1, 1, 2, 2))
    voc(name="empty")
    voc(thing("dog", 1, 1, "x", 2), thing("", 1, 1, 2, 2), name="b")
    voc(thing("dog", 1, 1, 2, 2), size="<size><width>9</width><height>9</height></size>", name="c")
    picture(voc.folder / "JPEGImages" / "c.jpg", 10, 10)
    (voc.folder / "Annotations" / "d.xml").write_text("<annotation>")
    (voc.folder / "ImageSets" / "Main" / "some.txt").write_text("a 1\nnone -1\n")
    _, samples, rejected = made(voc.folder, "voc")
    assert len(samples) == 1
    reasons = {each["where"]: each["reason"] for each in rejected}
    assert reasons["Annotations/empty.xml"] == "expected annotations, got none"
    assert "`bndbox`: expected four numbers" in reasons["Annotations/b.xml: object[0]"]
    assert "`name`: expected a text" in reasons["Annotations/b.xml: object[1]"]
    assert "an image of 9 x 9, as annotated" in reasons["Annotations/c.xml: 'dog'"]
    assert "expected Pascal VOC's XML" in reasons["Annotations/d.xml"]
    assert "1  passed over: images without annotations" in capsys.readouterr().out
    _, samples, (lost,) = made(voc.folder, "voc", "--split", "some")
    assert len(samples) == 1
    assert lost["where"] == "Annotations/none.xml"
    assert made(voc.folder, "voc", "--split", "other")[0] == 2
    (voc.folder / "ImageSets" / "Main" / "some.txt").write_text("../../etc/passwd\n")
    assert made(voc.folder, "voc", "--split", "some")[0] == 2
    assert "expected names of images" in capsys.readouterr().err


def test_voc_masks_are_the_pixels_of_an_object_s_number(voc):
    voc(thing("dog", 1, 1, 20, 20), thing("cat", 30, 1, 40, 20))
    pixels = np.zeros((100, 200), np.uint8)
    pixels[:20, :20], pixels[:20, 29:40], pixels[20, :20] = 1, 2, 255
    image = Image.fromarray(pixels, "P")
    image.putpalette([i % 256 for i in range(768)])
    (voc.folder / "SegmentationObject").mkdir()
    image.save(voc.folder / "SegmentationObject" / "a.png")
    _, samples, rejected = made(voc.folder, "voc", "--prefer", "mask")
    assert rejected == []
    mask = {"mask": "SegmentationObject/a.png", "char_span": [0, 3]}
    assert [sample["regions"] for sample in samples] == [
        [{**mask, "mask_value": 1}],
        [{**mask, "mask_value": 2}],
    ]


def test_voc_beside_its_images(tmp_path):
    picture(tmp_path / "train" / "a.jpg", 20, 10)
    text = f"<annotation><filename>old.jpg</filename>{thing('dog', 1, 1, 5, 5)}</annotation>"
    (tmp_path / "train" / "a.xml").write_text(text)
    _, (sample,), _ = made(tmp_path, "voc")
    assert sample["images"] == ["train/a.jpg"]


def test_two_folders_with_the_same_names_keep_their_images(tmp_path):
    for name, width in (("a", 200), ("b", 100), ("", 50)):
        picture(tmp_path / "JPEGImages" / name / "1.jpg", width, 100)
    for name in ("a", "b", "c"):
        text = f"<annotation><filename>1.jpg</filename>{thing('dog', 1, 1, 9, 9)}</annotation>"
        file = tmp_path / "Annotations" / name / "1.xml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    _, samples, (lost,) = made(tmp_path, "voc")
    assert [s["images"] for s in samples] == [["JPEGImages/a/1.jpg"], ["JPEGImages/b/1.jpg"]]
    assert "'JPEGImages/c/1.jpg', which is not there" in lost["reason"]


# YOLO


@pytest.fixture
def yolo(tmp_path):
    picture(tmp_path / "images" / "train" / "a.png", 200, 100)
    (tmp_path / "labels" / "train").mkdir(parents=True)

    def write(text, names="names: [dog, cat]\n", name="a"):
        (tmp_path / "data.yaml").write_text(names)
        (tmp_path / "labels" / "train" / f"{name}.txt").write_text(text)

    write.folder = tmp_path
    return write


def test_yolo_boxes_are_centred_fractions(tmp_path):
    text = "0 0.5 0.5 0.2 0.4\n1 0 0 0.5 0 0.5 0.5\n\n7 0 0 1 1\n0 x 0 0 0\n0 0.5 0.5\n"
    text += "0 nan 0 1 1\n" + "9" * 5000 + " 0 0 1 1\n"
    picture(tmp_path / "img" / "a.png", 200, 100)
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "a.txt").write_text(text)
    (labels / "classes.txt").write_text("dog\ncat\n")
    words = ("--images", tmp_path / "img")
    status, samples, rejected = made(tmp_path, "yolo", *words, data=labels)
    assert status == 0
    assert [said(sample)[1] for sample in samples] == ["cat"]
    assert samples[0]["regions"][0]["polygon"] == [[0, 0], [100, 0], [100, 50]]
    wheres = [each["where"] for each in rejected]
    assert wheres == ["a.txt:4", "a.txt:5", "a.txt:6", "a.txt:8", "a.txt: 'dog'"]
    assert "`line 7.box`: expected 4 finite numbers" in rejected[4]["reason"]
    (labels / "a.txt").write_text(text.replace("0 nan 0 1 1\n", ""))
    _, samples, _ = made(tmp_path, "yolo", *words, data=labels)
    assert samples[0]["regions"][0]["box"] == pytest.approx([80, 30, 120, 70])


@pytest.mark.parametrize("start", ["", "data.yaml", "labels/train", "labels"])
def test_yolo_names_of_data_yaml_and_images_in_their_folder(yolo, start):
    yolo("1 0.5 0.5 0.2 0.4\n0 0 0 0.5 0 0.5 0.5 0 0.5\n", "names: {0: dog, 1: cat}\nnc: 2\n")
    _, samples, rejected = made(yolo.folder, "yolo", data=yolo.folder / start)
    assert rejected == []
    assert [(s["images"], said(s)[1]) for s in samples] == [
        (["images/train/a.png"], "cat"),
        (["images/train/a.png"], "dog"),
    ]
    assert samples[0]["regions"][0]["box"] == pytest.approx([80, 30, 120, 70])
    assert samples[1]["regions"][0]["polygon"] == [[0, 0], [100, 0], [100, 50], [0, 50]]


def test_yolo_poses_are_boxes_and_their_points_are_said_to_be_unused(yolo, capsys):
    names = "names: [person]\nkpt_shape: [2, 3]\n"
    yolo("0 0.5 0.5 0.2 0.4 0.1 0.1 2 0 0 0\n0 0.5 0.5 0.2 0.4 0.1 0.1\n", names)
    _, (sample,), (lost,) = made(yolo.folder, "yolo")
    assert sample["regions"][0]["box"] == pytest.approx([80, 30, 120, 70])
    assert "expected 4 numbers and 2 key points of 3, got 6 numbers" in lost["reason"]
    assert "1  noted: poses whose key points were not used" in capsys.readouterr().out


def test_dota_corners_in_pixels_are_cut_at_the_edge(yolo):
    text = "imagesource:x\ngsd:0.1\n10 10 30 20 20 40 0 30 ship 0\n-20 0 20 0 20 10 -20 10 dock 1\n"
    yolo(text)
    _, (ship, dock), rejected = made(yolo.folder, "yolo")
    assert rejected == []
    assert ship["regions"][0]["polygon"] == [[10, 10], [30, 20], [20, 40], [0, 30]]
    assert sorted(dock["regions"][0]["polygon"]) == [[0, 0], [0, 10], [20, 0], [20, 10]]


def test_yolo_passes_over_lists_empty_files_and_images_without_a_file(yolo, capsys):
    yolo("")
    yolo("1 0.5 0.5 0.2 0.4\n", name="b")
    picture(yolo.folder / "images" / "train" / "b.png", 20, 10)
    picture(yolo.folder / "images" / "train" / "c.png", 20, 10)
    (yolo.folder / "train.txt").write_text("images/train/a.png\n")
    _, samples, rejected = made(yolo.folder, "yolo", "--on-bad-sample", "stop")
    assert [sample["images"] for sample in samples] == [["images/train/b.png"]]
    assert [each["where"] for each in rejected] == [
        "labels/train/a.txt",
        "train.txt",
        "images/train/c.png",
    ]
    printed = capsys.readouterr().out
    assert "2  passed over: images without annotations" in printed
    assert "1  passed over: text files that hold no labels" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: !!python/object/apply:os.system ['touch x']\n", "expected plain YAML"),
        ("names: !!python/name:os.system\n", "expected plain YAML"),
        ("names: [dog\n", "expected plain YAML"),
        ("names: 5\n", "expected a list of names"),
        ("names: {dog: 0}\n", "`names` are no numbers with texts"),
        ("names: [dog]\nkpt_shape: [1000000000, 3]\n", "`kpt_shape` is no count"),
        ("names: [dog]\n" + "x" * (1 << 20), "more than 1048576 bytes"),
    ],
)
def test_yolo_refuses_names_that_are_none(yolo, capsys, text, message):
    yolo("0 0.5 0.5 0.2 0.4\n", text)
    assert made(yolo.folder, "yolo", data=yolo.folder / "data.yaml")[0] == 2
    assert message in capsys.readouterr().err


def test_yolo_refuses_lists_of_names_that_disagree(yolo, capsys):
    yolo("0 0.5 0.5 0.2 0.4\n")
    other = yolo.folder / "labels" / "classes.txt"
    other.write_text("cat\ndog\n")
    assert made(yolo.folder, "yolo", data=yolo.folder / "labels")[0] == 2
    assert "expected one list of names, got" in capsys.readouterr().err
    _, (sample,), _ = made(yolo.folder, "yolo", data=other)
    assert said(sample)[1] == "cat"
    other.write_text("dog\n")
    assert made(yolo.folder, "yolo", data=yolo.folder / "labels")[0] == 0


def test_dota_has_its_names_in_its_lines(tmp_path):
    picture(tmp_path / "images" / "a.png", 200, 100)
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt" / "a.txt").write_text("gsd:1\n10 10 30 20 20 40 0 30 ship 0\n")
    _, (sample,), _ = made(tmp_path, "yolo")
    assert (sample["images"], said(sample)[1]) == (["images/a.png"], "ship")


def test_yolo_takes_no_image_of_another_folder_for_its_own(tmp_path):
    (tmp_path / "classes.txt").write_text("dog\n")
    picture(tmp_path / "img" / "a.png", 200, 100)
    for part in ("train", "val"):
        (tmp_path / "labels" / part).mkdir(parents=True)
        (tmp_path / "labels" / part / "a.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    words = ("--images", tmp_path / "img")
    _, samples, rejected = made(tmp_path, "yolo", *words)
    assert (samples, len(rejected)) == ([], 3)  # the third: an image without annotations
    (tmp_path / "labels" / "val" / "a.txt").unlink()
    _, (sample,), _ = made(tmp_path, "yolo", *words)
    assert sample["images"] == ["a.png"]
