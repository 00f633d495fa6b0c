"""`groundkern train` by several processes: what one process makes of the same batches.

One process takes batches of 4 and two take batches of 2 in turn, from the same permutation: a step
sees the same eight samples. The epoch has nine, so that its last step is mostly filled up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from groundkern.trainer import checkpoints, durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.data.order import Course, Filler, Order
from groundkern.trainer.metrics.tally import Tally
from groundkern.trainer.train import train
from tests.hf.launching import FORKED, ROOT, TORCHRUN, run
from tests.trainer.ranks_run import STOPPED_AT, half, settings
from tests.trainer.tiny_run import losses, make_data

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The data of a tiny run, with an image that only turns out to be corrupt when it is loaded."""
    data = make_data(tmp_path_factory.mktemp("data"))
    image = data / "5.png"
    image.write_bytes(image.read_bytes()[:-30])
    return data


@pytest.fixture(scope="module")
def one(broken, tmp_path_factory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    train(settings(broken, output, processes=1))
    return output


@pytest.fixture(scope="module")
def two(broken, tmp_path_factory) -> Path:
    """The folder of what two processes made."""
    where = tmp_path_factory.mktemp("two")
    run("tests.trainer.ranks_run", str(broken), str(where), launcher=FORKED)
    return where


def seen(two: Path, what: str) -> list:
    """What each process saw of a run."""
    return [json.loads((two / f"{rank}.json").read_text())[what] for rank in (0, 1)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / folder.MODEL / "model.safetensors")


@pytest.mark.parametrize("name", ["whole", "shared", "divided"])
def test_losses_and_weights_are_those_of_one_process(one, two, name):
    """Also where both share each sequence, and where they go on with sequences of their own."""
    whole = two / name
    assert len(losses(one)) == len(losses(whole)) == 6  # four steps and two evaluations
    for left, right in zip(losses(one), losses(whole), strict=True):
        assert right == pytest.approx(left, **CLOSE)
    left, right = weights(one), weights(whole)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ["whole", "shared"])
@pytest.mark.parametrize("name", [folder.BEFORE, folder.AFTER])
def test_evaluations_are_those_of_one_process(one, two, name, run):
    left, right = (durable.read_json(output / name) for output in (one, two / run))
    assert left["tasks"].keys() == right["tasks"].keys()
    for task, figures in left["tasks"].items():
        other = right["tasks"][task]
        kept, others = figures.pop("per_sample"), other.pop("per_sample")
        assert other == pytest.approx(figures, **CLOSE)
        assert others["of"] == kept["of"] and others["counts"] == kept["counts"]
        for metric, sums in kept["sums"].items():
            numbers = [[float(x) for x in text.split()] for text in (sums, others["sums"][metric])]
            assert numbers[1] == pytest.approx(numbers[0], **CLOSE)
    assert [m["name"] for m in left["heat_maps"]] == [m["name"] for m in right["heat_maps"]]


@pytest.mark.parametrize("name", ["whole", "shared", "divided"])
def test_counts_and_bad_samples_are_those_of_all(one, two, name):
    left, right = (durable.read_json(output / folder.RECORD) for output in (one, two / name))
    assert right["processes"] == 2
    assert right["supervision"] == left["supervision"]
    assert right["bad_samples"] == left["bad_samples"]
    assert left["bad_samples"]["train"]["count"] == 1
    assert right["best"]["step"] == left["best"]["step"]


def test_a_continued_run_has_the_same_bits(two):
    assert durable.read_json(two / "resumed" / folder.RECORD)["continued_from"].endswith("-2")
    assert losses(two / "resumed") == losses(two / "whole")
    left, right = weights(two / "whole"), weights(two / "resumed")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_processes_that_share_sequences_count_as_one_reader(two):
    records = [two / name / "checkpoint-2" / folder.RECORD for name in ("shared", "whole")]
    kept = [durable.read_json(path)["position"] for path in records]
    assert [position["processes"] for position in kept] == [1, 2]
    assert [position["taken"] for position in kept] == [9, 9]


def test_a_signal_to_one_stops_all_after_the_same_step(two):
    saved = f"checkpoint-{STOPPED_AT}"
    assert seen(two, "stopped") == 2 * [{"number": signal.SIGTERM, "saved": saved, "agreed": True}]
    assert checkpoints.fault(two / "stopped" / saved) is None
    assert losses(two / "stopped")[-1]["step"] == STOPPED_AT


def test_what_the_first_finds_wrong_all_say(two):
    first, second = seen(two, "refused")
    assert "`training.resume`: never, but" in first
    assert second == first


def test_one_process_goes_on_at_the_next_sample_of_two(broken, two, tmp_path, capsys):
    half(tmp_path / "run", two / "whole")
    given = settings(broken, tmp_path / "run", processes=2)  # its batches stay as they are
    train(given)
    assert "A step now takes 4 samples" in capsys.readouterr().out
    taken = {
        checkpoints.step_of(path): durable.read_json(path / folder.RECORD)["position"]["taken"]
        for path in checkpoints.listed(tmp_path / "run")
    }
    # steps of 2 x 2 samples, but for every third, which ends the Trainer's epoch of five batches
    assert [taken[step] for step in (2, 4)] == [9, 9 + 2 + 4]
    counts = durable.read_json(tmp_path / "run" / folder.RECORD)["supervision"]
    assert counts["samples"] == taken[4]


class Shuffled:
    """An order of n samples for each epoch."""

    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(random.Random(self.epoch).sample(range(self.samples), self.samples))


def steps(course: Course, until: int, last: int | None = None) -> list[list[int]]:
    """The samples of each step that the Trainer takes from a course's own to another."""
    order, step, taken = Order(Shuffled(course.samples), course, last), course.step, []
    rest = course.rounds % course.accumulation or course.accumulation
    while step < until:
        epoch, begin = divmod(step, course.steps)
        order.set_epoch(epoch)
        indices = list(order)
        assert len(indices) == len(order)
        batches = [indices[i : i + course.size] for i in range(0, len(indices), course.size)]
        at = begin * course.accumulation
        for number in range(begin, min(course.steps, begin + until - step)):
            size = course.accumulation if number < course.steps - 1 else rest
            one = [i for batch in batches[at : at + size] for i in batch]
            taken.append([i for i in one if not isinstance(i, Filler)])
            at, step = at + size, step + 1
    return taken


def test_no_sample_is_taken_twice_or_left_out_by_another_number_of_processes():
    rng = random.Random(0)
    for _ in range(500):
        samples, accumulation = rng.randint(1, 40), rng.randint(1, 4)
        first = Course(samples, rng.randint(1, 12), accumulation)
        stop, epochs = rng.randint(1, 15), rng.choice([1, 2, 2.5, 3])
        before = steps(first, stop)
        assert sum(map(len, before)) == first.at(stop)
        then = Course(samples, rng.randint(1, 12), accumulation, stop, first.at(stop))
        last = then.end(epochs) if then.moved else None
        after = steps(then, max(stop, then.until(epochs)), last)
        assert all(after)  # no step without anything to learn
        found = [index for step in before + after for index in step]
        order, whole = Shuffled(samples), []
        while len(whole) < len(found):
            whole += list(order)
            order.set_epoch(order.epoch + 1)
        assert found == whole[: len(found)]
        if then.moved and after:
            assert len(found) == last


def test_tallies_of_several_are_one_in_order():
    values, labels = torch.rand(6), torch.tensor([[1], [2], [2], [1], [3], [3]])

    def tally(batches):
        made = Tally(6)
        for batch in batches:
            rows = range(2 * batch, 2 * batch + 2)
            made.begin(rows, map(str, rows), batch)
            made.add("loss", values[list(rows)], torch.tensor([0, 1]))
            made.add_words(torch.tensor([1, 1]), labels[list(rows)], torch.tensor([0, 1]))
        return made

    whole = tally([0, 1, 2]).figures("x")
    assert Tally.joined([tally([1]), tally([0, 2])]).figures("x") == whole


def launched(data: Path, output: Path, *words: str) -> subprocess.Popen:
    """`torchrun --nproc-per-node 2 -m groundkern train` of many steps."""
    flags = {
        "model.path": data / "model",
        "data.train": data / "train.jsonl",
        "training.output": output,
        "training.steps": 500,
        "training.batch_size": 2,
        "training.log_every": 1,
    }
    command = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [*TORCHRUN, "-m", "groundkern", "train", *command, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(parent: int) -> dict[str, int]:
    """The processes that torchrun has started, by their rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {}
    for child in children:
        named = dict(
            line.partition("=")[::2]
            for line in Path(f"/proc/{child}/environ").read_text().split("\0")
        )
        if "RANK" in named:
            ranks[named["RANK"]] = int(child)
    return ranks


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGTERM, "torchrun"), (signal.SIGTERM, "1"), (signal.SIGKILL, "1")]
)
def test_whatever_ends_one_ends_all_with_a_sentence(broken, tmp_path, number, whom):
    output = tmp_path / "run"
    started = launched(broken, output, "--training.workers", "1")
    until = time.monotonic() + 300
    while len(losses(output) if output.exists() else []) < 3:
        assert started.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    ranks = processes(started.pid)
    os.kill(started.pid if whom == "torchrun" else ranks[whom], number)
    _, err = started.communicate(timeout=60)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    if number == signal.SIGTERM:
        assert err.count("Stopped by SIGTERM: saved in") == 1
        assert all(checkpoints.fault(path) is None for path in checkpoints.listed(output))
        assert len(checkpoints.listed(output)) == 1
    else:
        assert "process 0 of 2: another process ended" in err
        assert "trainer/train.py" not in err  # no traceback of ours


@pytest.mark.long
def test_a_sample_that_stops_one_process_is_named_once(broken, tmp_path):
    started = launched(broken, tmp_path / "run", "--data.on_bad_sample", "stop")
    _, err = started.communicate(timeout=300)
    assert started.returncode == 1
    assert err.count("error: train.jsonl:6: ") == 1
    assert "trainer/train.py" not in err  # torchrun may end the other before it says anything
