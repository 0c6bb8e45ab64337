"""Launches prepared by shapes: kept as long as said, and never taken for tensors or a device of another kind."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fp8moe.kernels.triton import launch as launching  # noqa: E402
from fp8moe.kernels.triton.launch import (  # noqa: E402
    KEPT,
    Prepared,
    block_of,
    by_shapes,
    forget,
    is_contiguous,
    layout_of,
)
from tests.kernels.ptx_cache import Pretender  # noqa: E402


def prepared(kernel: Any, **options: Any) -> Prepared:
    return Prepared(kernel.function, (2, 3), 5, SIZE=8, FLAG=True, num_warps=4, **options)


def late(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(1), tensor])[1:]


def test_the_second_prepared_launch_goes_past_triton(kernel):
    launch_on, x, y = prepared(kernel), torch.zeros(4), torch.ones(4)
    launch_on(x)
    launch_on(y)
    launch_on(x)
    (first,), (second, third) = kernel.by_triton, kernel.past
    assert first == ((2, 3), (x, 5), {"SIZE": 8, "FLAG": True, "num_warps": 4})
    assert second[:9] == (2, 3, 1, 0, 7, "packed", None, None, None)
    assert second[9] is y and third[9] is x and second[10:] == third[10:] == (5, 8, True)


def test_another_of_the_same_kind_goes_past_triton_at_once(kernel):
    prepared(kernel)(torch.zeros(4))
    Prepared(kernel.function, (7,), 9, SIZE=8, FLAG=True, num_warps=4)(torch.ones(4))
    assert len(kernel.by_triton) == 1 and kernel.past[-1][:3] == (7, 1, 1) and kernel.past[-1][10:] == (9, 8, True)


@pytest.mark.parametrize(
    "other", [late(torch.zeros(4)), torch.zeros(4).bfloat16(), torch.zeros(4, dtype=torch.int64), None]
)
def test_a_tensor_of_another_kind_is_tritons(kernel, other):
    launch_on = prepared(kernel)
    for _ in range(2):
        for tensor in (torch.zeros(4), other):
            launch_on(tensor)
    assert [args[0] for _, args, _ in kernel.by_triton][1:] == [other] and len(kernel.past) == 2


def test_neighbours_of_prepared_launches_do_not_run_together(kernel):
    def two(a, b, c, d, SIZE: tl.constexpr):
        """A kernel that is never compiled."""

    launch_on, x = Prepared(JITFunction(two), (1,), SIZE=1), torch.zeros(4)
    tensors = (None, x, late(x), x.bfloat16(), late(x.bfloat16()))
    count = 0
    for args in product(tensors, repeat=4):
        launch_on(*args)
        count += 1
        assert len(kernel.by_triton) == count
    for args in product(tensors, repeat=4):
        launch_on(*args)
    assert len(kernel.by_triton) == count == len(kernel.past)


def test_a_prepared_launch_asks_triton_for_hooks_for_its_device_and_for_who_replaces_it(kernel, monkeypatch):
    launch_on, x = prepared(kernel), torch.zeros(4)

    def again() -> tuple[int, int]:
        for _ in range(2):
            launch_on(x)
        return len(kernel.by_triton), len(kernel.past)

    assert again() == (1, 1)
    hook = lambda metadata: None  # noqa: E731
    triton.knobs.runtime.launch_exit_hook.add(hook)
    assert again() == (3, 1)
    triton.knobs.runtime.launch_exit_hook.remove(hook)
    assert again() == (3, 3)
    monkeypatch.setattr(Pretender, "get_current_device", lambda self: 1)
    assert again() == (4, 4)


def test_a_prepared_launch_of_another_run_is_not_remembered(kernel, monkeypatch):
    launch_on, noted = prepared(kernel), list[Any]()
    launch_on(torch.zeros(4))
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: noted.append(args))
    for _ in range(2):
        launch_on(torch.zeros(4))
    assert len(noted) == 2 and not kernel.past


def test_prepared_launches_of_interpreted_kernels_and_of_users_who_ask_so_are_tritons(kernel, monkeypatch):
    noted: list[Any] = []

    class Interpreted:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: noted.append((grid, args, constants))

    launch_on, x = Prepared(Interpreted(), (2,), 5, SIZE=1), torch.zeros(4)
    launch_on(x)
    launch_on(x)
    assert noted == [((2,), (x, 5), {"SIZE": 1})] * 2
    monkeypatch.setenv(launching.LAUNCH_VARIABLE, "triton")
    launching._direct.cache_clear()
    try:
        launch_on = prepared(kernel)
        for _ in range(2):
            launch_on(x)
    finally:
        launching._direct.cache_clear()
    assert len(kernel.by_triton) == 2 and not kernel.past


def test_the_first_tensors_are_described(kernel):
    block = block_of(64, 32)
    launch_on = prepared(kernel, described=(([64, 64], [64, 1], block),))
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        base = torch.zeros(64, 64, dtype=dtype)
        launch_on(base)
        args = (kernel.past or kernel.by_triton)[-1]
        one = args[9] if kernel.past else args[1][0]
        if dtype is torch.bfloat16:
            assert one.base is base and (one.shape, one.strides, one.block) == ([64, 64], [64, 1], block)
    assert len(kernel.by_triton) == 2 and len(kernel.past) == 1, "another dtype is another kind"


def test_what_is_prepared_is_kept_by_values_and_types_and_no_longer_than_said():
    made = []

    @by_shapes
    def prepare(*sizes: Any) -> object:
        made.append(sizes)
        return object()

    assert prepare(1, 2.0) is prepare(1, 2.0)
    assert len({id(prepare(one)) for one in (1, 1.0, True)}) == 3
    first = prepare(0)
    for size in range(2, KEPT + 2):
        prepare(size)
    assert prepare(0) is not first and made.count((0,)) == 2
    kept = prepare(0)
    forget()
    assert prepare(0) is not kept


def test_how_a_tensor_lies():
    whole = torch.zeros(4, 6, 8)
    for tensor in (whole, whole[1:], whole[:, :1], whole[:1], whole[..., :4], whole.mT, whole[2], late(torch.zeros(4))):
        shape, strides, rest = layout_of(tensor)
        assert (shape, strides, rest) == (tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
        assert is_contiguous(shape, strides) == tensor.is_contiguous()
    assert layout_of(late(torch.zeros(4)))[2] == 4
