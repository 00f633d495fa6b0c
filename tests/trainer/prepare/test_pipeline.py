"""The shared core: order, rejected inputs, continuing, workers, what a second run refuses."""

import json
import os
import signal
import time
from itertools import pairwise
from statistics import median

import pytest
from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.output import Output
from groundkern.trainer.prepare.pipeline import LeftOut, Made, prepare
from groundkern.trainer.prepare.sources import open_source, values
from groundkern.trainer.stopping import Stopped

SETTINGS = {"command": "test", "level": 3}


def sample(answer: str, **more) -> dict:
    return {"messages": [{"role": "assistant", "content": answer}], **more}


def work(item) -> Made:
    """One sample an input; what the input says may go wrong does."""
    if item.value == "bad":
        raise SampleError(f"{item.where}: expected a good one")
    if item.value == "left out":
        raise LeftOut(f"{item.where}: too dull")
    if item.value == "invalid":
        return Made([sample("")])
    if item.value == "bug":
        raise KeyError("x")
    if item.value == "stop":
        raise Stopped(signal.SIGTERM)
    if item.value == "die":
        os._exit(1)
    name = f"pages/{item.index}.png"
    return Made([sample(item.value, images=[name])], {name: Image.new("L", (4, 4))}, {"made": 1})


def source(*texts):
    return values(
        lambda: ((f"n{i}", text) for i, text in enumerate(texts)),
        total=len(texts),
        identity={"texts": len(texts)},
    )


def answers(path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.mark.parametrize("workers", [1, 2])
def test_order_images_rejects_and_counts(tmp_path, workers):
    path = tmp_path / "new" / "out.jsonl"
    texts = [*map(str, range(20)), "bad", "left out", "20"]
    out = prepare(source(*texts), work, output=path, settings=SETTINGS, workers=workers)
    assert answers(path) == list(map(str, range(21)))
    assert (out.inputs, out.samples, out.rejected, out.counts["made"]) == (23, 21, 2, 21)
    assert len(list((path.parent / "pages").glob("*.png"))) == 21
    rejected = [json.loads(line) for line in out.rejects.read_text().splitlines()]
    assert rejected == [
        {"where": "n20", "reason": "expected a good one", "original": "bad"},
        {"where": "n21", "reason": "too dull", "original": "left out"},
    ]
    assert not list(path.parent.rglob("*.partial"))


def slow(item) -> Made:
    """An engine that takes 50 ms; the sample says when it was busy, and in which process."""
    began = time.monotonic()
    time.sleep(0.05)
    times = {"pid": os.getpid(), "began": began, "ended": time.monotonic()}
    return Made([sample(item.value, meta=times)])


def test_workers_are_busy(tmp_path):
    path = tmp_path / "out.jsonl"
    prepare(source(*map(str, range(32))), slow, output=path, settings=SETTINGS, workers=2)
    spans: dict[int, list[tuple[float, float]]] = {}
    for line in path.read_text().splitlines():
        meta = json.loads(line)["meta"]
        spans.setdefault(meta["pid"], []).append((meta["began"], meta["ended"]))
    assert len(spans) == 2
    for each in spans.values():
        gaps = [behind[0] - before[1] for before, behind in pairwise(each)]
        assert median(gaps) < 0.1 * 0.05  # of most: a loaded machine delays a few


def test_a_bad_one_stops_if_asked_and_the_rerun_continues_behind_what_is_done(tmp_path):
    path = tmp_path / "out.jsonl"
    ok = source("0", "1", "left out", "bad", "2")
    with pytest.raises(SampleError, match="n3: expected a good one"):
        prepare(ok, work, output=path, settings=SETTINGS, on_bad_sample="stop")
    assert not path.exists()
    record = json.loads((tmp_path / "out.jsonl.prepare.json").read_text())
    assert (record["inputs"], record["samples"], record["rejected"]) == (3, 2, 1)
    out = prepare(ok, work, output=path, settings=SETTINGS)
    assert answers(path) == ["0", "1", "2"]
    assert out.counts["made"] == 3
    assert len(out.rejects.read_text().splitlines()) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_keeps_what_is_done(tmp_path, workers):
    path = tmp_path / "out.jsonl"
    texts = ["0", "1", "stop", "3"]

    def read():
        for i, text in enumerate(texts):
            if text == "stop" and workers == 2:
                raise Stopped(signal.SIGTERM)
            yield f"n{i}", text

    inputs = values(read, total=4, identity={"texts": 4})
    with pytest.raises(Stopped) as stop:
        prepare(inputs, work, output=path, settings=SETTINGS, workers=workers)
    assert stop.value.number == signal.SIGTERM
    assert stop.value.saved == str(tmp_path / "out.jsonl.prepare.json")
    texts[2] = "2"
    # what a process wrote after its last record is not trusted
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'{"half')
    prepare(inputs, work, output=path, settings=SETTINGS, workers=workers)
    assert answers(path) == ["0", "1", "2", "3"]


def test_a_finished_output_is_left_alone_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    prepare(source("0"), work, output=path, settings=SETTINGS)
    before = path.stat().st_mtime_ns
    again = prepare(source("0"), work, output=path, settings=SETTINGS)
    assert again.finished
    assert again.samples == 1
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"other settings or inputs \(level: 3 -> 4\)"):
        prepare(source("0"), work, output=path, settings={**SETTINGS, "level": 4})
    with pytest.raises(ConfigError, match=r"input.texts: 1 -> 2"):
        prepare(source("0", "1"), work, output=path, settings=SETTINGS)
    prepare(source("0", "1"), work, output=path, settings=SETTINGS, overwrite=True)
    assert answers(path) == ["0", "1"]
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="is there already"):
        prepare(source("0"), work, output=tmp_path / "mine.jsonl", settings=SETTINGS)


def test_two_processes_do_not_write_one_output(tmp_path):
    with Output(tmp_path / "out.jsonl", SETTINGS):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="another process is writing it"):
                Output(tmp_path / "out.jsonl", SETTINGS, overwrite=overwrite)


def test_a_partial_file_that_lost_its_end_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(Stopped):
        prepare(source("0", "stop"), work, output=path, settings=SETTINGS)
    (tmp_path / "out.jsonl.partial").write_bytes(b"")
    with pytest.raises(ConfigError, match="shorter than"):
        prepare(source("0", "stop"), work, output=path, settings=SETTINGS)


def test_a_worker_that_dies_is_one_sentence(tmp_path):
    texts = ["0", "1", "2", "die"]
    with pytest.raises(SampleError, match="a worker process died"):
        prepare(source(*texts), work, output=tmp_path / "out.jsonl", settings=SETTINGS, workers=2)


def test_a_bug_is_not_taken_for_bad_data(tmp_path):
    with pytest.raises(RuntimeError, match="n0: KeyError"):
        prepare(source("bug"), work, output=tmp_path / "out.jsonl", settings=SETTINGS)


def test_what_a_command_makes_is_checked_and_its_images_go_when_it_is_not_used(tmp_path):
    def make(item):
        return Made([sample("x", images=["a/b.png"], words=7)], {"a/b.png": Image.new("L", (4, 4))})

    out = prepare(source("0"), make, output=tmp_path / "out.jsonl", settings=SETTINGS)
    assert out.rejected == 1
    assert "`words`: expected" in out.rejects.read_text()
    assert not (tmp_path / "a/b.png").exists()


def test_hugging_face_rows_with_their_images_encoded(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    features = datasets.Features(
        {"text": datasets.Value("string"), "pages": datasets.List(datasets.Image())}
    )
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "pages": [images[:1], images]}, features=features
    )
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "splits"))
    for name, split in (("saved", None), ("rows.parquet", None), ("splits", "test")):
        rows = list(open_source(tmp_path / name, split=split).read())
        assert [row.value["text"] for row in rows] == ["a", "b"]
        assert rows[1].where == (f"{name}/{split}[1]" if split else f"{name}[1]")
        assert rows[1].value["pages"][1]["bytes"].startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="expected --split, one of train, test, got None"):
        open_source(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="expected a Hugging Face data set"):
        open_source(tmp_path / "empty")


@pytest.mark.parametrize("workers", [1, 2])
def test_values_nested_too_deeply_are_rejected(tmp_path, workers):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    inputs = values(lambda: [("n0", deep), ("n1", "1")], total=2, identity={})
    out = prepare(inputs, repeat, output=tmp_path / "out.jsonl", settings=SETTINGS, workers=workers)
    assert out.samples == out.rejected == 1
    assert "nested less deeply" in out.rejects.read_text()


def repeat(item) -> Made:
    return Made([sample(str(item.value))])
