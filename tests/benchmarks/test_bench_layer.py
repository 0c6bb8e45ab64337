"""The layer benchmark: its models are those of configs/, its layer computes what autograd does, kernels have kinds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import bench_layer
from benchmarks.kernel_shares import gathered, kind_of
from benchmarks.layers import DSV2_LITE, DSV3, LAYERS, SMALL, LayerStep, layer_flops
from fp8moe.cli.compose import compose
from fp8moe.layers.recipe import Precision
from fp8moe.model.flops import flops_per_token
from tests.train.recorded_graph import RecordedGraph, as_on_a_gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "model"), [("dsv3_671b", DSV3), ("dsv2_lite_16b", DSV2_LITE)])
def test_the_models_are_the_configured_ones(name, model):
    assert compose([f"model={name}"]).config.model == model


def test_the_layer_is_a_block_under_autograd():
    step = LayerStep(SMALL, Precision.FP32, 64, CPU)
    output, gradient = step()
    block = step.model.block(0)
    found = {name: p.main_grad.clone() for name, p in block.named_parameters()}
    step.model.main_grads.zero_()
    x = step._x_TD.clone().requires_grad_()
    expected, balance = block(x, step._positions)
    torch.autograd.backward([expected, balance], [step._dy_TD, torch.tensor(1e-4)])
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(gradient, x.grad)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.main_grad, found[name])
        assert found[name].abs().sum() > 0, name


def test_flops_of_all_layers_are_the_models():
    # The model adds to its layers the output head and the final norm.
    tokens, layers = 4096, DSV3.num_layers - DSV3.num_dense_layers
    dense = 3 * 2 * DSV3.num_dense_layers * 3 * DSV3.dim * (DSV3.dense_hidden - 9 * DSV3.experts.hidden)
    router = 3 * 2 * DSV3.num_dense_layers * 256 * DSV3.dim
    head = 3 * 2 * (DSV3.vocab_size + 1) * DSV3.dim
    per_token = layer_flops(DSV3, tokens) / tokens * (layers + DSV3.num_dense_layers) + dense - router + head
    assert per_token == pytest.approx(flops_per_token(DSV3, tokens), rel=1e-12)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("rows_kernel", "gemm"),
        ("tokens_kernel", "gemm"),
        ("grouped_wgrad_kernel", "gemm"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "gemm"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x192x128", "attention"),
        ("tiles_kernel", "cast"),
        ("requantize_kernel", "cast"),
        ("swiglu_backward_kernel", "swiglu"),
        ("norm_backward_kernel", "norm and rope"),
        ("copy_kernel", "permutation"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "element-wise"),
        ("Memcpy DtoD (Device -> Device)", "element-wise"),
        ("brand_new", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


def test_kernels_are_gathered_by_kind():
    found = gathered([("rows_kernel", 2.0), ("tiles_kernel", 0.5), ("rows_kernel", 1.0), ("brand_new", 0.25)])
    assert found.seconds == {"gemm": 3.0, "cast": 0.5, "other": 0.25}
    assert (found.launches, found.unknown, found.total) == (4, ("brand_new",), 3.75)


def test_the_benchmark_runs_on_a_cpu(tmp_path: Path):
    file = tmp_path / "layer.json"
    bench_layer.main(["--device", "cpu", "--repeats", "2", "--warmup", "0", "--tokens", "64", "--json", str(file)])
    records = json.loads(file.read_text())
    assert {(r["name"], r["metric"]) for r in records} == {
        (f"small {precision}", metric) for precision in ("bf16", "fp8") for metric in ("time", "throughput")
    }
    assert all(r["value"] > 0 for r in records)


def test_sequences_of_a_call_do_not_see_each_other(tmp_path: Path, capsys):
    both = LayerStep(SMALL, Precision.FP32, 64, CPU, sequence=32)
    first = LayerStep(SMALL, Precision.FP32, 32, CPU)
    first._x_TD, first._dy_TD = both._x_TD[:32], both._dy_TD[:32]
    for found, expected in zip(both(), first(), strict=True):
        torch.testing.assert_close(found[:32], expected)
    whole = LayerStep(SMALL, Precision.FP32, 64, CPU)
    assert not torch.allclose(whole()[0][32:], both()[0][32:])
    assert layer_flops(SMALL, 64, 32) < layer_flops(SMALL, 64) == layer_flops(SMALL, 64, 64)
    file = tmp_path / "layer.json"
    given = ["--device", "cpu", "--repeats", "2", "--warmup", "0", "--sequence", "32", "--json", str(file), "--tokens"]
    bench_layer.main([*given, "64"])
    assert {r["shape"] for r in json.loads(file.read_text())} == {"T64 S32 D128 E4"}
    with pytest.raises(SystemExit) as ended:
        bench_layer.main([*given, "64", "80"])
    assert ended.value.code == 2
    assert "--tokens 64 80 must be multiples of --sequence 32" in capsys.readouterr().err


def test_a_captured_layer_is_the_layer(monkeypatch):
    as_on_a_gpu(monkeypatch)
    step, again = (LayerStep(SMALL, Precision.FP8, 64, CPU) for _ in range(2))
    graph = bench_layer.as_captured({"fp8": step}, lambda: RecordedGraph)["fp8 graph"]  # has run twice
    graph()
    for _ in range(3):
        again()
    assert torch.equal(step.model.main_grads.dense, again.model.main_grads.dense)
    assert torch.equal(step.model.main_grads.expert, again.model.main_grads.expert)


def test_an_unknown_layer_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_layer.main(["--device", "cpu", "--layers", "dsv4"])
    assert ended.value.code == 2
    assert "--layers dsv4 is no layer of a cpu run: use small" in capsys.readouterr().err


def test_every_layer_of_a_gpu_can_be_built():
    for config in LAYERS["cuda"].values():
        with torch.device("meta"):
            from fp8moe.layers.dispatch import LocalDispatcher
            from fp8moe.layers.recipe import Recipe
            from fp8moe.model.block import Block

            Block(config, config.num_layers - 1, Recipe(Precision.FP8), LocalDispatcher(config.experts.num_experts))


def test_every_kernel_of_the_project_has_a_kind_and_a_name_of_its_own():
    found: dict[str, list[str]] = {}
    for path in Path(__file__).resolve().parents[2].glob("kernels/*/*.py"):
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M):
            found.setdefault(name, []).append(path.stem)
    assert found and [name for name in found if kind_of(name) == "other"] == []
    assert [(name, files) for name, files in found.items() if len(files) > 1] == []
