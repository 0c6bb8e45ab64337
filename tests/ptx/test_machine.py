"""The machine itself, on small programs written by hand: arithmetic against PyTorch and Python, order, deadlocks."""

import random

import numpy as np
import pytest
import torch

from tests.kernels.tensor_core import FRACTION_BITS, tensor_core_dot
from tests.ptx import scheduler
from tests.ptx.accumulator import truncated_sum
from tests.ptx.conversions import bf16_of, e4m3_of, half_of_e4m3
from tests.ptx.counts import Counts
from tests.ptx.cta import Cta
from tests.ptx.decode import decode
from tests.ptx.memory import Global
from tests.ptx.order import Clocks
from tests.ptx.parser import Unsupported, parse
from tests.ptx.registers import Fault

THREADS = 64
HEAD = f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry small(
	.param .u64 .ptr .global .align 1 small_param_0,
	.param .u64 .ptr .global .align 1 small_param_1
)
.reqntid {THREADS}
.maxnreg 64
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<30>;
	.reg .b64 %rd<9>;
	.loc 1 7 5 // small.py:7:5
	ld.param.b64 %rd1, [small_param_0];
	ld.param.b64 %rd2, [small_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	ld.global.b32 %r2, [%rd4];
	shl.b32 %r3, %r1, 2;
"""
TAIL = """
	st.global.b32 [%rd5], %r9;
	ret;
}
"""


def run(body: str, values: np.ndarray, seed: int | None = None) -> np.ndarray:
    """`body` computes %r9 of each thread from its number in %r2; %r1 is the thread, %r3 four times it."""
    decoded = decode(parse(HEAD + body + TAIL))
    memory, out = Global(), np.zeros(THREADS * 4, np.uint8)
    raw = values.astype(values.dtype).view(np.uint8).copy()
    addresses = [memory.place(raw), memory.place(out)]
    memory.seal()
    arguments = {f"small_param_{i}": at.to_bytes(8, "little") for i, at in enumerate(addresses)}
    choices, counts = None if seed is None else random.Random(seed), Counts(executed=[0] * len(decoded.ops))
    clocks = Clocks(THREADS // 32)
    cta = Cta(decoded, arguments, {}, memory, 1024, (0, 0, 0), (1, 1, 1), clocks, choices, counts)
    with np.errstate(all="ignore"):
        scheduler.run_cluster([cta], choices)
    memory.bring_back()
    return out.view(values.dtype)


def test_casts_are_those_of_pytorch():
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([patterns, patterns | 0x8000, patterns + 0x7FFF, patterns + 1])
    x = torch.from_numpy(bits.view(np.float32))
    x = x[~x.isnan()]
    half = (x.abs() + x.abs() * 2**-9).clamp(max=448)
    for each in (x.clamp(-448, 448), half):
        ours = torch.from_numpy(e4m3_of(each.numpy().copy()))
        assert torch.equal(ours, each.to(torch.float8_e4m3fn).view(torch.uint8))
        ours = torch.from_numpy(bf16_of(each.numpy().copy()).view(np.int16))
        assert torch.equal(ours, each.to(torch.bfloat16).view(torch.int16))
    assert set(e4m3_of(np.array([1e9, np.inf, 449], np.float32))) == {0x7E} and e4m3_of(np.float32([-np.nan])) == 0x7F
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(half_of_e4m3(codes.numpy())).float().nan_to_num(7), exact.nan_to_num(7))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r9, %r2, -3;", lambda x: x - 3),
        ("mul.lo.s32 %r9, %r2, %r2;", lambda x: x * x),
        ("mul.hi.s32 %r9, %r2, 1717986919;", lambda x: x * 1717986919 >> 32),
        (
            "cvt.s64.s32 %rd6, %r2;\n mul.hi.s64 %rd6, %rd6, 6148914691236517206;\n cvt.u32.u64 %r9, %rd6;",
            lambda x: x * 6148914691236517206 >> 64,
        ),
        ("div.s32 %r9, %r2, 7;", lambda x: abs(x) // 7 * (1 if x >= 0 else -1)),
        ("rem.s32 %r9, %r2, 7;", lambda x: abs(x) % 7 * (1 if x >= 0 else -1)),
        ("shr.s32 %r9, %r2, 40;", lambda x: -1 if x < 0 else 0),
        ("shr.u32 %r9, %r2, 5;", lambda x: (x & 0xFFFFFFFF) >> 5),
        ("shl.b32 %r9, %r2, 33;", lambda x: 0),
        ("bfe.u32 %r9, %r2, 3, 5;", lambda x: (x >> 3) & 31),
        ("bfe.s32 %r9, %r2, 0, 4;", lambda x: ((x & 15) ^ 8) - 8),
        ("shf.l.wrap.b32 %r9, %r2, 1, 8;", lambda x: 1 << 8 | (x & 0xFFFFFFFF) >> 24),
        ("prmt.b32 %r9, %r2, 0, 0x0123U;", lambda x: int.from_bytes((x & 0xFFFFFFFF).to_bytes(4, "little"), "big")),
        ("prmt.b32 %r9, %r2, 0, 0x4448U;", lambda x: 0xFF if x & 0x80 else 0),
        ("setp.lt.s32 %p1, %r2, 5;\n selp.b32 %r9, 1, 2, %p1;", lambda x: 1 if x < 5 else 2),
        ("setp.lt.u32 %p1, %r2, 5;\n mov.b32 %r9, 2;\n @%p1 mov.b32 %r9, 1;", lambda x: 1 if 0 <= x < 5 else 2),
        ("mov.b32 {%rs1, %rs2}, %r2;\n mov.b32 %r9, {%rs2, %rs1};", lambda x: x << 16 | (x & 0xFFFFFFFF) >> 16),
        ("mov.b32 %r9, 0x3F803F80;\n add.bf16x2 %r9, %r9, %r9;", lambda x: 0x40004000),
        ("mov.b32 %r9, 0x3F803B80;\n add.rn.bf16x2 %r9, %r9, 0x3B803F80;", lambda x: 0x3F803F80),  # ties to even
        ("mov.b32 %r9, 0x3FC0C000;\n mul.bf16x2 %r9, %r9, %r9;", lambda x: 0x40104080),
        ("cvt.s64.s32 %rd6, %r2;\n shr.s64 %rd6, %rd6, 36;\n cvt.u32.u64 %r9, %rd6;", lambda x: x >> 36),
    ],
)
def test_integers_are_those_of_python(instruction, expected):
    values = np.concatenate(
        [np.arange(-20, 20), [2**31 - 1, -(2**31), 0x7F80FF80, -77777777], np.arange(2**20, 2**20 + 20)]
    )
    values = values[:THREADS].astype(np.int32)
    got = run(instruction, values)
    assert got.tolist() == [(expected(int(x)) + 2**31) % 2**32 - 2**31 for x in values]


RUNS = """
	add.s32 %r4, %r2, 1; add.s32 %r5, %r2, -2; add.s32 %r6, %r1, 3;
	add.s32 %r7, %r4, 4; add.s32 %r8, %r5, 4; add.s32 %r4, %r1, 4;
	mov.b32 %r10, %r7; mov.b32 %r7, %r8; mov.b32 %r15, %r6;
	mov.b32 %r8, %r10;
	xor.b32 %r12, %r4, %r5; xor.b32 %r13, %r20, %r20; xor.b32 %r14, %r4, %r6;
	mov.b32 %r11, 5;
	mad.lo.s32 %r9, %r12, %r11, %r15;
	sub.s32 %r16, %r7, %r8;
	add.s32 %r9, %r9, %r13; add.s32 %r9, %r9, %r16; add.s32 %r9, %r9, %r14;
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_run_of_equal_instructions_does_what_each_does(seed):
    """A run ends before what reads its results or is branched to; it may write what it has read. %r20 holds nothing."""
    values, thread = np.arange(THREADS, dtype=np.int32) * 7 - 50, np.arange(THREADS)
    expected = ((thread + 4) ^ (values - 2)) * 5 + thread + 3 - 3 + ((thread + 4) ^ (thread + 3))
    branched = RUNS.replace("add.s32 %r8, %r5", "HERE: add.s32 %r8, %r5")
    for text, runs in ((RUNS, {0: 3, 3: 3, 6: 3, 10: 3}), (branched, {0: 3, 6: 3, 10: 3})):
        decoded = decode(parse(HEAD + text + TAIL))
        start = next(i for i, one in enumerate(decoded.program.code) if one.opcode == "add.s32")
        found = {i - start: one.length for i, one in enumerate(decoded.runs) if one is not None and i >= start}
        assert found == runs
        assert run(text, values, seed).tolist() == expected.tolist()


def test_lanes_exchange_values():
    values = np.arange(THREADS, dtype=np.int32)
    assert run("shfl.sync.bfly.b32 %r9, %r2, 5, 31, -1;", values).tolist() == [i ^ 5 for i in range(THREADS)]
    up = [i if i % 32 < 3 else i - 3 for i in range(THREADS)]
    assert run("shfl.sync.up.b32 %r9, %r2, 3, 0, -1;", values).tolist() == up
    assert run("redux.sync.add.s32 %r9, %r2, -1;", values).tolist() == [496] * 32 + [1520] * 32


EXCHANGE = """
	mov.b32 %r4, global_smem;
	add.s32 %r5, %r4, %r3;
	st.shared.b32 [%r5], %r2;
	{barrier}
	sub.s32 %r6, 252, %r3;
	add.s32 %r7, %r4, %r6;
	ld.shared.b32 %r9, [%r7];
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_barrier_is_needed_where_another_warp_reads(seed):
    values = np.arange(THREADS, dtype=np.int32)
    assert run(EXCHANGE.format(barrier="bar.sync 0;"), values, seed).tolist() == list(range(THREADS))[::-1]
    with pytest.raises(Fault, match=r"reads shared memory at \d+.*small\.py:7:5"):
        run(EXCHANGE.format(barrier=""), values, seed)
    with pytest.raises(Fault, match=r"without waiting for the read of warp"):
        run(EXCHANGE.format(barrier="bar.sync 0;") + "st.shared.b32 [%r5], %r9;", values, seed)


def test_a_deadlock_says_who_waits_where_for_what():
    one_warp = (
        "shr.u32 %r4, %r1, 5;\n setp.eq.s32 %p1, %r4, 1;\n mov.b32 %r9, 0;\n @%p1 bra DONE;\n bar.sync 3, 64;\n DONE:"
    )
    with pytest.raises(Fault, match=r"deadlock: warp 0 of CTA \(0, 0, 0\) at small\.py:7:5.*barrier 3.*\[0\] are of 2"):
        run(one_warp, np.zeros(THREADS, np.int32))


def test_lanes_of_a_warp_may_not_part():
    body = (
        "and.b32 %r4, %r1, 1;\n setp.eq.s32 %p1, %r4, 1;\n mov.b32 %r9, 0;\n @%p1 bra DONE;\n mov.b32 %r9, 1;\n DONE:"
    )
    with pytest.raises(Fault, match=r"lanes of one warp part"):
        run(body, np.zeros(THREADS, np.int32))


def test_accesses_stay_in_bounds_and_aligned():
    values = np.zeros(THREADS, np.int32)
    for move, message in (("add.s64 %rd6, %rd4, 4;", "out of the bounds"), ("add.s64 %rd6, %rd4, 2;", "misaligned")):
        with pytest.raises(Fault, match=message):
            run(f"{move}\n ld.global.b32 %r9, [%rd6];", values)
    with pytest.raises(Fault, match=r"beyond the 1024 bytes"):
        run("mov.b32 %r4, global_smem;\n ld.shared.b32 %r9, [%r4+1024];", values)
    with pytest.raises(Fault, match=r"which nobody wrote"):
        run("mov.b32 %r4, global_smem;\n ld.shared.b32 %r9, [%r4];", values)


LOCAL = """
	.local .align 2 .b8 	__local_depot0[2];
	.reg .b64 	%SP;
	.reg .b64 	%SPL;
	mov.b64 	%SPL, __local_depot0;
	cvta.local.u64 	%SP, %SPL;
	cvt.u16.u32 %rs1, %r2;
	add.s16 %rs2, %rs1, 1;
	st.b8 [%SP+1], %rs1;
	setp.lt.u32 %p1, %r1, 40;
	@%p1 st.b8 [%SP], %rs2;
	@!%p1 st.b8 [%SP], %rs1;
	ld.b16 %rs3, [%SP];
	cvt.u32.u16 %r9, %rs3;
"""


@pytest.mark.parametrize("seed", [None, 0])
def test_local_memory_is_each_thread_s_own(seed):
    values = np.arange(THREADS, dtype=np.int32) * 3
    expected = [(x % 256) << 8 | (x + (i < 40)) % 256 for i, x in enumerate(values.tolist())]
    assert run(LOCAL, values, seed).tolist() == expected
    with pytest.raises(Fault, match=r"beyond the 2 bytes of a thread's local memory"):
        run(LOCAL.replace("ld.b16 %rs3, [%SP]", "ld.b16 %rs3, [%SP+2]"), values)
    with pytest.raises(Fault, match=r"or in any other space"):
        run(LOCAL + "ld.b32 %r9, [%rd4];", values)


def test_a_loop_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr(scheduler, "INSTRUCTIONS", 1000)
    with pytest.raises(Fault, match=r"more than 1000 instructions"):
        run("mov.b32 %r9, 0;\n AGAIN:\n bra AGAIN;", np.zeros(THREADS, np.int32))


MBARRIER = """
	mov.b32 %r4, global_smem;
	setp.eq.s32 %p1, %r1, 0;
	@%p1 mbarrier.init.shared::cta.b64 [%r4], {count};
	bar.sync 0;
	add.s32 %r5, %r4, %r3;
	st.shared.b32 [%r5+64], %r2;
	setp.lt.u32 %p2, %r1, {arriving};
	@%p2 mbarrier.arrive.shared::cta.b64 _, [%r4];
{{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], 0;
	@!complete bra.uni waitLoop;
}}
	sub.s32 %r6, 252, %r3;
	add.s32 %r7, %r4, %r6;
	ld.shared.b32 %r9, [%r7+64];
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_an_mbarrier_hands_on_what_arrivals_knew(seed):
    values = np.arange(THREADS, dtype=np.int32)
    assert run(MBARRIER.format(count=THREADS, arriving=THREADS), values, seed).tolist() == list(range(THREADS))[::-1]
    with pytest.raises(Fault, match=r"deadlock.*1 of 65 arrivals"):
        run(MBARRIER.format(count=THREADS + 1, arriving=THREADS), values, seed)
    with pytest.raises(Fault, match=r"without waiting for the ordinary write|which nobody wrote"):
        run(MBARRIER.format(count=32, arriving=32), values, seed)


@pytest.mark.parametrize(("name", "exact", "places"), [("ex2", np.exp2, 2), ("rcp", np.reciprocal, 1)])
def test_approximations_are_off_by_what_their_description_allows(name, exact, places):
    values = np.linspace(-30, 30, THREADS, dtype=np.float32)
    found, right = run(f"{name}.approx.ftz.f32 %r9, %r2;", values), exact(values.astype(np.float64))
    apart = (found.view(np.int32) - right.astype(np.float32).view(np.int32)).astype(np.int64)
    assert set(apart.tolist()) == set(range(-places, places + 1))
    special = np.resize(np.array([np.inf, -np.inf, np.nan, 1e-40, -200], np.float32), THREADS)
    expected = {"ex2": [np.inf, 0, np.nan, None, 0], "rcp": [0, -0.0, np.nan, np.inf, None]}[name]
    for one, other in zip(run(f"{name}.approx.ftz.f32 %r9, %r2;", special), expected, strict=False):
        assert other is None or np.array_equal(one, other, equal_nan=True)
    rounded = run("rcp.rn.f32 %r9, %r2;", values)
    assert np.array_equal(rounded, np.float32(1) / values)
    larger = run("max.NaN.f32 %r9, %r2, 0f3F800000;", special)
    assert np.array_equal(np.isnan(larger), np.isnan(special))


@pytest.mark.parametrize("kind", ["first", "added", "with zeros", "all zero", "of one sign", "subnormal"])
def test_a_sum_of_13_fraction_bits_is_the_emulated_tensor_core_s(kind):
    codes = torch.arange(256, dtype=torch.uint8)
    of_codes = codes[codes & 0x7F != 0x7F].view(torch.float8_e4m3fn).float()
    torch.manual_seed(0)
    a, b = (of_codes[torch.randint(len(of_codes), (rows, 32))] for rows in (48, 64))
    start = torch.randn(48, 64) * 10.0 ** torch.randint(-4, 7, (48, 64))
    start = (start.view(torch.int32) & -1024).view(torch.float32)  # as a tensor core left it
    if kind == "subnormal":
        a[:], b[:], start[:] = 2.0**-6, 2.0**-6, 0  # dropped beside 7 x 2^-9 x 256, whose exponent is -6 + 8
        a[:, 0], b[:, 0] = 7 * 2.0**-9, 256
    if kind == "with zeros":
        a[torch.rand(a.shape) < 0.7] = 0
    if kind == "all zero":
        a, start = torch.zeros_like(a), torch.zeros_like(start)
    if kind == "of one sign":
        a, b, start = a.abs(), b.abs(), start.abs()
    before = None if kind == "first" else start
    got = truncated_sum(a.numpy(), b.numpy(), None if before is None else before.numpy(), FRACTION_BITS)
    expected = tensor_core_dot(a, b, torch.zeros(48, 64) if before is None else before)
    assert torch.equal(torch.from_numpy(got).double(), expected)
    exact = a.double() @ b.double().T + (0 if before is None else before.double())
    assert kind == "all zero" or not torch.equal(expected, exact)


def test_what_the_machine_does_not_know_is_refused():
    with pytest.raises(Unsupported, match=r"sin\.approx\.f32.*small\.py:7:5"):
        run("sin.approx.f32 %r9, %r2;", np.zeros(THREADS, np.float32))
