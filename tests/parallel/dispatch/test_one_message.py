"""Verbs cut at their message, captured and replayed on two ranks: the dispatcher's values, from the message alone."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.cuda_graph import Captured
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.parallel.dispatch import make_dispatcher, one_message
from fp8moe.parallel.dispatch.captured import CapturableDispatcher
from fp8moe.parallel.dispatch.one_message import can_cut
from fp8moe.parallel.mesh import build_mesh
from fp8moe.parallel.stream import tensors_of
from tests.parallel.dispatch.test_captured import Eager
from tests.parallel.ranks import TIMEOUT, run_ranks
from tests.train.recorded_graph import RecordedGraph, as_on_a_gpu

T, D, EXPERTS = 8, 128, 4


def verbs(dispatcher: Dispatcher, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, fp8: bool) -> list[Tensor]:
    """All four, one behind the other, each with something of what the one before gave."""
    rows = quantize_rows(x, power_of_two=True) if fp8 else x
    dispatched = dispatcher.dispatch(rows, dispatcher.announce(ids_TK), weights_TK).wait()
    y_RD = dispatched.weights_R[:, None].expand(-1, D).contiguous()
    combined = dispatcher.combine(y_RD, dispatched.state).wait()
    dy_RD = dispatcher.combine_backward(combined * x, dispatched.state, fp8=fp8).wait()
    dx, dweights = dispatcher.dispatch_backward(y_RD * 2, dispatched.weights_R * 3, dispatched.state).wait()
    arrived = dispatched.rows_RD, dispatched.weights_R, dispatched.group_offsets
    return list(tensors_of([*arrived, combined, dy_RD, dx, dweights]))


def batch(turn: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts and weights of this rank in a turn; in the second no token wants an expert of the first rank."""
    torch.manual_seed(10 * turn + torch.distributed.get_rank())
    first = 2 if turn == 1 else 0
    ids = torch.stack([torch.randperm(EXPERTS - first)[:2] + first for _ in range(T)])
    return torch.randn(T, D), ids, torch.rand(T, 2)


def kept_by_a_capture(dispatcher: Dispatcher) -> int:
    """Messages, and maps of their rows, that are still there when a capture of all verbs has ended."""
    made: list[weakref.ref[torch.UntypedStorage]] = []

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            made.extend(weakref.ref(one.untyped_storage()) for one in tensors_of([result]))
            return result

        return run

    names = ("pack_message", "plan_hop", "packed_rows", "packed_gradients")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(one_message, name, noted(getattr(one_message, name))))
        captured = Captured(lambda: verbs(dispatcher, *batch(0), fp8=True), Eager)
    assert len(made) > len(names) and captured._steps
    return sum(one() is not None for one in made)


def on_ranks(fp8: bool) -> tuple[list[int], list[int]]:
    """Python's calls of what packs and what sends, by turn: the capture, then replays."""
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    plain, *others = (
        make_dispatcher("all_to_all", mesh, EXPERTS, max_tokens=T, capacity_factor=factor, chunks=chunks)
        for factor, chunks in ((math.inf, 1), (math.inf, 2), (2.0, 1), (None, 1))
    )
    assert can_cut(plain) and not any(map(can_cut, others))
    capturable, given, found = CapturableDispatcher(plain), batch(0), list[Tensor]()
    packs, sends = list[int](), list[int]()
    with (
        pytest.MonkeyPatch.context() as patched,
        mock.patch.object(one_message, "pack_message", wraps=one_message.pack_message) as pack,
        mock.patch.object(one_message, "start_all_to_all", wraps=one_message.start_all_to_all) as send,
    ):
        as_on_a_gpu(patched)
        captured = Captured(lambda: found.extend(verbs(capturable, *given, fp8=fp8)), RecordedGraph)
        for turn in range(3):
            if turn:
                for still, value in zip(given, batch(turn), strict=True):
                    still.copy_(value)
                captured.replay()
            packs.append(pack.call_count)
            sends.append(send.call_count)
            for one, other in zip(found, verbs(plain, *batch(turn), fp8=fp8), strict=True):
                assert torch.equal(one.float(), other.float()), f"turn {turn}"
    del captured
    assert kept_by_a_capture(CapturableDispatcher(plain)) == 0
    return packs, sends


@pytest.mark.parametrize("fp8", [False, True])
def test_replays_give_what_the_dispatcher_gives_and_launch_messages_alone(fp8: bool) -> None:
    for packs, sends in run_ranks(on_ranks, 2, fp8):
        assert packs == [2, 2, 2] and sends == [4, 8, 12]
