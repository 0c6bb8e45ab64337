"""Tokens across ranks: the four verbs against the one-rank dispatcher, on ragged batches, with NaN in unused memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.message_layout import MOST_EXPERTS
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.layers.operand import Rows
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, one_hop
from fp8moe.parallel.mesh import build_mesh
from tests.parallel.ranks import TIMEOUT, run_ranks

D, E = 256, 8
Case = tuple[str, int, list[int]]  # payload, top-k, tokens a rank
CASES: list[Case] = [
    ("fp8", 2, [33, 7, 128, 1]),
    ("fp8", 8, [3, 0, 5, 2]),
    ("bf16", 3, [16, 16, 16, 16]),
    ("fp32", 1, [0, 40, 0, 0]),
    ("fp32", 2, [0, 0, 0, 0]),
]


def make(payload: str, topk: int, total: int) -> tuple[Rows, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(topk)
    x = torch.randn(total, D, generator=generator)
    ids = torch.rand(total, E, generator=generator).topk(topk).indices
    weights = torch.rand(total, topk, generator=generator)
    dy = torch.randn(total, D, generator=generator)
    dtype = torch.float32 if payload == "fp32" else torch.bfloat16
    rows: Rows = x.to(dtype)
    if payload == "fp8":
        rows = quantize_rows(x.to(dtype), power_of_two=True)
    return rows, ids, weights, dy.to(dtype)


def part(rows: Rows, start: int, stop: int) -> Rows:
    return rows.index_rows(torch.arange(start, stop)) if isinstance(rows, Fp8Tensor) else rows[start:stop]


def plain(rows: Rows) -> Tensor:
    return rows.dequantize() if isinstance(rows, Fp8Tensor) else rows.float()


def expert_function(rows: Rows, offsets: Tensor, first: int) -> Tensor:
    """Something that depends on the expert and leaves NaN in padding, as a kernel may."""
    y = plain(rows) * 1.0
    for e in range(len(offsets) - 1):
        y[offsets[e] : offsets[e + 1]] *= first + e + 1
    return torch.where(plain(rows).abs().sum(-1, keepdim=True) > 0, y, torch.nan)


def verbs(dispatcher: Dispatcher, case: Case, world: int, tokens: slice, first: int) -> dict[str, Tensor]:
    """All four verbs on this rank's `tokens` of the batch; `first` is the number of the rank's first expert."""
    rows, ids, weights, dy = make(case[0], case[1], sum(case[2][:world]))
    mine = part(rows, *tokens.indices(len(ids))[:2])
    sent = dispatcher.dispatch(mine, dispatcher.announce(ids[tokens]), weights[tokens]).wait()
    y = expert_function(sent.rows_RD, sent.group_offsets, first).to(dy.dtype)
    back = dispatcher.combine_backward(dy[tokens], sent.state).wait()
    dweights = torch.where(sent.weights_R > 0, sent.weights_R * 3, torch.nan)
    dx, dw = dispatcher.dispatch_backward(y, dweights, sent.state).wait()
    return {
        "rows": plain(sent.rows_RD), "weights": sent.weights_R, "offsets": sent.group_offsets,
        "out": dispatcher.combine(y, sent.state).wait(), "back": plain(back), "dx": dx, "dw": dw,
    }  # fmt: skip


def many_ranks(case: Case, world: int) -> dict[str, Tensor]:
    mesh = build_mesh(1, world, world, timeout=TIMEOUT)
    assert mesh.ep_group is not None
    start = sum(case[2][: mesh.rank])
    dispatcher = AllToAllDispatcher(*one_hop(mesh.ep_group, E))
    tokens = slice(start, start + case[2][mesh.rank])
    return verbs(dispatcher, case, world, tokens, mesh.rank * dispatcher.num_local_experts)


def by_expert(result: dict[str, Tensor], name: str) -> list[Tensor]:
    offsets = result["offsets"].tolist()
    return [result[name][a:b] for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize("world", [2, 4])
def test_verbs_equal_the_one_rank_dispatcher(world: int) -> None:
    answers = run_ranks(lambda: [many_ranks(case, world) for case in CASES], world)
    for i, case in enumerate(CASES):
        expected, got = verbs(LocalDispatcher(E), case, world, slice(None), 0), [answer[i] for answer in answers]
        for name in ("rows", "weights", "back"):  # what experts receive is bit-equal, expert by expert
            received = [group for rank in got for group in by_expert(rank, name)]
            for e, (a, b) in enumerate(zip(by_expert(expected, name), received, strict=True)):
                assert torch.equal(a, b), (case, name, e)
        for name in ("out", "dx", "dw"):
            ours = torch.cat([rank[name] for rank in got]).float()
            assert ours.shape == expected[name].shape
            assert not ours.isnan().any(), (case, name)
            bound = 1e-5 if case[0] == "fp32" or name == "dw" else 1e-2
            torch.testing.assert_close(ours, expected[name].float(), rtol=bound, atol=bound)


class Group:
    """A group that never communicates."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size


def made(ranks: int, experts: int, **options: int) -> AllToAllDispatcher:
    return AllToAllDispatcher(*one_hop(Group(ranks), experts), **options)  # type: ignore[arg-type]


def test_experts_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_experts=8 is not a multiple of parallel\.ep=3: use parallel\.ep=2"):
        made(3, 8)
    with pytest.raises(ValueError, match=r"num_experts=8 is not a multiple of parallel\.ep=16: use parallel\.ep=8"):
        made(16, 8)


def test_ids_travel_as_16_bits_and_a_dispatch_is_at_least_one_message() -> None:
    assert made(2, MOST_EXPERTS, chunks=1).num_local_experts == MOST_EXPERTS // 2
    with pytest.raises(ValueError, match=r"num_experts=32770 exceeds the 32768 .* use at most 32768"):
        made(2, MOST_EXPERTS + 2)
    with pytest.raises(ValueError, match=r"parallel\.chunks=0 must be at least 1"):
        made(2, 8, chunks=0)
