"""The table of tiles: complete, legal for the kernels that read it, and a pure choice."""

from dataclasses import replace

import pytest

from fp8moe.kernels import tiles
from fp8moe.kernels.tiles import (
    LENGTHS,
    UNQUANTIZED,
    Tile,
    as_entry,
    choose,
    cycles,
    length_of,
    production_tiles,
    read_table,
    step_of,
    tile_cycles,
    write_table,
)

OPS = ("gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad")


# (op, M, N, K, groups) and what tiles of each shape and order reached on an H100, in TFLOPS (benchmarks/LOG.md).
MEASURED = (
    (("gemm", 4096, 7168, 16384, 1), {(256, 128, "turns"): 1249, (128, 256, "turns"): 1271, (128, 256, "free"): 1155}),
    (("gemm", 4096, 4096, 7168, 1), {(256, 128, "turns"): 1195, (128, 256, "turns"): 1216, (128, 256, "free"): 1144}),
    (("gemm", 4096, 24576, 1536, 1), {(256, 128, "turns"): 1140, (128, 256, "turns"): 1145, (128, 256, "free"): 1102}),
    (("gemm", 4096, 7168, 2048, 1), {(256, 128, "turns"): 1128, (128, 256, "turns"): 1142, (128, 256, "free"): 1083}),
    (("gemm", 4096, 32768, 512, 1), {(256, 128, "turns"): 880, (128, 256, "turns"): 890, (128, 256, "free"): 914}),
    (("gemm", 4096, 2112, 7168, 1), {(128, 128, "free"): 923, (128, 128, "turns"): 973, (128, 256, "turns"): 921}),
)


def shape(tile):
    return tile.block_m, tile.block_n


@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_every_device_has_every_op_for_every_length(backend):
    ops = OPS + UNQUANTIZED
    for device, backends in read_table().items():
        for op, lengths in backends.get(backend, {}).items():
            assert op in ops and tuple(lengths) == LENGTHS and all(lengths.values()), (device, op)
            assert all(any("multicast" not in one for one in entries) for entries in lengths.values()), (device, op)
    for op in ops:
        assert isinstance(choose(backend, op, 4096, 4096, 4096), Tile)


def test_cycles_of_a_step():
    square, tall = step_of(128, 128, columns=False), step_of(256, 128, columns=False)
    assert (square.tensor, square.promotion, square.shared, square.gap) == (512, 128, 640, 110)
    assert (tall.tensor, tall.promotion, tall.shared, tall.gap) == (1024, 256, 1152, 220)
    assert tall.consumers == 1152 + 220 and tall.l2 == pytest.approx((256 * 132 + 128 * 128) / 52)
    assert step_of(256, 128, columns=False, consumers="turns").consumers == 1152 + 2 * 60
    columns = step_of(256, 128, columns=True)
    assert columns.promotion == 512 and columns.chain == 2 * (256 + 60 + 128) and columns.l2 == 384 * 132 / 52
    pair = step_of(256, 128, columns=True, rows_shared=2)
    assert pair.l2 == pytest.approx(256 * 132 / 52) and pair.consumers == columns.consumers == 1152 + 2 * 260


def test_cycles_are_those_of_the_busiest_sm():
    tall, pair = Tile(256, 128, 4, 8, 4), Tile(256, 128, 4, 8, 4, multicast=True)
    one = cycles(tall, "gemm", 4096, 128, 7168)
    assert one == 56 * (1152 + 220) + 2 * 1700
    assert cycles(replace(tall, consumers="turns"), "gemm", 4096, 128, 7168) == 56 * (1152 + 120) + 2 * 1700 + 720
    assert cycles(tall, "gemm", 4096, 2112, 7168) == 3 * one, "16 x 17 tiles on 132 SMs"
    assert cycles(tall, "gemm", 4096, 2112, 7168, sms=272) == one
    assert cycles(pair, "gemm", 4096, 2112, 7168) == 3 * one, "16 x 9 pairs on 66"
    assert cycles(pair, "gemm", 4096, 2112, 7168, sms=5) == 72 * one, "the odd SM is idle"
    by_tma, by_registers = (cycles(tile, "grouped_wgrad", 256, 128, 1024, groups=2, sms=4) for tile in (tall, pair))
    assert by_tma == pytest.approx(8 * (1152 + 520) + 2 * 1700 + 256 * 128 * 0.38), "fetched or added, TMA does it"
    assert by_registers == pytest.approx(8 * (1152 + 520) + 2 * 1700 + 256 * 128 * 0.48)


def test_a_consumer_of_a_ping_pong_has_all_waves_and_hides_its_epilogue():
    square = step_of(128, 128, columns=False, consumers="pingpong")
    assert tile_cycles(replace(square, l2=2000), 128, 128, 512, consumers="pingpong") == 4 * 2000
    assert tile_cycles(replace(square, l2=0), 128, 128, 512, consumers="pingpong") == (8 * 380 + 2 * 1700) / 2
    assert tile_cycles(replace(square, l2=0), 128, 128, 512) == 4 * (640 + 60) + 1700
    assert tile_cycles(replace(square, l2=0), 128, 128, 512, summed=2.0, consumers="pingpong") == 128 * 128 * 2
    for wrong in (Tile(128, 128, 6, 8, 4, multicast=True), Tile(128, 128, 5, 8, 4), Tile(256, 128, 4, 8, 4)):
        with pytest.raises(
            ValueError, match=r"ping-pong need tiles of 128x128, an even number of stages and no multicast"
        ):
            replace(wrong, consumers="pingpong")


@pytest.mark.parametrize(("problem", "tflops"), MEASURED)
def test_the_choice_is_what_was_measured_best(problem, tflops):
    op, m, n, k, groups = problem
    found = choose("gluon", op, m, n, k, groups=groups)
    assert tflops[*shape(found), found.consumers] >= 0.99 * max(tflops.values())


def class_of_before(op, m, n, k, groups):
    """The choice by four classes that `cycles` replaced: by whether 256x128 tiles give every SM one."""
    if groups * -(-m // 256) * -(-n // 128) < 132:
        return 128, 128
    return (128, 256) if op in ("gemm", "grouped_gemm") else (256, 128)


def test_no_choice_is_worse_than_that_of_four_classes():
    better = 0
    for op in OPS:
        for groups in (1, 8) if op.startswith("grouped") else (1,):
            for m in (16, 128, 500, 2048, 4096):
                for n in (128, 576, 2112, 7168):
                    for k in (512, 2048, 7168):
                        for sms in (132, 112, 131, 7):
                            found = choose("gluon", op, m, n, k, groups=groups, sms=sms)
                            before = next(
                                t for t in (Tile(**one) for one in read_table()["default"]["gluon"][op][length_of(k)])
                                if shape(t) == class_of_before(op, m, n, k, groups) and not t.multicast
                            )  # fmt: skip
                            ours, theirs = (cycles(t, op, m, n, k, groups=groups, sms=sms) for t in (found, before))
                            assert ours <= theirs, (op, m, n, k, groups, sms)
                            better += ours < 0.95 * theirs
    assert better > 50


def test_pairs_are_chosen_where_they_cost_no_more_and_where_they_may():
    large = ("gluon", "gemm", 4096, 7168, 16384)
    assert choose(*large, pairs=True) == Tile(256, 128, 4, 8, 4, multicast=True, consumers="turns")
    assert choose(*large, pairs=True, sms=131).multicast, "65 pairs and an idle SM"
    assert not choose(*large).multicast and not choose(*large, pairs=True, sms=1).multicast
    assert not choose("gluon", "gemm", 4096, 128, 7168, pairs=True).multicast, "half of each pair would be empty"
    assert choose("gluon", "grouped_gemm", 8192, 4096, 7168, groups=4, pairs=True).block_m == 128


def test_tiles_of_the_hopper_kernels_are_those_they_can_do():
    for op in OPS:
        for tile in production_tiles("gluon", op):
            assert (tile.block_m, tile.block_n) in ((256, 128), (128, 256), (128, 128)) and tile.warps == 4, (op, tile)
            assert op != "grouped_gemm" or tile.block_m == 128, "a taller tile could straddle two experts"
            rows = op in ("gemm", "grouped_gemm")  # which keep one scale of 32 a block, and buffers to store from
            scales = 4 * tile.block_m + (tile.block_n if rows else 4 * tile.block_n)
            ring = tile.stages * ((tile.block_m + tile.block_n) * 128 + scales)
            assert ring + (2 * 3 * 64 * 32 * 2 if rows else 0) <= 227 * 1024 - 512, (op, tile)


def test_tiles_of_bf16_weight_gradients_are_those_the_hopper_kernel_can_do():
    for op in UNQUANTIZED:
        for tile in production_tiles("gluon", op):
            assert (tile.block_m, tile.warps, tile.consumers, tile.multicast) == (128, 4, "free", False), (op, tile)
            assert tile.block_n in (128, 256) and tile.stages >= 2, (op, tile)
            # What a wave of each consumer is added to has room beside the ring.
            assert tile.stages * 64 * (128 + tile.block_n) * 2 + 2 * 64 * 128 * 4 <= 227 * 1024 - 512, (op, tile)


def test_ping_pong_is_in_no_table_for_turns_are_as_fast():
    orders = {tile.consumers for op in OPS for tile in production_tiles("gluon", op)}
    assert orders == {"free", "turns"}


def test_a_tile_is_written_with_what_is_unusual_and_read_back():
    plain, turns = Tile(128, 128, 4, 8, 4), Tile(128, 128, 4, 8, 4, multicast=True, consumers="turns")
    assert as_entry(plain) == {"block_m": 128, "block_n": 128, "stages": 4, "group": 8, "warps": 4}
    assert as_entry(turns) == as_entry(plain) | {"multicast": True, "consumers": "turns"}
    assert Tile(**as_entry(turns)) == turns and Tile(**as_entry(plain)) == plain
    with pytest.raises(ValueError, match=r"one of free, turns.*, got 'alone'"):
        Tile(128, 128, 4, 8, 4, consumers="alone")


def test_an_unknown_device_takes_the_default_and_an_unknown_op_is_refused():
    assert choose("gluon", "gemm", 4096, 4096, 4096, device="no such GPU") == choose("gluon", "gemm", 4096, 4096, 4096)
    with pytest.raises(ValueError, match=r"no tiles for op 'swiglu'.*gluon gemm"):
        choose("gluon", "swiglu", 1, 1, 1)


def test_a_device_of_its_own_wins(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    own = Tile(128, 128, 3, 4, 4)
    write_table(
        {**read_table(), "NVIDIA H200": {"gluon": {"gemm": {name: [tiles.as_entry(own)] for name in LENGTHS}}}}, path
    )
    written = read_table(path)
    assert written["default"] == read_table()["default"]
    monkeypatch.setattr(tiles, "read_table", lambda: written)
    tiles.choose.cache_clear()
    assert choose("gluon", "gemm", 4096, 4096, 4096, device="NVIDIA H200") == own
    assert choose("gluon", "grouped_gemm", 4096, 4096, 4096, device="NVIDIA H200").block_n == 256
    monkeypatch.undo()
    tiles.choose.cache_clear()


def test_writing_the_table_as_it_is_changes_nothing(tmp_path):
    path = tmp_path / "tiles.json"
    write_table(read_table(), path)
    assert path.read_text() == tiles.TABLE.read_text()
