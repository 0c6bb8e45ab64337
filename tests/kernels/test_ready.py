"""Products found by how their operands lie launch what the long way launches, and follow all that it asks."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fp8moe.kernels import tiles
from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, Fp8Tensor
from fp8moe.kernels.gluon import gemm, grouped_gemm, grouped_mm, launch, launch_tokens, ready
from fp8moe.kernels.tiles import Tile
from tests.kernels.sm90_cases import blocks, chosen, rows

OPS = gemm, grouped_gemm, grouped_mm
WAYS = "ready_rows", "ready_columns", "ready_tokens"
SMALL = Tile(128, 64, 4, 8, 4)


class Kernel:
    """Notes its launches: kernel, grid, arguments, constants; a descriptor as what it says."""

    def __init__(self, name, found):
        self.name, self.found = name, found

    def __getitem__(self, grid):
        return lambda *args, **constants: self.found.append((self.name, grid, [*map(said, args)], constants))


def said(value):
    if hasattr(value, "block"):
        return value.base, value.shape, value.strides, value.block
    return value


@pytest.fixture
def launched(monkeypatch):
    found = []
    for module, name in ((launch, "rows_kernel"), (launch, "columns_kernel"), (launch_tokens, "tokens_kernel")):
        monkeypatch.setattr(module, name, Kernel(name, found))
    return found


def same(one, other):
    """The same launch on the same memory; only an output may be new, the fifth argument."""
    assert one[:2] == other[:2] and one[3] == other[3]
    for place, (left, right) in enumerate(zip(one[2], other[2], strict=True)):
        base, known = (left[0], right[0]) if isinstance(left, tuple) else (left, right)
        if isinstance(base, torch.Tensor):
            assert base.data_ptr() == known.data_ptr() or place == 4
            assert (base.dtype, base.numel()) == (known.dtype, known.numel())
            assert not isinstance(left, tuple) or left[1:] == right[1:]
        else:
            assert left == right


def part(big, size):
    """[m, size] whose rows lie further apart."""
    return torch.empty(big, 256).bfloat16()[:, :size]


OFFSETS = torch.tensor([0, 128, 256], dtype=torch.int32)
CASES = {
    "rows": (gemm.gemm, rows(200, 256), blocks(144, 256)),
    "rows, fp32": (partial(gemm.gemm, out_dtype=torch.float32), rows(8, 16), blocks(32, 16)),
    "rows, added": (partial(gemm.gemm, accumulate=torch.empty(200, 300)[:, :128]), rows(200, 256), blocks(128, 256)),
    "columns": (partial(gemm.gemm, accumulate=torch.empty(128, 272)), rows(128, 48), rows(272, 48)),
    "columns, long": (partial(gemm.gemm, accumulate=torch.empty(128, 256)), rows(128, 4096), rows(256, 4096)),
    "grouped": (grouped_gemm.grouped_gemm, rows(256, 256), blocks(2, 144, 256), OFFSETS),
    "grouped sums": (grouped_gemm.grouped_wgrad, rows(128, 256), rows(64, 256), OFFSETS, torch.empty(2, 128, 64)),
    "tokens": (gemm.wgrad, part(72, 128), part(72, 48), torch.empty(128, 48)),
    "grouped tokens": (grouped_mm.grouped_mm_wgrad, part(256, 96), part(256, 64), OFFSETS, torch.empty(2, 96, 64)),
    "one expert's": (grouped_mm.grouped_mm_wgrad, part(99, 96), part(99, 64), OFFSETS[:2], torch.empty(1, 96, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_launches_what_the_long_way_launches(launched, monkeypatch, case):
    asked, choose = [], tiles.choose
    monkeypatch.setattr(
        tiles, "choose", lambda *args, **kwargs: asked.append((args, kwargs)) or choose(*args, **kwargs)
    )
    call, *operands = CASES[case]
    call(*operands)
    long = SimpleNamespace(calls=0)
    for module in OPS:
        for way in WAYS:
            if hasattr(module, way):
                monkeypatch.setattr(module, way, lambda *_: None)
    for module, name in ((launch, "launch_rows"), (launch, "launch_columns"), (launch_tokens, "launch_tokens")):
        for user in OPS:
            if hasattr(user, name):
                monkeypatch.setattr(user, name, noted(getattr(module, name), long))
    call(*operands)
    assert long.calls == 1 and len(asked) == 2 and asked[0] == asked[1], "one tile, asked for in the same way"
    one, other = launched
    same(one, other)


def noted(function, calls):
    def call(*args, **kwargs):
        calls.calls += 1
        return function(*args, **kwargs)

    return call


def late(shape, dtype=torch.float32):
    """A contiguous tensor that begins 4 or fewer bytes behind a multiple of 16."""
    return torch.empty(1 + shape[0] * shape[1], dtype=dtype)[1:].view(shape)


def with_data(x, data):
    return Fp8Tensor(data, x.scale, x.tile)


def with_scale(x, scale):
    return Fp8Tensor(x.data, scale, x.tile)


A, B = rows(64, 256), blocks(128, 256)
OTHERWISE = {
    "codes late": (with_data(A, late((64, 256), E4M3)), B),
    "codes apart": (with_data(A, torch.empty(64, 264).to(E4M3)[:, :256]), B),
    "codes transposed": (with_data(A, torch.empty(256, 64).to(E4M3).t()), B),
    "scales late": (with_scale(A, late((2, 64)).t()), B),
    "scales token-major": (with_scale(A, torch.empty(64, 2)), B),
    "scales apart": (with_scale(A, torch.empty(2, 66)[:, :64].t()), B),
    "weight late": (A, with_data(B, late((128, 256), E4M3))),
    "weight's scales late": (A, with_scale(B, late((1, 2)))),
    "weight's scales apart": (A, Fp8Tensor(torch.empty(256, 256).to(E4M3), torch.empty(2, 4)[:, :2], BLOCK_TILE)),
    "no tokens": (rows(0, 256), B),
    "no outputs": (A, blocks(0, 256)),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_operands_that_lie_otherwise_take_the_long_way(launched, case):
    gemm.gemm(A, B)  # the same shapes, which are known now
    a, b = OTHERWISE[case]
    assert ready.ready_rows("gemm", a, b, torch.bfloat16, None) is None
    gemm.gemm(a, b)
    assert len(launched) == (1 if case.startswith("no ") else 2)
    assert all(value[0].data_ptr() % 16 == 0 for value in launched[-1][2][:4])


def test_sums_that_lie_otherwise_take_the_long_way():
    x, dy, total = rows(64, 256), rows(128, 256), torch.empty(128, 64)
    assert ready.ready_columns("gemm_columns", dy, x, total) is not None
    for other in (torch.empty(64, 128).t(), torch.empty(128, 72)[:, :64], total[:, :0]):
        assert ready.ready_columns("gemm_columns", dy, x, other) is None
        assert ready.ready_tokens("wgrad", part(8, 128), part(8, 64), other) is None
    half, wide = part(8, 128), torch.empty(8, 64)
    assert ready.ready_tokens("wgrad", half, part(8, 64), total) is not None
    for one, other in ((wide[:, :0], half), (half, wide), (half.float(), part(8, 64)), (half, wide.bfloat16().t())):
        assert ready.ready_tokens("wgrad", one, other, total) is None
    assert ready.ready_rows("gemm", A, B, torch.float32, torch.empty(128, 64).t()) is None


def grids(launched, call):
    launched.clear()
    call()
    return launched[0][1]


def test_it_follows_the_limit_of_sms_the_tile_and_the_device(launched, monkeypatch):
    call = lambda: gemm.gemm(rows(4096, 256), blocks(2048, 256))  # noqa: E731
    (most,), (again,) = grids(launched, call), grids(launched, call)
    assert most == again == 132
    with limited_sms(5):
        assert grids(launched, call) == (5,)
        with limited_sms(7):
            assert grids(launched, call) == (7,)
    assert grids(launched, call) == (132,)
    with chosen(SMALL):
        call()
    assert launched[-1][3]["BN"] == 64
    call()
    assert launched[-1][3]["BN"] != 64
    asked = []
    monkeypatch.setattr(launch, "device_name", lambda device: asked.append(device) or tiles.DEFAULT_DEVICE)
    launch_on = [
        ready._ready_rows(
            "gemm", *map(ready.layout_of, (A.data, A.scale, B.data, B.scale)), torch.bfloat16, None, device
        )
        for device in (torch.device("meta"), torch.device("cpu"), torch.device("meta"))
    ]
    assert [device.type for device in asked] == ["meta", "cpu"] and launch_on[0] is launch_on[2]


def test_pairs_are_others(launched, monkeypatch):
    asked = []

    def choose(*args, pairs, **kwargs):
        asked.append(pairs)
        return SMALL

    monkeypatch.setattr(tiles, "choose", choose)
    for allowed in (False, True, False):
        for module in (ready, launch):
            monkeypatch.setattr(module, "pairs_allowed", lambda allowed=allowed: allowed)
        gemm.gemm(A, B)
    assert asked == [False, True]
