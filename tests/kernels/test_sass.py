"""What the compile gate reads out of texts of a compiler: each reading finds what it is for, and nothing else."""

import pytest

pytest.importorskip("triton")


def test_a_spill_inside_the_steps_is_found():
    from tests.kernels.sass import spills_in_steps

    def code(*lines):
        return "\n".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */" for i, line in enumerate(lines))

    steps = ["LDL R1, [R1]", "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", "@!P0 BRA 0x20"]
    assert spills_in_steps(code("STL [R1], R0", "NOP", *steps, "EXIT")) == 1
    assert spills_in_steps(code("STL [R1], R0", "LDL R1, [R1]", *steps[1:], "@P1 BRA 0x0")) == 0


def test_an_arrival_without_a_barrier_is_found():
    from tests.kernels.sm90 import unguarded_arrivals

    arrive = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"
    wgmma = "wgmma.wait_group.sync.aligned 0;"
    assert unguarded_arrivals("\n".join([wgmma, "bar.sync 2, 128;", "add.s32 %r1, %r2, 8;", arrive])) == 0
    assert unguarded_arrivals("\n".join(["bar.warp.sync -1;", "add.s32 %r1, %r2, 8;", arrive])) == 0, "a producer's"
    assert unguarded_arrivals("\n".join([wgmma, "add.s32 %r1, %r2, 8;", arrive])) == 1
    assert unguarded_arrivals("\n".join(["bar.sync 2, 128;", wgmma, arrive])) == 1
    assert unguarded_arrivals("\n".join(["bar.sync 2, 128;", "ld.shared.b32 %r3, [%r4];", arrive])) == 1
    assert unguarded_arrivals("\n".join(["@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 49152;"])) == 0


def test_a_load_in_flight_at_an_arrival_is_found():
    from tests.kernels.sass import NO_SCOREBOARD, loads_in_flight

    def code(*lines):
        """(text, scoreboard set, scoreboards waited for) as a disassembly."""
        words = [(text, (board << 5 | waits << 11) << 41) for text, board, waits in lines]
        return "\n".join(
            f"        /*0000*/    {text} ;    /* {0:#018x} */\n    /* {word:#018x} */" for text, word in words
        )

    load, late = ("LDS R24, [R5+UR7+0x30300]", 0, 0), ("LDS.64 R26, [R5+UR7+0x30320]", NO_SCOREBOARD, 0)
    barrier = ("BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", NO_SCOREBOARD, 0)
    arrive = ("@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R3+UR7+0x318d0], RZ", NO_SCOREBOARD, 0)
    use, fence = ("FFMA R149, R24, R210, R149", NO_SCOREBOARD, 1), ("FENCE.VIEW.ASYNC.S", 0, 1)
    assert loads_in_flight(code(load, use, barrier, arrive)) == 0
    assert loads_in_flight(code(load, barrier, arrive, use)) == 1
    assert loads_in_flight(code(load, barrier, use, arrive)) == 1, "another warp's load is not waited for after it"
    assert loads_in_flight(code(late, load, barrier, arrive)) == 2
    assert loads_in_flight(code(late, load, use, barrier, arrive)) == 0
    assert loads_in_flight(code(load, late, fence, barrier, arrive)) == 0


def test_a_sum_that_is_added_twice_is_found():
    from tests.kernels.reductions import UNUSED, sums_added_again

    def module(*combined):
        """A reduction or scan for each operation."""
        return "\n".join(
            f'%{i} = "tt.{kind}"(%v) <{{axis = 1 : i32}}> ({{\n^bb0(%a: f32):\n  %c = {operation} %a, %b : f32\n'
            f"  tt.{kind}.return %c : f32\n}}) : (tensor<8x8xf32>) -> tensor<8xf32>\n%r{i} = arith.addf %{i}, %e : f32"
            for i, (kind, operation) in enumerate(combined)
        )

    add, scan, top, count = (
        ("reduce", "arith.addf"),
        ("scan", "arith.addf"),
        ("reduce", "arith.maxsi"),
        ("reduce", "arith.addi"),
    )

    def again(ttir, ttgir, name="a kernel"):
        return sums_added_again(name, {"ttir": module(*ttir), "ttgir": module(*ttgir)})

    assert again((add, scan, top), (add, scan, top)) == 0
    assert again((add, top), (add, top, add)) == 1
    assert again((scan,), (scan, scan, scan)) == 2
    assert again((add, top, count), (add, top, top, count, count)) == 0, "exact: they are the same in any order"
    unused = next(iter(UNUSED))
    assert again((add, add), (add,), unused) == 0
    assert again((add, add), (add, add), unused) == 1, "another one took the place of the unused"
    assert sums_added_again("of Gluon", {"ttgir": module(add)}) == 0
