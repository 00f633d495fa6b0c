"""Figures that explain themselves: time and memory of every contestant, and how cost grows."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.timing.results import Row

COLOURS = {"floor": "#9e9e9e", "ours": "#1b7f5c", "baseline": "#c8553d", "peer": "#5b7db1"}
MEANING = {
    "floor": "the matrix products alone (floor)",
    "ours": "groundkern",
    "baseline": "what people write today",
    "peer": "other libraries and torch.compile",
}

SIZES = {"keys": "keys S", "rows": "rows N", "columns": "columns C", "vocabulary": "vocabulary V"}


def _origin(rows: list[Row]) -> str:
    """Where and when it was measured, for the foot of a figure."""
    r = rows[0]
    loads = sorted(x["load"] for x in rows if x["load"] is not None)
    load = f"load average {loads[0]} to {loads[-1]}, " if loads else ""
    return (
        f"{r['device']}, {r['processor']}, {r['threads']} threads, torch {r['torch']}, "
        f"{load}commit {r['commit']}, {r['date']}"
    )


def _groups(rows: list[Row], *fields: str) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[f] for f in fields), []).append(row)
    return found


def _bars(axis, rows: list[Row], value: Callable[[Row], float | None], form: str) -> None:
    """Horizontal log bars with their numbers; one word in place of a bar that was not measured."""
    known = [x for x in map(value, rows) if x]
    left = min(known, default=1.0) / 2
    for i, row in enumerate(rows):
        x = value(row)
        if x:
            axis.barh(i, x - left, left=left, color=COLOURS[row["kind"]])
            axis.text(x, i, " " + form.format(x), va="center", fontsize=7)
        else:
            outcome = str(row["status"]).split(":")[0]
            text = "not measured" if outcome == "timed" else outcome
            axis.text(left, i, f" {text}", va="center", fontsize=7, color="#777777")
    axis.set_xscale("log")
    axis.set_xlim(left, max(known, default=1.0) * 4)
    axis.tick_params(axis="x", labelsize=7)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if not known:
        axis.set_xticks([])
    axis.spines[["top", "right"]].set_visible(False)


def overview(op: str, rows: list[Row], folder: Path) -> Path:
    """Two panels per problem: time against the floor, and peak memory."""
    groups = _groups(rows, "problem", "dtype", "mode")
    heights = [len(g) + 2 for g in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(13, 0.24 * sum(heights) + 1.6),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for (time_axis, memory_axis), group in zip(axes, groups.values()):
        first = group[0]
        _bars(time_axis, group, lambda r: r["to_gemms_p50"], "{:.2f}x")
        time_axis.axvline(1, color="#333333", linewidth=0.8)
        shown = [r for r in group if r["kind"] != "floor"]
        offset = len(group) - len(shown)
        _bars(memory_axis, shown, lambda r: r["peak_mib"], "{:.1f}")
        names = [str(r["contestant"]) for r in group]
        time_axis.set_yticks(range(len(group)), names, fontsize=7)
        memory_axis.set_yticks([])
        time_axis.set_ylim(len(group) - 0.4, -0.6)
        memory_axis.set_ylim(len(shown) - 0.4, -0.6 - offset)
        kind = "forward + backward" if first["mode"] == "full" else "forward"
        title = f"{first['problem']}, {first['dtype']}, {kind}\n{first['shape']}"
        time_axis.set_title(title, fontsize=8, loc="left")
    axes[-1][0].set_xlabel(
        "time / time of the matrix products alone (line: 1), lower is better", fontsize=9
    )
    axes[-1][1].set_xlabel(
        "peak memory of the call beyond its inputs, MiB, lower is better", fontsize=9
    )
    return _finish(figure, f"{op}: time and memory", rows, folder / f"{op}.png")


def scaling(op: str, along: str, rows: list[Row], folder: Path) -> Path | None:
    """Time and memory against a size on log axes, with the floor as a line; None if there is one
    size."""
    rows = [r for r in rows if r["p50_ms"] and r[along] and r.get("swept") in (along, "", None)]
    others = [n for n in ("keys", "rows") if n != along]
    groups = {
        key: group
        for key, group in _groups(rows, "case", "dtype", "mode", *others).items()
        if len({r[along] for r in group}) > 1
    }
    if not groups:
        return None
    figure, axes = plt.subplots(len(groups), 2, figsize=(12, 3.6 * len(groups)), squeeze=False)
    for line, ((case, dtype, mode, *fixed), group) in zip(axes, groups.items()):
        for axis, field, unit in zip(line, ("p50_ms", "peak_mib"), ("ms", "MiB")):
            for (name, kind), points in _groups(group, "contestant", "kind").items():
                points = sorted((r[along], r[field]) for r in points if r[field])
                if points:
                    style = "--" if kind == "floor" else "-"
                    colour = COLOURS[kind] if kind in ("floor", "ours") else None
                    axis.plot(
                        *zip(*points), style, marker="o", label=name, markersize=3, color=colour
                    )
            limits = sorted({(r[along], r["floor_ms"]) for r in group if r["floor_ms"]})
            if field == "p50_ms" and limits:
                axis.plot(*zip(*limits), ":", color="black", label="memory and matmul ceilings")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(SIZES[along])
            axis.set_ylabel("time, ms" if unit == "ms" else "peak memory of the call, MiB")
            if not any(r[field] for r in group):
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6)
        rest = ", ".join(f"{n} {x}" for n, x in zip(others, fixed) if x)
        line[0].set_title(f"{case}, {dtype}, {mode}, {rest}", fontsize=8, loc="left")
    return _finish(figure, f"{op}: cost against {along}", rows, folder / f"{op}_{along}.png")


def training_step(rows: list[Row], folder: Path) -> Path:
    """Time against SFT that skips full logits, and peak memory, over the length of the sample; and
    the longest sample within the cap, if it was searched for."""
    capped = [r for r in rows if r["longest"] is not None and r["tokens"] == rows[0]["tokens"]]
    figure, axes = plt.subplots(1, 2 + bool(capped), figsize=(14 if capped else 11, 4.6))
    clock = ("cpu_", "CPU time") if rows[0]["device"] == "cpu" else ("", "time")
    panels = (
        (f"{clock[0]}to_skipping_p50", f"{clock[1]} / SFT skipping logits", "linear"),
        ("peak_mib", "peak memory of a step beyond weights, MiB", "log"),
    )
    for axis, (field, label, scale) in zip(axes, panels):
        for (name, kind), points in _groups(rows, "contestant", "kind").items():
            points = sorted((r["tokens"], r[field]) for r in points if r[field])
            if points:
                style = "-" if kind == "ours" else "--"
                axis.plot(*zip(*points), style, marker="o", label=name, markersize=3)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_yscale(scale)
        axis.set_xlabel("tokens of the sample")
        axis.set_ylabel(label)
        axis.legend(fontsize=6)
    if capped:
        names = [str(r["contestant"]) for r in capped]
        colours = [COLOURS[r["kind"]] for r in capped]
        axes[2].barh(range(len(names)), [r["longest"] for r in capped], color=colours)
        axes[2].set_yticks(range(len(names)), names, fontsize=7)
        axes[2].invert_yaxis()
        axes[2].set_xlabel(f"longest sample within {capped[0]['cap_gib']:g} GiB, tokens")
    title = f"training step: {rows[0]['problem'].split('/')[0]}, {rows[0]['dtype']}"
    return _finish(figure, title, rows, folder / "training_step.png")


def _finish(
    figure, title: str, rows: list[Row], path: Path, metadata: dict[str, str] | None = None
) -> Path:
    """Adds title, meaning of the colours and origin, and saves it with `metadata` in the PNG."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.1 / height, title, fontsize=12, va="top")
    figure.legend(
        handles,
        list(MEANING.values()),
        ncols=4,
        fontsize=8,
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(0.99, 1 - 0.05 / height),
    )
    figure.text(0.01, 0.08 / height, _origin(rows), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1 - 0.35 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
    return path


def overviews(rows: list[Row], folder: Path) -> list[Path]:
    """One overview per op."""
    return [overview(op, group, folder) for (op,), group in _groups(rows, "op").items()]


def sweeps(rows: list[Row], folder: Path, along: tuple[str, ...] = ("keys",)) -> list[Path]:
    """Cost against each swept size, per op."""
    rows = [{**r, "case": str(r["problem"]).rsplit("/", 1)[0]} for r in rows]
    drawn = [
        scaling(op, a, group, folder) for (op,), group in _groups(rows, "op").items() for a in along
    ]
    return [path for path in drawn if path is not None]


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """The figures of a run, one overview per op and one per swept size."""
    cases = [r for r in rows if not r["swept"]]
    return overviews(cases, folder) + sweeps(rows, folder, tuple(SIZES))


def ratios(rows: list[Row], path: Path, metadata: dict[str, str]) -> Path:
    """Our time and memory over each other contestant's, a line per problem; left of 1 ours is
    less."""
    groups = _groups([r for r in rows if r["mode"] == "full"], "problem", "dtype")
    figure, (time_axis, memory_axis) = plt.subplots(
        1, 2, figsize=(13, 0.36 * len(groups) + 2.2), sharey=True, width_ratios=(3, 2)
    )
    styles: dict[str, tuple[str, str]] = {}
    for i, group in enumerate(groups.values()):
        us = next(r for r in group if r["kind"] == "ours")
        for row in group:
            if row["kind"] == "ours" or not row["p50_ms"]:
                continue
            name = str(row["contestant"]).split(" (")[0]
            style = styles.setdefault(name, (COLOURS[row["kind"]], "|osD^v<>PX*ph"[len(styles)]))
            low, mid, high = (row[f"ours_over_this_p{p}"] for p in (20, 50, 80))
            time_axis.plot([low, high], [i, i], color=style[0], linewidth=3, alpha=0.35)
            marks = {time_axis: mid}
            if row["peak_mib"]:
                marks[memory_axis] = us["peak_mib"] / row["peak_mib"]
            for axis, x in marks.items():
                axis.plot(x, i, style[1], color=style[0], markersize=7, alpha=0.8)
    for axis, what in ((time_axis, "time"), (memory_axis, "peak memory")):
        axis.axvline(1, color="#333333", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"{what}: ours / theirs (left of the line ours is less)")
        axis.spines[["top", "right"]].set_visible(False)
    names = [f"{problem.split('/')[1]}, {dtype}" for problem, dtype in groups]
    time_axis.set_yticks(range(len(names)), names, fontsize=8)
    time_axis.invert_yaxis()
    handles = [plt.Line2D([], [], color=c, marker=m, linestyle="") for c, m in styles.values()]
    memory_axis.legend(handles, list(styles), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _finish(figure, "Forward + backward", rows, path, metadata)
