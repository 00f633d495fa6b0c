"""`python -m tests.hf.field_table`: the table of `gk_` tensors in docs/data/data-format.md."""

from __future__ import annotations

from pathlib import Path

from groundkern.hf.data.batch import COUNT_RULES, FIELDS, VALUES

PAGE = Path(__file__).parents[2] / "docs" / "data" / "data-format.md"
BEGIN, END = "<!-- fields:begin -->\n", "<!-- fields:end -->"


def table() -> str:
    """One row for each field: shape, dtype, range, what it counts towards, meaning."""
    lines = ["| tensor | shape | dtype | values | counts | meaning |", "|---|---|---|---|---|---|"]
    for name, spec in FIELDS.items():
        counts = [f"`{count}`" for count, rule in COUNT_RULES.items() if rule.of[-1] == name]
        shape = f"[{', '.join(spec.dims.split())}]"
        dtype = str(spec.dtype).removeprefix("torch.")
        below = VALUES[spec.values].below
        values = spec.values if below is None else f"{spec.values} < {below}"
        cells = (f"`gk_{name}`", shape, dtype, values, ", ".join(counts), spec.meaning)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table as the page has it."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + written() + END, BEGIN + table() + END))
