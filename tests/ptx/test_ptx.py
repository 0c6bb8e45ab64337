"""Every kernel's compiled PTX, run on this CPU: to the bit where it casts or moves, within bounds where it multiplies.

One command runs all cases (`suite`); each kernel of the compile table has a test of its own here, which reads what
became of its case.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fp8moe.kernels.backend import release_of
from tests.ptx.order_plants import ORDER_PLANTS
from tests.ptx.pair_plants import PAIR_PLANTS
from tests.ptx.plants import PLANTS
from tests.ptx.speed_limits import ACCEPTED, beyond
from tests.ptx.token_plants import TOKEN_PLANTS

pytest.importorskip("triton")
# Two minutes of CPU, on two cores, and twice as much where all is to be compiled; a busy machine takes longer.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "tests" / "kernels" / "sm90.json").read_text())
COUNTS = json.loads((ROOT / "tests" / "ptx" / "counts.json").read_text())
KERNELS = sorted({name for kernels in TABLE.values() for name in kernels})
PAIRS_SINCE = (3, 8)  # of Triton
# What a report must say, where only one explanation is right: whom it waits for, and where in the source
# (a copy that is inlined is placed where it is called by one Triton, where it is written by another).
PLANT_REPORTS = {
    "a consumer waits for the wrong phase": ("which nobody wrote|while a copy of TMA", r"(?:rows_kernel|pipeline)\.py"),
    "the producer waits for the wrong phase": ("deadlock", "waits for the phase of parity", "columns_kernel.py"),
    "a consumer never gives a slot back": ("deadlock", "of 2 arrivals"),
    "a slot is given back before its products": ("a copy overwrites shared memory", "without waiting"),
    "more bytes are expected than come": ("deadlock", "bytes are missing"),
    "no proxy fence before a TMA store": ("not visible to the asynchronous proxy", "epilogues.py"),
    "no proxy fence behind reads of scales": (
        r"has its value \(fence\.proxy\.async\)",
        r"(?:columns_kernel|pipeline)\.py",
    ),
    "the scale of step k + 4 serves step k": ("calc_diff",),
    "a load of scales begins at any of them": ("begins at", "no multiple of 16"),
    "a sum is fetched over one that is not stored": ("overwrites shared memory", "while the TMA store"),
    "no proxy fence before a fetched sum is stored": ("not visible to the asynchronous proxy",),
    "an arrival does not wait for the partner warps": ("without waiting until the read of warp",),
    "no wait for a product": ("uses a register of a WGMMA",),
    "no proxy fence between masked rows and their product": ("fence.proxy.async", "wgrad.py"),
    "no fence before a product": ("after the last wgmma.fence",),
    "a partition keeps its registers": ("deadlock", "registers: "),
    "one barrier of the CTA is missing": ("without waiting for the (?:ordinary write|read) of warp",),
    "a producer does not wait for its peer's consumers": ("deadlock|while a copy of TMA",),
    "a sum's producer does not wait for its peer's consumers": ("while a copy of TMA", r"of CTA \(1, 0, 0\)"),
    "a consumer of a pair tells only its own CTA": ("deadlock", "of 4 arrivals"),
    "a consumer's arrival for the pair stays at home": ("there is no mbarrier", "mbarrier.arrive.shared::cluster"),
    "rows for both CTAs reach only CTA 0": ("deadlock", "bytes are missing"),
    "both CTAs of a pair load the same columns": ("calc_diff",),
    "a load for both starts before the peer's barriers exist": ("there is no mbarrier", "multicast::cluster"),
    "a CTA leaves before its peer's last arrival": ("may have left",),
    "a consumer keeps its turn": ("deadlock", "consumers.py"),
    "a turn is passed before the product is started": ("out of turn",),
    "a ping-pong producer fills the other ring": ("a copy overwrites shared memory", "under way"),
    "a ping-pong's second producer is never told to start": ("deadlock", "consumers.py"),
    "a ping-pong's slot is given back before its products": ("a copy overwrites shared memory", "without waiting"),
    "no proxy fence behind a cut": ("not visible to the asynchronous proxy", "tokens_kernel.py"),
    "a consumer does not wait for what the other cuts": ("without waiting for the (?:ordinary write|read) of warp",),
    "the barrier of the cuts counts one consumer": ("without waiting for the (?:ordinary write|read) of warp",),
    "a slot is given back under its products": ("a copy overwrites shared memory", "without waiting"),
    "entries are multiplied before they have arrived": ("while a copy of TMA", "decode_attention.py"),
    "a warp does not wait for the maxima of the others": ("without waiting for the ordinary write of warp",),
    "a warp does not wait for the weights of the others": ("without waiting for the ordinary write of warp",),
    "entries are loaded over those that are still read": (r"has its value \(fence\.proxy\.async\)",),
    "a slot is given back that is not held": ("a copy overwrites shared memory", "without waiting"),
}


# Largest relative errors: at most 0.1 % with promotion, a fourth of BF16's rounding; at least the report's 2 % without,
# and what FP32 makes of the same kernel.
PROMOTED, ONE_SUM, IN_FP32 = 1e-3, 2e-2, 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the command reports: {"triton": version, "cases": {name: ...}, "plants": ..., "sums": ...}.

    Workers of pytest-xdist that share this file's tests share the report: the first of them makes it.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    report = folder / "ptx.json"
    with open(folder / "ptx.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            run_suite(report)
    return json.loads(report.read_text())


def run_suite(report):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "fp8moe"))}
    command = [sys.executable, "-m", "tests.ptx", "--json", str(report)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert run.returncode in (0, 1) and report.exists(), run.stderr[-3000:]


@pytest.mark.parametrize("kernel", KERNELS)
def test_its_machine_code_does_what_the_specification_says(found, kernel):
    version = release_of(found["triton"])
    if " multicast " in kernel and version < PAIRS_SINCE:
        pytest.skip("this Triton has no arrival at another CTA's barrier: the launcher refuses pairs")
    case = found["cases"][kernel.rsplit(" ", 1)[0]]
    assert case["error"] == ""
    assert kernel in case["kernels"], "the case doesn't launch it"


def test_every_loop_of_the_machine_code_goes_round(found):
    """A loop over rows, programs or columns that every case leaves after one pass is not tested by any."""
    rounds = Counter()
    for case in found["cases"].values():
        rounds.update(case["rounds"])
    assert len(rounds) > 40
    assert sorted(place for place, times in rounds.items() if not times) == []


@pytest.mark.parametrize("plant", [plant.name for plant in (*PLANTS, *ORDER_PLANTS, *TOKEN_PLANTS, *PAIR_PLANTS)])
def test_a_planted_fault_is_found(found, plant):
    if plant not in found["plants"]:
        assert release_of(found["triton"]) < PAIRS_SINCE and plant in [pair.name for pair in PAIR_PLANTS]
        pytest.skip("this Triton has no pairs of CTAs")
    report = found["plants"][plant]
    assert not report.startswith("not planted"), report
    assert report, "neither the machine nor the result shows it"
    for word in PLANT_REPORTS.get(plant, ()):
        assert re.search(word, report), report


@pytest.mark.parametrize("op", ["gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad"])
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_promotion_keeps_what_the_tensor_core_would_lose(found, backend, op):
    """K = 4,096 of positive codes in 13 fraction bits: what an FP8 kernel loses, and what without promotion."""
    row = found["sums"][f"{backend} {op}"]
    assert row["as emulated"], "the kernel's sum is not that of `tests.kernels.tensor_core`"
    assert 1e-5 < row["promoted"] <= PROMOTED
    if op == "gemm":
        assert row["one sum in FP32"] <= IN_FP32, "the kernel without promotion is wrong in FP32 as well"
        assert row["one sum"] >= ONE_SUM


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_a_whole_layer_gives_what_the_specification_gives(found, kind):
    """Forward, backward and weight gradients of a mixture layer; what holds them is in `layer_cases`."""
    assert found["layers"][kind]["wrong"] == []


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_the_layer_runs_every_kernel_that_it_launches_on_a_gpu(found, layer_launches, kind):
    assert found["layers"][kind]["launched"] == layer_launches[kind]


def test_accesses_are_whole_sectors_and_free_of_bank_conflicts_or_there_is_a_reason(found):
    counts = {kernel: row for case in found["cases"].values() for kernel, row in case["counts"].items()}
    assert counts
    assert [worse for kernel, row in counts.items() for worse in beyond(kernel, row, found["triton"])] == []
    for pattern, figure, _, _ in ACCEPTED:
        assert any(re.search(pattern, kernel) and figure in row for kernel, row in counts.items()), pattern


def test_the_committed_counts_are_those_of_this_code(found):
    if found["triton"] not in COUNTS:
        pytest.skip(f"counts.json has no counts of Triton {found['triton']}: python -m tests.ptx --write")
    counts = {kernel: row for case in found["cases"].values() for kernel, row in case["counts"].items()}
    committed = COUNTS[found["triton"]]
    assert counts.keys() == committed.keys()
    for kernel, row in counts.items():
        # A routing drawn by another release of torch moves a few numbers a little.
        ours, theirs = ({name: x for name, x in one.items() if name != "per"} for one in (row, committed[kernel]))
        told = f"{kernel}: rewrite them by python -m tests.ptx --write, and read the diff"
        assert row["per"] == committed[kernel]["per"] and ours == pytest.approx(theirs, rel=0.05), told
