"""What `make aot` reads in machine code and in triton's representations.

On shortened excerpts of what triton 3.7.1 compiled our kernels to; the expected numbers are counted
by hand.
"""

import pytest

from benchmarks.aot.reading import amdgcn, sass, ttgir
from benchmarks.aot.reading.code import Loop, loops, main_loop, shaped


def machine_code(*lines: str) -> str:
    """As cuobjdump prints it: 16 bytes per instruction, its encoding beside it."""
    head = '\n\tcode for sm_90a\n\t\tFunction : _forward_kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    body = []
    for place, line in enumerate(lines):
        body.append(
            f"        /*{place * 16:04x}*/              {line} ;     /* 0x00000a00ff017b82 */"
        )
        body.append(" " * 100 + "/* 0x000e620000000800 */")
    return head + "\n".join(body) + "\n"


# sm_90's forward kernel: a loop of 13 instructions and a NOP, one of them under a branch (0x100);
# loads and a barrier before it do not count.
FORWARD = machine_code(
    "LDC R1, c[0x0][0x28]",
    "@!P4 LDG.E.128 R12, desc[UR10][R24.64]",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P6 BRA 0x140",
    "DEPBAR.LE SB0, 0x0",  # 0x40: the loop
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P4 LDG.E R56, desc[UR10][R4.64]",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x16x16.F32.BF16 R64, gdesc[UR40], RZ, !UPT",
    "HGMMA.64x16x16.F32.BF16 R64, gdesc[UR12], R64",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "HGMMA.64x64x16.F32.BF16 R24, R72, gdesc[UR12].tnspB, R24, gsb0",
    "NOP",
    "LDGSTS.E.BYPASS.128 [R211+0x4000], desc[UR10][R6.64], P6",
    "LDGDEPBAR",
    "@P4 BRA 0x110",
    "LDGSTS.E [R121+0xc000], desc[UR10][R4.64], P0",  # 0x100
    "@!P4 BRA 0x40",
    "STG.E.64 desc[UR10][R2.64], R4",
    "EXIT",
    "EXIT",  # 0x140
    "BRA 0x150",
)
# sm_100 waits in code at the end of the kernel that jumps back into the middle. The only loops are
# one of two instructions, and the outer one, whose matrix instruction has no shape.
WAITING = machine_code(
    "STL [R1], R4",
    "UTCHMMA gdesc[UR54], gdesc[UR56], tmem[UR10], tmem[UR58], idesc[UR59], !UPT",  # 0x10: the loop
    "BRA.U UP0, 0x40",
    "UTCBAR [UR26], URZ",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR5+0xa000], R16",  # 0x40
    "@!P6 BRA 0xa0",
    "BAR.SYNC.DEFER_BLOCKING 0x0",  # 0x60
    "LDL R4, [R1]",
    "@!P2 BRA 0x10",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR5+0xa000], R16",  # 0xa0
    "@!P6 BRA 0xa0",
    "BRA 0x60",
)


def test_the_main_loop_of_nvidia_code() -> None:
    assert main_loop(sass.parse(FORWARD)) == Loop(
        instructions=13,
        barriers=1,
        loads={128: 1, 32: 2},
        copies=2,
        matrix={"HGMMA 64x16x16": 2, "HGMMA 64x64x16": 1},
        n=16,
        local=0,
    )


def test_a_rare_case_that_jumps_back_is_no_loop_of_its_own() -> None:
    code = sass.parse(WAITING)
    assert loops(code) == [frozenset({*range(1, 9), 10, 11, 12}), frozenset({10, 11})]
    loop = main_loop(code)
    assert loop == Loop(11, 1, {}, 0, {"UTCHMMA": 1}, None, 1)
    assert sum(x.local for x in code) == 2  # the store before the loop as well
    named = shaped(loop, "UTCHMMA", [(64, 128), (64, 16)])
    assert (named.matrix, named.n) == ({"UTCHMMA 64x128,64x16": 1}, 16)


def test_threads_that_met_go_on_where_their_bssy_says() -> None:
    lines = ["BSSY B0, 0x40", "@P0 BRA 0x30", "MOV R0, R1", "BSYNC B0", "@P1 BRA 0x0", "EXIT"]
    code = sass.parse(machine_code(*lines))
    assert code[3].targets == (4,)
    assert loops(code) == [frozenset(range(5))]


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("LDG.E.U8 R2, desc[UR4][R2.64]", (8, False, None)),
        ("LDG.E.U16.CONSTANT R2, desc[UR4][R2.64]", (16, False, None)),
        ("LDG.E R2, desc[UR4][R2.64]", (32, False, None)),
        ("LDG.E.64 R2, desc[UR4][R2.64]", (64, False, None)),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R2.64]", (128, True, None)),
        ("UTMALDG.2D [UR8], [UR4]", (None, True, None)),
        ("LDS.128 R2, [R4]", (None, False, None)),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", (None, False, ("HMMA", (16, 8, 16)))),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", (None, False, ("HMMA", (16, 8, 8)))),
        ("IMAD.MOV.U32 R32, RZ, RZ, RZ", (None, False, None)),
    ],
)
def test_one_nvidia_instruction(line: str, read: tuple) -> None:
    (instruction,) = sass.parse(machine_code(line))
    assert (instruction.load, instruction.copy, instruction.matrix) == read


@pytest.mark.parametrize("text", ["", "cuobjdump fatal: no code", machine_code("@P0 BRA 0x990")])
def test_what_is_no_nvidia_code_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        sass.parse(text)


def test_without_matrix_instructions_the_deepest_then_longest_innermost_loop() -> None:
    inner = ["MOV R0, R1", "LDG.E R2, desc[UR4][R2.64]", "@P0 BRA 0x10"]  # 0x10 .. 0x30
    long = ["LDG.E.64 R2, desc[UR4][R2.64]", *["MOV R0, R1"] * 5, "@P2 BRA 0x50"]  # 0x50 .. 0xb0
    code = sass.parse(machine_code("NOP", *inner, "@P1 BRA 0x0", *long, "EXIT"))
    assert main_loop(code).loads == {32: 1}
    alone = sass.parse(machine_code("NOP", *inner, "NOP", *long, "EXIT"))
    assert main_loop(alone).loads == {64: 1}
    assert main_loop(sass.parse(machine_code("MOV R0, R1", "EXIT", "BRA 0x20"))) is None


AMD = """\
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
_forward_kernel:                        ; @_forward_kernel
; %bb.3:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_waitcnt lgkmcnt(0)
\ts_branch .LBB0_0
\t.p2align\t8
.LBB0_0:
\tbuffer_load_dwordx4 v[16:19], v2, s[20:23], 0 offen
\ts_barrier
\ts_cbranch_vccnz .LBB0_9
.LBB0_7:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dword v18, v113, s[0:1]
\tbuffer_load_dwordx4 v[158:161], v18, s[4:7], 0 offen
\tbuffer_load_ubyte v3, v18, s[4:7], 0 offen
\tbuffer_load_dwordx4 v4, s[4:7], 0 offen lds
\ts_barrier
\tv_mfma_f32_32x32x8_bf16 v[18:33], v[66:67], v[46:47], 0
\tv_mfma_f32_32x32x8_bf16 v[18:33], v[68:69], v[50:51], v[18:33]
\ts_nop 7
\tscratch_store_dword off, v18, s33 offset:16 ; 4-byte Folded Spill
\ts_cbranch_scc1 .LBB0_7
\ts_branch .LBB0_9
.LBB0_9:
\tscratch_load_dword v18, off, s33 offset:16
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\t.amdhsa_kernel _forward_kernel
"""


def test_the_main_loop_of_amd_code() -> None:
    code = amdgcn.parse(AMD)
    assert main_loop(code) == Loop(
        instructions=9,
        barriers=1,
        loads={128: 2, 32: 1, 8: 1},
        copies=1,
        matrix={"v_mfma 32x32x8": 2},
        n=32,
        local=1,
    )
    assert sum(x.local for x in code) == 2


@pytest.mark.parametrize("text", ["", "\t.section .rodata\n", "\ts_cbranch_scc1 .LBB0_3\n"])
def test_what_is_no_amd_code_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        amdgcn.parse(text)


# A loop that counts rows, then one with dots, and another wait after it; `pendings` is wgmma's.
TTGIR = """\
#tmem1 = #ttng.tensor_memory_encoding<blockM = 64, blockN = 16, colStride = 1>
    %upto = scf.for %n0 = %c0_i32 to %N step %c512_i32 iter_args(%a = %c0_i32) -> (i32)  : i32 {
      %w = ttg.async_wait %t {num = 7 : i32} loc(#loc1)
      scf.yield %a : i32 loc(#loc2)
    } loc(#loc3)
    %acc:3 = scf.for %e = %1 to %count step %some iter_args(%x = %c) -> (tensor<64x32xf32>)  : i32 {
      %k = ttg.async_wait %k_271, %v_272, %words_275 {num = 4 : i32} loc(#loc436)
      %s = ttng.warp_group_dot %q, %k, %c7 {isAsync = true} : !ttg.memdesc<64x128xbf16> loc(#loc4)
      %t:3 = ttng.warp_group_dot_wait %s, %q {pendings = 0 : i32} : tensor<64x32xf32> loc(#loc5)
      %m:2 = scf.if %p -> (i32, i32) {
        %v = ttg.async_wait %v_1 {num = 2 : i32} loc(#loc6)
        scf.yield %a, %b : i32, i32 loc(#loc7)
      } else {
        scf.yield %b, %a : i32, i32 loc(#loc8)
      } loc(#loc9)
      scf.yield %t : tensor<64x32xf32> loc(#loc10)
    } loc(#loc11)
    %acc_1 = ttg.async_wait {num = 0 : i32} loc(#loc12)
    tt.return loc(#loc13)
"""
TCGEN05 = """\
    %dv:2 = scf.for %i = %5 to %7 step %c16_i32 iter_args(%a = %cst) -> (tensor<64x128xf32>)  : i32 {
      %dk = scf.if %p -> (tensor<64x128xf32>) {
        ttng.tc_gen5_mma %k, %raw, %raw_256, %true, %true, %raw_257[%true] {is_async} : !ttg.memdesc<64x128xbf16, #shared, #smem>, !ttg.memdesc<128x16xbf16, #shared1, #smem>, !ttg.memdesc<64x16xf32, #tmem1, #ttng.tensor_memory, mutable>, !ttg.memdesc<1xi64, #shared2, #smem, mutable> loc(#loc1)
        ttng.tc_gen5_mma %dv_267, %dout, %dv_215, %true, %true, %dv_268[%true] {is_async} : !ttg.memdesc<64x16xbf16, #tmem1, #ttng.tensor_memory>, !ttg.memdesc<16x128xbf16, #shared, #smem>, !ttg.memdesc<64x128xf32, #tmem, #ttng.tensor_memory, mutable>, !ttg.memdesc<1xi64, #shared2, #smem, mutable> loc(#loc2)
        scf.yield %x : tensor<64x128xf32> loc(#loc3)
      } else {
        scf.yield %y : tensor<64x128xf32> loc(#loc4)
      } loc(#loc5)
      scf.yield %dk : tensor<64x128xf32> loc(#loc6)
    } loc(#loc7)
"""  # noqa: E501


def test_the_copies_in_flight_are_those_at_the_main_loops_tightest_wait() -> None:
    assert ttgir.in_flight(TTGIR) == 2
    assert ttgir.in_flight(TTGIR.replace("{num = 2", "{num = 9")) == 4
    assert ttgir.in_flight(TCGEN05) is None
    assert ttgir.in_flight("") is None


def test_the_shapes_of_products_into_tensor_memory() -> None:
    assert ttgir.tensor_memory_shapes(TCGEN05) == [(64, 16), (64, 128)]
    assert ttgir.tensor_memory_shapes(TTGIR) == []


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
%r = arith.addf %q, %y : tensor<16x32xf32>
"""
ROUNDED_FROM = ROUNDED_SUM.replace("addf %q, %y", "subf %q, %y")
LOST = ROUNDED_SUM.replace("addf %q, %y", "subf %s, %q")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (CLEAN, 0),
        (NARROW_DOT, 1),
        (CLEAN + ROUNDED_SUM, 1),
        (CLEAN + ROUNDED_FROM, 1),
        (CLEAN + LOST, 0),
    ],
)
def test_sums_in_16_bits_are_found(body: str, found: int) -> None:
    assert len(ttgir.narrowed(HEAD + body + "}")) == found
