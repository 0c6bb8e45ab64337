"""Detached graphs and deferred weight gradients: each backward at its time, in its order, into its own parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fp8moe.layers.linear import Linear, attach_main_grads
from fp8moe.layers.phase import DeferredWgrads, run_detached, submit
from fp8moe.layers.recipe import Precision, Recipe


def products(x: Tensor, y: Tensor, z: Tensor) -> tuple[tuple[Tensor, ...], str]:
    return (x * y, x * 2, z), "the rest"


def test_gradients_stop_at_the_inputs() -> None:
    source = torch.randn(3, requires_grad=True)
    x, y, counts = source * 1, torch.randn(3), torch.arange(3)
    graph, rest = run_detached(products, x, y, counts, wgrads=DeferredWgrads())
    assert rest == "the rest"
    assert torch.equal(graph.outputs[0], x * y) and not any(out.requires_grad for out in graph.outputs)
    dx, dy, dcounts = graph.backward(torch.ones(3), torch.full((3,), 5.0), None)
    assert dx is not None and dy is not None and dcounts is None
    assert torch.equal(dx, y + 10) and torch.equal(dy, x.detach()) and source.grad is None


def test_an_output_without_gradient_counts_nothing() -> None:
    x, y = torch.randn(2, 3)
    graph, _ = run_detached(products, x, y, torch.arange(3), wgrads=DeferredWgrads())
    dx, dy, _ = graph.backward(None, torch.ones(3), torch.ones(3))
    assert dx is not None and torch.equal(dx, torch.full((3,), 2.0)) and dy is None


def test_one_gradient_an_output_is_asked_for() -> None:
    graph, _ = run_detached(products, *torch.randn(2, 3), torch.arange(3), wgrads=DeferredWgrads())
    with pytest.raises(ValueError):
        graph.backward(torch.ones(3))


def test_outputs_and_inputs_are_let_go() -> None:
    x, y = torch.randn(2, 3)
    graph, _ = run_detached(lambda x, y: ((x + y,), None), x * 1, y, wgrads=DeferredWgrads())
    kept = StorageWeakRef(graph.outputs[0].untyped_storage())
    (out,) = graph.take()
    assert graph.outputs == () and not kept.expired()
    del out
    assert kept.expired(), "a sum keeps nothing of its output"
    gradient = StorageWeakRef(graph.backward(torch.randn(3))[0].untyped_storage())  # type: ignore[union-attr]
    assert gradient.expired(), "the graph forgets its inputs and their gradients"


def test_weight_gradients_of_a_backward_wait_in_its_own_object() -> None:
    linear = Linear(4, 5, Recipe(Precision.FP32))
    torch.nn.init.normal_(linear.weight)
    attach_main_grads(linear)
    x, dy, deferred = torch.randn(3, 4), torch.randn(3, 5), DeferredWgrads()
    graph, _ = run_detached(lambda x: ((linear(x),), None), x, wgrads=deferred)
    (dx,) = graph.backward(dy)
    assert dx is not None and torch.equal(dx, dy @ linear.weight.detach())
    assert len(deferred) == 1 and not linear.weight.main_grad.any()  # type: ignore[operator]
    deferred.run()
    torch.testing.assert_close(linear.weight.main_grad, dy.T @ x)


def test_without_gradients_there_is_no_backward() -> None:
    with torch.no_grad():
        graph, _ = run_detached(lambda x: ((x * 2,), None), torch.ones(3), wgrads=DeferredWgrads())
    assert torch.equal(graph.outputs[0], torch.full((3,), 2.0))


def test_what_waits_runs_in_its_order_once_and_without_autograd() -> None:
    log: list[object] = []
    submit(lambda: log.append("at once"))
    wgrads, inner = DeferredWgrads(), DeferredWgrads()
    with wgrads.collect():
        submit(lambda: log.append(("a", torch.is_grad_enabled())))
        with inner.collect():
            submit(lambda: log.append("inner"))
        submit(lambda: log.append("b"))
    submit(lambda: log.append("at once again"))
    assert log == ["at once", "at once again"] and (len(wgrads), len(inner)) == (2, 1)
    wgrads.run()
    assert log[2:] == [("a", False), "b"] and (len(wgrads), len(inner)) == (0, 1)
    wgrads.run()
    inner.run()
    assert log[4:] == ["inner"]


def test_a_backward_that_fails_stops_collecting() -> None:
    wgrads, log = DeferredWgrads(), []
    with pytest.raises(RuntimeError, match="a failure"), wgrads.collect():
        raise RuntimeError("a failure")
    submit(lambda: log.append(1))
    assert log == [1]
