"""Files that are damaged, or whose texts hold what cuts lines; most were found by tests/fuzz."""

from __future__ import annotations

import io
import json
import unicodedata
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare import chat
from groundkern.trainer.prepare.adapt.common import Options, embedded, tables
from groundkern.trainer.prepare.adapt.work import Adapt
from groundkern.trainer.prepare.chat import ChatSettings, ask, usage_so_far
from groundkern.trainer.prepare.maps.formats import coco, yolo
from groundkern.trainer.prepare.maps.formats.common import Options as Read
from groundkern.trainer.prepare.maps.grid import Grid
from groundkern.trainer.prepare.marks.grouping import PrintedWord
from groundkern.trainer.prepare.marks.matching import PrintedText
from groundkern.trainer.prepare.marks.normalise import _JOINING, tokens
from groundkern.trainer.prepare.ocr.tesseract import tsv_words
from groundkern.trainer.prepare.output import Output
from groundkern.trainer.prepare.placing import first_there
from groundkern.trainer.prepare.reading import json_array, plain_json, split_lines
from groundkern.trainer.prepare.sources import Item, Unusable, members
from groundkern.trainer.wording import MESSAGE, cut

# Everything but \n and \r\n at which str.splitlines cuts, and \r, at which text files do.
ENDS = ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.jpg")
    return tmp_path


@pytest.mark.parametrize("end", ENDS)
def test_only_newlines_end_a_caption_of_flickr30k(photo, end):
    for name, text in (
        ("Sentences/a.txt", f"[/EN#1/people A{end}man] sits .\r\nTwo dogs{end}run .\n"),
        ("Annotations/a.xml", "<annotation></annotation>"),
    ):
        (photo / name).parent.mkdir(exist_ok=True)
        (photo / name).write_bytes(text.encode())
    work = Adapt("flickr30k", Options(photo, images=photo))
    source, root = work.inputs()
    made = [work.rooted(root)(item).samples[0] for item in source.read()]
    answers = [sample["messages"][1]["content"] for sample in made]
    assert answers == [f"A{end}man sits .", f"Two dogs{end}run ."]


@pytest.mark.parametrize("end", ENDS)
def test_only_newlines_end_a_line_of_yolo(photo, end):
    (photo / "classes.txt").write_bytes(f"a{end}cat\r\ndog\n".encode())
    (photo / "a.txt").write_bytes(f"1 0.5 0.5{end}0.2 0.2\r\n0 0.5 0.5 0.2 0.2\n".encode())
    found = [value for _, value in yolo.opened(Read(photo)).read()]
    assert [value["label"] for value in found] == ["dog", f"a{end}cat"]


def test_classes_of_yolo_that_are_no_text_are_refused(photo):
    (photo / "classes.txt").write_bytes(b"cat\xff\n")
    (photo / "a.txt").write_bytes(b"0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(ConfigError, match=r"classes\.txt: expected a list of names in UTF-8"):
        yolo.opened(Read(photo))


@pytest.mark.parametrize("text", ["", "a", "a\n", "a\r\nb", "\n\n", "a\u2028b\x1cc\rd\ne"])
def test_split_lines_keeps_everything_but_the_ends(text):
    assert [line + "\n" for line in split_lines(text)] == [
        line.replace("\r\n", "\n") if line.endswith("\n") else line + "\n"
        for line in io.StringIO(text, newline="\n")
    ]


@pytest.mark.parametrize("end", [e for e in ENDS if e not in "\x0b\x0c"])
def test_only_newlines_end_a_row_of_tesseract(end):
    head = "level\tblock_num\tpar_num\tline_num\tleft\ttop\twidth\theight\tconf\ttext"
    text = f"{head}\n5\t1\t1\t1\t1\t2\t3\t4\t90\tco{end}al\n"
    assert list(tsv_words(text)) == [(f"co{end}al", (1, 2, 4, 6), 0.9, 0, 0)]


@pytest.mark.parametrize("row", ["5\t1", "5\t1\t1\t1\tx\t2\t3\t4\t90\tcoal", "5" + "\t1" * 8])
def test_a_damaged_row_of_tesseract_is_one_sentence(row):
    head = "level\tblock_num\tpar_num\tline_num\tleft\ttop\twidth\theight\tconf\ttext"
    with pytest.raises(SampleError, match="tesseract printed no row of a word"):
        list(tsv_words(f"{head}\n{row}\n"))


# Names that an object has twice, and files that end early


def test_an_element_with_a_name_twice_is_refused_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [{"q": 1, "q": 2}, {"a": [{"b": 1, "b": 1}]}, {"q": 3}]}')
    first, second, third = json_array(path, "data")
    assert isinstance(first, Unusable) and first.reason.startswith("`q`: expected each name once")
    assert isinstance(second, Unusable) and second.reason.startswith("`b`")
    assert third == {"q": 3}
    assert list(members(first, "qas", "a list", "a.json[0]")) == [("a.json[0]", first)]


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [1], "data": []}')
    with pytest.raises(SampleError, match="expected each name once, got 'data' twice"):
        list(json_array(path, "data"))


@pytest.mark.parametrize("rest", ["", ', "more": {"a": 1', "]}", "} x", ', "a" 1}', ", 7: 1}"])
def test_a_file_that_ends_wrongly_is_not_read_as_whole(tmp_path, rest):
    path = tmp_path / "a.json"
    path.write_text('{"data": [1, 2]' + rest)
    with pytest.raises(SampleError, match=r"a\.json: character \d+: expected"):
        list(json_array(path, "data"))


def test_a_number_of_5000_digits_costs_one_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"a": 1}}, {{"a": {"9" * 5000}}}, {{"a": 3}}]')
    assert list(json_array(path)) == [{"a": 1}, {"a": float("inf")}, {"a": 3}]


def test_annotations_of_coco_with_a_name_twice_are_refused_by_name(photo):
    path = photo / "instances.json"
    path.write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 5, "name": "cat"}],'
        '"annotations": [{"image_id": 1, "category_id": 5, "bbox": [1, 1, 2, 2], "bbox": []}]}'
    )
    ((where, value),) = coco.opened(Read(path)).read()
    assert where == "instances.json: annotations[0]"
    assert value.reason == "`bbox`: expected each name once, got it twice"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b'{"a": 1, "a": 1}', "expected each name once, got `a` twice"),
        (b"[" * 100_000, "expected values nested less deeply"),
        (b"\xff", "expected UTF-8 text, got invalid start byte"),
        (b"{", "expected JSON, got none"),
    ],
)
def test_plain_json_says_what_is_wrong(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        plain_json(text)


def test_a_damaged_table_is_one_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["abc" * 50, "def" * 50]}), path)
    whole = path.read_bytes()
    assert len(list(tables(Options(path)).read())) == 2
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(SampleError, match=r"a\.parquet\[0\]: expected a row that can be read"):
        list(tables(Options(path)).read())


def test_a_damaged_image_in_a_row_is_one_sentence(monkeypatch):
    def damaged(file):
        raise NotImplementedError("Unknown pixel format flags 6144")

    monkeypatch.setattr(Image, "open", damaged)  # what Pillow does with a damaged DDS file
    item = Item(0, "rows[0]", {})
    with pytest.raises(SampleError, match=r"rows\[0\]: `image`: .*, got '5 bytes' \(Unknown pix"):
        embedded({"image": {"bytes": b"DDS |"}}, item, Options(Path("x")))


# What commands leave behind


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"settings": {}, "counts": []}']
)
def test_a_damaged_record_of_a_command_is_refused_in_a_sentence(tmp_path, damaged):
    path = tmp_path / "out.jsonl"
    Path(f"{path}.prepare.json").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"out\.jsonl\.prepare\.json is damaged .*--overwrite"):
        Output(path, {"command": "words"})
    with Output(path, {"command": "words"}, overwrite=True) as out:
        out.finish()


@pytest.mark.parametrize(
    "change",
    [{"bytes": [-1, 0]}, {"bytes": [0.0, 0]}, {"inputs": "1"}, {"counts": {"words": 10**400}}],
)
def test_a_record_with_impossible_counts_is_refused(tmp_path, change):
    path = tmp_path / "out.jsonl"
    with Output(path, {"command": "words"}) as out:
        state = json.loads(out.record.read_bytes())
    out.record.write_text(json.dumps({**state, **change}))
    with pytest.raises(ConfigError, match="is damaged"):
        Output(path, {"command": "words"})


@pytest.mark.parametrize("damaged", [b"", b'{"answer": "4', b"[]", b'{"answer": 4}', b"\xff"])
def test_a_damaged_answer_in_the_cache_is_asked_again(tmp_path, damaged):
    settings, messages = ChatSettings("m", tmp_path), [{"role": "user", "content": "2 + 2?"}]
    path = chat.answer_path(settings, messages)
    path.parent.mkdir()
    path.write_bytes(damaged)
    with mock.patch.object(chat, "_complete", return_value=("4", {"requests": 1})):
        assert ask(settings, messages) == "4"
    with mock.patch.object(chat, "_complete", side_effect=AssertionError("asked a third time")):
        assert ask(settings, messages) == "4"


def test_a_line_of_usage_that_was_cut_off_is_not_counted(tmp_path):
    lines = [b'{"requests": 1, "prompt_tokens": 5}', b'{"requests": 1, "pro', b'{"requests": 1}']
    (tmp_path / chat.USAGE).write_bytes(b"\n".join(lines))
    assert usage_so_far(tmp_path) == {"requests": 2, "prompt_tokens": 5, "completion_tokens": 0}


# Texts


@pytest.mark.parametrize("text", ["\ub098\ub294 \ud55c\uad6d", "\u0b94\u0b9f", "caf\u00e9 \u30ac"])
def test_a_text_in_either_normal_form_has_the_same_tokens(text):
    keys = [[t.key for t in tokens(unicodedata.normalize(f, text))] for f in ("NFC", "NFD")]
    assert keys[0] == keys[1]
    composed, split = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    (match,) = PrintedText([PrintedWord(composed, (0, 0, 9, 9))]).matches(split)
    assert (match.start, match.stop) == (0, len(split))


def test_every_letter_that_joins_the_one_before_it_is_known():
    joining = set()
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            first, second = (chr(int(part, 16)) for part in parts)
            composes = unicodedata.normalize("NFC", first + second) == chr(code)
            if composes and not unicodedata.combining(second):
                joining.add(second)
    assert joining
    assert {letter for letter in joining if not _JOINING.match(letter)} == set()


def test_a_character_that_is_several_words_is_marked_once():
    words = [PrintedWord("\u682a\u5f0f", (0, 0, 9, 9)), PrintedWord("\u4f1a\u793e", (0, 50, 9, 59))]
    matches = PrintedText(words).matches("\u337f")  # one character: "株式会社"
    assert [(match.start, match.stop) for match in matches] == [(0, 1)]


@pytest.mark.parametrize("text", ["9" * 5000 + "x1", "1x" + "9" * 20, "0x4", "4x", "\u00b2x3"])
def test_grids_that_are_none(text):
    with pytest.raises(ConfigError, match="expected HEIGHTxWIDTH"):
        Grid.of(text, "neighbours")


def test_an_image_path_that_is_too_long_is_not_there(tmp_path):
    assert first_there(tmp_path, ["x" * 5000, "a\0b", "c"]) == "x" * 5000


# Messages


@pytest.mark.parametrize(
    "text", [*ENDS, "\n", "\0", "\ud800", "\u202e", "\ufdd0", "x" * 10_000, "\u2028" * 900]
)
@pytest.mark.parametrize("kind", [SampleError, ConfigError])
def test_every_message_is_one_line_of_bounded_length(kind, text):
    message = str(kind(f"train.jsonl:7: `text`: expected a word, got {text}, really"))
    assert len(message) <= MESSAGE
    assert len(message.splitlines()) == 1
    assert message.startswith("train.jsonl:7: `text`: expected a word")
    assert message.encode()


def test_a_message_that_is_fit_stays_as_it_is():
    text = "train.jsonl:7: `text`: expected “é”, got '\u56fe\U0001f642'"
    assert cut(text) == text


def test_long_labels_do_not_make_long_places(photo):
    (photo / "classes.txt").write_text("cat " * 5000)
    (photo / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    arguments = Namespace(
        data=photo,
        images=None,
        overhang=0.01,
        question="{label}?",
        answer="{count}",
        format="yolo",
        prefer="box",
        split=None,
        names=None,
        box_style=None,
        model=None,
        output=photo / "out.jsonl",
    )
    from groundkern.trainer.prepare.maps.annotated import prepared

    source, _, _ = prepared(arguments, None)
    assert all(len(item.where) <= 300 for item in source.read())


def test_phrases_of_a_text_with_accents_apart_keep_them():
    from groundkern.trainer.prepare.phrases.composites import records
    from groundkern.trainer.prepare.phrases.rules import noun_phrases

    text = unicodedata.normalize("NFD", "A caf\u00e9 and a caf\u00e9s owner and e")
    made = records(text, noun_phrases(text))
    sample = {"messages": [{"role": "assistant", "content": text}], "phrases": made}
    found = parse_sample(sample, root=Path(), where="x").phrases
    assert text[found[-2].start : found[-2].stop] == unicodedata.normalize(
        "NFD", "a caf\u00e9s owner"
    )
