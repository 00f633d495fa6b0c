"""Whether an installed groundkern works: `python tools/check_install.py [--native]`.

Run by cibuildwheel and by `make wheel` in a clean environment, which has the wheel and torch and
nothing of this checkout. With --native the C++ kernels have to be there, else the reason why they
are not is printed; either way the ops are compared with the reference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

import torch
from torch import Tensor

import groundkern as gk

CHECKOUT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-5  # float32; sums of 64 terms in another order


def attention(backend: str) -> list[Tensor]:
    q, k, v = (x.requires_grad_() for x in (torch.randn(2, h, 64, 32) for h in (4, 2, 2)))
    rows = gk.QueryRows.causal(torch.tensor([0, 1, 1]), torch.tensor([40, 20, 63]))
    out, lse = gk.side_attention(rows.take(q), k, v, rows, backend=backend)
    (out.square().sum() + lse.sum()).backward()
    return [out, lse, q.grad, k.grad, v.grad]


def map_divergence(backend: str) -> list[Tensor]:
    q, k = (x.requires_grad_() for x in (torch.randn(2, h, 64, 32) for h in (4, 2)))
    rows = gk.QueryRows.causal(torch.tensor([0, 1]), torch.tensor([40, 63]))
    columns = torch.arange(5, 25, dtype=torch.int32).repeat(2, 1)
    target = torch.rand(2, 20)
    kl = gk.attention_kl(rows.take(q), k, target, rows, columns, over="columns", backend=backend)
    kl.sum().backward()
    return [kl, q.grad, k.grad]


def cross_entropy(backend: str) -> list[Tensor]:
    hidden, head = torch.randn(7, 32).requires_grad_(), torch.randn(300, 32).requires_grad_()
    loss = gk.linear_cross_entropy(hidden, head, torch.arange(7), backend=backend)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    loss.sum().backward()
    return [loss, hidden.grad, head.grad]


def agree(call: Callable[[str], list[Tensor]], backend: str) -> None:
    """Raises AssertionError unless a backend computes what the reference does."""
    results = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        results.append(call(name))
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    print(f"{call.__name__}: {backend} agrees with reference")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--native", action="store_true", help="fail if there are no C++ kernels")
    native = parser.parse_args().native
    if CHECKOUT in Path(gk.__file__).resolve().parents[:2]:
        print("error: this is the checkout's groundkern and not an installed one", file=sys.stderr)
        return 2
    assert metadata.version("groundkern") == gk.__version__
    assert resources.files("groundkern").joinpath("trainer/demo/config.yaml").is_file()
    reason = gk.available_backends()["native"]
    print("native:", reason or "runs here")
    if native and reason:
        return 1
    for call in (attention, map_divergence, cross_entropy):
        agree(call, "auto" if reason else "native")
    script = Path(sys.executable).with_name("groundkern")
    print(subprocess.run([script, "env"], check=True, capture_output=True, text=True).stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
