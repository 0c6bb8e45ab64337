"""Verbs of a dispatcher between graphs: the values that they have without, and no memory of the graphs kept."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.cuda_graph import Captured
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.operand import Rows
from fp8moe.parallel.dispatch.captured import CapturableDispatcher
from fp8moe.parallel.stream import tensors_of


class Eager:
    """A graph whose capture computes, once."""

    def capturing(self) -> nullcontext[None]:
        return nullcontext()

    def replay(self) -> None:
        pass


def verbs(dispatcher: LocalDispatcher | CapturableDispatcher, x: Rows) -> list[Tensor]:
    """All four, of 8 tokens with 2 of 4 experts each."""
    ids_TK = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]] * 2)
    weights_TK = torch.linspace(0, 1, 16).view(8, 2)
    fp8 = isinstance(x, Fp8Tensor)
    dispatched = dispatcher.dispatch(x, dispatcher.announce(ids_TK), weights_TK).wait()
    y_RD = torch.arange(len(dispatched.weights_R) * 128.0).view(-1, 128)
    combined = dispatcher.combine(y_RD, dispatched.state).wait()
    dy_RD = dispatcher.combine_backward(combined * 1e-3, dispatched.state, fp8=fp8).wait()
    dx = dispatcher.dispatch_backward(y_RD * 2, dispatched.weights_R * 3, dispatched.state).wait()
    rows = dispatched.rows_RD, dispatched.weights_R, dispatched.group_offsets
    given.extend(weakref.ref(tensor.untyped_storage()) for tensor in (ids_TK, weights_TK, y_RD, combined))
    return list(tensors_of([*rows, combined, dy_RD, *dx]))


given: list[weakref.ref[torch.UntypedStorage]] = []


@pytest.mark.parametrize("fp8", [False, True])
def test_every_verb_gives_what_the_dispatcher_gives(fp8: bool) -> None:
    x = torch.randn(8, 128)
    rows = quantize_rows(x, power_of_two=True) if fp8 else x
    found: list[Tensor] = []
    dispatcher = CapturableDispatcher(LocalDispatcher(4))
    expected = verbs(LocalDispatcher(4), rows)
    given.clear()
    captured = Captured(lambda: found.extend(verbs(dispatcher, rows)), Eager)
    assert len(found) == len(expected) == (9 if fp8 else 7)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.float(), other.float())
    found.clear()
    assert [storage() is None for storage in given] == [True] * 4, "a capture keeps none of its tensors"
    del captured
    assert len(dispatcher._buffers) == 0


def test_outside_a_capture_it_is_the_dispatcher() -> None:
    x = torch.randn(8, 128)
    for one, other in zip(
        verbs(CapturableDispatcher(LocalDispatcher(4)), x), verbs(LocalDispatcher(4), x), strict=True
    ):
        assert torch.equal(one, other)
