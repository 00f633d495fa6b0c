"""A run on a stream: killed and continued, it sees what a run that was not killed sees."""

from __future__ import annotations

import pytest

from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.last_step import LastStep
from groundkern.trainer.streaming.position import FILE
from groundkern.trainer.train import train
from tests.trainer.tiny_run import config, losses, make_data


class Killed(BaseException):
    """What no handler of the run takes for an error."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("streamed"))


def settings(data, output, **changed):
    more = {"streaming": True, "shuffle_buffer": 4, "test": None, **changed}
    training = {"accumulation": 1, "save_every": 2, "steps": 5, "workers": 2}
    training |= {"output": str(output), "batch_size": 2, "learning_rate": 1e-3, "log_every": 1}
    data_section = {"train": str(data / "train.jsonl"), **more}
    return config(data, output, data=data_section, training=training, objectives={})


def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    train(settings(data, tmp_path / "whole"))
    whole = losses(tmp_path / "whole")
    real = LastStep.on_step_end

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 4:  # before its checkpoint; 3 is lost too
            raise Killed
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(LastStep, "on_step_end", killed)
    with pytest.raises(Killed):
        train(settings(data, tmp_path / "cut"))
    monkeypatch.undo()
    kept = durable.read_json(tmp_path / "cut" / "checkpoint-2" / FILE)
    assert (kept["ranks"], kept["workers"], kept["batches"]) == (1, 2, 2)  # not those prefetched
    with (data / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"the contents of .*train\.jsonl"):
        train(settings(data, tmp_path / "cut"))
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text()[:-1])
    train(settings(data, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == whole
    record = durable.read_json(tmp_path / "cut" / folder.RECORD)
    assert record["samples"]["train"] >= 6 and record["bad_samples"]["train"]["count"] == 0


def test_epochs_of_a_stream_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"`training.epochs`: expected training.steps"):
        config(
            data,
            tmp_path,
            data={"train": "a", "streaming": True},
            training={
                "output": "o",
                "steps": None,
                "epochs": 1,
            },
        )
