"""python -m benchmarks.readme: the README's table and figure, made from committed results.

The table stands between two comment lines; the figure carries the fingerprint of the results it
was drawn from. `--check` changes nothing and fails where either is stale.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

from PIL import Image

from benchmarks import suite
from benchmarks.suite import Row
from benchmarks.training_losses import EAGER

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "benchmarks.png"
BLOCK = re.compile(r"(<!-- benchmarks:begin -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL)
HEAD = (
    "| forward + backward | dtype | x GEMMs | fastest other | ours / that | MiB, ours / eager |",
    "|---|---|---|---|---|---|",
)


def latest(kind: str = "cpu") -> Path:
    """The newest dated results of a machine kind; names sort by date."""
    return sorted(RESULTS.glob(f"*-{kind}.json"))[-1]


def _line(rows: list[Row]) -> str:
    """One problem: us against the floor, the fastest that was timed, and the first baseline."""
    us = next(r for r in rows if r["kind"] == "ours")
    others = [r for r in rows if r["kind"] in ("baseline", "peer") and r["p50_ms"]]
    fastest = max(others, key=lambda r: r["ours_over_this_p50"])
    eager = next(r for r in others if r["kind"] == "baseline")
    ratio = fastest["ours_over_this_p50"]
    cells = (
        f"{_case(us)}: {us['shape']}",
        str(us["dtype"]).replace("float32", "fp32").replace("bfloat16", "bf16"),
        f"{us['to_gemms_p50']:.2f}",
        str(fastest["contestant"]),
        f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}",
        f"{us['peak_mib']:.0f} / {eager['peak_mib']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _case(row: Row) -> str:
    """`attention_kl_visible` of `issue-5/attention_kl_visible/S4096xN32`."""
    return f"`{str(row['problem']).split('/')[1]}`"


def table(path: Path) -> str:
    """Every problem of a results file, those that we lose included."""
    rows = suite.read_json(path)
    problems = dict.fromkeys((r["problem"], r["dtype"]) for r in rows if r["mode"] == "full")
    groups = [[r for r in rows if (r["problem"], r["dtype"]) == p] for p in problems]
    r = rows[0]
    origin = (
        f"{r['processor']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}, "
        f"{str(r['date'])[:10]}: [{path.stem}](benchmarks/results/{path.stem}.csv)."
    )
    return "\n".join((*HEAD, *map(_line, groups), "", origin)) + "\n"


def step(path: Path) -> str:
    """A sentence on a whole training step at the longest sample of a results file."""
    rows = suite.read_json(path)
    longest = max(r["tokens"] for r in rows)
    at = {r["contestant"]: r for r in rows if r["tokens"] == longest}
    ours, eager = at["groundkern, all"], at[EAGER]
    return (
        f"\nA whole training step at {longest} tokens with SMAM, DV-SFT and KLAL takes "
        f"**{ours['to_skipping_p50']:.2f}x** the time and **{ours['memory_to_skipping']:.2f}x** "
        "the memory of plain fine-tuning that skips full logits; KLAL alone by "
        f"`output_attentions=True` {eager['to_skipping_p50']:.2f}x and "
        f"{eager['memory_to_skipping']:.2f}x "
        f"([{path.stem}](benchmarks/results/{path.stem}.csv)).\n"
    )


def fingerprint(path: Path) -> str:
    """Of the results' content; changes with any number in them."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(path: Path, figure: Path) -> None:
    """Our time over each other contestant's, case by case; the fingerprint goes into the PNG."""
    from benchmarks import plots

    plots.ratios(suite.read_json(path), figure, {"Results": fingerprint(path)})


def rewritten(text: str, path: Path) -> str:
    """The README with the table of `path` in its block."""
    if not BLOCK.search(text):
        raise ValueError("README.md has no benchmarks:begin / benchmarks:end lines")
    return BLOCK.sub(lambda m: m[1] + table(path) + step(latest("training-step")) + m[2], text)


def stale(path: Path) -> list[str]:
    """What differs from the results, in sentences."""
    found = []
    text = README.read_text(encoding="utf-8")
    if rewritten(text, path) != text:
        found.append(f"the README's table is not that of {path.name}")
    drawn = Image.open(FIGURE).text.get("Results") if FIGURE.exists() else None
    if drawn != fingerprint(path):
        found.append(f"{FIGURE.relative_to(ROOT)} was not drawn from {path.name}")
    return found


def main() -> int:
    """1 where --check finds something stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = latest()
    if not check:
        README.write_text(rewritten(README.read_text(encoding="utf-8"), path), encoding="utf-8")
        draw(path, FIGURE)
        return 0
    for sentence in stale(path):
        print(f"{sentence}; run: python -m benchmarks.readme", file=sys.stderr)
    return int(bool(stale(path)))


if __name__ == "__main__":
    sys.exit(main())
