"""A whole layer captured, in one graph or divided where messages would stand: on a GPU, and as a CPU records it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.layers import DSV2_LITE, SMALL, LayerStep
from fp8moe.layers.cuda_graph import Captured, Graph, cuda_graphs
from fp8moe.layers.moe import MoE
from fp8moe.layers.recipe import Precision
from fp8moe.parallel.dispatch.captured import CapturableDispatcher
from tests.train.recorded_graph import RecordedGraph, as_on_a_gpu

FEW_EXPERTS = replace(DSV2_LITE, experts=replace(DSV2_LITE.experts, num_experts=8, hidden=256))


def run_thrice(step: LayerStep, run: Callable[[], object]) -> list[torch.Tensor]:
    """The flat gradients after three runs, the last of them with other inputs."""
    run()
    run()
    step._x_TD.copy_(step._x_TD.flip(0))
    run()
    return [step.model.main_grads.dense, step.model.main_grads.expert]


@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_replay_is_the_layer(kind: str, precision: str, divided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits on a CPU; on a GPU attention's backward may add in another order, and so two plain runs may differ."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: `make test-gpu`")
    device, on_gpu = torch.device(kind), kind == "cuda"
    if not on_gpu:
        as_on_a_gpu(monkeypatch)
    config, tokens = (FEW_EXPERTS, 1024) if on_gpu else (SMALL, 64)
    captured, plain, again = (LayerStep(config, Precision(precision), tokens, device) for _ in range(3))
    if divided:
        for module in captured.model.modules():
            if isinstance(module, MoE):
                module.dispatcher = CapturableDispatcher(module.dispatcher)
    captured()  # compiles
    captured.model.main_grads.zero_()
    graphs: list[Captured] = []
    make_graph: Callable[[], Graph] = cuda_graphs() if on_gpu else RecordedGraph

    def run() -> None:
        if graphs:
            graphs[0].replay()
        else:
            graphs.append(Captured(captured, make_graph))

    found, expected, repeated = run_thrice(captured, run), run_thrice(plain, plain), run_thrice(again, again)
    assert len(graphs[0]._steps) == (17 if divided else 1)
    for one, other, twin in zip(found, expected, repeated, strict=True):
        assert one.isfinite().all() and other.any()
        if on_gpu:
            apart, spread = ((a - other).norm() / other.norm() for a in (one, twin))
            assert apart < max(1e-3, 3 * spread), f"a replay is {apart:.1e} from the layer, a second layer {spread:.1e}"
        else:
            assert torch.equal(one, other) and torch.equal(twin, other)
