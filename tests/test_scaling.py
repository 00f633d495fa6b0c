"""Sweeps and the exponents fitted to them; the README's table and figure."""

import pytest
import torch
from PIL import Image

from benchmarks import problems, readme
from benchmarks.figures import plots, scaling
from benchmarks.timing import results, suite
from tests.test_benchmarks import measured


def swept(along: str, **sizes) -> list[problems.Problem]:
    options = {"keys": [], "rows": [], **sizes}
    return problems.problems(
        shapes=[problems.QUICK],
        ops=list(problems.OPS),
        dtypes=[torch.float32],
        sweep=[along],
        **options,
    )


@pytest.mark.parametrize(
    ("along", "ops"),
    [
        ("keys", {"side_attention", "attention_map"}),
        ("rows", {"side_attention", "attention_map", "linear_cross_entropy"}),
        ("columns", {"attention_map"}),
        ("vocabulary", {"linear_cross_entropy"}),
    ],
)
def test_one_size_grows_alone(along: str, ops: set[str]) -> None:
    found = swept(along)
    assert {p.op for p in found} == ops
    for op in ops:
        some = [p for p in found if p.op == op]
        assert [getattr(p, along) for p in some] == list(problems.SWEEPS[along])
        for other in set(scaling.SIZES) - {along}:
            assert len({getattr(p, other) for p in some}) == 1
    assert len({p.key for p in found}) == len(found)


def test_the_command_line_chooses_sizes() -> None:
    found = swept("keys", keys=[64, 128], rows=[4])
    assert {(p.keys, p.rows, p.columns) for p in found} == {
        (64, 4, 0), (128, 4, 0), (64, 4, 64), (128, 4, 128)
    }  # fmt: skip


def test_exponents() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(sizes, [3 * x**2 for x in sizes]) == pytest.approx(2)
    assert scaling.exponent(sizes, [5.0] * 4) == pytest.approx(0)


def test_fits_of_rows() -> None:
    title = {"problem": "s/op/S1", "op": "op", "dtype": "float32", "mode": "full", "swept": "keys"}
    sizes = {"rows": 4, "columns": 0, "vocabulary": 0, "contestant": "ours"}
    rows = [
        {**title, **sizes, "keys": s, "p50_ms": float(max(s, 8)), "peak_mib": None}
        for s in (32, 4, 8, 16)
    ]
    (fit,) = scaling.fits(rows)
    assert 0 < fit["time"] < 1
    assert fit["time_last"] == pytest.approx(1)
    assert fit["memory"] is None


def test_the_backward_alone() -> None:
    """Its floor is what it adds to the forward, and its clock starts after it."""
    for problem in swept("rows", keys=[64], rows=[4]):
        forward, backward, full = (problem.floor(m) for m in ("forward", "backward", "full"))
        assert backward.bytes == full.bytes - forward.bytes
        assert backward.flops == full.flops - forward.flops
    rows = suite.measure(
        problem,
        "backward",
        torch.device("cpu"),
        backends=["auto", "reference"],
        compiled=False,
        with_memory=False,
        seconds=0.0,
        least=3,
        ceilings={},
    )
    assert {r["status"].split(":")[0] for r in rows} <= {"timed", "refused"}
    assert all(r["rounds"] == 3 for r in rows if r["status"] == "timed")


def test_a_sweep_is_drawn(tmp_path) -> None:
    origin = dict.fromkeys(("device", "processor", "threads", "torch", "commit", "date"), "")
    rows = [{**r, **origin} for p in swept("keys", keys=[64, 128], rows=[4]) for r in measured(p)]
    drawn = {p.name for p in plots.draw(rows, tmp_path)}
    assert drawn == {"side_attention_keys.png", "attention_map_keys.png"}


def test_the_readme_shows_the_latest_results() -> None:
    assert readme.stale(readme.latest()) == []


def test_a_changed_result_is_noticed(tmp_path) -> None:
    path = readme.latest()
    changed = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    us = next(r for r in results.read(path) if r["kind"] == "ours")
    changed.write_text(text.replace(str(us["to_gemms_p50"]), "123.0"), encoding="utf-8")
    assert len(readme.stale(changed)) == 2


def test_the_figure_carries_its_source(tmp_path) -> None:
    readme.draw(readme.latest(), tmp_path / "f.png")
    drawn = Image.open(tmp_path / "f.png")
    assert drawn.text["Results"] == readme.fingerprint(readme.latest())
