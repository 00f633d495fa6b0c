"""Data that goes bad (issue 17, items 8, 12, 14 and 17): told once, in a sentence, and bounded."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from groundkern.hf import GroundingCollator, load_processor
from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.collating import COUNTS, RobustCollator
from groundkern.trainer.counting import CountingTrainer
from groundkern.trainer.data.bad_samples import BadSample, BadSamples
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import DataChanged, SampleError, image_size, load_rgb
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.program import main
from groundkern.trainer.train import train
from tests.trainer.tiny_run import ROOT, config

PLAIN = {"objectives": {"smam": None, "dv_sft": None, "klal": None}}


def line(answer: str, image: str = "a.png", **more) -> str:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"images": [image], "messages": messages, **more})


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    whole = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    def write(*lines: str) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes("".join(each + "\n" for each in lines).encode())
        return path

    return write


@pytest.fixture(scope="module")
def model(data):
    return AutoModelForImageTextToText.from_pretrained(data / "model")


# item 8, 17: the file while it is read


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    """Another file of whole, good lines, so that an old offset is within one or another's start."""
    other = path.with_name("other")
    other.write_text("".join(line(f"other {i}") + "\n" for i in range(20)))
    os.replace(other, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"answer 9", b"ANSWER 9"))


def shift(path: Path) -> None:
    path.write_bytes(line("new first").encode() + b"\n" + path.read_bytes())


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES = [delete, replace, cut, empty, edit, shift, folder_instead]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_8_a_changed_file_stops_even_where_bad_samples_are_skipped(write, change, workers):
    path = write(*(line(f"answer {i}") for i in range(10)))
    dataset = JsonLinesDataset(path, on_bad_sample="skip")
    change(path)
    with pytest.raises(DataChanged) as caught:
        list(DataLoader(dataset, batch_size=None, num_workers=workers, sampler=[9]))
    assert str(caught.value).startswith(("data.jsonl:10: expected the line", f"{path}: expected"))
    assert "Traceback" not in str(caught.value)
    assert dataset.bad == []


def test_8_lines_added_behind_change_nothing(write):
    path = write(*(line(f"answer {i}") for i in range(3)))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    dataset = JsonLinesDataset(path)
    with path.open("ab") as file:
        file.write(b"\n" + line("more").encode())
    assert [dataset[i].messages[1]["content"][-1] for i in range(len(dataset))] == list("012")


@pytest.mark.parametrize(("change", "workers"), [(delete, 0), (replace, 2)])
def test_8_17_a_file_that_changes_while_training_ends_the_run_with_1(
    data, tmp_path, capsys, monkeypatch, change, workers
):
    copy = tmp_path / "train.jsonl"
    copy.write_bytes((data / "train.jsonl").read_bytes())
    prepare = CountingTrainer._prepare_inputs

    def changing(self, inputs):
        if not copy.with_name("changed").exists():
            copy.with_name("changed").touch()
            change(copy)
        return prepare(self, inputs)

    monkeypatch.setattr(CountingTrainer, "_prepare_inputs", changing)
    settings = tmp_path / "settings.json"
    options = {"data": {"train": str(copy), "root": str(data), "test": None}}
    training = {"steps": 40, "workers": workers, "accumulation": 1}
    wanted = config(data, tmp_path / "run", **options, **PLAIN, training=training)
    settings.write_text(wanted.model_dump_json())
    assert main(["train", "--config", str(settings)]) == 1
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(("error: train.jsonl:", f"error: {copy}: expected the"))


# item 8: how many bad samples are too many


def test_8_max_bad_fraction_holds_at_the_check(write):
    lines = [line(f"{i}", "none.png" if i < 3 else "a.png") for i in range(10)]
    assert len(JsonLinesDataset(write(*lines), max_bad_fraction=0.3)) == 7
    sentence = (
        r"^data.jsonl: expected at most 0.29 of the samples to be bad \(`data.max_bad_fraction`\), "
        r"got 3 of 10; the first: data.jsonl:1: `images\[0\]`: expected an image file"
    )
    with pytest.raises(SampleError, match=sentence):
        JsonLinesDataset(write(*lines), max_bad_fraction=0.29)
    with pytest.raises(SampleError, match="expected at most 0 of"):
        JsonLinesDataset(write(*lines), max_bad_fraction=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_8_max_bad_fraction_holds_while_training(write, workers):
    lines = [line(f"{i}", "cut.png" if i < 6 else "a.png") for i in range(12)]
    dataset = JsonLinesDataset(write(*lines), max_bad_fraction=0.25)
    assert len(dataset) == 12
    with pytest.raises(SampleError, match=r"^data.jsonl: expected at most 0.25 .* got 4 of 12; "):
        list(DataLoader(dataset, batch_size=None, num_workers=workers))


def test_8_a_sample_is_bad_once_however_often_it_is_met(write, caplog):
    dataset = JsonLinesDataset(write(line("a"), line("b", "cut.png")), max_bad_fraction=0.5)
    for _ in range(5):
        assert dataset[1].messages[1]["content"] == "a"
    assert len(dataset.bad) == 1
    assert caplog.text.count("bad sample skipped: data.jsonl:2: `images[0]`: ") == 1


def test_8_the_setting_reaches_the_data(data, tmp_path, capsys):
    lines = (data / "train.jsonl").read_text().split("\n")[:9]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, "{", "{", "{"]))
    options = {"data": {"train": str(tmp_path / "bad.jsonl"), "root": str(data), "test": None}}
    (tmp_path / "c.json").write_text(config(data, tmp_path / "run", **options).model_dump_json())
    words = ["train", "--config", str(tmp_path / "c.json")]
    assert main(words) == 1
    assert "got 3 of 12; the first: bad.jsonl:10: " in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "--data.max_bad_fraction", "1.5"]) == 2


# item 8: worker processes


def test_8_a_worker_whose_first_batch_is_all_bad_goes_on(data, model, tmp_path, caplog):
    Image.new("RGB", (224, 224)).save(data / "large.png")
    lines = (data / "train.jsonl").read_text().split("\n")[:6]
    large = {**json.loads(lines[0]), "images": ["large.png"], "regions": [], "words": []}
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([json.dumps(large)] * 4 + lines))
    dataset = JsonLinesDataset(path, root=data)
    processor = load_processor(data / "model")
    collator = RobustCollator(
        GroundingCollator(processor, model.config, max_length=60), "skip", dataset
    )
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=2))
    assert len(batches) == 5
    for batch in batches[:2]:  # the first batch of each worker
        assert (batch["labels"] == -100).all()
        assert batch["gk_text_position"].numel() == 0 or (batch["gk_text_position"] == -1).all()
        assert batch[COUNTS]["supervision"] == {}
    found = [bad.where for batch in batches for bad in batch[COUNTS]["bad"]]
    assert sorted(set(found)) == [f"d.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert batches[4][COUNTS]["supervision"]["samples"] == 2
    assert "bad sample skipped" not in caplog.text  # a worker's words are the main process's to say

    stop = RobustCollator(collator.collator, "stop", dataset)
    loader = DataLoader(dataset, batch_size=2, collate_fn=stop, num_workers=2)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert str(caught.value).startswith("`d.jsonl:1: max_length`: expected at least")
    assert "Traceback" not in str(caught.value)


def test_8_late_bad_samples_of_workers_are_in_the_record_and_told_once(data, tmp_path, caplog):
    noise = data / "noise.png"
    Image.effect_noise((84, 84), 50).convert("RGB").save(noise)
    (data / "half.png").write_bytes(noise.read_bytes()[: noise.stat().st_size // 2])
    lines = (data / "train.jsonl").read_text().split("\n")[:9]
    late = {**json.loads(lines[0]), "images": ["half.png"]}
    (tmp_path / "late.jsonl").write_text("\n".join([json.dumps(late), *lines]))
    options = {"data": {"train": str(tmp_path / "late.jsonl"), "root": str(data), "test": None}}
    training = {"steps": None, "epochs": 2, "workers": 2, "batch_size": 5}
    with caplog.at_level(logging.WARNING):
        train(config(data, tmp_path / "run", **options, **PLAIN, training=training))
    record = durable.read_json(tmp_path / "run" / folder.RECORD)["bad_samples"]["train"]
    assert record["count"] == 1
    assert record["first"][0]["where"] == "late.jsonl:1"
    assert caplog.text.count("bad sample skipped: late.jsonl:1") == 1


def test_8_bad_samples_survive_a_process_and_are_sent_once():
    import pickle

    bad = BadSamples(0.5)
    bad.total = 4
    bad.add(BadSample("a:1", "x"))
    bad = pickle.loads(pickle.dumps(bad))
    assert bad == [BadSample("a:1", "x")]
    assert [each.where for each in bad.take()] == ["a:1"]
    bad.add_all([BadSample("a:1", "y"), BadSample("a:2", "x")])
    assert [each.where for each in bad.take()] == ["a:2"]
    with pytest.raises(SampleError, match="got 3 of 4"):
        bad.add(BadSample("a:3", "x"))


# item 12: names twice, depth, length


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"regions": [{"text": "a"}], "regions": [], "messages": []}', "regions"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
        ('{"messages": [], "x": {"a": [[{"deep": {"b": 1, "b": 1}}]]}}', "b"),
        ('{"messages": [], "\\u0061": 1, "a": 2}', "a"),
    ],
)
def test_12_a_name_twice_is_refused_by_name_at_any_depth(text, name, tmp_path):
    sentence = f"d:3: `{name}`: expected a name once in an object, got it twice"
    for given in (text, text.encode()):
        with pytest.raises(SampleError) as caught:
            parse_sample(given, root=tmp_path, where="d:3")
        assert str(caught.value) == sentence


def hostile() -> dict[str, bytes]:
    wide = b", ".join(b'"%d": 0' % i for i in range(100_000))
    answer = b'{"messages": [{"role": "assistant", "content": "%s"}], %s}'
    return {
        "deep lists": b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        "deeper lists": b'{"messages": ' + b"[" * 10**6,
        "deep objects": b'{"a": ' * 900 + b"1" + b"}" * 900,
        "long text": b'{"messages": "' + b"a" * 10**6 + b'"}',
        "long name": b'{"messages": [], "' + b"a" * 10**6 + b'": 1}',
        "long name twice": b'{"%s": 1, "%s": 2}' % (b"a" * 10**6, b"a" * 10**6),
        "many names": b"{" + wide + b', "0": 1}',
        "lines in a name": b'{"messages": [], "a\\nb\\u001b[31m": 1}',
        "long number": b'{"messages": ' + b"9" * 10**5 + b"}",
        "long path": answer % (b"a", b'"images": ["%s"]' % (b"a/" * 10**5)),
        "long text of a region": answer % (b"a", b'"regions": [{"text": "%s"}]' % (b"b" * 10**6)),
        "long answer": answer % (b" " * 10**6, b'"regions": [{"char_span": [0, 9]}]'),
        "surrogate": b'{"messages": [], "\\udc00": 1}',
    }


@pytest.mark.parametrize("what", hostile())
def test_12_whatever_a_line_holds_the_message_is_short_and_one_line(what, tmp_path):
    with pytest.raises(SampleError) as caught:
        parse_sample(hostile()[what], root=tmp_path, where="d:1")
    assert str(caught.value).startswith("d:1: ")
    assert len(str(caught.value)) <= 1000
    assert str(caught.value).isprintable()


# item 14: what ends a line

ENDS = "\u2028\u2029\u0085\x1c\x1d\x1e\x0b\x0c\r"


def test_14_only_line_feeds_end_lines(write):
    answers = [f"one{end}two" for end in ENDS]
    texts = [line(answer).replace(json.dumps(answer), _raw(answer)) for answer in answers]
    path = write(*texts, line("last") + "\r")
    dataset = JsonLinesDataset(path, on_bad_sample="stop")
    found = [dataset[i].messages[1]["content"] for i in range(len(dataset))]
    assert found == [*answers, "last"]
    assert [dataset[i].name for i in (0, 9)] == ["data.jsonl:1", "data.jsonl:10"]


def _raw(answer: str) -> str:
    """As JSON, with nothing escaped that JSON allows as it is."""
    return json.dumps(answer, ensure_ascii=False)


def test_14_metrics_are_read_by_line_feeds(tmp_path):
    rows = [{"step": i, "text": f"a{end}b"} for i, end in enumerate(ENDS)]
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / folder.METRICS).write_bytes(written.encode())
    assert folder.read_metrics(tmp_path) == rows


def test_14_nothing_of_the_trainer_splits_at_other_characters():
    """The readers of other people's files are tested with the adapters."""
    sources = (ROOT / "groundkern" / "trainer").rglob("*.py")
    own = [path for path in sources if "prepare" not in path.parts]
    assert len(own) > 20
    assert [path.name for path in own if ".splitlines(" in path.read_text(encoding="utf-8")] == []


# item 17: memory of an image

PEAK = """
import os
import sys
from pathlib import Path
from groundkern.trainer.data.images import image_size, load_rgb
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
for path in map(Path, sys.argv[1:]):
    if child := os.fork():  # each in memory that the others have not touched
        assert os.waitpid(child, 0)[1] == 0
        continue
    size = image_size(path, where="x", field="y")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    image = load_rgb(path, size, where="x", field="y")
    assert image.mode == "RGB"
    print((peak() - before) / (size[0] * size[1]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc")
def test_17_decoding_takes_few_bytes_a_pixel(tmp_path):
    """A one-bit image of 12 kB, and the kind that took most: 17 and 20 bytes a pixel before."""
    side = 3000
    Image.new("1", (side, side), 1).save(tmp_path / "bits.png")
    palette = Image.new("P", (side, side))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "clear.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (side, side)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (side, side)).save(tmp_path / "alpha.png", compress_level=1)
    limits = {"bits.png": 6, "clear.png": 9, "turned.jpg": 9, "alpha.png": 11}
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in limits)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for (name, most), taken in zip(limits.items(), done.stdout.split(), strict=True):
        assert 3 <= float(taken) < most, name


def test_17_what_decoding_takes_is_limited_too(tmp_path):
    where = {"where": "x", "field": "y"}
    for name in ("a.png", "a.webp", "a.jp2"):
        Image.new("RGB", (40, 20)).save(tmp_path / name)
    assert image_size(tmp_path / "a.png", max_pixels=800, **where) == (40, 20)
    with pytest.raises(SampleError, match="at most 9600 bytes while it is decoded, got 13600 for"):
        image_size(tmp_path / "a.webp", max_pixels=800, **where)
    assert image_size(tmp_path / "a.webp", max_pixels=1134, **where) == (40, 20)
    with pytest.raises(SampleError, match=r"got 20000 for the JPEG2000 of 40 x 20 in 'a.jp2'"):
        image_size(tmp_path / "a.jp2", max_pixels=1666, **where)


def test_17_strips_are_converted_as_the_whole_was(tmp_path, monkeypatch):
    import numpy as np

    random = np.random.default_rng(0)
    values = random.integers(0, 256, (37, 23, 4), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "rgba.png")
    Image.fromarray(values[..., :2].copy(), "LA").save(tmp_path / "la.png")
    Image.fromarray(values[..., :3]).save(
        tmp_path / "rgb.png", transparency=tuple(values[0, 0, :3].tolist())
    )
    Image.fromarray(values[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    palette = Image.fromarray(values[..., :3]).quantize(16)
    palette.save(tmp_path / "p.png", transparency=bytes(range(16)))
    for path in sorted(tmp_path.iterdir()):
        found = []
        for strip in (10**6, 60, 1):
            monkeypatch.setattr("groundkern.hf.data.pictures.STRIP", strip)
            found.append(load_rgb(path, (23, 37), where="x", field="y").tobytes())
        assert found[0] == found[1] == found[2]
        with Image.open(path) as image:
            if path.name != "deep.png":
                rgba = image.convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                assert found[0] == Image.alpha_composite(white, rgba).convert("RGB").tobytes()


def test_8_what_is_bad_among_held_out_samples_is_not_counted_as_trained_on(data, tmp_path):
    """The evaluation during training has its own collator and its own list."""
    Image.new("RGB", (224, 224)).save(data / "huge.png")
    lines = (data / "test.jsonl").read_text().split("\n")[:4]
    huge = {**json.loads(lines[0]), "images": ["huge.png"], "regions": [], "words": []}
    (tmp_path / "held.jsonl").write_text("\n".join([*lines, json.dumps(huge)]))
    options = {"test": str(tmp_path / "held.jsonl"), "root": str(data), "max_length": 60}
    training = {"steps": 1, "accumulation": 1}
    evaluation = {"every": 1, "heatmaps": 0, "batch_size": 5}
    wanted = config(data, tmp_path / "run", **PLAIN, data=options, training=training)
    train(wanted.model_copy(update={"evaluation": wanted.evaluation.model_copy(update=evaluation)}))
    bad = durable.read_json(tmp_path / "run" / folder.RECORD)["bad_samples"]
    assert bad["train"]["count"] == 0
    assert [each["where"] for each in bad["test"]["first"]] == ["held.jsonl:5"]
