"""When a bucket's message starts, in which order, and what waits for weights; on a stream and a group that record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fp8moe.layers.linear import Linear, MainGrads, QuantizedWeight, attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.parallel.sharding import zero as zero_module
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.sharding.zero import Zero1
from fp8moe.schedule.build import build_schedule

Log = list[tuple[str, str, int]]


class Group:
    """Two ranks of which this is the first."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


class AtOnce:
    """A stream whose messages run when they are started."""

    def start(self, message: Any, finish: Any, name: str) -> Any:
        value = finish(message())
        return SimpleNamespace(wait=lambda: value)


class Stages(nn.Module):
    """Two stages of two passes; the first's embedding is used again by the last pass."""

    def __init__(self) -> None:
        super().__init__()
        recipe = Recipe(Precision.FP8)
        self.embedding = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
        self.one, self.two, self.three = (Linear(128, 128, recipe) for _ in range(3))
        for module in (self.one, self.two, self.three):
            nn.init.ones_(module.weight)
            module.quantize()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    calls: Log = []
    for name in ("reduce_scatter", "all_gather"):
        monkeypatch.setattr(
            zero_module, name, lambda flat, parts, group, what, name=name: calls.append((name, what, parts[0][0]))
        )
    monkeypatch.setattr(zero_module, "communication_stream", lambda device, of: AtOnce())
    return calls


def made(log: Log, pp: int = 1, **settings: Any) -> tuple[Stages, Zero1]:
    model = Stages()
    passes = {
        (0, 0): [model.embedding],
        (0, 1): [model.one.weight],
        (1, 0): [model.two.weight],
        (1, 1): [model.three.weight, model.embedding],
    }
    quantized = {m.weight: m for m in model.modules() if isinstance(m, QuantizedWeight)}
    mesh = Mesh(pp, 2, 2, 0, mirrored=pp > 1, dense_group=Group())  # type: ignore[arg-type]
    grads = attach_main_grads(model)
    return model, Zero1(grads, list(model.parameters()), mesh, passes, quantized=quantized, **settings)


ONE, TWO, THREE = 256, 256 + 128 * 128, 256 + 2 * 128 * 128


def test_a_message_starts_behind_the_last_pass_that_feeds_it(log: Log) -> None:
    _, zero = made(log)
    zero.begin(build_schedule("dualpipev", 1, 2))  # both stages on this rank
    for place, started in (((1, 1), THREE), ((1, 0), TWO), ((0, 1), ONE), ((0, 0), 0)):
        zero.after_last_wgrad(*place)
        assert log[-1] == ("reduce_scatter", "gradients", started), place
    assert len(log) == 4


def test_messages_keep_the_order_that_all_ranks_expect(log: Log) -> None:
    _, zero = made(log)
    zero.begin(build_schedule("dualpipev", 1, 2))
    for place in ((0, 1), (1, 0)):
        zero.after_last_wgrad(*place)
        assert log == [], "the last stage's go first"
    with pytest.raises(AssertionError, match="left gradients unfinished"):
        zero.finish()
    zero.after_last_wgrad(1, 1)
    assert [start for _, _, start in log] == [THREE, TWO, ONE]


@pytest.mark.parametrize("rank", [0, 1])
def test_both_ranks_of_a_mirrored_stage_expect_one_order(log: Log, rank: int) -> None:
    """Each is done with another of the two stages first; neither's own order may deadlock them."""
    schedule = build_schedule("dualpipe", 4, 8)
    orders = []
    for pp_rank in (rank, 3 - rank):
        model = Stages()
        mesh = Mesh(4, 1, 1, pp_rank, mirrored=True, dense_group=Group())  # type: ignore[arg-type]
        passes = {(rank, 0): [model.embedding], (rank, 1): [model.one.weight], (3 - rank, 0): [model.two.weight],
                  (3 - rank, 1): [model.three.weight]}  # fmt: skip
        zero = Zero1(attach_main_grads(model), list(model.parameters()), mesh, passes, quantized={})
        zero.begin(schedule)
        orders.append([min(one.feeds) for one in zero._queue])
        last = [schedule.last_wgrads(one) for one in (rank, 3 - rank)]
        ends = [max(of_rank[stage][1] for of_rank in last) for stage, _ in orders[-1]]
        assert ends == sorted(ends)
    assert orders[0] == orders[1]


def test_squares_are_of_the_own_part_and_of_buffers_without_replicas(log: Log) -> None:
    model = Stages()
    grads = attach_main_grads(model)
    grads = MainGrads(grads.dense, torch.full((3,), 2.0))
    mesh = Mesh(1, 2, 2, 0, dense_group=Group())  # type: ignore[arg-type]
    zero = Zero1(grads, list(model.parameters()), mesh, {(0, 0): list(model.parameters())}, quantized={})
    assert zero.is_sharded(grads.dense) and not zero.is_sharded(grads.expert)
    grads.dense.copy_(torch.arange(len(grads.dense)) % 7)
    zero.begin(build_schedule("1f1b", 1, 1))
    zero.after_last_wgrad(0, 0)
    half = grads.dense[: len(grads.dense) // 2].double()
    assert float(zero.finish()) == pytest.approx(float(half.square().sum()) + 12.0)


def test_a_forward_waits_for_its_own_weights_and_makes_their_blocks_once(log: Log) -> None:
    model, zero = made(log)
    with torch.no_grad():
        for module in (model.one, model.two, model.three):
            module.weight.mul_(2)
    for one in zero.buckets:
        one.weight = torch.empty(0)
        zero.start_gather(one)
    assert [start for name, _, start in log if name == "all_gather"] == [0, ONE, TWO, THREE]
    old = model.two.blocks
    zero.before_forward(0, 1)
    assert float(model.one.blocks.scale.max()) == pytest.approx(2 / 448) and model.two.blocks is old
    fresh = model.one.blocks
    zero.before_forward(0, 1)
    assert model.one.blocks is fresh, "once a step"
    zero.wait_weights()
    assert float(model.two.blocks.scale.max()) == float(model.three.blocks.scale.max()) == pytest.approx(2 / 448)
    assert all(one.gathering is None for one in zero.buckets)


def test_a_tied_copy_goes_last_and_is_counted_by_the_first_stage(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []
    monkeypatch.setattr(zero_module, "all_reduce_in_message", lambda t, group, name: summed.append(t.numel()))
    for pp_rank, counted in ((0, True), (1, False)):
        model = Stages()
        mesh = Mesh(2, 2, 2, 2 * pp_rank, dense_group=Group(), tie_group="tie")  # type: ignore[arg-type]
        passes = {
            (pp_rank, 0): [model.one.weight, model.two.weight, model.three.weight],
            (pp_rank, 1): [model.embedding],  # as on the last stage, where the MTP module is done with it early
        }
        grads = attach_main_grads(model)
        zero = Zero1(grads, list(model.parameters()), mesh, passes, quantized={}, tied=model.embedding)
        grads.dense[:256] = 1.0
        zero.begin(build_schedule("1f1b", 2, 2))
        zero.after_last_wgrad(pp_rank, 1)
        assert log == []
        zero.after_last_wgrad(pp_rank, 0)
        assert [start for _, _, start in log] == [ONE, 0]
        log.clear()
        assert float(zero.finish()) == pytest.approx(128.0 if counted else 0.0)
    assert summed == [128, 128]
