"""The performance model's arithmetic against hand-made figures, and its predictions against what was measured."""

import subprocess
import sys

import pytest

from benchmarks import model, model_casts
from benchmarks.model import DEEPGEMM, PROBLEMS, measured
from benchmarks.shapes import DENSE, GROUPED, GROUPED_WGRAD
from fp8moe.plan import gemm_model
from fp8moe.plan.gemm_model import Problem, Work, memory_bytes, predict, work_of

TALL, PAIR = Work(256, 128), Work(256, 128, rows_shared=2)
IN_TURNS = Work(256, 128, consumers="turns")
CLOSE = 0.15


def test_bytes_are_operands_and_output_once():
    assert memory_bytes(Problem("gemm", 256, 128, 128)) == 256 * 128 + 128 * 128 + 4 * (256 + 1) + 2 * 256 * 128
    added = Problem("gemm_columns", 256, 128, 130, "columns", groups=3)
    assert memory_bytes(added) == 3 * (384 * 130 + 4 * 2 * 384 + 8 * 256 * 128)


def test_waves_and_time():
    problem = Problem("gemm", 4096, 2112, 7168)
    p = predict(problem, TALL)
    cycles = 3 * (56 * (1152 + 2 * 110) + 2 * 1700)
    share = 4096 * 2112 * 7168 / 4096 / 132 / cycles
    assert (p.waves, p.bound) == (3, "shared") and p.share == pytest.approx(share)
    assert p.clock == pytest.approx(2.026e9 - 0.4e9 * share)
    assert p.seconds == pytest.approx(cycles / p.clock + gemm_model.START_SECONDS)
    assert p.tflops == pytest.approx(2 * 4096 * 2112 * 7168 / p.seconds / 1e12)
    assert predict(problem, Work(256, 128, sms=272)).waves == 1
    assert predict(problem, PAIR).waves == 3
    turns = predict(problem, IN_TURNS)
    assert turns.share == pytest.approx(share * cycles / (3 * (56 * (1152 + 2 * 60) + 2 * 1700 + 720)))
    assert predict(DENSE[4], TALL).tflops > predict(DENSE[4], IN_TURNS).tflops, "4 steps"


def test_the_clock_falls_with_the_work_of_the_tensor_core():
    busy, idle = predict(DENSE[0], IN_TURNS), predict(Problem("gemm", 4096, 4096, 128), TALL)
    assert busy.share > 0.7 and busy.clock < 1.75e9
    assert idle.share < 0.21 and 1.94e9 < idle.clock <= gemm_model.FASTEST_CLOCK


def test_what_the_memory_bounds_is_said_and_a_sum_hides_a_part_of_its_shorter_phase():
    grads = Problem("grouped_wgrad", 7168, 4096, 128, "columns", groups=64)
    for work, tiles, shown in ((TALL, 435, 0.4), (PAIR, 435, 0.75)):  # 64 x 28 x 32 tiles, of one step and an epilogue
        for device, bandwidth in (("H100", 2.96e12), ("H200", 4.2e12)):
            p, memory = predict(grads, work, device=device), memory_bytes(grads) / bandwidth
            compute = tiles * (1152 + 2 * 260 + 2 * 1700) / p.clock
            assert p.bound == "hbm" and p.seconds == pytest.approx(memory + shown * compute + 4e-6)


def test_the_unit_that_a_step_waits_for_is_named():
    """Of small tiles L2: its loads beside steps of (64 + 64) * 128 + (64 + 64) * 128 bytes of shared memory."""
    loads, consumers = 64 * (132 + 128) / 52, 256 + 110 / 2
    for steps, slower in ((128, "l2"), (32, "shared")):  # of few steps the epilogue, which hides no load, is the longer
        p = predict(Problem("gemm", 8192, 8192, 128 * steps), Work(64, 64))
        one = {"l2": steps * loads, "shared": steps * consumers + 850}
        assert p.bound == slower == max(one, key=one.__getitem__)
        assert p.seconds == pytest.approx(p.waves * one[slower] / p.clock + 4e-6) and p.waves == 125


def test_every_record_of_an_h100_is_predicted():
    records = measured()
    assert records.keys() == {f"{p.op} {p.label}" for p in PROBLEMS}
    for p in PROBLEMS:
        predicted, record = predict(p, work_of(p, pairs=False)[0]).tflops, records[f"{p.op} {p.label}"]
        assert abs(predicted / record - 1) <= CLOSE, (p.op, p.label, predicted, record)


def test_the_figures_that_deepgemm_published_are_predicted_from_its_tiles():
    published = {f"{p.op} {p.label}": p for p in PROBLEMS if p.published}
    assert published.keys() == DEEPGEMM.keys()
    for key, p in published.items():
        predicted = predict(p, DEEPGEMM[key]).tflops
        assert abs(predicted / p.published - 1) <= CLOSE, (key, predicted, p.published)


def test_production_tiles_respect_the_groups():
    for pairs in (False, True):
        assert all(work_of(problem, pairs=pairs)[1].block_m == 128 for problem in GROUPED)
        assert all(work_of(problem, pairs=pairs)[1].block_m == 256 for problem in GROUPED_WGRAD)


def test_the_table_is_labelled_and_has_every_shape(capsys):
    assert model.main(["--sms", "112"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION") and "112 SMs" in text
    for column in ("H100", "H200", "measured", "cuBLASLt", "DeepGEMM", "pair's tile"):
        assert column in text
    assert len(text.strip().splitlines()) == 3 + len(PROBLEMS)


def test_limits_of_a_cast():
    found = model_casts.limits(model_casts.Counted(6.0, 0.5), 0.25)
    assert found["hbm"] == 2.96e12
    assert found["issue"] == pytest.approx(132 * 1.75e9 * 2.4 * 32 / 6)
    assert found["partial"] == pytest.approx(58e9 * 32 * 0.5 / 0.25)
    assert "partial" not in model_casts.limits(model_casts.Counted(6.0))
    assert model_casts.together({"a": 1.0, "b": 1.0}) == pytest.approx(0.5**0.25)
    assert model_casts.together({"a": 1.0, "b": 100.0}) == pytest.approx(1.0)


def test_casts_are_predicted_from_their_compiled_code(capsys):
    assert model_casts.main() == 0
    text = capsys.readouterr().out
    for name, then, record, now in model_casts.rows():
        assert name in text
        assert abs(then / record - 1) <= 0.20, (name, then, record)
        assert now >= 0.97 * then, f"{name}: today's code is slower than what was measured"


def test_no_sms_are_refused():
    command = [sys.executable, "-m", "benchmarks.model", "--sms", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "--sms must be at least 2" in run.stderr
