"""The performance model's arithmetic, against figures worked out by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import model
from benchmarks.model import memory_bytes, predict, step_of, tile_of
from benchmarks.shapes import DENSE, GROUPED, GROUPED_WGRAD, Problem
from fp8moe.kernels.tiles import Tile

TALL = Tile(256, 128, 4, 8, 4)
SQUARE = Tile(128, 128, 6, 8, 4)


def test_cycles_of_a_step():
    square, tall = step_of(128, 128, "rows"), step_of(256, 128, "rows")
    assert (square.tensor, square.promotion, square.shared) == (512, 128, 640)
    assert (tall.tensor, tall.promotion, tall.shared) == (1024, 256, 1152)
    assert step_of(128, 256, "rows") == tall
    # 49,152 bytes at 32 a cycle
    assert tall.l2 == tall.cycles == 1536 and tall.bound == "l2"
    columns = step_of(256, 128, "columns")
    assert columns.promotion == 512 and columns.tensor == 1024
    # One consumer: two waves of 256 + 60 + 128 cycles
    assert columns.chain == 888 < columns.tensor


def test_a_pair_reads_its_rows_once():
    tall, wide = step_of(256, 128, "rows", multicast=True), step_of(128, 256, "rows", multicast=True)
    assert (tall.l2, wide.l2) == (256 * 128 / 32, 320 * 128 / 32) and tall.shared == 1152 and tall.bound == "shared"
    problem, pair = Problem("gemm", 4096, 2112, 7168), replace(TALL, multicast=True)
    assert (predict(problem, pair, 132, 1e9).tiles, predict(problem, pair, 132, 1e9).waves) == (16 * 9 * 2, 3)
    assert predict(DENSE[0], pair, 132, 1e9).tflops > 1.1 * predict(DENSE[0], TALL, 132, 1e9).tflops


def test_bytes_are_operands_and_output_once():
    assert memory_bytes(Problem("gemm", 256, 128, 128)) == 256 * 128 + 128 * 128 + 4 * (256 + 1) + 2 * 256 * 128
    added = Problem("gemm_columns", 256, 128, 130, "columns", groups=3)
    assert memory_bytes(added) == 3 * (384 * 130 + 4 * 2 * 384 + 8 * 256 * 128)


def test_waves_and_time():
    problem = Problem("gemm", 4096, 2112, 7168)
    p = predict(problem, TALL, 132, 1e9)
    assert (p.tiles, p.waves) == (16 * 17, 3)
    assert p.seconds == pytest.approx(3 * (56 * 1536 + 2 * model.EPILOGUE_CYCLES) / 1e9 + model.START_SECONDS)
    assert p.tflops == pytest.approx(2 * 4096 * 2112 * 7168 / p.seconds / 1e12)
    assert predict(problem, TALL, 272, 1e9).waves == 1
    assert predict(problem, TALL, 132, 2e9).tflops > p.tflops


def test_what_the_memory_bounds_is_said():
    thin = Problem("gemm", 256, 128, 1 << 20)
    assert predict(thin, TALL, 132, 1.8e9).bound == "l2"
    grads = Problem("grouped_wgrad", 7168, 4096, 128, "columns", groups=64)
    bounded = predict(grads, TALL, 132, 1.8e9)
    assert bounded.bound == "hbm" and bounded.seconds == pytest.approx(
        memory_bytes(grads) / model.HBM_BYTES_PER_SECOND + model.START_SECONDS
    )


def test_square_and_tall_tiles_on_the_first_shape_lie_where_they_were_estimated():
    first = DENSE[0]
    slow, fast = (predict(first, SQUARE, 132, clock).tflops for clock in (1.59e9, 1.82e9))
    assert 800 < slow < fast < 980
    slow, fast = (predict(first, TALL, 132, clock).tflops for clock in (1.59e9, 1.82e9))
    assert 1050 < slow < fast < 1310


def test_production_tiles_respect_the_groups():
    assert all(tile_of(problem).block_m == 128 for problem in GROUPED)
    assert all(tile_of(problem).block_m == 256 for problem in GROUPED_WGRAD)


def test_the_table_is_labelled_and_has_every_shape(capsys):
    assert model.main(["--sms", "132", "112"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION") and "TFLOPS@112" in text
    assert len(text.strip().splitlines()) == 2 + 14


def test_no_sms_are_refused():
    command = [sys.executable, "-m", "benchmarks.model", "--sms", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "--sms must be at least 1" in run.stderr
