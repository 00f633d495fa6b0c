"""`make aot` from recorder to reader: launches are specialised as the runtime does, the edges are
covered, and what is read of a kernel is what its source says.

Each test runs in a process of its own, because benchmarks.aot imports triton without its
interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.costs import loss_times
from groundkern import available_backends

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).parents[1]


def run(program: str, *paths: Path, **environment: str):
    """The JSON that a program prints."""
    path = os.pathsep.join([str(ROOT), *map(str, paths)])
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_edges_are_launched() -> None:
    program = """
import json
from benchmarks.aot.compiling import TARGETS
from benchmarks.aot.launches import launches, leaves

found = []
for launch in launches(subset=True):
    kinds = {}
    for target in ("sm_90", "gfx942"):
        kinds[target] = dict(leaves(launch, TARGETS[target].gpu))
    found.append([launch.label, launch.name, kinds])
print(json.dumps(found))
"""
    found = run(program)
    of_one_row = {name for label, name, _ in found if "rows=1 " in f"{label} "}
    assert {"row_kernel", "forward_kernel", "map_kernel", "backward_dkv_kernel"} <= of_one_row
    assert len(of_one_row) >= 10

    def kinds(special: str, kernel: str, argument: str, target: str = "sm_90") -> set[str]:
        """How an argument is specialised in launches whose label ends in `special`."""
        return {
            specialised[target][argument]
            for label, name, specialised in found
            if name == kernel and re.search(rf" D=\d+ {special}$", label)
        }

    usual, dq = "kl mean visible", "backward_dq_kernel"
    assert kinds(usual, dq, "x.q.ptr") == {"*bf16 D"}
    assert kinds(f"unaligned {usual}", dq, "x.q.ptr") == {"*bf16 D"}, "operands are copied"
    assert kinds(f"unaligned {usual}", dq, "x.weight") == {"*fp32 "}
    assert kinds(usual, dq, "x.C") == {"i32 D"}
    for argument in ("x.C", "x.heads", "x.q.n", "x.k.s"):
        assert kinds(f"all ones {usual}", dq, argument) == {"constexpr 1"}
    assert kinds(f"all odd {usual}", dq, "x.C") == {"i32 "}
    # AMD's 32-bit offsets, and 64-bit strides.
    assert kinds("sets", "forward_kernel", "x.k.ptr", "gfx942") == {"*bf16 DS"}
    assert kinds("over 2 GiB sets", "forward_kernel", "x.k.ptr", "gfx942") == {"*bf16 D"}
    assert kinds("over 2 GiB sets", "forward_kernel", "x.k.b") == {"i64 D"}
    # Chunks of one row begin at any row, so their alignment differs.
    chunks = {
        specialised["sm_90"]["results.loss"]
        for label, name, specialised in found
        if name == "row_kernel"
        and "results.loss" in specialised["sm_90"]
        and label.endswith("rows=1 a chunk")
    }
    assert chunks - {"constexpr None"} == {"*fp32 ", "*fp32 D"}  # the backward has no results


@pytest.mark.long
def test_a_launch_compiles_to_what_the_runtime_would_take(tmp_path: Path) -> None:
    """The runtime, asked to compile the same launch for the same GPU, finds it in the cache."""
    program = """
import json
from benchmarks.aot import calls, compiling
from benchmarks.aot.recorder import recorded, triton
from triton.runtime.driver import driver

gpu = compiling.TARGETS["sm_90"].gpu

class Driver:
    def get_current_target(self): return gpu
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

sizes = calls.Sizes(rows=3, vocabulary=33)
run = lambda: calls.linear_cross_entropy(sizes, True, "bags", 30.0, budget=1)
launches = [x for x in recorded("", run) if x.name == "row_kernel"]
errors = [x for x in (compiling.compiled(y, "sm_90", False)["failure"] for y in launches) if x]
driver.set_active(Driver())
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
for launch in launches:
    launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
print(json.dumps([errors, len(launches), hits]))
"""
    errors, launches, hits = run(program, TRITON_CACHE_DIR=str(tmp_path))
    assert errors == []
    assert launches > len(hits) >= 2  # both compile equal ones once
    assert all(hits)


def test_the_loss_has_the_instructions_that_its_expected_time_counts(tmp_path: Path) -> None:
    """The two loops over a row of the vocabulary are the innermost with exponentials."""
    program = """
import json
from functools import partial
from benchmarks.aot import calls, compiling
from benchmarks.aot.reading.code import loops
from benchmarks.aot.recorder import recorded, triton

target = compiling.TARGETS["sm_90"]
run = partial(calls.linear_cross_entropy, calls.Sizes(), False, "", 0.0)
*_, launch = (x for x in recorded("", run) if x.name == "row_kernel" and x.kind == "large")
source, options = launch.source(target.gpu)
code = compiling.instructions(triton.compile(source, target=target.gpu, options=options))
found = loops(code)
inner = [x for x in found if not any(y < x for y in found)]
exponential = [x for x in inner if any(code[at].opcode.startswith("MUFU") for at in x)]
print(json.dumps([sum(code[at].opcode != "NOP" for at in x) for x in exponential]))
"""
    counted = run(program, TRITON_CACHE_DIR=str(tmp_path))
    assert counted == pytest.approx(list(loss_times.INSTRUCTIONS.values()), rel=0.03)


GEMM = """
import triton
import triton.language as tl


@triton.jit
def gemm(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(a + i[:, None] * K + (k0 + k)[None, :])
        y = tl.load(b + (k0 + k)[:, None] * N + j[None, :])
        total += tl.dot(x, y)
    tl.store(c + i[:, None] * N + j[None, :], total)
"""


def test_what_is_read_of_a_kernel_is_what_its_source_says(tmp_path: Path) -> None:
    """A matrix product of 64 x 64 by 4 warps.

    wgmma's n is N. With s stages, s - 2 iterations of two copies each are in flight at the wait.
    Twice 64 x 64 bf16 are 2 x 4 copies of 16 bytes by 128 threads.
    """
    (tmp_path / "gemm.py").write_text(GEMM, encoding="utf-8")
    program = """
import json, torch
from benchmarks.aot.compiling import compiled
from benchmarks.aot.recorder import LabelledLaunch, recorded
import gemm

a, b = (torch.empty(4096, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
c = torch.empty(64, 64, device="meta")
found = {}
for stages in (2, 3, 4):
    run = lambda: gemm.gemm[(1,)](a, b, c, 4096, 64, 64, 64, num_warps=4, num_stages=stages)
    launch, *_ = recorded("bfloat16", run)
    for target in ("sm_80", "sm_90") if stages == 3 else ("sm_90",):
        found[f"{target} {stages}"] = compiled(launch, target)
run = lambda: gemm.gemm[(1,)](a, b[:, 1:], c, 4095, 64, 64, 64, num_warps=4, num_stages=3)
launch, *_ = recorded("bfloat16", run)
found["odd"] = compiled(launch, "sm_90")
found["gfx942"] = compiled(launch, "gfx942")
print(json.dumps(found))
"""
    found = run(program, tmp_path)
    assert all(x["failure"] is None and x["spills"] == x["local"] == 0 for x in found.values())
    loops = {name: x["loop"] for name, x in found.items()}
    assert [loops[f"sm_90 {s}"]["in_flight"] for s in (2, 3, 4)] == [0, 2, 4]
    for name in ("sm_90 2", "sm_90 3", "sm_90 4", "sm_80 3"):
        assert (loops[name]["loads"], loops[name]["copies"]) == ({"128": 8}, 8)
        assert loops[name]["barriers"] >= 1
    assert set(loops["sm_90 3"]["matrix"]) == {"HGMMA 64x64x16"}
    assert loops["sm_90 3"]["n"] == 64
    assert set(loops["sm_80 3"]["matrix"]) == {"HMMA 16x8x16"}
    # 64^3 products in 16 x 8 x 16 ones: 128 warp instructions, a quarter of them each warp's.
    assert loops["sm_80 3"]["matrix"]["HMMA 16x8x16"] == 4 * 8 * 4 // 4
    # A row of 4095 elements begins at an odd address: 16-bit loads, none of them asynchronous.
    assert min(int(width) for width in loops["odd"]["loads"]) == 16
    assert loops["odd"]["instructions"] > 2 * loops["sm_90 3"]["instructions"]
    assert loops["gfx942"]["matrix"].keys() <= {"v_mfma 32x32x8", "v_mfma 16x16x16"}
    assert loops["gfx942"]["n"] in (16, 32)


def test_a_tile_that_leaves_its_loop_waiting_fails(tmp_path: Path) -> None:
    """Two warp groups share 32 keys in products of 16, and two stages copy nothing ahead."""
    program = """
import json
from functools import partial
from benchmarks.aot import calls, compiling
from benchmarks.aot.recorder import recorded
from groundkern.ops.side_attention import triton_launch
from groundkern.tiles import Tile

failures = {}
for rows, tile in enumerate((Tile(64, 32, 8, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)), 64):
    triton_launch.TILES[("forward", False, 128)] = tile
    sizes = calls.Sizes(dim=64, rows=rows)  # calls that are alike have the launch of the first
    run = partial(calls.side_attention, sizes, True, True, 0.0)
    (launch,) = (x for x in recorded(f"side_attention bfloat16 {tile}", run) if x.kind == "large")
    failures[str(tile[2:4])] = compiling.compiled(launch, "sm_90")["failure"]
print(json.dumps(failures))
"""
    failures = run(program, TRITON_CACHE_DIR=str(tmp_path))
    assert failures["(8, 3)"].endswith("wanted wgmma with at least 32 columns, got 16")
    assert failures["(4, 2)"].endswith("wanted at least 2 copies in flight, got 0")
    assert failures["(4, 3)"] is None


def test_wide_heads_do_not_spill_on_amd(tmp_path: Path) -> None:
    """With eight warps 804 bytes of each thread did."""
    program = """
import json
from functools import partial
from benchmarks.aot import calls, compiling
from benchmarks.aot.recorder import recorded

run = partial(calls.attention_map, calls.Sizes(dim=192, rows=2), "map", "value", "columns", 0.0)
found = [x for x in recorded("", run) if (x.kind, x.name) == ("AMD", "backward_dq_kernel")]
print(json.dumps([compiling.compiled(x, "gfx942", read=False) for x in found]))
"""
    (found,) = run(program, TRITON_CACHE_DIR=str(tmp_path))
    assert found["failure"] is None and found["spills"] == 0
