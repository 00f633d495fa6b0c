"""What `make aot` would miss if it were wrong: sums in 16 bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from groundkern import available_backends

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).parents[1]
HEAD = "tt.func public @kernel() {"
CLEAN = """
%p = arith.truncf %s : tensor<16x32xf32> to tensor<16x32xbf16> loc(#loc1)
%t = tt.trans %p {order = array<i32: 1, 0>} : tensor<16x32xbf16> -> tensor<32x16xbf16>
%a = tt.dot %t, %v, %c, inputPrecision = ieee : tensor<32x16xbf16> * tensor<16x64xbf16> -> tensor<32x64xf32>
%o = arith.truncf %a : tensor<32x64xf32> to tensor<32x64xbf16>
tt.store %ptr, %o, %mask : tensor<32x64x!tt.ptr<bf16>>
%w = arith.extf %k : tensor<16x32xbf16> to tensor<16x32xf32>
"""  # noqa: E501
NARROW_DOT = "%a = tt.dot %p, %v, %c : tensor<16x16xf16> * tensor<16x64xf16> -> tensor<16x64xf16>"
ROUNDED_SUM = """
%p = arith.truncf %s : tensor<16x32xf32> to tensor<16x32xbf16>
%q = arith.extf %p : tensor<16x32xbf16> to tensor<16x32xf32>
"""


def test_sums_in_16_bits_are_found() -> None:
    """In a process of its own: benchmarks.aot takes triton without its interpreter."""
    bodies = {CLEAN: 0, NARROW_DOT: 1, CLEAN + ROUNDED_SUM: 1}
    program = "import sys\nfrom benchmarks.aot import narrowed\n"
    program += "print(*(len(narrowed(text)) for text in sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", program, *(HEAD + body + "}" for body in bodies)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(x) for x in result.stdout.split()] == list(bodies.values())
