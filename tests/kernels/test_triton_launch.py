"""Launches past Triton's search: the key tells apart whatever Triton compiles apart, and Triton is asked when due."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fp8moe.kernels.triton import launch as launching  # noqa: E402
from fp8moe.kernels.triton.launch import Descriptor, block_of, kinds_of, launch  # noqa: E402
from tests.kernels.ptx_cache import Pretender  # noqa: E402

NUMBERS = (0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40, 2**63, 2**63 + 1)


def nothing(a, b, SIZE: tl.constexpr, FLAG: tl.constexpr):
    """A kernel that is never compiled."""


def arguments() -> list[Any]:
    buffer = torch.zeros(64, 64)
    tensors = [buffer.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64)]
    blocks = block_of(64, 32), block_of(32, 64)
    descriptors = [Descriptor(t, [64, 64], [64, 1], block) for t in tensors[1:3] for block in blocks]
    shifted = [t[:, 1:] for t in tensors]
    return [None, 0.5, 1.0, *NUMBERS, *tensors, *shifted, torch.nn.Parameter(buffer), *descriptors]


def test_the_key_is_never_coarser_than_tritons(monkeypatch):
    monkeypatch.setattr(driver, "_active", Pretender())
    *_, binder = JITFunction(nothing).create_binder()

    def by_triton(value: Any) -> Any:
        return binder(value, None, SIZE=1, FLAG=True)[1][0]

    values = arguments()
    for one, other in combinations(values, 2):
        if by_triton(one) != by_triton(other):
            assert kinds_of((one,)) != kinds_of((other,)), (one, other)
    assert len({str(by_triton(value)) for value in values}) >= 15, "the values are of many kinds"
    assert kinds_of((2, 3, 16, 32)) == kinds_of((5, 7, 48, 64)), "sizes of a kind share a kernel"


def test_kinds_of_neighbours_do_not_run_together():
    values = arguments()
    found = {}
    for first in values:
        for second in values:
            key = tuple(kinds_of((first, second)))
            parts = tuple(map(tuple, (kinds_of((first,)), kinds_of((second,)))))
            assert found.setdefault(key, parts) == parts


def test_a_descriptor_is_tritons():
    base = torch.zeros(64, 64, dtype=torch.bfloat16)
    ours, theirs = (
        Descriptor(base, [64, 64], [64, 1], block_of(64, 32)),
        TensorDescriptor(base, [64, 64], [64, 1], [64, 32]),
    )
    for name in (field.name for field in fields(theirs)):
        assert getattr(ours, name) is getattr(theirs, name) or getattr(ours, name) == getattr(theirs, name), name


def test_the_second_launch_of_a_kind_goes_past_triton(kernel):
    x, y = torch.zeros(4), torch.ones(4)
    launch(kernel.function, (3,), x, 5, FLAG=True, SIZE=8, num_warps=4)
    launch(kernel.function, (2, 6), y, 7, FLAG=True, SIZE=8, num_warps=4)
    (first,), (second,) = kernel.by_triton, kernel.past
    assert first == ((3,), (x, 5), {"FLAG": True, "SIZE": 8, "num_warps": 4})
    assert second[:9] == (2, 6, 1, 0, 7, "packed", None, None, None)
    assert second[9] is y and second[10:] == (7, 8, True), "constants in the order of the parameters"


@pytest.mark.parametrize(
    ("args", "constants"),
    [((6, 5), {}), ((None, 16), {}), ((None, 5), {"SIZE": 16}), ((None, 5), {"num_warps": 8}), ((None, 1), {})],
)
def test_another_kind_is_tritons(kernel, args, constants):
    usual = {"SIZE": 8, "FLAG": True, "num_warps": 4}
    launch(kernel.function, (1,), None, 5, **usual)
    launch(kernel.function, (1,), *args, **usual | constants)
    assert len(kernel.by_triton) == 2 and not kernel.past


def test_triton_is_asked_by_hooks_by_flags_and_by_who_replaces_it(kernel, monkeypatch):
    def again(*args: Any) -> tuple[int, int]:
        for _ in range(2):
            launch(kernel.function, (1,), *args, SIZE=8, FLAG=True)
        return len(kernel.by_triton), len(kernel.past)

    assert again(None, 5) == (1, 1)
    assert again(None, True) == (3, 1)
    hook = lambda metadata: None  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    assert again(None, 5) == (5, 1)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert again(None, 5) == (5, 3)
    noted: list[Any] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: noted.append(args))
    assert again(None, 5) == (5, 3) and len(noted) == 2


def test_constants_by_position_are_refused(kernel):
    with pytest.raises(AssertionError, match="nothing"):
        launch(kernel.function, (1,), None, 5, 8, FLAG=True)


def test_a_user_can_leave_every_launch_to_triton(kernel, monkeypatch):
    monkeypatch.setenv(launching.LAUNCH_VARIABLE, "triton")
    launching._direct.cache_clear()
    try:
        for _ in range(2):
            launch(kernel.function, (1,), torch.zeros(4), None, SIZE=1, FLAG=False)
    finally:
        launching._direct.cache_clear()
    assert len(kernel.by_triton) == 2 and not kernel.past


class ContextDriver:
    """Stands in for the CUDA driver: what it is asked, and what it answers."""

    def __init__(self, current: int | None, status: int = 0) -> None:
        self.current, self.status, self.asked = current, status, list[str]()

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.current
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        self.asked.append(f"retain {device}")
        context._obj.value = 100 + device
        return self.status

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.asked.append(f"set {context.value}")
        return 0


@pytest.mark.parametrize(("current", "asked"), [(None, ["retain 3", "set 103"]), (7, [])])
def test_a_thread_gets_a_context_if_it_has_none(monkeypatch, current, asked):
    driver_api = ContextDriver(current)
    monkeypatch.setattr(launching.ctypes, "CDLL", lambda name: driver_api)
    launching.enter_context(3)
    assert driver_api.asked == asked


def test_a_context_that_the_driver_refuses_is_said(monkeypatch):
    monkeypatch.setattr(launching.ctypes, "CDLL", lambda name: ContextDriver(None, status=101))
    with pytest.raises(RuntimeError, match="context of device 3: error 101"):
        launching.enter_context(3)


def test_each_thread_asks_once(kernel, monkeypatch):
    entered = []
    monkeypatch.setattr(launching.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(launching.torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(launching, "enter_context", entered.append)
    monkeypatch.setattr(launching, "_thread", launching.threading.local())

    def run():
        for _ in range(2):
            launch(kernel.function, (1,), None, 2, SIZE=1, FLAG=True)

    run()
    other = launching.threading.Thread(target=run)
    other.start()
    other.join(timeout=60)
    assert entered == [5, 5] and len(kernel.by_triton) + len(kernel.past) == 4
