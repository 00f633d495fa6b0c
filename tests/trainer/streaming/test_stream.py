"""Streams: shares of readers, exact positions, bad records, formats, length groups."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import read_lines
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.streaming import stream as streams
from groundkern.trainer.streaming.position import Position, merged
from groundkern.trainer.streaming.records import reader_of
from groundkern.trainer.streaming.shards import find_shards
from groundkern.trainer.streaming.stream import Place, SampleStream, Source


def record(text, **more):
    return {"messages": [{"role": "assistant", "content": text}], **more}


def write(path, texts):
    path.write_text("".join(json.dumps(record(text)) + "\n" for text in texts))
    return path


def source(path, tmp_path, **more):
    shards = find_shards(path)
    reader = reader_of(
        shards,
        root=None,
        image_roots=(),
        boxes=BoxSettings,
        max_pixels=10**6,
        scratch=tmp_path / "scratch",
    )
    return Source(shards, shards.labels(), reader, **more)


def stream_of(path, tmp_path, **options):
    return SampleStream([source(path, tmp_path)], **{"seed": 0, "buffer": 4, **options})


def said(example):
    return example.messages[-1]["content"]


def texts(stream, count):
    return [said(example) for example in itertools.islice(stream, count)]


def test_byte_ranges_have_every_line_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"x" * n + b"\n" for n in (1, 7, 0, 3, 12, 2)) + b"last")
    whole = [(offset, line) for _, offset, line in read_lines(path)]
    for cut in range(path.stat().st_size + 1):
        ranges = (read_lines(path, start=0, stop=cut), read_lines(path, start=cut))
        assert [(o, line) for part in ranges for _, o, line in part] == whole


@pytest.mark.parametrize("files", [1, 3])
def test_readers_share_an_epoch(tmp_path, files):
    wanted = Counter(map(str, range(24)))
    for number in range(files):
        write(tmp_path / f"{number}.jsonl", [t for t in wanted if int(t) % files == number])
    found = Counter()
    for rank in range(2):
        stream = stream_of(tmp_path, tmp_path)
        for number in (2 * rank, 2 * rank + 1):
            records = stream._records(number, 4, Place())
            mine = [r for e, _, r in itertools.takewhile(lambda found: found[0] == 0, records)]
            found.update(said(stream._sample(raw).load()) for raw in mine)
    assert found == wanted


def test_epochs_have_orders_of_their_own(tmp_path):
    stream = stream_of(write(tmp_path / "a.jsonl", map(str, range(8))), tmp_path)
    got = texts(stream, 16)
    assert sorted(got[:8]) == sorted(got[8:]) == sorted(map(str, range(8)))
    assert got[:8] != got[8:]
    assert texts(stream_of(tmp_path / "a.jsonl", tmp_path, seed=1), 8) != got[:8]


class Batch:
    """Texts, and where the reader stands behind them, as the collator sends it."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, examples):
        return [said(example) for example in examples], self.stream.place


def batches(stream, workers, count):
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=Batch(stream))
    found = list(itertools.islice(loader, count))
    return [each for each, _ in found], [place for _, place in found]


class Lengths:
    def of(self, sample):
        return len(sample.messages[-1]["content"])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("workers", "trained"), [(0, 5), (2, 5), (2, 6)])
def test_goes_on_at_the_batch_that_was_trained(tmp_path, workers, trained, grouped, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["x" * i for i in range(1, 16)])
    with path.open("a") as file:
        file.write("no JSON\n")

    def made():
        stream = stream_of(path, tmp_path, buffer=6)
        stream.workers = workers
        if grouped:
            stream.group_by_length(Lengths(), 2)
        return stream

    whole, places = batches(made(), workers, 14)
    before = Position(made())
    for place in places[:trained]:  # those behind were prefetched
        before.note(place)
    after = made()
    Position(after).restore(json.loads(json.dumps(merged([before.saved()]))))
    if not workers:
        parsed = []
        real = streams.SampleStream._sample
        monkeypatch.setattr(
            streams.SampleStream, "_sample", lambda self, raw: parsed.append(1) or real(self, raw)
        )
        batches(after, 0, 1)
        assert len(parsed) <= (8 if grouped else 4)  # of a pool at most, not all before it
    assert batches(after, workers, 14 - trained)[0] == whole[trained:]


def test_other_readers_go_on_after_as_many_samples(tmp_path, caplog):
    stream = stream_of(write(tmp_path / "a.jsonl", map(str, range(40))), tmp_path)
    position = Position(stream)
    for place in batches(stream, 0, 6)[1]:
        position.note(place)
    stream.ranks, stream.workers, position = 2, 2, position.saved()
    position |= {"ranks": 1, "workers": 0}
    with caplog.at_level(logging.WARNING):
        Position(stream).restore(merged([position]))
    assert stream.starts == {number: Place(0, 3) for number in range(4)}  # 11 records of 4 readers
    assert "4 readers (processes x workers) go on where 1 were" in caplog.text
    for stream.rank in range(2):
        assert len(texts(stream, 12)) == 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_goes_on_twice_keeps_every_place(tmp_path, ranks):
    path = write(tmp_path / "a.jsonl", map(str, range(40)))
    saved = {"ranks": ranks, "workers": 0, "batches": 3}
    saved["places"] = {str(number): [0, 3, 1] for number in range(ranks)}
    parts = []
    for rank in range(2):
        stream = stream_of(path, tmp_path)
        stream.rank, stream.ranks = rank, 2
        position = Position(stream)
        position.restore(saved)
        if rank == 0:  # the other one gives nothing before the next checkpoint
            position.note((0, Place(0, 9, 1)))
        parts.append(position.saved())
    other = [0, 3, 1] if ranks == 2 else [0, 2, 0]
    assert merged(parts)["places"] == {"0": [0, 9, 1], "1": other}


def test_bad_records_are_left_out_told_once_and_too_many_stop(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("no JSON\n" + "".join(json.dumps(record(str(i))) + "\n" for i in range(3)))
    stream = stream_of(path, tmp_path, max_bad_fraction=0.3)
    assert set(texts(stream, 9)) == set("012")
    assert [bad.where for bad in stream.bad] == ["a.jsonl:1"]
    assert stream.take_read() >= 11 and stream.take_read() == 0
    path.write_text("no JSON\n" * 3 + json.dumps(record("a")))
    monkeypatch.setattr(streams, "LEAST", 2)
    with pytest.raises(SampleError, match="max_bad_fraction"):
        texts(stream_of(path, tmp_path, max_bad_fraction=0.3), 9)
    with pytest.raises(SampleError, match=r"^a.jsonl:\d: "):
        texts(stream_of(path, tmp_path, on_bad_sample="stop"), 9)


def test_a_reader_without_records_and_a_file_of_bad_ones_end(tmp_path):
    stream = stream_of(write(tmp_path / "a.jsonl", ["long" * 50]), tmp_path)
    stream.ranks, ended = 2, []
    for stream.rank in range(2):
        try:
            next(iter(stream))
        except SampleError as error:
            ended.append(str(error))
    assert len(ended) == 1 and "expected records for each of 2 readers" in ended[0]
    (tmp_path / "b.jsonl").write_text('{"messages": []}\n' * 3)
    with pytest.raises(SampleError, match="expected a usable sample, got none"):
        next(iter(stream_of(tmp_path / "b.jsonl", tmp_path)))


def test_weights_are_shares_by_how_many_records_there_are(tmp_path):
    small = source(write(tmp_path / "a.jsonl", ["a"] * 30), tmp_path, weight=3.0)
    large = source(write(tmp_path / "b.jsonl", ["b"] * 90), tmp_path)
    stream = SampleStream([small, large], seed=0, buffer=8)
    assert stream.shares == pytest.approx([0.5, 0.5])
    assert Counter(texts(stream, 400))["a"] / 400 == pytest.approx(0.5, abs=0.1)


def png():
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "PNG")
    return file.getvalue()


def test_parquet_of_our_records_by_rows(tmp_path):
    rows = [record(str(i), regions=[{"text": str(i), "box": [0, 0, 4, 4]}]) for i in range(9)]
    rows[3]["regions"][0] |= {"occurrence": 0}  # a column that the others have as null
    for row in rows:
        row["images"] = ["i.png"]
        row["messages"].insert(0, {"role": "user", "content": "?"})
    (tmp_path / "i.png").write_bytes(png())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    stream = stream_of(tmp_path / "*.parquet", tmp_path)
    found = []
    for number in range(3):
        for epoch, _, raw in stream._records(number, 3, Place()):
            if epoch:
                break
            found.append(said(stream._sample(raw).load()))
    assert sorted(found) == [str(i) for i in range(9)] and not stream.bad


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_of_other_programs_with_images_inside(tmp_path, kind):
    asked = {"role": "user", "content": "<image>what?"}
    chat = {"messages": [asked, {"role": "assistant", "content": "red"}]}
    image = {"bytes": png(), "path": None} if kind == "parquet" else None
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [{**chat, "images": [image or url]} for _ in range(3)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = list(itertools.islice(stream_of(path, tmp_path), 3))
    assert [example.images[0].size for example in examples] == [(9, 7)] * 3
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]


def test_what_cannot_be_streamed_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record("a")]))
    write(tmp_path / "a.jsonl", "a")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b.parquet")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("a.json", "which has to be read whole"),
        ("", "got both kinds"),
        ("empty", "got none at"),
        ("*.txt", "got none at"),
    ):
        with pytest.raises(ConfigError, match=reason):
            find_shards(tmp_path / name)


def test_digest_sees_names_sizes_and_ends(tmp_path):
    path = write(tmp_path / "a.jsonl", "abc")
    before = find_shards(path).digest()
    assert find_shards(path).digest() == before
    write(path, "abd")
    assert find_shards(path).digest() != before
