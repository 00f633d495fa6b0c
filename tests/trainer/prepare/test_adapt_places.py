"""Adapters of data sets with boxes and points: coordinates by hand, bad records by their place."""

import hashlib
import io
import pickle

import pytest
from PIL import Image

from groundkern.trainer.data.sample import parse_sample
from tests.trainer.prepare.reading_samples import picture, prepared, said, write

WIDTH, HEIGHT = 200, 100


def adapt(out, dataset, data, *words):
    return prepared(out / "out.jsonl", "adapt", dataset, data, *words)


def only(status, samples, rejected) -> dict:
    assert (status, len(samples), rejected) == (0, 1, [])
    return samples[0]


def unit_boxes(sample, root) -> list[tuple]:
    parsed = parse_sample(sample, root=root, where="x")
    return [box for region in parsed.regions for box in region.boxes]


# RefCOCO


def refcoco(root, refs, annotations=None, name="refs(unc).p", protocol=2):
    picture(root / "train2014" / "COCO_7.jpg", WIDTH, HEIGHT)
    folder = root / "refcoco"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(refs, protocol))
    if annotations is None:
        annotations = [{"id": 5, "image_id": 7, "bbox": [20, 10, 40, 20]}]
    images = [{"id": 7, "file_name": "COCO_7.jpg", "width": WIDTH, "height": HEIGHT}]
    write(folder / "instances.json", {"images": images, "annotations": annotations})
    return folder, "--images", root / "train2014"


def ref(*sentences, **changes) -> dict:
    said = [{"raw": s, "sent": s, "sent_id": i, "tokens": []} for i, s in enumerate(sentences)]
    base = {"ref_id": 1, "ann_id": 5, "image_id": 7, "category_id": 1, "split": "train"}
    return {**base, "file_name": "COCO_7_5.jpg", "sent_ids": [0], "sentences": said, **changes}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco_boxes_are_corner_width_and_height_in_pixels(tmp_path, protocol):
    refs = [ref("left dog", "the dog"), ref("cat", split="val")]
    words = refcoco(tmp_path, refs, protocol=protocol)
    status, samples, rejected = adapt(tmp_path, "refcoco", *words, "--split", "train")
    assert (status, rejected) == (0, [])
    assert [said(s) for s in samples] == [
        ("Where is left dog?", "[100, 100, 300, 300]"),
        ("Where is the dog?", "[100, 100, 300, 300]"),
    ]
    assert samples[0]["regions"] == [{"char_span": [0, 20], "box": [20, 10, 60, 30]}]
    assert unit_boxes(samples[0], tmp_path / "train2014") == [(0.1, 0.1, 0.3, 0.3)]


def test_refcoco_rounding_over_the_edge_is_cut(tmp_path):
    boxes = [{"id": 5, "image_id": 7, "bbox": [190, 90, 10.01, 10.01]}]
    sample = only(*adapt(tmp_path, "refcoco", *refcoco(tmp_path, [ref("dog")], boxes)))
    assert sample["regions"][0]["box"] == [190, 90, 200, 100]


@pytest.mark.parametrize(
    ("bad", "where", "message"),
    [
        (ref("x", ann_id=6), ".sentences[0]", "`ann_id`: expected one of instances.json, got 6"),
        (ref("x", image_id=8), ".sentences[0]", "`image_id`: expected one of instances.json"),
        (
            ref("x", ann_id={5}),
            ".sentences[0]",
            "`ann_id`: expected one of instances.json, got {5}",
        ),
        (ref("x", image_id=True), ".sentences[0]", "`image_id`: expected one of"),
        ({(1, 2): 3, "sentences": None}, "", "`sentences`: expected a list"),
        (ref(""), ".sentences[0]", "`sentence`: expected a text, got ''"),
        (ref("x", sentences=3), "", "`sentences`: expected a list"),
        (ref("x", sentences=[3]), ".sentences[0]", "expected a text, got None"),
        ([1], "", "`sentences`: expected a list"),
    ],
)
def test_refcoco_bad_references(tmp_path, bad, where, message):
    refs = [ref("a dog"), bad, ref("b dog")]
    status, samples, (lost,) = adapt(tmp_path, "refcoco", *refcoco(tmp_path, refs))
    assert status == 0
    assert len(samples) == 2
    assert lost["where"] == f"refs(unc).p[1]{where}"
    assert message in lost["reason"]
    assert lost["original"]


@pytest.mark.parametrize("box", [[20, 10, -4, 5], [20, 10, float("nan"), 5], [0, 0, 900, 5], None])
def test_refcoco_bad_boxes(tmp_path, box):
    boxes = [{"id": 5, "image_id": 7, "bbox": box}]
    _, samples, (lost,) = adapt(tmp_path, "refcoco", *refcoco(tmp_path, [ref("x")], boxes))
    assert samples == []
    assert "`bbox`: expected" in lost["reason"]


def test_refcoco_refuses_what_it_cannot_use(tmp_path, capsys):
    folder, *images = refcoco(tmp_path, [ref("x")])
    assert adapt(tmp_path, "refcoco", folder)[0] == 2
    assert "needs --images" in capsys.readouterr().err
    assert adapt(tmp_path, "refcoco", folder, *images, "--split", "dev")[0] == 2
    assert "one of train, got dev" in capsys.readouterr().err
    refcoco(tmp_path, [ref("x")], name="refs(google).p")
    assert adapt(tmp_path, "refcoco", folder, *images)[0] == 2
    assert "expected one refs(...).p, got refs(google).p, refs(unc).p" in capsys.readouterr().err
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Image.Image], 2))
    assert adapt(tmp_path, "refcoco", folder / "refs(unc).p", *images)[0] == 2
    assert "it would load PIL.Image.Image" in capsys.readouterr().err


# Visual Genome


def test_visual_genome_boxes_are_corner_width_and_height_in_pixels(tmp_path):
    picture(tmp_path / "VG_100K_2" / "61.jpg", WIDTH, HEIGHT)
    region = {"region_id": 1, "image_id": 61, "phrase": " a red door ", "x": 50, "y": 20}
    region |= {"width": 100, "height": 40}
    off = {**region, "phrase": "wall", "x": 199, "width": 3}
    bad = [
        {**region, "width": 0},
        {**region, "x": -40},
        {**region, "x": "50"},
        {**region, "phrase": None},
        {**region, "image_id": 62},
        {**region, "image_id": "../61"},
        "region",
    ]
    data = [{"id": 61, "regions": [region, off, *bad]}, {"id": 62}, {"id": 63, "regions": []}]
    path = write(tmp_path / "region_descriptions.json", data)
    status, samples, rejected = adapt(tmp_path, "visual_genome", path)
    assert status == 0
    assert [said(s) for s in samples] == [
        ("Describe a part of this image.", "a red door"),
        ("Describe a part of this image.", "wall"),
    ]
    assert samples[0]["images"] == ["VG_100K_2/61.jpg"]
    assert samples[0]["regions"] == [{"char_span": [0, 10], "box": [50, 20, 150, 60]}]
    assert samples[1]["regions"][0]["box"] == [199, 20, 200, 60]
    assert unit_boxes(samples[0], tmp_path) == [(0.25, 0.2, 0.75, 0.6)]
    wheres = [each["where"] for each in rejected]
    prefix = "region_descriptions.json"
    assert wheres == [*(f"{prefix}[0].regions[{i}]" for i in range(2, 9)), f"{prefix}[1]"]
    words = ("--overhang", "1", "--question", "What is at {box}?")
    _, samples, rejected = prepared(
        tmp_path / "more.jsonl", "adapt", "visual_genome", tmp_path, *words
    )
    assert [s["regions"][0]["box"] for s in samples][2] == [0, 20, 60, 60]
    assert said(samples[2])[0] == "What is at [0, 200, 300, 600]?"
    assert len(rejected) == 7


# Flickr30k Entities

ANNOTATION = """<annotation><filename>1000.jpg</filename>
<size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>7</name><name>8</name><bndbox>
<xmin>1</xmin><ymin>1</ymin><xmax>200</xmax><ymax>100</ymax></bndbox></object>
<object><name>7</name><bndbox>
<xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>30</ymax></bndbox></object>
<object><name>9</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>"""
CAPTION = "[/EN#7/people/other Two boys] play [/EN#0/notvisual it] in [/EN#9/scene a park] .\n"


def flickr(root, caption=CAPTION, annotation=ANNOTATION):
    for folder, suffix, text in (
        ("Sentences", "txt", caption),
        ("Annotations", "xml", annotation),
    ):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"1000.{suffix}").write_text(text, encoding="utf-8")
    picture(root / "images" / "1000.jpg", WIDTH, HEIGHT)
    return root, "--images", root / "images"


def test_flickr_boxes_count_pixels_from_one_with_the_last_one_in(tmp_path):
    sample = only(*adapt(tmp_path, "flickr30k", *flickr(tmp_path)))
    assert said(sample) == ("Describe this image.", "Two boys play it in a park .")
    assert sample["regions"] == [
        {"char_span": [0, 8], "box": [0, 0, 200, 100]},
        {"char_span": [0, 8], "box": [20, 10, 60, 30]},
    ]
    assert unit_boxes(sample, tmp_path / "images") == [(0, 0, 1, 1), (0.1, 0.1, 0.3, 0.3)]
    answer = said(sample)[1]
    phrases = [answer[slice(*phrase["char_span"])] for phrase in sample["phrases"]]
    assert phrases == ["Two boys", "it", "a park"]


def test_flickr_splits_and_answers_around_the_caption(tmp_path):
    words = flickr(tmp_path, CAPTION * 2)
    (tmp_path / "train.txt").write_text("1000\n2000\n../Sentences/1000\n")
    options = ("--split", "train", "--answer", "Two boys? {caption}")
    status, samples, lost = adapt(tmp_path, "flickr30k", *words, *options)
    assert (status, len(samples)) == (0, 2)
    assert [each["where"] for each in lost] == ["2000.txt", "train.txt"]
    assert samples[0]["regions"][0]["char_span"] == [10, 18]
    assert adapt(tmp_path, "flickr30k", *words, "--answer", "no")[0] == 2
    assert adapt(tmp_path, "flickr30k", *words, "--split", "dev")[0] == 2
    assert adapt(tmp_path, "flickr30k", tmp_path / "images", *words[1:])[0] == 2


@pytest.mark.parametrize(
    ("caption", "annotation", "message"),
    [
        (
            "[/EN#7/people Two boys play .",
            ANNOTATION,
            "expected marks such as [/EN#1/people A man]",
        ),
        (CAPTION, ANNOTATION[:-5], "1000.xml: "),
        (CAPTION, ANNOTATION.replace(">21<", ">NaN<"), "object[1].bndbox`: expected 4 finite"),
        (CAPTION, ANNOTATION.replace(">21<", ">x<"), "object[1].bndbox`: expected four numbers"),
        (CAPTION, ANNOTATION.replace("<xmin>21</xmin>", ""), "expected four numbers"),
        (CAPTION, ANNOTATION.replace(">21<", ">90<"), "object[1].bndbox`: expected x0 < x1"),
        (CAPTION, ANNOTATION.replace(">60<", ">900<"), "expected coordinates within 200 x 100"),
        (CAPTION, '<!DOCTYPE a [<!ENTITY b "c">]>' + ANNOTATION, "expected no document type"),
    ],
)
def test_flickr_bad_captions_and_boxes(tmp_path, caption, annotation, message):
    words = flickr(tmp_path, "A dog .\n\n" + caption, annotation.replace("NaN", "nan"))
    status, samples, rejected = adapt(tmp_path, "flickr30k", *words)
    assert status == 0
    assert len(samples) + len(rejected) == 2
    lost = rejected[-1]
    assert lost["where"] == "1000.txt:3"
    assert message in lost["reason"]


# PixMo-Points


def encoded(width=WIDTH, height=HEIGHT, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(buffer, kind, **options)
    return buffer.getvalue()


def pixmo(root, *rows):
    datasets = pytest.importorskip("datasets")
    data = encoded()
    digest = hashlib.sha256(data).hexdigest()
    (root / "images").mkdir(exist_ok=True)
    (root / "images" / f"{digest}.png").write_bytes(data)
    base = {"image_url": "u", "image_sha256": digest, "label": "dogs", "count": 2}
    base |= {"points": [{"x": 10.0, "y": 20.0}, {"x": 50.0, "y": 100.4}], "collection_method": "x"}
    rows = [{**base, **row} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(root / "train-00000-of-00001.parquet")
    return root, "--images", root / "images"


def test_pixmo_points_are_percent(tmp_path):
    sample = only(*adapt(tmp_path, "pixmo_points", *pixmo(tmp_path, {})))
    assert said(sample) == ("How many are there: dogs?", "2")
    ((x0, y0), (x1, y1)) = sample["regions"][0]["points"]
    assert (x0, y0, x1, y1) == pytest.approx((0.1, 0.2, 0.5, 1.0))
    assert sample["regions"][0]["char_span"] == [0, 1]
    parsed = parse_sample(sample, root=tmp_path / "images", where="x")
    assert sum(parsed.regions[0].points, ()) == pytest.approx((0.1, 0.2, 0.5, 1.0))


def test_pixmo_points_in_pixels_and_none_at_all(tmp_path):
    words = pixmo(tmp_path, {"points": [{"x": 150.0, "y": 20.0}]}, {"points": [], "count": 0})
    status, (one, none), rejected = adapt(tmp_path, "pixmo_points", *words, "--points-in", "pixel")
    assert (status, rejected) == (0, [])
    assert one["regions"][0]["points"] == [pytest.approx([0.75, 0.2])]
    assert said(none)[1] == "0"
    assert none["regions"] == []


def test_pixmo_bad_rows(tmp_path):
    rows = [
        {"points": [{"x": 150.0, "y": 20.0}]},
        {"points": [{"x": float("nan"), "y": 20.0}]},
        {"points": [{"x": None, "y": 20.0}]},
        {"label": ""},
        {"image_sha256": "0" * 64},
        {"image_sha256": "../../etc/passwd"},
        {},
    ]
    words = pixmo(tmp_path, *rows)
    changed = "1" * 64
    (tmp_path / "images" / f"{changed}.png").write_bytes(encoded())
    words = pixmo(tmp_path, *rows, {"image_sha256": changed})
    status, samples, rejected = adapt(tmp_path, "pixmo_points", *words)
    assert (status, len(samples)) == (0, 1)
    name = "train-00000-of-00001.parquet"
    assert [each["where"] for each in rejected] == [f"{name}[{i}]" for i in (0, 1, 2, 3, 4, 5, 7)]
    reasons = [each["reason"] for each in rejected]
    assert "`points[0]`: expected coordinates within 100 x 100, got [150.0, 20.0]" in reasons[0]
    assert "expected 2 finite numbers" in reasons[1]
    assert "expected the image that was annotated" in reasons[6]


def test_refcoco_rows_with_the_image_inside(tmp_path):
    datasets = pytest.importorskip("datasets")
    turned = Image.Exif()
    turned[0x0112] = 6  # seen 100 wide, 200 high
    rows = [
        {"image": {"bytes": encoded(), "path": None}, "bbox": [20.0, 10.0, 40.0, 20.0]},
        {
            "image": {"bytes": encoded(kind="JPEG", exif=turned), "path": None},
            "bbox": [20, 150, 40, 20],
        },
        {"image": {"bytes": b"none", "path": None}, "bbox": [0, 0, 1, 1]},
        {"image": {"bytes": None, "path": "a.png"}, "bbox": [0, 0, 1, 1]},
    ]
    rows = [{**row, "answer": ["the dog", "dog left"]} for row in rows]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "bbox": datasets.List(datasets.Value("float32")),
            "answer": datasets.List(datasets.Value("string")),
        }
    )
    data = datasets.Dataset.from_list(rows[:3], features=features)
    datasets.DatasetDict({"val": data}).save_to_disk(tmp_path / "saved")
    status, samples, rejected = adapt(tmp_path, "refcoco", tmp_path / "saved")
    assert (status, len(samples)) == (0, 4)
    assert [s["images"][0] for s in samples[::2]] == [
        "out_images/00000000.png",
        "out_images/00000001.jpg",
    ]
    assert unit_boxes(samples[0], tmp_path) == [pytest.approx((0.1, 0.1, 0.3, 0.3))]
    assert unit_boxes(samples[2], tmp_path) == [pytest.approx((0.2, 0.75, 0.6, 0.85))]
    assert [each["where"] for each in rejected] == ["saved/val[2]"]
    assert (tmp_path / "out_images" / "00000001.jpg").read_bytes() == rows[1]["image"]["bytes"]
    datasets.Dataset.from_list(rows[3:]).to_parquet(tmp_path / "one.parquet")
    _, samples, (lost,) = prepared(
        tmp_path / "p.jsonl", "adapt", "refcoco", tmp_path / "one.parquet"
    )
    assert samples == []
    assert "expected the bytes of an image in the row" in lost["reason"]
