"""`prepare maps --format coco`: boxes, polygons, run lengths, crowds, panoptic files, results."""

import pytest
from PIL import Image

from tests.trainer.prepare.reading_samples import picture, prepared, said, write

GOOD = {"image_id": 1, "category_id": 18}
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
# of the image 20 x 10: columns 2 to 4 whole, as a list, and as pycocotools writes it
COLUMNS = {"size": [10, 20], "counts": [20, 30, 150]}
PACKED = {"size": [10, 20], "counts": "d0n0f4"}


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "img" / "a.png", 20, 10)
    picture(tmp_path / "img" / "b.png", 20, 10)
    return tmp_path


def coco(root, *annotations, words=(), images=None):
    images = images or [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}]
    data = {"annotations": annotations, "images": images, "categories": CATEGORIES}
    path = write(root / "instances.json", data)
    images = ("--images", root / "img")
    return prepared(root / "out.jsonl", "maps", path, "--format", "coco", *images, *words)


def test_boxes_polygons_and_what_is_wrong_with_some(tmp_path, capsys):
    picture(tmp_path / "img" / "a.png", 200, 100)
    bad = [
        {**GOOD, "segmentation": {"counts": [0, 7], "size": [100, 200]}},
        {**GOOD, "image_id": 9, "bbox": [0, 0, 1, 1]},
        {**GOOD, "category_id": 9, "bbox": [0, 0, 1, 1]},
        7,
        GOOD,
        {**GOOD, "segmentation": [[1, 2, 3]]},
        {**GOOD, "segmentation": 5},
    ]
    triangles = [[0, 0, 8, 0, 8, 8], [20, 20, 30, 20, 30, 30]]
    status, samples, rejected = coco(
        tmp_path,
        {**GOOD, "category_id": 1, "segmentation": triangles},
        {**GOOD, "category_id": 3, "bbox": [0, 0, float("nan"), 3]},
        {**GOOD, "category_id": 1, "bbox": [100, 50, 100.5, 50]},
        *bad,
        images=[{"id": 1, "file_name": "a.png"}, None],
        words=("--grid", "4x8", "--preview", "2"),
    )
    assert status == 0
    (person,) = samples
    assert person["regions"][1]["polygon"] == [[20, 20], [30, 20], [30, 30]]
    assert person["regions"][2]["box"] == [100, 50, 200, 100]
    reasons = {each["where"].removeprefix("instances.json: "): each["reason"] for each in rejected}
    assert "`image_id`: expected a known one, got 9" in reasons["annotations[4]"]
    assert "`category_id`: expected a known one, got 9" in reasons["annotations[5]"]
    assert reasons["annotations[6]"] == "expected an object"
    assert "expected a `bbox` or a `segmentation`, got neither" in reasons["annotations[7]"]
    assert "expected lists of x, y, ... or run lengths" in reasons["annotations[8]"]
    assert "expected lists of x, y, ... or run lengths" in reasons["annotations[9]"]
    car = reasons["'a.png' 'car'"]
    assert car.startswith("`annotations[1].box`: expected 4 finite numbers")
    dog = reasons["'a.png' 'dog'"]
    assert dog.startswith("`annotations[3].mask.counts`: expected")
    assert Image.open(tmp_path / "out.preview.png").size[0] > 250
    printed = capsys.readouterr().out
    assert "1  target maps" in printed
    assert "1  boxes that stuck out" in printed
    assert "1  passed over: annotations without a place" in printed


@pytest.mark.parametrize("runs", [COLUMNS, PACKED])
def test_prefer_says_which_of_two_places(root, runs):
    annotation = {**GOOD, "id": 4, "bbox": [2, 0, 3, 10], "segmentation": runs}
    _, (sample,), rejected = coco(root, annotation)
    assert rejected == []
    assert said(sample) == ("Where is the dog?", "dog")
    assert sample["regions"] == [{"char_span": [0, 3], "box": [2, 0, 5, 10]}]
    _, (sample,), _ = coco(root, annotation, words=("--prefer", "mask", "--overwrite"))
    assert sample["regions"] == [{"char_span": [0, 3], "mask": runs}]
    _, (sample,), _ = coco(root, {**GOOD, "segmentation": runs}, words=("--overwrite",))
    assert sample["regions"] == [{"char_span": [0, 3], "mask": runs}]


def test_several_polygons_of_an_object_are_one_thing(root):
    two = {**GOOD, "id": 4, "bbox": [0, 0, 9, 9]}
    two["segmentation"] = [[0, 0, 4, 0, 4, 4], [5, 5, 9, 5, 9, 9]]
    one = {**GOOD, "id": 5, "segmentation": [[10, 0, 14, 0, 14, 4]]}
    words = ("--prefer", "mask", "--answer", "{count} of them")
    _, (sample,), _ = coco(root, two, one, words=words)
    assert said(sample)[1] == "2 of them"
    assert len(sample["regions"]) == 3


def test_crowds_and_images_without_annotations_are_counted_and_never_stop_a_run(root, capsys):
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in ((1, "a"), (2, "b"))]
    crowd = {**GOOD, "iscrowd": 1, "segmentation": COLUMNS, "bbox": [2, 0, 3, 10]}
    annotations = [crowd, {**GOOD, "iscrowd": 0, "bbox": [1, 1, 2, 2]}, crowd]
    stop = ("--on-bad-sample", "stop")
    status, samples, rejected = coco(root, *annotations, images=images, words=stop)
    assert (status, len(samples)) == (0, 1)
    assert [each["where"].partition(": ")[2] for each in rejected] == [
        "annotations[0]",
        "annotations[2]",
        "images[1]",
    ]
    printed = capsys.readouterr().out
    assert "2  passed over: crowds" in printed
    assert "1  passed over: images without annotations" in printed


def test_an_image_of_another_size_than_annotated_is_refused(root):
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}]
    _, samples, (lost,) = coco(root, {**GOOD, "bbox": [1, 1, 2, 2]}, images=images)
    assert samples == []
    assert lost["reason"] == "`size`: expected an image of 40 x 20, as annotated, got 20 x 10"


def test_an_image_is_not_given_to_two_of_its_name(root):
    names = ("left/a.png", "right/a.png", "moved/b.png")
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    box = {"category_id": 1, "bbox": [1, 1, 5, 5]}
    places = [{**box, "image_id": i} for i in range(3)]
    _, (sample,), rejected = coco(root, *places, images=images)
    assert sample["images"] == ["b.png"]
    assert [each["reason"].partition("got ")[2][:12] for each in rejected] == [
        "'left/a.png'", "'right/a.png"
    ]  # fmt: skip


def test_polygons_of_annotations_without_an_id_are_things_of_their_own(root):
    halves = [[0, 0, 4, 0, 4, 4], [6, 0, 9, 0, 9, 4]]
    place = {"image_id": 1, "category_id": 1, "segmentation": halves}
    _, (sample,), _ = coco(root, place, place, words=("--answer", "{count}"))
    assert said(sample)[1] == "2"


def test_segments_of_panoptic_files_are_annotations(root):
    segments = [
        {"id": 7, "category_id": 18, "bbox": [1, 1, 2, 2], "iscrowd": 0},
        {"id": 8, "category_id": 1, "bbox": [3, 1, 2, 2], "iscrowd": 0},
        None,
    ]
    _, samples, (lost,) = coco(
        root, {"image_id": 1, "file_name": "a_panoptic.png", "segments_info": segments}
    )
    assert [said(sample)[1] for sample in samples] == ["dog", "person"]
    assert lost["where"] == "instances.json: annotations[0].segments_info[2]"


def test_results_take_their_images_and_names_from_another_file(root, capsys):
    coco(root)
    results = [
        {**GOOD, "bbox": [1, 2, 3, 4], "score": 0.9},
        {**GOOD, "image_id": 3, "bbox": [1, 2, 3, 4], "score": 0.8},
    ]
    path = write(root / "results.json", results)
    words = ("maps", path, "--format", "coco", "--images", root / "img")
    assert prepared(root / "r.jsonl", *words)[0] == 2
    assert "expected --names" in capsys.readouterr().err
    named = ("--names", root / "instances.json")
    status, (sample,), (lost,) = prepared(root / "r.jsonl", *words, *named)
    assert status == 0
    assert sample["regions"] == [{"char_span": [0, 3], "box": [1, 2, 4, 6]}]
    assert lost["where"] == "results.json[1]"
