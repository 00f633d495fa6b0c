"""python -m benchmarks.readme: the figures of the README and of docs/benchmarks.md, from committed
results.

A summary in the README and the tables of the page, of CPU results and of a GPU's, each stand
between two comment lines. The picture carries the fingerprint of the results it was drawn from.
`--check` changes nothing and fails if one of them is out of date.
"""

import argparse
import hashlib
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks.gpu.reporting.report import fastest_other, form
from benchmarks.gpu.reporting.sessions import GRAPH, groups
from benchmarks.timing import results
from benchmarks.timing.results import Row
from benchmarks.training_step.losses import EAGER

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "benchmarks.png"
BLOCKS = {
    name: re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    for name in ("summary", "benchmarks", "gpu")
}
NO_GPU = (
    "No kernel has run on a GPU yet: the Triton kernels are checked in Triton's interpreter and "
    "compiled ahead of time, and what `make gpu` measures on a card will stand here.\n"
)
LINK = "../benchmarks/results"  # from the page
HEAD = (
    "| forward + backward | dtype | x GEMMs | fastest other | ours / that | MiB, ours / eager |",
    "|---|---|---|---|---|---|",
)


def latest(kind: str = "cpu") -> Path:
    """The newest dated CPU results of a kind; file names sort by date."""
    found = [x for x in RESULTS.glob(f"*-{kind}.csv") if results.read(x)[0]["device"] == "cpu"]
    return max(found)


def latest_gpu(folder: Path = RESULTS) -> Path | None:
    """The newest dated results with graph replays on a GPU, of any card; None if there are none."""

    def newest(path: Path) -> str:
        rows = results.read(path)
        on_gpu = any(r["device"] != "cpu" and r.get("contestant") == GRAPH for r in rows)
        return max(str(r["date"]) for r in rows) if on_gpu else ""

    return max(filter(newest, folder.glob("*.csv")), key=newest, default=None)


def _line(rows: list[Row]) -> str:
    """One problem: us against the floor, the fastest that was timed, and the first baseline."""
    us = next(r for r in rows if r["kind"] == "ours")
    others = [r for r in rows if r["kind"] in ("baseline", "peer") and r["p50_ms"]]
    fastest = max(others, key=lambda r: r["ours_over_this_p50"])
    eager = next(r for r in others if r["kind"] == "baseline")
    cells = (
        f"{_case(us)}: {us['shape']}",
        str(us["dtype"]).replace("float32", "fp32").replace("bfloat16", "bf16"),
        f"{us['to_gemms_p50']:.2f}",
        str(fastest["contestant"]),
        _ratio(fastest),
        f"{us['peak_mib']:.0f} / {eager['peak_mib']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _ratio(other: Row) -> str:
    """Our time over another's, bold if we are faster."""
    ratio = other["ours_over_this_p50"]
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


def _case(row: Row) -> str:
    """`attention_kl_visible`, of `issue-5/attention_kl_visible/S4096xN32`."""
    return f"`{str(row['problem']).split('/')[1]}`"


def table(path: Path) -> str:
    """Every problem of a results file, including those that we lose."""
    rows = results.read(path)
    problems = dict.fromkeys((r["problem"], r["dtype"]) for r in rows if r["mode"] == "full")
    groups = [[r for r in rows if (r["problem"], r["dtype"]) == p] for p in problems]
    r = rows[0]
    origin = (
        f"{r['processor']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}, "
        f"{str(r['date'])[:10]}: [{path.stem}]({LINK}/{path.stem}.csv)."
    )
    return "\n".join((*HEAD, *map(_line, groups), "", origin)) + "\n"


def gpu(path: Path | None) -> str:
    """Every call that was replayed on a GPU, forward and full; one sentence if none was."""
    if path is None:
        return NO_GPU
    found = groups(results.read(path))
    replayed = [x for x in found.values() if any(r["contestant"] == GRAPH for r in x)]
    others = [fastest_other(rows) for rows in replayed]
    head = "| case | mode | ms | % of floor | x GEMMs |"
    head += " fastest other | ours / that |" if any(others) else ""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for rows, other in zip(replayed, others, strict=True):
        us = next(r for r in rows if r["contestant"] == GRAPH)
        cells = [f"`{str(us['problem']).partition('/')[2]}`: {us['shape']}", str(us["mode"])]
        cells += [form(us[n]) for n in ("p50_ms", "percent_of_floor", "to_gemms_p50")]
        if any(others):
            cells += [str(other["contestant"]), _ratio(other)] if other else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    r = max((row for rows in replayed for row in rows), key=lambda row: str(row["date"]))
    origin = (
        f"{r['device']}, torch {r['torch']}, triton {r['triton']}, commit {r['commit']}, "
        f"{str(r['date'])[:10]}: [{path.stem}]({LINK}/{path.stem}.csv). Device time by "
        "CUDA-graph replay, no input in the L2 cache."
    )
    return "\n".join((*lines, "", origin, *_wrong(path))) + "\n"


def _wrong(path: Path) -> Iterator[str]:
    """A table of times must not hide results that were wrong: a line that counts them."""
    smoke = path.with_name(f"{path.stem}-smoke.csv")
    if smoke.exists():
        right = [row["ok"] is True for row in results.read(smoke)]
        if not all(right):
            link = f"[{smoke.stem}]({LINK}/{smoke.name})"
            yield f"**{right.count(False)} of {len(right)} checks against fp64 failed**: {link}."


def step(path: Path, folder: str = LINK) -> str:
    """A sentence on a whole training step at the longest sample of a results file, which lies in
    this folder as seen from the page."""
    rows = results.read(path)
    longest = max(r["tokens"] for r in rows)
    at = {r["contestant"]: r for r in rows if r["tokens"] == longest}
    ours, eager = at["groundkern, all"], at[EAGER]
    return (
        f"\nA whole training step at {longest} tokens with SMAM, DV-SFT and KLAL takes "
        f"**{ours['to_skipping_p50']:.2f}x** the time and **{ours['memory_to_skipping']:.2f}x** "
        "the memory of plain fine-tuning that skips full logits; KLAL alone by "
        f"`output_attentions=True` {eager['to_skipping_p50']:.2f}x and "
        f"{eager['memory_to_skipping']:.2f}x "
        f"([{path.stem}]({folder}/{path.stem}.csv)).\n"
    )


def fingerprint(path: Path) -> str:
    """A hash of the results, which changes with any number in them."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(path: Path, figure: Path) -> None:
    """Draws our time over each other contestant's, case by case, with the fingerprint in the
    PNG."""
    from benchmarks.figures import plots

    plots.ratios(results.read(path), figure, {"Results": fingerprint(path)})


def summary(path: Path) -> str:
    """The README's sentences: every case of the table in a line, and a whole step."""
    rows = [r for r in results.read(path) if r["mode"] == "full"]
    problems = dict.fromkeys((r["problem"], r["dtype"]) for r in rows)
    fastest = [
        max(
            r["ours_over_this_p50"]
            for r in rows
            if (r["problem"], r["dtype"]) == problem
            and r["kind"] in ("baseline", "peer")
            and r["p50_ms"]
        )
        for problem in problems
    ]
    ahead = sum(ratio < 1 for ratio in fastest)
    cases = (
        f"On CPU, forward and backward, {ahead} of {len(fastest)} cases are faster than the "
        f"fastest of plain torch, torch.compile and other libraries: {min(fastest):.2f}x to "
        f"{max(fastest):.2f}x of its time."
    )
    text = f"{cases} {step(latest('training-step'), 'benchmarks/results').strip()}"
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def rewritten(page: Path, path: Path) -> str:
    """The text of the README or of the benchmarks' page, with what `path` and the newest GPU
    results say."""
    if page == README:
        blocks = {"summary": summary(path)}
    else:
        made = table(path) + step(latest("training-step"))
        blocks = {"benchmarks": made, "gpu": gpu(latest_gpu())}
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        if not BLOCKS[name].search(text):
            raise ValueError(f"{page.name} has no {name}:begin / {name}:end lines")
        text = BLOCKS[name].sub(lambda m, block=block: m[1] + block + m[2], text)
    return text


def stale(path: Path) -> list[str]:
    """What is not up to date with the results, in sentences."""
    found = []
    for page in (README, PAGE):
        if rewritten(page, path) != page.read_text(encoding="utf-8"):
            found.append(f"{page.name} does not say what {path.name} and a GPU's newest say")
    drawn = Image.open(FIGURE).text.get("Results") if FIGURE.exists() else None
    if drawn != fingerprint(path):
        found.append(f"{FIGURE.relative_to(ROOT)} was not drawn from {path.name}")
    return found


def main() -> int:
    """Returns 1 if --check finds something out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = latest()
    if not check:
        for page in (README, PAGE):
            page.write_text(rewritten(page, path), encoding="utf-8")
        draw(path, FIGURE)
        return 0
    for sentence in stale(path):
        print(f"{sentence}; run: python -m benchmarks.readme", file=sys.stderr)
    return int(bool(stale(path)))


if __name__ == "__main__":
    sys.exit(main())
