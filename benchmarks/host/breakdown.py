"""Where a layer's host time goes, by named functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.host import layers
from benchmarks.host.layers import WARM
from benchmarks.host.spans import Spans
from benchmarks.launches.noting import kernel_class
from groundkern import backends, checks
from groundkern.hf.model import attention, readings, taken
from groundkern.lse import Watch
from groundkern.opaque import BODIES, Op


def _named() -> Iterator[tuple[str, object, str]]:
    """(name, owner, attribute) of what is timed."""
    yield "lse: Watch.lse", Watch, "lse"
    yield "wrapper: rows taken", taken.Places, "take"
    yield "wrapper: rows taken", taken.Places, "split"
    yield "wrapper: rows added", taken.Places, "whole"
    yield "wrapper: rows added", taken.Places, "add"
    yield "wrapper: side rows", attention.SideRows, "attend"
    yield "wrapper: map loss", readings.MapLoss, "read"
    yield "wrapper: own columns", readings.MapRows, "own"
    yield "op: public function", attention, "side_attention"
    yield "op: public function", readings, "attention_kl"
    yield "op: checks", checks, "tensor"
    yield "op: checks", checks, "finite_positive"
    yield "op: choice of backend", backends, "choose"
    yield "launch: arguments", kernel_class(), "run"


@contextmanager
def _timed(spans: Spans) -> Iterator[None]:
    with ExitStack() as stack:
        for name, owner, attribute in _named():
            made = spans.timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, made))
        for op, body in BODIES.items():
            way = "backward" if op.endswith("backward") else "forward"
            made = spans.timed(f"op: {way} body", body)
            stack.enter_context(mock.patch.dict(BODIES, {op: made}))
        stack.enter_context(
            mock.patch.object(Op, "__call__", spans.timed("op: dispatch", Op.__call__))
        )
        yield


def breakdown(depth: int, terms: dict, rounds: int) -> list[str]:
    """Lines of a table: microseconds and calls of a layer."""
    spans, least, functions = Spans(), {}, ALL_ATTENTION_FUNCTIONS
    with _timed(spans):
        main = functions["sdpa"]
        functions["sdpa"] = spans.timed("main pass", main)
        with layers.steps(depth, terms) as steps:
            wrapper = functions["sdpa"]
            functions["sdpa"] = spans.timed("wrapper: attention function", wrapper)
            for number in range(rounds + WARM):
                spans.clear()
                steps["grounded"]()
                if number >= WARM:
                    for name, seconds in spans.seconds.items():
                        least[name] = min(seconds, least.get(name, seconds))
            functions["sdpa"] = wrapper
        functions["sdpa"] = main
    width = max(map(len, least))
    return [
        f"{name:{width}} {spans.calls[name] / depth:5.1f} calls {least[name] / depth * 1e6:7.1f} us"
        for name in sorted(least)
    ]
