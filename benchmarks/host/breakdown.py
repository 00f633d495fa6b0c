"""Where a layer's host time goes, by named functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.host import layers
from benchmarks.host.layers import WARM
from benchmarks.host.spans import Spans
from benchmarks.launches.noting import kernel_class
from groundkern import asked, backends, calls, checks, taken, taken_kernels
from groundkern.hf.model import attention, body_run, layer, map_readings
from groundkern.lse import Watch
from groundkern.ops.attention_map import triton_launch as map_launch
from groundkern.ops.side_attention import triton_launch as side_launch
from groundkern.tiles import Launcher


def _named() -> Iterator[tuple[str, object, str]]:
    """(name, owner, attribute) of what is timed."""
    yield "lse: Watch.lse", Watch, "lse"
    yield "wrapper: rows taken", taken.Places, "take"
    yield "wrapper: gradients joined", taken_kernels, "join"
    yield "wrapper: what a layer is asked", body_run.BodyRun, "calls"
    yield "wrapper: ops before the main pass", attention, "ask_beside"
    yield "wrapper: side rows", layer.SideRows, "ask"
    yield "wrapper: map loss", map_readings.MapLoss, "take"
    yield "wrapper: own columns", map_readings.MapRows, "own"
    yield "op: asked", asked, "side_attention"
    yield "op: asked", asked, "attention_kl"
    yield "op: all of a layer", attention.asked, "run"
    yield "op: checks", checks, "tensor"
    yield "op: choice of backend", backends, "choose"
    for launch in (side_launch, map_launch):
        yield "op: forward", launch, "forward"
        yield "op: backward", launch, "backward"
    yield "op: what is kept", calls, "kept"
    yield "op: signature", calls, "signature"
    yield "launch: the first", kernel_class(), "run"
    yield "launch", Launcher, "__call__"


@contextmanager
def _timed(spans: Spans) -> Iterator[None]:
    with ExitStack() as stack:
        for name, owner, attribute in _named():
            made = spans.timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, made))
        yield


def breakdown(depth: int, terms: dict, rounds: int, dtype: torch.dtype) -> list[str]:
    """Lines of a table: microseconds and calls of a layer."""
    spans, least, functions = Spans(), {}, ALL_ATTENTION_FUNCTIONS
    with _timed(spans):
        main = functions["sdpa"]
        functions["sdpa"] = spans.timed("main pass", main)
        with layers.steps(depth, terms, dtype) as steps:
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
