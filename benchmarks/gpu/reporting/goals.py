"""The goals of our kernels on a GPU, and whether a measured row meets them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.reporting.sessions import number
from benchmarks.timing.results import Row

LOGITS = 2**30  # bytes: the default logit budget of the Triton backend


@dataclass(frozen=True)
class Goal:
    """limit: of `field` in the row of graph replays. least: whether it is a lower limit."""

    text: str
    field: str
    limit: float
    least: bool
    reason: str

    def met(self, row: Row) -> bool | None:
        """None if the row has no such number."""
        x = number(row[self.field])
        if x is None:
            return None
        return x >= self.limit if self.least else x <= self.limit


GOALS = {
    "bytes, forward": Goal(
        "70 % of bandwidth",
        "percent_of_floor",
        70.0,
        True,
        "side passes where moving bytes takes longer: every key and value is read once",
    ),
    "bytes, full": Goal(
        "55 % of bandwidth",
        "percent_of_floor",
        55.0,
        True,
        "the same with the backward: one more pass over keys and values, and a reduction",
    ),
    "products, forward": Goal(
        "55 % of matmul rate",
        "percent_of_floor",
        55.0,
        True,
        "side passes where the products take longer: a softmax stands between two of them",
    ),
    "products, full": Goal(
        "40 % of matmul rate",
        "percent_of_floor",
        40.0,
        True,
        "the same with the backward, which makes nine products where the floor counts seven",
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
    """The goal for a row of ours; None if there is none, as for the loss's forward alone."""
    if row["op"] == "linear_cross_entropy":
        if row["mode"] != "full":
            return None
        logits = 4 * row["rows"] * row["vocabulary"]
        return GOALS["one chunk" if logits <= LOGITS else "chunks"]
    bandwidth, rate = number(row["bandwidth"]), number(row["matmul_rate"])
    if not bandwidth or not rate:
        return None
    memory_bound = row["floor_bytes"] / bandwidth >= row["floor_flops"] / rate
    way = "forward" if row["mode"] == "forward" else "full"
    return GOALS[f"{'bytes' if memory_bound else 'products'}, {way}"]
