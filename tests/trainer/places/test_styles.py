"""What each family writes, read again: the same boxes on its grid, the same labels."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from benchmarks.families.zoo.first import tiny_qwen_processor
from groundkern.trainer.config import ConfigError
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.of_model import style_named, style_of
from groundkern.trainer.places.styles import STYLES, Style
from groundkern.trainer.places.units import Extent, Resized, extent
from groundkern.trainer.places.writing import Writer
from tests.sources import ROOT

SIZE = (640, 480)
CAT, DOG = Place((0.1, 0.2, 0.5, 0.5), "the cat"), Place((0.0, 0.0, 1.0, 1.0), "the cat")
BIRD = Place((0.25, 0.5, 0.75, 0.9), "a bird")
SPOT, END = Place((0.1, 0.25), "the cat"), Place((1.0, 1.0), "the cat")
quick = settings(
    max_examples=40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)

BOXES = {
    "per_mille": "[100, 200, 500, 500] [0, 0, 1000, 1000] [250, 500, 750, 900]",
    "unit": "[0.1, 0.2, 0.5, 0.5] [0.0, 0.0, 1.0, 1.0] [0.25, 0.5, 0.75, 0.9]",
    "llava": "[0.1, 0.2, 0.5, 0.5] [0.0, 0.0, 1.0, 1.0] [0.25, 0.5, 0.75, 0.9]",
    "pixel": "[64, 96, 320, 240] [0, 0, 640, 480] [160, 240, 480, 432]",
    "qwen": "<ref>the cat</ref><box>(100,200),(500,500)</box><box>(0,0),(1000,1000)</box>, "
    "<ref>a bird</ref><box>(250,500),(750,900)</box>",
    "qwen2": "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(500,500)"
    "<|box_end|><|box_start|>(0,0),(1000,1000)<|box_end|>, <|object_ref_start|>a bird"
    "<|object_ref_end|><|box_start|>(250,500),(750,900)<|box_end|>",
    "qwen2.5": '[{"bbox_2d": [64, 96, 320, 240], "label": "the cat"}, '
    '{"bbox_2d": [0, 0, 640, 480], "label": "the cat"}, '
    '{"bbox_2d": [160, 240, 480, 432], "label": "a bird"}]',
    "qwen3": '[{"bbox_2d": [100, 200, 500, 500], "label": "the cat"}, '
    '{"bbox_2d": [0, 0, 1000, 1000], "label": "the cat"}, '
    '{"bbox_2d": [250, 500, 750, 900], "label": "a bird"}]',
    "internvl": "<ref>the cat</ref><box>[[100, 200, 500, 500], [0, 0, 1000, 1000]]</box>, "
    "<ref>a bird</ref><box>[[250, 500, 750, 900]]</box>",
    "minicpm": "<ref>the cat</ref><box>100 200 500 500</box><box>0 0 1000 1000</box>, "
    "<ref>a bird</ref><box>250 500 750 900</box>",
    "paligemma": "<loc0205><loc0102><loc0512><loc0512> the cat ; "
    "<loc0000><loc0000><loc1023><loc1023> the cat ; <loc0512><loc0256><loc0922><loc0768> a bird",
    "florence2": "the cat<loc_100><loc_200><loc_500><loc_500><loc_0><loc_0><loc_999><loc_999>"
    "a bird<loc_250><loc_500><loc_750><loc_900>",
    "kosmos2": "<phrase>the cat</phrase><object><patch_index_0195><patch_index_0495>"
    "</delimiter_of_multi_objects/><patch_index_0000><patch_index_1023></object>, "
    "<phrase>a bird</phrase><object><patch_index_0520><patch_index_0919></object>",
    "deepseek": "<|ref|>the cat<|/ref|><|det|>[[100, 200, 500, 500], [0, 0, 999, 999]]<|/det|>, "
    "<|ref|>a bird<|/ref|><|det|>[[250, 500, 749, 899]]<|/det|>",
    "gemini": '[{"box_2d": [200, 100, 500, 500], "label": "the cat"}, '
    '{"box_2d": [0, 0, 1000, 1000], "label": "the cat"}, '
    '{"box_2d": [500, 250, 900, 750], "label": "a bird"}]',
}
POINTS = {
    "per_mille": "[100, 250] [1000, 1000]",
    "unit": "[0.1, 0.25] [1.0, 1.0]",
    "llava": "[0.1, 0.25] [1.0, 1.0]",
    "pixel": "[64, 120] [640, 480]",
    "qwen": "<ref>the cat</ref><box>(100,250)</box><box>(1000,1000)</box>",
    "qwen2": "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,250)<|box_end|>"
    "<|box_start|>(1000,1000)<|box_end|>",
    "qwen2.5": '[{"point_2d": [64, 120], "label": "the cat"}, '
    '{"point_2d": [640, 480], "label": "the cat"}]',
    "qwen3": '[{"point_2d": [100, 250], "label": "the cat"}, '
    '{"point_2d": [1000, 1000], "label": "the cat"}]',
    "gemini": '[{"point": [250, 100], "label": "the cat"}, '
    '{"point": [1000, 1000], "label": "the cat"}]',
    "molmo": '<points x1="10.0" y1="25.0" x2="100.0" y2="100.0" alt="the cat">the cat</points>',
    "molmo2": '<points coords="1 1 100 250 2 1000 1000">the cat</points>',
}
TIES = ("numbers", "label")


@pytest.mark.parametrize(("name", "text"), BOXES.items())
def test_boxes_as_each_family_writes_them(name, text):
    made = STYLES[name].write([CAT, DOG, BIRD], SIZE)
    assert made.text == text
    for part, place in zip(made.parts, (CAT, DOG, BIRD), strict=True):
        assert part.label is None or text[slice(*part.label)] == place.label
    assert (made.parts[0].label is None) == (not STYLES[name].has_labels)


@pytest.mark.parametrize(("name", "text"), POINTS.items())
def test_points_as_each_family_writes_them(name, text):
    assert STYLES[name].write([SPOT, END], SIZE).text == text


def test_each_style_has_an_example():
    assert set(BOXES) == {name for name, style in STYLES.items() if style.box}
    assert set(POINTS) == {name for name, style in STYLES.items() if style.point}


sides = st.sampled_from([1, 2, 27, 28, 333, 1000, 4097])
sizes = st.tuples(sides, sides)
fraction = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 1e-9, 1 - 1e-9, 0.0005, 0.9995]), st.floats(0, 1)
)


@st.composite
def boxes(draw):
    numbers = [sorted((draw(fraction), draw(fraction))) for _ in range(2)]
    (x0, x1), (y0, y1) = numbers
    assume(x0 < x1 and y0 < y1)
    return x0, y0, x1, y1


points = st.tuples(fraction, fraction)
plain = st.text(
    st.sampled_from("abzéßあ中🙂 '\"[](){}:,.\\/&#%=-_0123456789"), min_size=1, max_size=40
).filter(lambda text: text.strip())
any_text = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from([*"<>;\n[]{}\"'", "</ref>", "<loc0001>", "<|box_end|>", "</point>", "a"])
    ).map("".join),
)


def whole(style: Style, size: tuple[int, int]) -> Extent:
    """What a style's own numbers are out of, said apart from how they are written."""
    own = {"paligemma": 1024, "kosmos2": 32, "florence2": 1000, "deepseek": 999, "molmo": 100}
    own |= {"unit": 1, "llava": 1}
    if style.in_pixels:
        return extent("pixel", size, None)
    return Extent((0, 0), (own.get(style.name, 1000),) * 2)


def read(style: Style, text: str, size: tuple[int, int]) -> list[Place]:
    return [
        Place(whole(style, size).fractions(mark.numbers), mark.label and mark.label.text)
        for mark in style.read(text)
    ]


@pytest.mark.parametrize("name", STYLES)
@quick
@given(st.data())
def test_what_is_written_is_read_and_written_alike(name, data):
    style = STYLES[name]
    size = data.draw(sizes)
    shapes = [boxes()] if style.box else []
    shapes += [points] if style.point else []
    labels = plain if data.draw(st.booleans()) else st.none()
    if name != "florence2":  # where all that stands before a place is its label
        labels = st.one_of(st.none(), plain)
    each = st.builds(Place, st.one_of(shapes), labels)
    places = data.draw(st.lists(each, min_size=1, max_size=4))
    made = style.write(places, size)
    found = read(style, made.text, size)
    steps = [(style.grid.steps or side) for side in size]
    for place, again, part in zip(places, found, made.parts, strict=True):
        label = (place.label or "").strip() or None
        assert again.label == (label if style.has_labels else None)
        assert len(again.numbers) == len(place.numbers)
        for i, (mine, theirs) in enumerate(zip(place.numbers, again.numbers, strict=True)):
            assert abs(mine - theirs) <= 2 / steps[i % 2] + 1e-9  # a box keeps a step of width
        if len(again.numbers) == 4:
            x0, y0, x1, y1 = again.numbers
            assert x0 < x1
            assert y0 < y1
        assert part.numbers[0] < part.numbers[1]
    again = [place._replace(label=mine.label) for place, mine in zip(found, places, strict=True)]
    assert style.write(again, size).text == made.text


@pytest.mark.parametrize("name", STYLES)
@quick
@given(any_text)
def test_a_label_is_held_to_the_letter_or_refused(name, label):
    style = STYLES[name]
    place = Place((0.1, 0.2, 0.5, 0.5) if style.box else (0.1, 0.2), label)
    try:
        made = style.write([place, place], SIZE)
    except ValueError:
        assert any(sign in label for sign in "<>;\n")  # any other label has to be held
        assert name not in ("qwen2.5", "qwen3", "gemini", "molmo", "molmo2")
        return
    wanted = (label.strip() or None) if style.has_labels else None
    assert [each.label for each in read(style, made.text, SIZE)] == [wanted] * 2


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "gemini", "molmo", "molmo2"])
def test_json_and_molmo_hold_any_label(name):
    label = 'a "b" <ref>\\ </points>\n[{1}] ; é 🙂 &amp;'
    style = STYLES[name]
    (found,) = read(style, style.write([SPOT._replace(label=label)], SIZE).text, SIZE)
    assert found.label == label


def test_a_label_with_its_closing_tag_is_refused():
    with pytest.raises(ValueError, match=r"label that internvl can hold, got 'a</ref>b'"):
        STYLES["internvl"].write([CAT._replace(label="a</ref>b")], SIZE)


@pytest.mark.parametrize(("name", "place"), [("molmo", CAT), ("internvl", SPOT), ("kosmos2", SPOT)])
def test_what_a_style_does_not_have_is_refused(name, place):
    assert not STYLES[name].can(place)
    with pytest.raises(ValueError, match=f"are all that {name} has"):
        STYLES[name].write([place], SIZE)


def test_kosmos_2_as_transformers_writes_it():
    from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index

    for box in (CAT.numbers, DOG.numbers, BIRD.numbers, (0.5, 0.5, 0.51, 0.52), (0.99, 0, 1, 1)):
        first, last = coordinate_to_patch_index(box, 32)
        expected = f"<patch_index_{first:04}><patch_index_{last:04}>"
        assert STYLES["kosmos2"].numbers(Place(box)) == expected


def test_florence_2_as_transformers_writes_it():
    import torch
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

    post = Florence2PostProcessor.__new__(Florence2PostProcessor)
    post.quantize_bins = (1000, 1000)
    boxes = torch.tensor([[64.3, 96.0, 320.0, 240.9], [0.0, 0.0, 640.0, 480.0]])
    for box, bins in zip(boxes, post.quantize(boxes, SIZE).tolist(), strict=True):
        fractions = tuple(v / s for v, s in zip(box.tolist(), SIZE * 2, strict=True))
        assert STYLES["florence2"].numbers(Place(fractions)) == "".join(f"<loc_{b}>" for b in bins)


@pytest.mark.parametrize(
    ("kind", "style"),
    [
        ("qwen2_vl", "qwen2"),
        ("qwen2_5_vl", "qwen2.5"),
        ("qwen3_vl_moe", "qwen3"),
        ("internvl", "internvl"),
        ("paligemma", "paligemma"),
        ("kosmos-2", "kosmos2"),
        ("llava", "llava"),
        ("gemma3", "gemini"),
    ],
)
def test_auto_is_the_style_of_the_model(tmp_path, kind, style):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    assert style_named("auto", tmp_path).name == style


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "idefics3"}', r"one of per_mille, unit, .* how 'idefics3' of .* writes"),
        ("{}", "how None of"),
        ("[]", "how None of"),
        ("{", "expected a model folder, got"),
        (None, "expected a model folder, got"),
    ],
)
def test_a_model_of_no_known_style_is_refused_by_name(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        style_of(tmp_path)


def test_names_of_styles_are_checked():
    assert style_named("qwen3", None).name == "qwen3"
    with pytest.raises(ConfigError, match=r"`--box-style`: expected one of .*, got 'qwen9'"):
        style_named("qwen9", None)
    with pytest.raises(ConfigError, match="auto`: expected --model"):
        style_named("auto", None)


def test_the_table_of_the_documentation_is_what_is_written(tmp_path):
    tiny_qwen_processor().save_pretrained(tmp_path)
    resized = replace(Resized.of(tmp_path), least=56 * 56, most=28 * 28 * 1280)  # Qwen2.5-VL's
    page = (ROOT / "docs" / "data" / "boxes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", page, re.MULTILINE)
    said = {name: text.replace("\\|", "|") for name, text in rows if name in STYLES}
    assert list(said) == list(STYLES)
    for name, text in said.items():
        place = CAT if STYLES[name].box else Place((0.3, 0.35), CAT.label)
        writer = Writer(name, resized if STYLES[name].unit == "resized" else None)
        assert writer.write([place], SIZE).text == text
