"""What our kernels are meant to reach on a GPU, and whether a measured row does."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.reporting.sessions import number
from benchmarks.timing.results import Row

LOGITS = 2**30  # bytes of fp32 logits that the Triton backend keeps by default


@dataclass(frozen=True)
class Goal:
    """limit: of `field` of the row by graph replay. least: whether it is a lower limit."""

    words: str
    field: str
    limit: float
    least: bool
    reason: str

    def met(self, row: Row) -> bool | None:
        """None where the row does not say."""
        x = number(row[self.field])
        if x is None:
            return None
        return x >= self.limit if self.least else x <= self.limit


GOALS = {
    "bytes": Goal(
        "70 % of bandwidth",
        "percent_of_floor",
        70.0,
        True,
        "side passes where moving bytes takes longer: every key and value is read once a pass",
    ),
    "products": Goal(
        "55 % of matmul rate",
        "percent_of_floor",
        55.0,
        True,
        "side passes where the products take longer: a softmax stands between two of them",
    ),
    "one chunk": Goal(
        "GEMMs + 5 %",
        "to_gemms_p50",
        1.05,
        False,
        "loss, forward and backward, all logits at once: they are passed over beside the GEMMs",
    ),
    "chunks": Goal(
        "GEMMs + 20 %",
        "to_gemms_p50",
        1.20,
        False,
        "loss, forward and backward, in chunks: smaller GEMMs, and dweight is summed over chunks",
    ),
}


def goal_of(row: Row) -> Goal | None:
    """The goal for a row of ours; None where none is set: the loss's forward alone."""
    if row["op"] == "linear_cross_entropy":
        if row["mode"] != "full":
            return None
        logits = 4 * row["rows"] * row["vocabulary"]
        return GOALS["one chunk" if logits <= LOGITS else "chunks"]
    bandwidth, rate = number(row["bandwidth"]), number(row["matmul_rate"])
    if not bandwidth or not rate:
        return None
    memory_bound = row["floor_bytes"] / bandwidth >= row["floor_flops"] / rate
    return GOALS["bytes" if memory_bound else "products"]
