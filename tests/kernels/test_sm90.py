"""The compile gate: every device kernel, at each production tile, as Hopper machine code that keeps its promises.

Runs without a GPU and without the interpreter, in processes of its own (Triton reads TRITON_INTERPRET on import, and
other tests set it). `sm90` says how; `python -m tests.kernels.sm90 --write` rewrites the committed figures.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(600)  # half a minute of two idle cores; a busy machine takes several

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "tests" / "kernels" / "sm90.json").read_text())
SHARED_LIMIT = 227 * 1024  # bytes one CTA may use
REGISTER_FILE = 65536
# Two words a thread are kept in local memory from one tile to its epilogue; the steps of a tile touch none.
SPILLED_ONCE_A_TILE = {"gluon gemm_columns add 256x128x4 group 8 multicast columns_kernel": 2}
SPILLED_BY = {  # and by no newer Triton
    "3.6.0": {
        "gluon gemm add 128x256x4 group 16 rows_kernel": 20,
        "gluon gemm add 128x256x4 group 8 turns rows_kernel": 20,
        "gluon gemm add 256x128x4 group 8 turns rows_kernel": 16,
    }
}
GEMMS = ("rows_kernel", "columns_kernel", "gemm_kernel", "grouped_gemm_kernel", "grouped_wgrad_kernel")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two compiling processes report: {"triton": version, "kernels": {name: ...}}."""
    path = tmp_path_factory.mktemp("sm90") / "found.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "fp8moe"))}
    command = [sys.executable, "-m", "tests.kernels.sm90", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def kernels(found):
    return found["kernels"]


def is_gemm(entry):
    """FP8 products, not the cast of E5M6 that also goes by columns_kernel."""
    return entry["kernel"].split(".")[-1] in GEMMS and ".e5m6." not in entry["kernel"]


@pytest.mark.slow
def test_every_kernel_of_the_device_back_ends_is_compiled(kernels):
    defined = set()
    for folder in ("triton", "gluon"):
        for path in (ROOT / "kernels" / folder).glob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                    defined.add(f"fp8moe.kernels.{folder}.{path.stem}.{node.name}")
    assert defined and defined == {entry["kernel"] for entry in kernels.values()}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad"])
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_every_production_tile_is_compiled(found, kernels, backend, op):
    from fp8moe.kernels.backend import release_of
    from fp8moe.kernels.gluon.launch import can_fetch
    from fp8moe.kernels.tiles import production_tiles
    from tests.kernels.sm90_cases import tile_name

    compiled = [name for name in kernels if name.startswith(f"{backend} {op} ")]
    for tile in production_tiles(backend, op, pairs=release_of(found["triton"]) >= (3, 8)):
        shape = f" {tile_name(tile)} "
        kinds = {name.split()[2] for name in compiled if shape + name.split()[-1] in name}
        # Of a pair TMA never adds, `launch` takes the registers' way; to fetch takes room beside the ring, and Gluon.
        adds, writes = {"add"} if tile.multicast else {"add", "add_long"}, {"bf16", "fp32"}
        if backend == "gluon" and can_fetch(tile):
            adds |= {"add_fetched"}
        expected = {"gemm": writes | {"add"}, "grouped_gemm": writes, "grouped_wgrad": adds}
        assert kinds == expected.get(op, adds | writes)


@pytest.mark.slow
def test_fp8_products_run_on_the_tensor_cores_from_tma_without_a_spill(kernels, found):
    spilled = SPILLED_ONCE_A_TILE | SPILLED_BY.get(found["triton"], {})
    gemms = {name: entry["figures"] for name, entry in kernels.items() if is_gemm(entry)}
    assert gemms
    for name, figure in gemms.items():
        assert figure["QGMMA"] > 0 and figure["HGMMA"] == 0 and figure["UTMALDG"] >= 2, name
        allowed = spilled.get(name, 0)
        assert kernels[name]["spills_in_steps"] == 0, name
        assert max(figure["STL"], figure["LDL"]) <= allowed and figure["local"] <= 4 * allowed, name
        # Promotion: every value that a WGMMA of k32 makes (64 a thread, 4 a product) is multiplied and added.
        assert figure["FFMA"] >= 64 * figure["QGMMA"] // 4, name


@pytest.mark.slow
def test_unquantized_weight_gradients_run_on_the_tensor_cores_from_tma_without_a_spill(kernels):
    found = {name: entry["figures"] for name, entry in kernels.items() if entry["kernel"].endswith(".wgrad_kernel")}
    assert {name.split()[1] for name in found} == {"wgrad", "grouped_mm_wgrad"}
    for name, figure in found.items():
        assert figure["HGMMA"] > 0 and figure["UTMALDG"] >= 4, name
        assert figure["STL"] == figure["LDL"] == figure["local"] == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("op", ["wgrad", "grouped_mm_wgrad"])
def test_bf16_weight_gradients_of_hopper_move_all_by_tma_and_sum_in_the_tensor_core(kernels, op):
    from fp8moe.kernels.gluon.tokens_kernel import TOKENS
    from fp8moe.kernels.tiles import production_tiles
    from tests.kernels.sm90_cases import TOKEN_SUMS, tile_name

    expected = {}
    for tile in production_tiles("gluon", op):
        for kind in TOKEN_SUMS:
            expected[f"gluon {op} {kind} {tile_name(tile)} tokens_kernel"] = tile, kind
    found = {name for name, entry in kernels.items() if entry["kernel"].endswith("gluon.tokens_kernel.tokens_kernel")}
    assert {name for name in found if name.split()[1] == op} == set(expected)
    for name, (tile, kind) in expected.items():
        figure, boxes = kernels[name]["figures"], 2 + tile.block_n // 64
        pieces = 2 * 4 * tile.block_n // 128 if kind == "add_fetched" else 0  # of 64x32, of both consumers
        assert figure["HGMMA"] == 2 * TOKENS.value // 16 and figure["QGMMA"] == 0, name
        assert (figure["UTMALDG"], figure["UTMASTG"]) == (boxes + pieces, pieces), name
        assert figure["STL"] == figure["LDL"] == figure["local"] == 0, name


@pytest.mark.slow
def test_a_tile_of_sums_is_asked_for_before_it_is_needed(kernels):
    for name, entry in kernels.items():
        if entry["kernel"].endswith(".wgrad_kernel"):
            height, width = map(int, re.findall(r"(\d+)x(\d+)x", name)[0])
            assert entry["asked_for"] == height * width // 32 // entry["figures"]["threads"], name


@pytest.mark.slow
def test_bf16_rows_leave_by_tma_and_all_scales_arrive_by_it(kernels):
    for name, entry in kernels.items():
        figure, rows = entry["figures"], entry["kernel"].endswith("gluon.rows_kernel.rows_kernel")
        if rows:
            assert (figure["UTMASTG"] > 0) == (" bf16 " in name), name
        if " multicast " not in name and (rows or entry["kernel"].endswith("gluon.columns_kernel.columns_kernel")):
            height, width = map(int, re.findall(r"(\d+)x(\d+)x", name)[0])
            loads = 3 + width // 128 if rows else 4  # of a weight, the scale of each 128 columns
            fetched = 8 * height // 128 if " add_fetched " in name else 0
            assert figure["UTMALDG"] == loads * (2 if " pingpong " in name else 1) + fetched, name


@pytest.mark.slow
def test_a_pair_loads_its_rows_once_for_both(found, kernels):
    from fp8moe.kernels.backend import release_of

    pairs = {name: entry for name, entry in kernels.items() if " multicast " in name}
    assert bool(pairs) == (release_of(found["triton"]) >= (3, 8))
    for name, entry in pairs.items():
        figure, height, width = entry["figures"], *map(int, re.findall(r"(\d+)x(\d+)x", name)[0])
        assert figure["multicast"] == 2 * height // 64, f"{name}: codes and scales"
        assert figure["UTMALDG"] == figure["multicast"] + 2 * width // 128, name
        assert entry["remote"] == 2, f"{name}: each of two consumers tells CTA 0, wherever it is"


def test_rows_move_by_16_bytes_without_a_spill_or_an_atomic(kernels):
    # (loads, stores) of 16 bytes that a thread must have: 32 words moved, 8 copies of a row summed, 32 values cast.
    # 16 logits, in 2 loads a pass; 8 rows in flight beside main_grad.
    least = dict.fromkeys(("copy_kernel", "pack_message_kernel", "unpack_message_kernel"), (8, 8))
    least |= {"sum_kernel": (8, 1), "cast_kernel": (4, 16), "cross_entropy_kernel": (2, 0), "sum_runs_kernel": (10, 2)}
    modules = ("permute", "plan", "message", "cross_entropy", "embedding")
    moved = {name: e for name, e in kernels.items() if e["kernel"].split(".")[-2] in modules}
    assert {e["kernel"].split(".")[-1] for e in moved.values()} > set(least)
    for name, entry in moved.items():
        figure, wide = entry["figures"], entry["wide"]
        assert figure["STL"] == figure["LDL"] == figure["local"] == wide["atomic"] == 0, name
        loads, stores = least.get(entry["kernel"].split(".")[-1], (0, 0))
        assert wide["loads"] >= loads and wide["stores"] >= stores, name


def test_casts_keep_four_ctas_an_sm_and_store_whole_vectors(kernels):
    # (16-byte stores that a thread must have, registers at most): codes as columns 64 at a time, as rows 32 at a time.
    least = {"quantize_rows": (2, 64), "quantize_columns": (4, 102), "quantize_rows_and_columns": (6, 128)}
    least |= {"requantize_columns": (4, 102), "pack_e5m6": (0, 64), "e5m6": (0, 102)}
    found = {name: e for name, e in kernels.items() if name.startswith("triton ") and name.split()[1] in least}
    assert {name.split()[1] for name in found} == set(least)
    for name, entry in found.items():
        figure, (stores, registers) = entry["figures"], least[name.split()[1]]
        assert figure["STL"] == figure["LDL"] == figure["local"] == entry["wide"]["atomic"] == 0, name
        assert figure["registers"] <= registers and figure["threads"] == 128, name
        assert entry["wide"]["stores"] >= stores, name


def test_swiglu_has_two_ctas_an_sm_and_a_cast_for_each_store(found, kernels):
    from tests.kernels.sm90 import fits_registers

    # Casts, two values each: 16 values a lane of gate, up and h; 64 of h; 16 and 32 of both gradients.
    casts = {
        "swiglu_kernel": 24,
        "swiglu_columns_kernel": 32,
        "swiglu_backward_kernel": 48,
        "silu_mul_kernel": 0,
        "silu_mul_backward_kernel": 0,
    }
    ours = {name: e for name, e in kernels.items() if e["kernel"].split(".")[-2] in ("swiglu", "silu_mul")}
    assert {e["kernel"].split(".")[-1] for e in ours.values()} == set(casts)
    for name, entry in ours.items():
        figure, wide = entry["figures"], entry["wide"]
        assert fits_registers(found["triton"], name, figure) and wide["atomic"] == 0, name
        assert 2 * figure["registers"] * figure["threads"] <= REGISTER_FILE, name
        assert 2 * figure["shared"] <= SHARED_LIMIT, name
        assert wide["stores"] >= 2, name
        if "F320" not in name:
            assert entry["casts"] == casts[entry["kernel"].split(".")[-1]], name


@pytest.mark.slow
def test_routing_and_biases_of_experts_stay_in_registers_and_add_in_a_fixed_order(found, kernels):
    from tests.kernels.sm90 import fits_registers

    ours = {name: e for name, e in kernels.items() if e["kernel"].split(".")[-2] in ("route", "expert_bias")}
    assert {e["kernel"].split(".")[-1] for e in ours.values()} == {
        *("route_kernel", "balance_kernel", "route_backward_kernel"),
        *("bias_add_kernel", "bias_dgrad_kernel", "bias_rows_kernel", "bias_columns_kernel"),
    }
    for name, entry in ours.items():
        figure, wide = entry["figures"], entry["wide"]
        assert fits_registers(found["triton"], name, figure) and wide["atomic"] == 0, name


@pytest.mark.slow
def test_norms_and_rotations_neither_spill_nor_take_turns(kernels):
    # (loads, stores) of 16 bytes that a thread must have where 7168 features, or 128 heads, are worked on in BF16.
    least = {
        "triton rms_norm bf16 residual tensor and rows pow2 norm_kernel": (6, 5),
        "triton rms_norm_backward bf16 residual norm_backward_kernel": (6, 2),
        "triton rms_norm_columns bf16 pow2 norm_columns_kernel": (8, 4),
        "triton rope_queries bf16 rotate_queries_kernel": (6, 6),
        "triton rope_keys_backward bf16 keys_backward_kernel": (12, 8),
    }
    found = {name: e for name, e in kernels.items() if e["kernel"].split(".")[-2] in ("norm", "rope")}
    assert least.keys() <= found.keys()
    for name, entry in found.items():
        figure, wide = entry["figures"], entry["wide"]
        few = 4 if "backward bf16 D16384" in name else 0  # words that Triton 3.8 keeps apart at 16,384 features
        assert max(figure["STL"], figure["LDL"]) <= few and figure["local"] <= 4 * few and wide["atomic"] == 0, name
        loads, stores = least.get(name, (0, 0))
        assert wide["loads"] >= loads and wide["stores"] >= stores, name


@pytest.mark.slow
def test_no_sum_is_added_again_for_another_layout(kernels):
    assert {name: entry["added_again"] for name, entry in kernels.items() if entry["added_again"]} == {}


@pytest.mark.slow
def test_one_cta_fits_an_sm(kernels):
    for name, entry in kernels.items():
        figure = entry["figures"]
        assert figure["shared"] <= SHARED_LIMIT, name
        assert figure["registers"] <= 255 and figure["registers"] * figure["threads"] <= REGISTER_FILE, name


@pytest.mark.slow
def test_a_consumer_hands_a_slot_back_only_when_all_its_warps_are_done(kernels):
    assert [name for name, entry in kernels.items() if entry["unguarded"]] == []


@pytest.mark.slow
def test_no_scale_is_still_being_read_when_a_slot_is_handed_back(kernels):
    rings = [entry for entry in kernels.values() if entry["kernel"].endswith("gluon.columns_kernel.columns_kernel")]
    assert rings
    assert [name for name, entry in kernels.items() if entry["in_flight"]] == []


@pytest.mark.slow
def test_each_fp8_store_of_weight_blocks_has_a_cast_of_its_own(kernels):
    # 64 values a thread, two a cast, in two orientations. ptxas 12.9 shares casts between both stores, wrongly.
    endings = (".blocks_kernel", ".blocks_step_kernel")
    found = {name: entry["casts"] for name, entry in kernels.items() if entry["kernel"].endswith(endings)}
    assert len(found) > 2 and set(found.values()) == {64}, found


@pytest.mark.slow
def test_an_update_moves_16_bytes_at_a_time_in_few_registers(kernels):
    # (loads, stores) of 16 bytes a thread: gradient and master of 8 values, and the casts of 64.
    least = {"flat_step_kernel": (4, 2), "blocks_step_kernel": (20, 10)}
    found = {name: e for name, e in kernels.items() if e["kernel"].split(".")[-1] in least}
    assert {e["kernel"].split(".")[-1] for e in found.values()} == set(least)
    for name, entry in found.items():
        figure, wide = entry["figures"], entry["wide"]
        loads, stores = least[entry["kernel"].split(".")[-1]]
        assert wide["loads"] >= loads and wide["stores"] >= stores and wide["atomic"] == 0, name
        assert figure["STL"] == figure["LDL"] == figure["local"] == 0, name
        # Two programs of 256 threads an SM at least, so that one loads while the other computes.
        assert figure["registers"] * figure["threads"] * 2 <= REGISTER_FILE, name


@pytest.mark.slow
def test_the_norm_adds_in_a_fixed_order(kernels):
    found = {name: entry for name, entry in kernels.items() if ".squared_norm." in entry["kernel"]}
    assert len(found) == 2
    for name, entry in found.items():
        assert entry["wide"]["atomic"] == entry["figures"]["STL"] == entry["figures"]["local"] == 0, name


@pytest.mark.slow
def test_the_committed_figures_are_those_of_this_code(found):
    if found["triton"] not in TABLE:
        pytest.skip(f"sm90.json has no figures of Triton {found['triton']}: python -m tests.kernels.sm90 --write")
    figures = {name: entry["figures"] for name, entry in found["kernels"].items()}
    assert figures == TABLE[found["triton"]], "rewrite them: python -m tests.kernels.sm90 --write, and read the diff"
