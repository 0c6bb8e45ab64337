"""Accesses that are executed as one do what they do one by one, and are at fault for the same reasons."""

import numpy as np
import pytest

from tests.ptx.decode import decode
from tests.ptx.parser import parse
from tests.ptx.registers import Fault
from tests.ptx.test_machine import HEAD, TAIL, THREADS, run

OWN = """
	mov.b32 %r4, global_smem;
	add.s32 %r5, %r4, %r3;
	sub.s32 %r6, 252, %r3;
	add.s32 %r7, %r4, %r6;
	setp.lt.u32 %p1, %r1, 40;
"""
STORES = "st.shared.b32 [%r5], %r2; st.shared.b32 [%r5+256], %r1; st.shared.b32 [%r5+512], %r3;\n"
GUARDED = "@%p1 st.shared.b32 [%r5], %r3; @!%p1 st.shared.b32 [%r5+256], %r3; @%p1 st.shared.b32 [%r5+512], %r1;\n"
LOADS = "ld.shared.b32 %r10, [%r5]; ld.shared.b32 %r11, [%r5+256]; ld.shared.b32 %r12, [%r5+512];\n"
SUM = "shl.b32 %r11, %r11, 8;\n mad.lo.s32 %r9, %r12, 65536, %r10;\n add.s32 %r9, %r9, %r11;"


def lengths(body: str) -> list[int]:
    return [one.length for one in decode(parse(HEAD + body + TAIL)).runs if one is not None and one.seen]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_runs_of_accesses_do_what_each_does(seed):
    values, thread = np.arange(THREADS, dtype=np.int32) * 7 % 101, np.arange(THREADS)
    body, few = OWN + STORES + GUARDED + LOADS + SUM, thread < 40
    assert lengths(body) == [3, 3, 3]
    first, second = np.where(few, 4 * thread, values), np.where(few, thread, 4 * thread)
    expected = first + (second << 8) + (np.where(few, thread, 4 * thread) << 16)
    assert run(body, values, seed).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_run_of_accesses_is_at_fault_where_one_of_them_is(seed):
    values = np.arange(THREADS, dtype=np.int32)
    crossed = OWN + STORES.replace("[%r5+512]", "[%r7]") + "mov.b32 %r9, 0;"
    assert lengths(crossed) == [3]
    with pytest.raises(Fault, match=r"without waiting for the ordinary write of warp.*st\.shared\.b32 \[%r7\], %r3"):
        run(crossed, values, seed)
    unwritten = OWN + STORES + LOADS.replace("+512", "+768") + SUM
    with pytest.raises(Fault, match=r"which nobody wrote.*ld\.shared\.b32 %r12"):
        run(unwritten, values, seed)
    with pytest.raises(Fault, match=r"beyond the 1024 bytes.*st\.shared\.b32 \[%r5\+1024\]"):
        run(OWN + STORES.replace("+512", "+1024"), values, seed)
