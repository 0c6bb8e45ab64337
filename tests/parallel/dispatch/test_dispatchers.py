"""Every dispatcher against the one-rank layer, over random routings, layouts, sizes and settings.

Rows that experts receive are bit-equal; outputs and gradients of the whole mixture of experts agree to 1e-5 in FP32 and
to BF16's rounding of partial sums otherwise.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.layers.dispatch import Dispatched, Dispatcher, LocalDispatcher
from fp8moe.layers.linear import attach_main_grads, quantize_weights
from fp8moe.layers.moe import ExpertsConfig, MoE
from fp8moe.layers.operand import Rows
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import RouterConfig
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, one_hop, two_hops
from fp8moe.parallel.dispatch.counts import Capacity
from fp8moe.parallel.mesh import Mesh, build_mesh
from tests.parallel.ranks import TIMEOUT, run_ranks

D, F, E = 128, 32, 16


@dataclass(frozen=True)
class Case:
    """`open_experts` are those a token may choose; `fixed` sends messages of a fixed size, large enough for all."""

    per_node: int
    tokens: tuple[int, ...]
    topk: int
    open_experts: frozenset[int]
    precision: Precision
    chunks: int
    fixed: bool
    seed: int

    @property
    def world(self) -> int:
        return len(self.tokens)

    def slice(self, rank: int) -> slice:
        start = sum(self.tokens[:rank])
        return slice(start, start + self.tokens[rank])


def case_of(seed: int) -> Case:
    """Drawn from one number: hypothesis varies a case in small steps, and each costs a world of processes."""
    rng = random.Random(seed)
    world, per_node = rng.choice(
        [(8, 4), (8, 2), (8, 8), (8, 1), (4, 2), (4, 2), (4, 1), (4, 4), (2, 1), (2, 2), (1, 1)]
    )
    topk = rng.randint(1, 8)
    return Case(
        per_node=per_node,
        tokens=tuple(rng.choice([0, 1, rng.randint(2, 40), rng.randint(2, 40)]) for _ in range(world)),
        topk=topk,
        open_experts=frozenset(rng.sample(range(E), rng.choice([topk, rng.randint(topk, E), E]))),
        precision=rng.choice(list(Precision)),
        chunks=rng.randint(1, 3),
        fixed=rng.random() < 0.4,
        seed=seed % 1000,
    )


EVERYTHING = Case(2, (17, 0, 33, 1, 40, 8, 0, 21), 8, frozenset(range(E)), Precision.FP8, 2, True, 0)


def dispatchers(case: Case, mesh: Mesh) -> dict[str, Dispatcher]:
    capacity = Capacity(max(*case.tokens, 1), factor=1000.0) if case.fixed else None
    options: dict[str, Any] = {"chunks": case.chunks, "capacity": capacity}
    group = mesh.ep_group or dist.group.WORLD
    assert group is not None
    found: dict[str, Dispatcher] = {"one hop": AllToAllDispatcher(*one_hop(group, E), **options)}
    if case.world > 1:
        route = two_hops(group, mesh.rail_group, mesh.node_group, E)
        found["two hops"] = AllToAllDispatcher(*route, **options)
    return found


class Recorded:
    """A dispatcher that keeps what experts and combine's backward receive."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner, self.num_local_experts = inner, inner.num_local_experts
        self.seen: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def dispatch(self, *arguments: Any) -> Any:
        arrived: Dispatched = self.inner.dispatch(*arguments).wait()
        self.note("forward", arrived.rows_RD)
        self.seen |= {"weights": arrived.weights_R, "offsets": arrived.group_offsets}
        return LocalDispatcherReady(arrived)

    def combine_backward(self, *arguments: Any, **options: Any) -> Any:
        rows = self.inner.combine_backward(*arguments, **options).wait()
        self.note("backward", rows)
        return LocalDispatcherReady(rows)

    def note(self, name: str, rows: Rows) -> None:
        parts = (
            {"codes": rows.data.view(torch.uint8), "scales": rows.scale} if isinstance(rows, Fp8Tensor) else {"": rows}
        )
        self.seen |= {f"{name} {part}": value for part, value in parts.items()}


@dataclass
class LocalDispatcherReady:
    value: Any

    def wait(self) -> Any:
        return self.value


def layer(case: Case, dispatcher: Dispatcher, tokens: slice, first: int) -> dict[str, Any]:
    """Forward and backward of a mixture of experts on `tokens` of the batch, its experts numbered from `first`."""
    recorded = Recorded(dispatcher)
    router, experts = RouterConfig(case.topk, route_scale=2.5), ExpertsConfig(E, F, num_shared=0)
    moe = MoE(D, router, experts, Recipe(case.precision), recorded)
    generator = torch.Generator().manual_seed(case.seed)
    local = slice(first, first + dispatcher.num_local_experts)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            whole = torch.randn(E, *parameter.shape[1:], generator=generator) * 0.1
            parameter.copy_(whole if name == "router.weight" else whole[local])
        moe.router.bias_E[[e for e in range(E) if e not in case.open_experts]] = -10.0
    attach_main_grads(moe)
    quantize_weights(moe)
    x, dy = torch.randn(2, sum(case.tokens), D, generator=generator).to(case.precision.dtype)
    x = x[tokens].requires_grad_()
    routed = moe.route(x, num_sequences=1)
    y = moe(routed)
    y.backward(dy[tokens])
    assert x.grad is not None
    grads = {name: p.main_grad.clone() for name, p in moe.named_parameters()}  # type: ignore[attr-defined]
    return {"ids": routed.announced.topk_ids_TK, "y": y.detach(), "dx": x.grad, **grads, **recorded.seen}


def ranks(case: Case) -> dict[str, dict[str, Any]]:
    mesh = build_mesh(1, case.world, case.world, timeout=TIMEOUT, ranks_per_node=case.per_node)
    first = mesh.ep_rank * (E // case.world)
    answers = {}
    for name, dispatcher in dispatchers(case, mesh).items():
        answers[name] = layer(case, dispatcher, case.slice(mesh.rank), first)
        dispatcher.verify()
        all_reduce(answers[name]["router.weight"], mesh.dp_group)
    return answers


def groups(answer: dict[str, Any], name: str) -> list[Tensor]:
    """`answer[name]` expert by expert; NaN scales, if any, compare as bits."""
    offsets, value = answer["offsets"].tolist(), answer[name]
    value = value.view(torch.int32) if value.dtype is torch.float32 else value
    return [value[a:b] for a, b in itertools.pairwise(offsets)]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@settings(
    max_examples=32, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(case=st.integers(0, 2**32).map(case_of))
@example(case=EVERYTHING)
@example(case=replace(EVERYTHING, fixed=False, chunks=3, per_node=4, precision=Precision.FP32))
@example(case=replace(EVERYTHING, fixed=False, chunks=1, per_node=8, precision=Precision.BF16))
@example(case=replace(EVERYTHING, fixed=False, topk=1, open_experts=frozenset({3, 12}), per_node=1))
@example(case=replace(EVERYTHING, tokens=(0,) * 8))
def test_every_dispatcher_equals_the_one_rank_layer(case: Case) -> None:
    expected = layer(case, LocalDispatcher(E), slice(None), 0)
    answers = run_ranks(ranks, case.world, case)
    bound = 1e-5 if case.precision is Precision.FP32 else 1e-2
    event(f"{case.world // case.per_node} nodes of {case.per_node} ranks")
    for kind in answers[0]:
        got = [answer[kind] for answer in answers]
        if not torch.equal(torch.cat([g["ids"] for g in got]), expected["ids"]):
            event("a tie, routed otherwise")  # another size of batch, another last bit of a score
            return
        for name in (n for n in expected if n.startswith(("forward", "backward"))):
            received = [rows for rank in got for rows in groups(rank, name)]
            for e, (a, b) in enumerate(zip(groups(expected, name), received, strict=True)):
                assert torch.equal(a, b), (kind, name, e)
        # A router's scores depend on the size of its batch in the last bit, so weights are equal among dispatchers.
        for mine, other in zip(got, (answer["one hop"] for answer in answers), strict=True):
            assert torch.equal(mine["weights"], other["weights"])
        weights = torch.cat([rows for rank in got for rows in groups(rank, "weights")]).view(torch.float32)
        torch.testing.assert_close(weights, expected["weights"], rtol=1e-5, atol=0)
        whole = {name: torch.cat([g[name] for g in got]) for name in ("y", "dx", "experts.gate_up.weight",
                                                                        "experts.down.weight")}  # fmt: skip
        whole["router.weight"] = got[0]["router.weight"]
        for name, value in whole.items():
            assert torch.isfinite(value).all(), (kind, name)
            if expected[name].numel():
                assert distance(value, expected[name]) <= bound, (kind, name, distance(value, expected[name]))
