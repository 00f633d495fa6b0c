"""`python -m benchmarks training_step`: all contestants agree, and the rows say what was
measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.timing import results
from benchmarks.training_step import losses as training_losses
from benchmarks.training_step import step as training_step
from benchmarks.training_step.methods import METHODS, step_of
from benchmarks.training_step.model import LEAST, SHAPES, Rows, build, sample
from groundkern.hf import attach, detach


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    arguments = ["--device", "cpu", "--shape", "tiny", "--tokens", "256", "--seconds", "0"]
    files = ["--least", "2", "--csv", str(folder / "s.csv")]
    console = Console(file=(folder / "out.txt").open("w"), width=130)
    threads = torch.get_num_threads()
    code = training_step.main([*arguments, *files, "--plot", str(folder)], console)
    torch.set_num_threads(threads)
    assert code == 0
    assert (folder / "training_step.png").stat().st_size > 10_000
    return results.read(folder / "s.csv")


@pytest.mark.long
def test_every_contestant_agrees_and_is_measured(rows):
    assert [r["contestant"] for r in rows] == list(training_step.NAMES)
    assert {r["status"] for r in rows} == {"timed"}
    by_name = {r["contestant"]: r for r in rows}
    assert float(by_name[training_step.SKIPPING]["to_skipping_p50"]) == 1
    assert all(float(r["cpu_p50_ms"]) > 0 for r in rows)
    assert all(r["processor"] and r["date"] and r["commit"] for r in rows)


@pytest.mark.long
def test_memory_is_measured_in_a_process_of_its_own(rows):
    if not training_step.memory.RESET.exists():
        pytest.skip("no /proc on this system")
    peak = {r["contestant"]: float(r["peak_mib"]) for r in rows}
    assert peak[training_step.EAGER] > 1.2 * peak["groundkern, KLAL"]
    assert peak["groundkern, text only"] < peak["stock SFT"]


@pytest.mark.parametrize(("per_token", "most"), [(1.0, 4096), (1.37, 2989), (0.3, 5000), (17, 0)])
def test_the_longest_sample_that_fits(monkeypatch, per_token, most):
    seen = []

    def peaks(settings, length, names):
        seen.append(length)
        return (
            {names[0]: int(length * per_token)} if length <= 5000 else {}
        )  # beyond that, out of memory

    monkeypatch.setattr(training_step, "peaks", peaks)
    settings = training_step.parser().parse_args(["--most-tokens", "65536"])
    found = training_step.longest(settings, "stock SFT", 4096)
    assert found <= most
    assert most - found <= max(64, found // 16) + 64
    assert all(length % 64 == 0 and length >= 256 for length in seen)


def test_a_contestant_with_another_loss_is_not_timed(monkeypatch):
    monkeypatch.setattr(training_losses, "mean_kl", lambda rows, batch: 0 * next(rows).sum())
    arguments = ["--device", "cpu", "--shape", "tiny"]
    settings = training_step.parser().parse_args(arguments)
    names = (training_step.EAGER, "groundkern, KLAL")
    found = {c.name: c for c in training_step.contestants(settings, 256, names)}
    assert found[training_step.EAGER].status.startswith("disagrees")
    assert found[training_step.EAGER].run is None
    assert found["groundkern, KLAL"].status == "timed"


def test_the_sample_has_rows_of_every_kind():
    shape, device = SHAPES["tiny"], torch.device("cpu")
    model = attach(build(shape, device, torch.float32), **training_step.TERMS)
    output = model(**sample(shape, 300, Rows(), device))
    detach(model)
    assert all(float(part) > 0 for part in output.parts.values())
    assert output.side_log_prob.shape == (1, 32)
    with pytest.raises(ValueError, match="at least 256"):
        sample(shape, 255, Rows(), device)


QUICK = ("KLAL, half of the rows gated", "patch-text contrast")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in METHODS],
)
def test_every_method_has_a_step(name):
    """It trains: its loss is finite and other than that of plain fine-tuning of the same sample."""
    shape, method = replace(SHAPES["tiny"], layers=4), METHODS[name]
    rows = replace(method.rows, text=min(method.rows.text, 64))
    ours, plain = step_of(name, replace(method, rows=rows), shape, LEAST)
    (loss,), gradients = ours()
    (without,), others = plain()
    assert bool(torch.isfinite(loss)) and float(loss) != float(without)
    assert all(bool(torch.isfinite(x).all()) for x in gradients)
    assert len(gradients) == len(others)
