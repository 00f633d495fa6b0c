"""JSON-lines files: order, bad lines by file and number, skip and stop, late decoding."""

import json
import logging
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError


def line(answer: str, image: str = "a.png", **more) -> bytes:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"images": [image], "messages": messages, **more}).encode()


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    whole = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    def write(*lines: bytes, end: bytes = b"\n"):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(lines) + end)
        return path

    return write


def answers(dataset) -> list[str]:
    return [dataset[i].messages[1]["content"] for i in range(len(dataset))]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_items_in_the_order_of_the_file(write, end):
    path = write(line("one", task="x"), b"", b"  ", line("two"), end=end)
    dataset = JsonLinesDataset(path)
    assert answers(dataset) == ["one", "two"]
    assert dataset.tasks == ["x", ""]
    assert [dataset[i].name for i in range(2)] == ["data.jsonl:1", "data.jsonl:4"]
    assert dataset[-1].name == "data.jsonl:4"
    assert dataset.bad == []
    with pytest.raises(IndexError):
        dataset[2]


def test_windows_line_ends_and_byte_order_mark(write):
    path = write(b"\xef\xbb\xbf" + line("one") + b"\r", line("two") + b"\r")
    assert answers(JsonLinesDataset(path)) == ["one", "two"]


def test_skip_reports_file_line_and_reason(write, caplog):
    path = write(line("one"), b"{", line("two", image="none.png"), line("three"), b'{"\xff": 1}')
    with caplog.at_level(logging.WARNING):
        dataset = JsonLinesDataset(path, on_bad_sample="skip")
    assert answers(dataset) == ["one", "three"]
    assert [bad.where for bad in dataset.bad] == ["data.jsonl:2", "data.jsonl:3", "data.jsonl:5"]
    assert "invalid JSON" in dataset.bad[0].reason
    assert "`images[0]`" in dataset.bad[1].reason
    assert "bad sample skipped: data.jsonl:3: `images[0]`" in caplog.text
    assert "skipped 3 of 5 samples" in caplog.text


def test_stop_raises_at_the_first(write):
    path = write(line("one"), b"{", line("two", image="none.png"))
    with pytest.raises(SampleError, match=r"^data.jsonl:2: .*invalid JSON"):
        JsonLinesDataset(path, on_bad_sample="stop")


def test_unknown_policy(write):
    with pytest.raises(ValueError, match="`on_bad_sample`: expected skip or stop, got 'ask'"):
        JsonLinesDataset(write(line("one")), on_bad_sample="ask")


def test_huge_line_is_bad_and_the_next_one_is_found(write):
    path = write(line("one"), line("x" * 5000), line("two"))
    dataset = JsonLinesDataset(path, max_line=1000)
    assert answers(dataset) == ["one", "two"]
    assert dataset[1].name == "data.jsonl:3"
    assert dataset.bad[0].where == "data.jsonl:2"
    assert dataset.bad[0].reason == "expected a line of at most 1000 bytes, got more"


def test_pixel_limit(write):
    assert len(JsonLinesDataset(write(line("one")), max_pixels=63)) == 0
    assert len(JsonLinesDataset(write(line("one")), max_pixels=64)) == 1


def test_root_elsewhere(write, tmp_path):
    path = write(line("one"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    assert JsonLinesDataset(path, root=tmp_path / "images")[0].images[0].size == (9, 9)


def test_late_decode_failure_is_replaced_by_the_next_sample(write):
    path = write(line("one"), line("two", image="cut.png"), line("three", image="cut.png"))
    dataset = JsonLinesDataset(path)
    assert len(dataset) == 3
    assert answers(dataset) == ["one", "one", "one"]
    assert [bad.where for bad in dataset.bad] == ["data.jsonl:2", "data.jsonl:3"]
    stop = JsonLinesDataset(path, on_bad_sample="stop")
    with pytest.raises(SampleError, match=r"^data.jsonl:2: `images\[0\]`: expected an image"):
        stop[1]


def test_nothing_decodable_is_an_error_and_not_a_loop(write):
    dataset = JsonLinesDataset(write(line("one", image="cut.png")))
    with pytest.raises(SampleError, match="expected samples that can be decoded"):
        dataset[0]


def test_empty_file(write):
    assert len(JsonLinesDataset(write(end=b""))) == 0


def test_goes_through_worker_processes(write):
    dataset = JsonLinesDataset(write(line("one"), line("two")))
    assert answers(pickle.loads(pickle.dumps(dataset))) == ["one", "two"]
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert [example.name for example in loader] == ["data.jsonl:1", "data.jsonl:2"]
