"""A step of captured micro-batches on paper: without the host's waits; what graphs between messages take beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.published import planned, read_cluster
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.cuda_graph import Captured
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.parallel.dispatch import captured as dispatch
from fp8moe.parallel.stream import tensors_of
from fp8moe.plan.graph_costs import COPIES, passed
from fp8moe.plan.memory import rank_memory
from fp8moe.plan.step_time import StepTime
from tests.parallel.dispatch.test_captured import Eager, verbs
from tests.plan.test_step_time import SMALL, small

HOST = "waits for the host"
GRAPHS = "parallel.cuda_graphs=true"


def parts(time: StepTime) -> dict[str, float]:
    return {part.name: part.seconds for part in time.parts}


def test_captured_micro_batches_do_not_wait_for_the_host() -> None:
    layout = ("parallel.ep=1", "seq_len=2048", "optimizer.sharding=none")
    before, after = parts(small(*layout)), parts(small(*layout, GRAPHS))
    assert after.pop(HOST) == 0 < before.pop(HOST)
    hidden = "gradients and weights between replicas"  # by a backward that is shorter now
    assert after.pop(hidden) >= before.pop(hidden) and after == pytest.approx(before)


@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_graphs_between_messages_copy_what_passes(factor: float) -> None:
    """Two copies of what arrives and one of what is given, each read and written, at 0.95 of a copy's bandwidth."""
    layout = ("parallel.ep=8", "seq_len=2048", f"parallel.capacity_factor={factor}", "optimizer.sharding=none")
    plain, captured = small(*layout), small(*layout, GRAPHS)
    before, after = parts(plain), parts(captured)
    assert after.pop(HOST) == 0 and before[HOST] > 0
    copies = after[COPIES]
    assert captured.seconds == pytest.approx(plain.seconds - before.pop(HOST) + copies)
    rows = 2048 * 6 * factor  # and padding; 26 mixtures, 8 micro-batches, BF16
    least = 26 * 8 * (24 * rows + 24 * 2048) * 2048 / (read_cluster("h100_8").hbm_gb_per_second * 1e9) / 0.95
    assert least < copies < 1.1 * least


@pytest.mark.parametrize("fp8", [False, True])
def test_buffers_and_copies_are_those_of_the_dispatcher(fp8: bool) -> None:
    """Bytes of every buffer of a layer's four verbs, and the copies of what arrives, which the host launches."""
    x = torch.randn(8, 128)
    rows = quantize_rows(x, power_of_two=True) if fp8 else x
    capturable = dispatch.CapturableDispatcher(LocalDispatcher(4))
    copies = 0

    def into(buffers: dict[str, Any], name: str, values: Any) -> Any:
        nonlocal copies
        copies += len(list(tensors_of([values]))) if name.endswith("arrived") else 0
        return real(buffers, name, values)

    real = dispatch._into
    with mock.patch.object(dispatch, "_into", into):
        captured = Captured(lambda: verbs(capturable, rows), Eager)
    buffers = list(tensors_of([*capturable._buffers[captured].values()]))
    largest = max(len(one) for one in buffers)
    config: Any = SimpleNamespace(
        model=SimpleNamespace(dim=128, router=SimpleNamespace(topk=2), experts=SimpleNamespace(num_experts=8)),
        precision=SimpleNamespace(mode=Precision.FP8 if fp8 else Precision.FP32),
        recipe=SimpleNamespace(dtype=torch.float32),
        rank_tokens=8,
        ep=2,
    )
    found = passed(config, largest)
    assert sum(sum(given) + sum(arrive) for given, arrive in found.values()) == sum(one.nbytes for one in buffers)
    assert sum(len(arrive) for _, arrive in found.values()) == copies == (9 if fp8 else 7)
    assert Recipe(Precision.BF16).dtype.itemsize == 2, "what those of a model's are"


def test_memory_beside_graphs() -> None:
    """Buffers of V2-Lite's messages (docs/layer.md: half a GB at a factor of 1.5) and a forward of validation."""
    words = (*SMALL, "precision=fp8", "parallel.ep=8", "parallel.capacity_factor=1.5")
    (plain,), (captured,) = rank_memory(planned(words, 8)), rank_memory(planned((*words, GRAPHS), 8))
    more = {kind: captured.kinds[kind] - plain.kinds[kind] for kind in plain.kinds}
    assert more.pop("beside graphs") == pytest.approx(1.0e9, rel=0.2) and not any(more.values())
    (alone,) = rank_memory(planned((*words[:-2], "parallel.ep=1", GRAPHS), 8))
    assert 0.2e9 < alone.kinds["beside graphs"] < 0.6e9
