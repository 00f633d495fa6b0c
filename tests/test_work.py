"""The table of least work: every shape, and a line computed by hand."""

import pytest

from benchmarks import problems, work


def test_the_table_names_every_shape_and_call(capsys) -> None:
    assert work.main(["--bandwidth", "4", "--rate", "800"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    per_shape = len(work.KEYS) * len(work.ROWS) * 3 * 2 + len(work.LOSS_ROWS) * 2
    assert len(lines) == len(problems.MODELS) * per_shape
    assert {line.split()[0] for line in lines} == set(problems.MODELS)
    assert {line.split()[-1] for line in lines} == {"memory", "matrix"}


def test_one_line_by_hand() -> None:
    """A trained head at 512 rows: three products; W read twice, dW written, h read twice, dh."""
    lines = {line.call: line for line in work.loss("qwen3-vl-2b")}
    floor = lines["linear_cross_entropy trained N512"].floor
    assert floor.flops == 3 * 2 * 512 * 2048 * 151_936
    assert floor.bytes == 2 * (3 * 151_936 * 2048 + 3 * 512 * 2048)
    text = work.text(lines["linear_cross_entropy trained N512"], 1.0, 1.0)
    assert text.split()[5:7] == [f"{floor.flops / 1e9:.3f}", f"{floor.bytes / 1e6:.2f}"]
    assert float(text.split()[-2]) == pytest.approx(floor.flops / 1e6, abs=0.1)


def test_ceilings_come_together() -> None:
    with pytest.raises(SystemExit):
        work.main(["--rate", "800"])
