"""python -m benchmarks.expected: what the ops should take on an H200, computed and not measured.

From what each kernel reads, writes and multiplies (costs/passes.py, with the tiles of the code) and
the assumptions below. `--write` puts the table into docs/ops/gpu.md, `--check` fails if another is
there. With a card's own ceilings: `--bandwidth 4.1 --rate 760 --graph-us 1.8 --eager-us 6`.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from benchmarks import problems
from benchmarks.costs import floors, loss_times, passes
from benchmarks.costs.cross_entropy_engine import Head
from benchmarks.costs.loss_times import LossTime
from benchmarks.costs.passes import Pass

ROOT = Path(__file__).parents[1]
PAGE, COUNTS = ROOT / "docs" / "ops" / "gpu.md", ROOT / "benchmarks" / "counts.json"
BLOCK = re.compile(r"(<!-- expected:begin -->\n).*?(<!-- expected:end -->)", re.DOTALL)
MODEL = problems.MODELS["qwen2.5-vl-7b"]
SIDE, KLAL = "gpu/side_attention", "gpu/attention_kl mean columns sets"
LAYERS = 28
LATENCY = 0.8e-6  # seconds that a load from device memory takes, assumed


@dataclass(frozen=True)
class Card:
    """What is assumed of the card and of kernels on it, carefully. None of it is measured by us."""

    bandwidth: float = 4.3  # TB/s of a copy
    rate: float = 790.0  # TFLOP/s of a large bf16 matrix product
    graph_us: float = 2.0  # of a kernel in a CUDA graph
    eager_us: float = 8.0  # of a kernel launched from Python
    memory: float = 0.85  # share of that bandwidth that a kernel reaches
    forward: float = 0.44  # share of that rate that Triton reaches in a forward
    backward: float = 0.35  # and in a backward
    merge: float = 42.0  # KB a microsecond that one program reads of others' sums
    exchange_us: float = 0.5  # that a program waits for the L2 cache when programs merge
    clock: float = 1.7  # GHz under load
    issue: float = 0.6  # share of the clocks in which the loss's row kernel issues an instruction
    cuda_forward: float = 0.94  # share of that rate that a CUDA / CuTe kernel reaches
    cuda_backward: float = 0.65


HOPED = {
    "memory": 0.95,
    "forward": 0.60,
    "backward": 0.50,
    "merge": 112.0,
    "exchange_us": 0.3,
    "issue": 0.8,
}
WHY = {
    "bandwidth": "TB/s, of a copy",
    "rate": "TFLOP/s, of a large bf16 matrix product",
    "graph_us": "us, of a kernel in a CUDA graph, from start to start: a guess",
    "eager_us": "us, of a kernel launched from Python: a guess",
    "memory": "of that bandwidth, reached while enough is asked for ahead (0.8 us of it): a guess",
    "forward": "of that rate, in Triton. FlashAttention-2 reaches 35 % of 989 TFLOP/s on an H100 "
    "without Hopper's instructions, FlashAttention-3 75 % (its paper): between them",
    "backward": "of that rate, in Triton: a guess, a fifth below the forward",
    "merge": "KB/us, one program from the L2 cache: a processor's share of 5.5 TB/s, or 64 bytes a "
    "clock: a guess",
    "exchange_us": "us, of a load from the L2 cache or of an atomic there with its fence, while a "
    "program waits for it: a guess",
    "clock": "GHz of a processor under load: a guess",
    "issue": "of the clocks, in which the loss's row kernel issues an instruction: a guess",
    "cuda_forward": "of that rate, in CUDA / CuTe: FlashAttention-3's 75 % of 989",
    "cuda_backward": "of that rate, in CUDA / CuTe: a guess",
}


@dataclass(frozen=True)
class Expected:
    """One line of the table; times in microseconds."""

    case: str
    mode: floors.Mode
    floor: float
    parts: dict[str, float]  # memory, matrix, latency, merge
    kernels: int
    eager: float
    cuda: float

    @property
    def us(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


def _times(one: Pass, card: Card) -> dict[str, float]:
    """Of one kernel: where its time goes. Memory and products overlap: the longer counts."""
    needed = card.bandwidth * 1e12 * LATENCY
    share = min(1.0, one.flight / needed) if one.flight else 1.0
    memory = (one.read + one.written) / (card.bandwidth * 1e6 * card.memory * share)
    reached = card.backward if "backward" in one.kernel or "dk" in one.kernel else card.forward
    matrix = one.flops / (card.rate * 1e6 * reached * one.busy)
    longer = {"memory": memory} if memory >= matrix else {"matrix": matrix}
    merge = one.merged / 1e3 / card.merge + one.exchanges * card.exchange_us
    return {**longer, "latency": card.graph_us, "merge": merge}


def _cuda(floor: floors.Floor, mode: floors.Mode, card: Card) -> float:
    """Of a kernel written by hand: the floor's bytes or products, and one launch a direction."""
    reached = card.cuda_forward if mode == "forward" else card.cuda_backward
    memory = floor.bytes / (card.bandwidth * 1e6 * HOPED["memory"])
    matrix = floor.flops / (card.rate * 1e6 * reached)
    return max(memory, matrix) + card.graph_us * (1 if mode == "forward" else 2)


def _line(
    case: str, mode: floors.Mode, floor: floors.Floor, some: list[Pass], others: int, card: Card
) -> Expected:
    """others: torch's small kernels besides."""
    parts = {"memory": 0.0, "matrix": 0.0, "latency": others * card.graph_us, "merge": 0.0}
    for one in some:
        for name, us in _times(one, card).items():
            parts[name] += us
    count = len(some) + others
    least = 1e6 * floor.seconds(card.bandwidth * 1e12, card.rate * 1e12)
    eager = max(sum(parts.values()), count * card.eager_us)
    return Expected(case, mode, least, parts, count, eager, _cuda(floor, mode, card))


def _sizes(rows: int, keys: int, columns: int = 0) -> floors.AttentionSizes:
    return floors.AttentionSizes(
        rows=rows,
        heads=MODEL.heads,
        kv_heads=MODEL.kv_heads,
        dim=MODEL.dim,
        value_dim=MODEL.dim,
        keys=keys,
        used=columns or keys,
        itemsize=2,
        columns=columns,
    )


def torch_kernels(call: str, mode: floors.Mode) -> int:
    """Of a call in all layers but the first, as counts.json has them."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))[call]
    ways = ("forward",) if mode == "forward" else ("forward", "backward")
    return sum(counts[f"{way} torch"] for way in ways)


def lines(card: Card) -> Iterator[Expected]:
    """Side attention of {1, 8, 64, 256} rows on {32k, 128k} keys; KLAL of {4, 32} rows at 8k."""
    for keys in (32_768, 131_072):
        for rows in (1, 8, 64, 256):
            s = _sizes(rows, keys)
            for mode in ("forward", "full"):
                case = f"side attention, {rows} row{'s' * (rows > 1)}, {keys // 1024}k keys"
                some = passes.side_attention(s, mode)
                others = torch_kernels(SIDE, mode)
                yield _line(case, mode, floors.side_attention(s, mode), some, others, card)
    for rows in (4, 32):
        s = _sizes(rows, 8192, 2048)
        for mode in ("forward", "full"):
            case = f"KLAL, {rows} rows, 2k columns of 8k keys"
            floor = floors.attention_map(s, mode, per_row=True)
            others = torch_kernels(KLAL, mode)
            yield _line(case, mode, floor, passes.attention_kl(s, mode), others, card)


HEAD = "| case | mode | floor, us | expected, us | % of floor | bound by | kernels | eager, us |"
HEAD += " CUDA / CuTe, us |"
KERNELS = """\
| kernel | reads | writes | dots |
|---|---|---|---|
| side `_forward_kernel` | q, K, V; from L2 all partial sums | those, out and its rest, lse | 2 |
| side `_backward_kernel`, to 128 lanes | q, dout, out, K, V | dk, dv, partial dq | 5 |
| side `_backward_dq_kernel`, above | q, dout, out, K, V | partial dq, delta | 3 |
| side `_backward_dkv_kernel`, above | q, dout, K, V | dk, dv | 4 |
| side `_sum_kernel` | partial dq | dq | 0 |
| KLAL `_norm_kernel` | q, K of the columns | normaliser | 1 |
| KLAL `_map_kernel` | q, K of the columns, target | log map, KL | 1 |
| KLAL `_sums_kernel` | q, K of the columns, target, log map | the normaliser's gradient | 1 |
| KLAL `_backward_dq_kernel` | the same; every split's partial dq | that, dq | 2 |
| KLAL `_backward_dkv_kernel` | the same | dk | 2 |
"""


def _span(low: float, high: float) -> str:
    low, high = f"{low:.0f}", f"{high:.0f}"
    return low if low == high else f"{low} to {high}"


def steps_products(tokens: int) -> float:
    """FLOPs of the matrix products of a full fine-tuning step of the model, attention left out."""
    m, ffn = MODEL, 18_944
    layer = m.hidden * m.dim * 2 * (m.heads + m.kv_heads) + 3 * m.hidden * ffn
    return 6.0 * tokens * (LAYERS * layer + m.hidden * m.vocabulary)


def _share(careful: list[Expected], hoped: list[Expected], card: Card) -> str:
    """A sentence on KLAL in every layer."""
    us = [LAYERS * x[-1].us for x in (hoped, careful)]
    step = steps_products(8192) / card.rate / 1e6
    times = " to ".join(dict.fromkeys(f"{x / 1e3:.1f}" for x in us))
    sentence = (
        f"KLAL of 32 rows in all {LAYERS} layers: {times} ms in a CUDA graph. The matrix products "
        f"of a full fine-tuning step at 8k tokens take {step / 1e3:.0f} ms at {card.rate:g} "
        f"TFLOP/s, which no step reaches, so that this is at most {100 * us[1] / step:.1f} % of it."
    )
    return "\n".join(textwrap.wrap(sentence, 100, break_on_hyphens=False)) + "\n"


def _loss_time(head: Head, card: Card) -> LossTime:
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))[f"gpu/loss {loss_times.name(head)}"]
    kernels = sum(n for kind, n in counts.items() if kind.endswith((" triton", " torch")))
    assumed = loss_times.Assumed(
        bandwidth=card.bandwidth * 1e12,
        rate=card.rate * 1e12,
        launch=card.graph_us * 1e-6,
        memory=card.memory,
        clock=card.clock * 1e9,
        issue=card.issue,
    )
    return loss_times.loss_time(head, kernels, assumed)


LOSS_HEAD = (
    "| rows x hidden x vocabulary | products, ms | chunks | ours, ms | row kernel, us | bound by |"
    " other kernels, us | of the products |"
)


def loss_table(card: Card) -> str:
    """Expected times of a loss's step beside those of its products alone."""
    better = replace(card, **HOPED)
    rows = [LOSS_HEAD, "|---" * (LOSS_HEAD.count("|") - 1) + "|"]
    for head in loss_times.SHAPES:
        x, y = _loss_time(head, card), _loss_time(head, better)
        cells = [loss_times.name(head), f"{1e3 * x.products:.2f}", str(len(head.chunks))]
        cells += [f"{1e3 * y.total:.2f} to {1e3 * x.total:.2f}", _span(1e6 * y.rows, 1e6 * x.rows)]
        cells += [x.bound, f"{1e6 * x.launches:.0f}", f"{y.ratio:.3f}x to {x.ratio:.3f}x"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def text(card: Card) -> str:
    """The tables as Markdown."""
    better = replace(card, **HOPED)
    careful, hoped = list(lines(card)), list(lines(better))
    rows = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for x, y in zip(careful, hoped, strict=True):
        cells = [x.case, x.mode, f"{x.floor:.1f}", _span(y.us, x.us)]
        cells += [_span(100 * x.floor / x.us, 100 * y.floor / y.us), x.bound, str(x.kernels)]
        cells += [_span(y.eager, x.eager), f"{x.cuda:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    assumed = ["| assumed | careful | hoped for | what it is |", "|---|---|---|---|"]
    for f in fields(card):
        values = f"{getattr(card, f.name):g} | {getattr(better, f.name):g}"
        assumed.append(f"| `{f.name}` | {values} | {WHY[f.name]} |")
    return (
        "\n".join([*rows, "", _share(careful, hoped, card), loss_table(card), KERNELS, *assumed])
        + "\n"
    )


def rewritten(page: str, card: Card) -> str:
    """The page with this table in it."""
    if not BLOCK.search(page):
        raise ValueError("docs/ops/gpu.md has no expected:begin / expected:end lines")
    return BLOCK.sub(lambda m: m[1] + text(card) + m[2], page)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if --check finds another table in docs/ops/gpu.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expected", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/ops/gpu.md")
    parser.add_argument("--check", action="store_true")
    for f in fields(Card):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=float, default=f.default)
    args = parser.parse_args(arguments)
    card = Card(**{f.name: getattr(args, f.name) for f in fields(Card)})
    page = PAGE.read_text(encoding="utf-8")
    if args.write:
        PAGE.write_text(rewritten(page, card), encoding="utf-8")
    elif args.check:
        if rewritten(page, card) != page:
            print("docs/ops/gpu.md has another table; run: python -m benchmarks.expected --write")
            return 1
    else:
        print(text(card), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
