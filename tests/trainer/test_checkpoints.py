"""Checkpoints are whole or absent, and a run takes only whole ones of its own line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from groundkern.trainer import checkpoints, durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.counting import CountingTrainer
from groundkern.trainer.durable import StorageError
from groundkern.trainer.program import main
from groundkern.trainer.progress import progress
from groundkern.trainer.stopping import Stopped
from groundkern.trainer.train import train
from tests.trainer.tiny_run import STEPS, config, losses, run

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.pt"


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    """The output of a whole run that kept the checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("saved") / "run"
    train(settings(data, output))
    assert names(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return output


@pytest.fixture
def output(saved, tmp_path) -> Path:
    """A copy of `saved` to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def settings(data: Path, output: Path, **training):
    training = {"save_every": 2, "keep": 3, **training}
    return config(data, output, training=training, data={"test": None})


def names(output: Path) -> list[str]:
    return [path.name for path in checkpoints.listed(output)]


def killed_in(monkeypatch, where: object, name: str, at: int) -> None:
    """Let the `at`-th call of a function die instead."""
    original, calls = getattr(where, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, dying)


def test_a_record_has_the_hash_of_every_file(output):
    checkpoint = output / "checkpoint-4"
    record = durable.read_json(checkpoint / folder.RECORD)
    files = {path.name for path in checkpoint.iterdir()}
    assert set(record["files"]) | {folder.RECORD} == files
    assert {WEIGHTS, OPTIMIZER, "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= files
    assert checkpoints.fault(checkpoint) is None
    assert not (output / checkpoints.SAVING / "checkpoint-4").exists()


def test_damage_of_any_file_in_any_way_is_found(output):
    checkpoint = output / "checkpoint-6"
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        cut = content[:-2]  # a record says the same without its last newline
        for harm in (b"", cut, content[: len(content) // 2], bytes(flipped)):
            path.write_bytes(harm)
            assert path.name in checkpoints.fault(checkpoint), (path.name, len(harm))
        path.unlink()
        assert path.name in checkpoints.fault(checkpoint)
        path.write_bytes(content)
    assert checkpoints.fault(checkpoint) is None


def test_item_5_a_damaged_newest_checkpoint_is_passed_over_with_a_sentence(
    data, saved, output, caplog
):
    (output / "checkpoint-6" / WEIGHTS).write_bytes(b"")
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-8")
    with caplog.at_level(logging.WARNING):
        train(settings(data, output))
    for name in ("checkpoint-6", "checkpoint-8"):
        assert f"{name} is damaged and is passed over: {WEIGHTS} has 0 bytes of" in caplog.text
        assert (output / "abandoned" / "1" / name / WEIGHTS).exists()  # and not removed
    assert losses(output) == losses(saved)
    assert names(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert durable.read_json(output / folder.RECORD)["continued_from"].endswith("checkpoint-4")


def test_item_5_without_a_whole_checkpoint_nothing_starts_anew_by_itself(data, output):
    for name in names(output):
        (output / name / OPTIMIZER).unlink()
    with pytest.raises(ConfigError, match=r"auto, but no checkpoint in .* is whole"):
        train(settings(data, output))
    with pytest.raises(ConfigError, match=rf"got .*checkpoint-4: {OPTIMIZER} is missing"):
        train(settings(data, output, resume=str(output / "checkpoint-4")))


def test_item_3_killed_while_a_checkpoint_is_rewritten(data, saved, output, monkeypatch):
    """Continued from 4 while 6 exists, killed when new weights were saved and nothing else."""
    resume = str(output / "checkpoint-4")
    killed_in(monkeypatch, CountingTrainer, "_save_optimizer_and_scheduler", 1)
    with pytest.raises(Killed):
        train(settings(data, output, resume=resume))
    monkeypatch.undo()
    assert names(output) == ["checkpoint-2", "checkpoint-4"]
    away = output / "abandoned" / "1"
    assert checkpoints.fault(away / "checkpoint-6") is None
    assert losses(away) == losses(saved)
    train(settings(data, output))
    assert durable.read_json(output / folder.RECORD)["continued_from"] == resume
    assert losses(output) == losses(saved)


def test_item_3_a_rollback_leaves_no_later_checkpoint_to_auto(data, saved, output, monkeypatch):
    """Continued from 2 with save_every 1 to step 3, and killed: auto takes 3, not the old 6."""
    resume = str(output / "checkpoint-2")
    killed_in(monkeypatch, CountingTrainer, "_save_checkpoint", 2)
    with pytest.raises(Killed):
        train(settings(data, output, resume=resume, save_every=1))
    assert names(output) == ["checkpoint-2", "checkpoint-3"]
    train(settings(data, output))
    assert durable.read_json(output / folder.RECORD)["continued_from"].endswith("checkpoint-3")
    assert losses(output) == losses(saved)


def test_a_checkpoint_of_another_folder_puts_everything_away(data, saved, output, tmp_path):
    elsewhere = Path(shutil.copytree(output / "checkpoint-4", tmp_path / "other" / "checkpoint-4"))
    train(settings(data, output, resume=str(elsewhere)))
    assert names(output) == ["checkpoint-6"]
    assert names(output / "abandoned" / "1") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert losses(output) == losses(saved)[4:]
    train(settings(data, output, resume=str(elsewhere)))
    assert names(output / "abandoned" / "2") == ["checkpoint-6"]


def test_item_4_with_keep_1_the_old_one_outlives_the_new_ones_save(data, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path / "run", keep=1)
    killed_in(monkeypatch, checkpoints, "seal", 2)
    with pytest.raises(Killed):
        train(wanted)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert checkpoints.fault(tmp_path / "run" / "checkpoint-2") is None
    train(wanted)
    assert names(tmp_path / "run") == ["checkpoint-6"]
    assert not list((tmp_path / "run" / checkpoints.SAVING).glob("*"))


def test_rotation_keeps_the_best_one(output):
    checkpoints.rotate(output, 1, best=2)
    assert names(output) == ["checkpoint-2", "checkpoint-6"]
    checkpoints.rotate(output, 1)
    assert names(output) == ["checkpoint-6"]


def test_other_data_of_the_same_size_is_not_continued_on(data, output, tmp_path):
    other = tmp_path / "train.jsonl"
    text = (data / "train.jsonl").read_text()
    other.write_text(text.replace("row 0 column 0", "row 0 column 1", 1).replace("1", "1"))
    wanted = settings(data, output).model_dump(mode="json")
    wanted["data"] |= {"root": str(data), "train": str(other)}
    for name in names(output):  # as if it had been trained on the file before it changed
        record = durable.read_json(output / name / folder.RECORD)
        record["config"] = wanted
        del record["sha256"]
        durable.write_json(
            output / name / folder.RECORD, {**record, "sha256": checkpoints._own_digest(record)}
        )
    settings_file = tmp_path / "settings.json"
    settings_file.write_text(json.dumps(wanted))
    assert other.stat().st_size == (data / "train.jsonl").stat().st_size
    assert main(["train", "--config", str(settings_file)]) == 2


@pytest.mark.parametrize(
    "error",
    [OSError(28, "full"), RuntimeError("torch"), SafetensorError("full"), Exception("tokenizers")],
)
def test_what_cannot_be_saved_leaves_what_was_there(tmp_path, error):
    (tmp_path / "model").mkdir()
    refused = pytest.raises(StorageError, match=r"model cannot be written: .* bytes free")
    with refused, checkpoints.aside(tmp_path, "model") as folder:
        (folder / "half").write_text("x")
        raise error
    assert [path.name for path in (tmp_path / "model").iterdir()] == []
    assert list((tmp_path / checkpoints.SAVING).iterdir()) == []


@pytest.mark.parametrize("error", [Stopped(2), KeyError("a bug"), Killed()])
def test_what_is_no_fault_of_the_disk_is_not_called_one(tmp_path, error):
    with pytest.raises(type(error)), checkpoints.aside(tmp_path, "model"):
        raise error
    assert not (tmp_path / "model").exists()


FULL = {  # what is called for which path; torch.save's error is of another kind
    "checkpoint": (CountingTrainer, "_save_optimizer_and_scheduler", RuntimeError("write failed")),
    "model": (durable, "sync_tree", OSError(28, "No space left on device")),
    "metrics.jsonl": (Path, "open", OSError(28, "No space left on device")),
    "report.html": (durable.os, "replace", OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("what", FULL)
def test_item_17_a_full_disk_is_one_sentence_and_status_1(
    data, saved, output, tmp_path, monkeypatch, capsys, what
):
    where, name, error = FULL[what]
    original = getattr(where, name)

    def full(*args, **kwargs):
        appends = args[1:] == ("ab",)
        if appends if name == "open" else what in ("checkpoint", Path(args[-1]).name):
            raise error
        return original(*args, **kwargs)

    shutil.rmtree(output / "checkpoint-6")
    monkeypatch.setattr(where, name, full)
    settings_file = tmp_path / "settings.json"
    settings_file.write_text(settings(data, output).model_dump_json())
    assert main(["train", "--config", str(settings_file)]) == 1
    monkeypatch.undo()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "cannot be written: " in last
    assert "bytes free" in last
    assert checkpoints.fault(output / "checkpoint-4") is None
    assert not list(output.rglob(f"*{durable.PARTIAL}"))
    train(settings(data, output))
    assert losses(output) == losses(saved)


def test_item_9_a_write_error_leaves_the_rows_of_the_metrics(tmp_path, monkeypatch):
    rows = [{"step": step, "loss": 1.0} for step in range(1, 1001)]
    path = tmp_path / folder.METRICS
    durable.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()

    def failing(_):
        raise OSError(5, "I/O error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: I/O error"):
        folder.keep_metrics(tmp_path, 500)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.METRICS]


def test_a_cut_row_is_skipped_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / folder.METRICS
    path.write_text('{"step": 1, "note": "a\u2028b"}\n{"step": 2, "no', encoding="utf-8")
    assert folder.read_metrics(tmp_path) == [{"step": 1, "note": "a\u2028b"}]
    folder.keep_metrics(tmp_path, 5)
    durable.append_line(path, '{"step": 2}')
    assert [row["step"] for row in folder.read_metrics(tmp_path)] == [1, 2]


def test_rows_that_are_none_are_left_out_with_a_sentence(tmp_path, caplog):
    rows = (b'{"step": 1}', b"\xff", b"[]", b"{", b"[" * 10**5, b"1" * 5000, b'{"step": "x"}')
    (tmp_path / folder.METRICS).write_bytes(b"\n".join([*rows, b'{"step": 2}', b""]))
    with caplog.at_level(logging.WARNING):
        assert folder.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    assert "metrics.jsonl:2 is no row" in caplog.text
    assert len(caplog.records) == 6


@pytest.mark.parametrize(
    "content", [b"", b'{"', b"\xff", b"[" * 10**5, b"{}", b"1" * 5000, b'{"files": {}}']
)
def test_a_record_of_anything_is_a_damaged_one(output, content):
    (output / "checkpoint-6" / folder.RECORD).write_bytes(content)
    assert folder.RECORD in checkpoints.fault(output / "checkpoint-6")


def test_a_number_that_json_has_not_is_no_part_of_a_record(output):
    path = output / "checkpoint-6" / folder.RECORD
    text = path.read_text()
    assert '"patience": null' in text
    path.write_text(text.replace('"patience": null', '"patience": Infinity'))
    assert checkpoints.fault(path.parent) == f"{folder.RECORD} was changed"


@contextmanager
def recorded(checkpoint: Path) -> Iterator[dict]:
    """The settings in a checkpoint's record, to be changed as another version would have them."""
    record = durable.read_json(checkpoint / folder.RECORD)
    yield record["config"]
    del record["sha256"]
    durable.write_json(
        checkpoint / folder.RECORD, {**record, "sha256": checkpoints._own_digest(record)}
    )


def test_a_record_of_another_version_is_refused_by_name(data, output):
    with recorded(output / "checkpoint-6") as record:
        record["training"]["gone"] = 1
    with pytest.raises(ConfigError, match=r"`training.gone` of another version of groundkern"):
        checkpoints.find(settings(data, output))


def test_labels_of_an_older_version_do_not_change_silently(data, output, caplog):
    """Its records have no `number_label`; a run that trained on labels does not go on by itself."""
    newest = output / "checkpoint-6"
    with recorded(newest) as record:
        for name in ("number_label", "strip_punctuation", "max_number_tokens"):
            del record["supervision"][name]
        del record["data"]["geometry"], record["model"]["image_options"]
    with pytest.raises(ConfigError, match=r"\(labels of words by another version of groundkern\);"):
        checkpoints.find(settings(data, output))
    assert checkpoints.find(settings(data, output, resume=str(newest))) == newest
    assert "labels of words are made otherwise from here on" in caplog.text
    caplog.clear()
    with recorded(newest) as record:
        record["objectives"]["dv_sft"] = None
    plain = config(data, output, objectives={"dv_sft": None}, data={"test": None})
    assert checkpoints.find(plain) == newest
    assert caplog.text.count("labels of words are made otherwise from here on") == 1


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    value = {"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": -float("inf")}, "d": True}
    durable.write_json(tmp_path / "x.json", value)
    assert durable.read_json(tmp_path / "x.json") == {
        "a": [None, 1.5, [None]],
        "b": {"c": None},
        "d": True,
    }


@contextmanager
def another_process_holds(output: Path) -> Iterator[int]:
    """The number of a process that has a run's folder, and is killed at the end."""
    says, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with folder.held(output):
            os.write(tells, b"held")
            time.sleep(600)
    os.read(says, 4)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_item_10_a_second_run_in_a_folder_is_told_who_holds_it(data, tmp_path, capsys):
    output = tmp_path / "run"
    settings_file = tmp_path / "settings.json"
    settings_file.write_text(settings(data, output).model_dump_json())
    with another_process_holds(output) as holder:
        assert main(["train", "--config", str(settings_file)]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert f"got {output}, held by process {holder} on " in sentence
    assert sorted(path.name for path in output.iterdir()) == [folder.LOCK]
    with folder.held(output):  # a killed holder holds nothing
        pass


def test_item_17_ctrl_c_twice_with_workers_prints_no_traceback(data, tmp_path):
    output = tmp_path / "run"
    settings_file = tmp_path / "settings.json"
    wanted = settings(data, output, steps=10**5, workers=2)
    settings_file.write_text(wanted.model_dump_json())
    process = run(["train", "--config", str(settings_file)], start_new_session=True)
    while not checkpoints.listed(output):
        assert process.poll() is None, process.communicate()
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped at once" in err or "Stopped by SIGINT: saved in" in err
    assert "Traceback" not in err
    assert checkpoints.fault(checkpoints.listed(output)[-1]) is None


def test_item_19_elsewhere_than_on_a_terminal_there_are_plain_lines(data, tmp_path, capfd):
    train(settings(data, tmp_path / "run"))
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    assert len([line for line in out.splitlines() if line.startswith("step ")]) == STEPS
    assert "training" not in err  # within 30 seconds


def test_item_19_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("groundkern.trainer.progress._PAUSE", 0.0)
    with progress("counting", total=3, unit="sheep") as bar:
        for _ in range(3):
            time.sleep(0.01)
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    assert lines[-1].startswith("counting: 100%")
    assert "3/3" in lines[-1]
    assert "sheep/s" in lines[-1]
    assert not [line for line in lines if "\r" in line]


def test_a_changed_save_every_holds_after_continuing(data, output):
    resume = str(output / "checkpoint-2")
    train(settings(data, output, resume=resume, save_every=1, keep=9))
    assert names(output) == [f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)]


def test_a_step_may_be_divided_otherwise_while_it_takes_as_many_samples(data, output):
    newest = output / "checkpoint-6"
    assert durable.read_json(newest / folder.RECORD)["position"]["processes"] == 1
    for batch, accumulation, processes in ((4, 1, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4)):
        given = settings(data, output, batch_size=batch, accumulation=accumulation)
        assert checkpoints.find(given, processes) == newest
    with pytest.raises(ConfigError, match=r"batch_size: 2 -> 4; samples in a step: 4 -> 16\);"):
        checkpoints.find(settings(data, output, batch_size=4), 2)
    assert checkpoints.find(settings(data, output), 2) == newest  # a longer step, with a sentence


def test_a_step_divided_otherwise_learns_the_same(data, saved, output):
    shutil.rmtree(output / "checkpoint-6")
    train(settings(data, output, batch_size=1, accumulation=4))
    for found, wanted in zip(losses(output), losses(saved), strict=True):
        # the Trainer's epochs count batches
        named = [name for name in wanted if name != "epoch" and not name.startswith("padding")]
        assert len(named) > 5
        for name in named:
            assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name
