"""What one could install or switch on instead: measured if it is importable, named with its
version.

Liger, cut-cross-entropy and QuACK are called as their documentation says; an adapter that no longer
fits shows up as "failed" or "disagrees" in the results.
"""

import importlib
from collections.abc import Callable
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants import baselines, flex
from benchmarks.contestants.baselines import Refused, Step
from groundkern.ops.cases import Call

COMPILED = (
    "torch.compile",
    "FlexAttention",
)  # how the names of those start that compile for every shape


def _module(name: str, package: str):
    """An optional package's module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"{package} is not importable here ({error})") from error


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiled(adapter: Callable[[Call], Step]) -> Callable[[Call], Step]:
    """torch.compile of a baseline."""

    def prepare(call: Call) -> Step:
        torch._dynamo.reset()
        return torch.compile(adapter(call))

    return prepare


def _unsmoothed(call: Call) -> Tensor:
    """The targets, if the peers' losses can express the call."""
    if "bags" in call.options:
        raise Refused("it cannot smooth over an image's own labels")
    return call.options["target"]


def torch_linear_cross_entropy(chunked: bool) -> Callable[[Call], Step]:
    """F.linear_cross_entropy of torch >= 2.13, with or without its chunking."""

    def prepare(call: Call) -> Step:
        target = _unsmoothed(call)
        if not hasattr(F, "linear_cross_entropy"):
            raise Refused(f"torch {torch.__version__} has no F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def step(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (F.linear_cross_entropy(x["hidden"], x["weight"], target, options=options),)

        return step

    return prepare


def liger(call: Call) -> Step:
    """Liger-Kernel's fused linear cross entropy."""
    target = _unsmoothed(call)
    module = _module("liger_kernel.transformers", "Liger-Kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda x: (loss(x["weight"], x["hidden"], target),)


def cut_cross_entropy(call: Call) -> Step:
    """Apple's cut-cross-entropy, without its gradient filter, so that gradients are exact."""
    target = _unsmoothed(call)
    run = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda x: (run(x["hidden"], x["weight"], target, filter_eps=None),)


def quack(call: Call) -> Step:
    """QuACK's chunked linear cross entropy."""
    target = _unsmoothed(call)
    run = _module("quack.linear_cross_entropy", "QuACK").chunked_linear_cross_entropy
    return lambda x: (run(x["hidden"], x["weight"], target),)


def peers(op: str) -> dict[str, Callable[[Call], Step]]:
    """Adapters by name with version."""
    here = f"torch {torch.__version__}"
    match op:
        case "side_attention":
            return {
                "torch.compile of gathered keys": compiled(baselines.gathered_attention),
                f"FlexAttention, block mask and lse ({here})": flex.attention,
            }
        case "attention_map":
            return {
                "torch.compile of grouped scores": compiled(baselines.gathered_map),
                f"FlexAttention's lse, closed form per head ({here})": flex.closed_form_kl,
            }
        case "linear_cross_entropy":
            return {
                "torch.compile of F.cross_entropy": compiled(baselines.eager_cross_entropy),
                f"F.linear_cross_entropy ({here})": torch_linear_cross_entropy(False),
                f"F.linear_cross_entropy chunked ({here})": torch_linear_cross_entropy(True),
                f"Liger {version('liger-kernel') or ''}".strip(): liger,
                f"cut-cross-entropy {version('cut-cross-entropy') or ''}".strip(): (
                    cut_cross_entropy
                ),
                f"QuACK {version('quack-kernels') or ''}".strip(): quack,
            }
    raise ValueError(f"no op {op!r}")
