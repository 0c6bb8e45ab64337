"""The Hopper kernel of BF16 weight gradients: on a Hopper GPU values against FP64, ragged groups and equal bits.

Without a GPU what its launcher decides: who runs it, how sums are added, what is copied. Its machine code runs in
`tests/ptx` (`token_cases`).
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.gemm import wgrad
from fp8moe.kernels.grouped_mm import grouped_mm_wgrad
from fp8moe.kernels.tiles import Tile, production_tiles
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of

pytest.importorskip("triton")

from fp8moe.kernels.gluon import gemm, grouped_mm, launch, launch_tokens
from fp8moe.kernels.gluon.epilogues import ADD, ADD_FETCHED
from fp8moe.kernels.gluon.launch_tokens import tokens_epilogue
from fp8moe.kernels.triton.launch import layout_of
from tests.kernels.sm90_cases import TOKEN_SUMS, chosen, summed

GROUPS = [[3, 0, 64, 0, 150], [1024, 1000, 0, 1111], [1], [0, 0], [4100, 2000, 8192, 0, 128]]
TILES = production_tiles("gluon", "grouped_mm_wgrad")
REPEATS = 20
BOUND = 1e-10  # FP32 sums in the tensor core's order, which cuts bits off


def operands(kind, device, sizes, n, k, rest=70):
    """dy, x and offsets of groups of these sizes; NaN and infinity in the rows of nobody."""
    rows = sum(sizes)
    dy, x = (data(kind, rows + rest, size, device=device) for size in (n, k))
    dy[rows:], x[rows:] = float("nan"), float("inf")
    return dy, x, offsets_of(sizes, device)


def check(dy, x, offsets, total, before):
    for e, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        if start == stop:
            assert torch.equal(total[e], before[e])
            continue
        left, right = dy[start:stop].double().T, x[start:stop].double().T
        assert calc_diff(total[e].double() - before[e], left @ right.T, left, right) <= BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (576, 272), (200, 144), (13, 21)])
def test_each_group_against_fp64(hopper, sizes, n, k, kind):
    dy, x, offsets = operands(kind, hopper, sizes, n, k)
    before = torch.zeros(len(sizes), n, k, device=hopper)
    total = before.clone()
    grouped_mm_wgrad(dy, x, offsets, total)
    check(dy, x, offsets, total, before)


@pytest.mark.gpu
@pytest.mark.parametrize("added", TOKEN_SUMS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_n}x{tile.stages}")
def test_every_way_to_add_gives_the_same_bits_every_time(hopper, tile, added):
    dy, x, offsets = operands("normal", hopper, [1024, 1000, 0, 1111, 1], 1024, 1536)
    before, totals = torch.randn(5, 1024, 1536, device=hopper), []
    for sums in ("add", *[added] * REPEATS):
        total = before.clone()
        with chosen(tile), summed(sums):
            grouped_mm_wgrad(dy, x, offsets, total)
        totals.append(total)
    check(dy, x, offsets, totals[0], before.double())
    assert all(torch.equal(total, totals[0]) for total in totals)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000, 4096])
@pytest.mark.parametrize(("n", "k"), [(256, 7168), (72, 136)])
def test_the_dense_weight_gradient_has_one_group(hopper, tokens, n, k):
    dy, x, offsets = operands("normal", hopper, [tokens], n, k, rest=0)
    total, grouped = (torch.ones(shape, device=hopper) for shape in ((n, k), (1, n, k)))
    wgrad(dy, x, total)
    grouped_mm_wgrad(dy, x, offsets, grouped)
    assert torch.equal(total, grouped[0])
    check(dy, x, offsets, grouped, torch.ones_like(grouped).double())


@pytest.fixture
def launched(monkeypatch):
    """What was launched: "tokens" with the grid, the arguments and the constants, "triton" with the op."""
    found = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: found.append(("tokens", grid, args, constants))

    monkeypatch.setattr(launch_tokens, "tokens_kernel", Kernel())
    by_triton = SimpleNamespace(
        grouped_mm_wgrad=lambda *args: found.append(("triton", "grouped_mm_wgrad")),
        wgrad=lambda *args: found.append(("triton", "wgrad")),
    )
    monkeypatch.setattr(grouped_mm, "grouped_mm", by_triton)
    monkeypatch.setattr(gemm, "triton_gemm", by_triton)
    return found


def test_fp32_operands_and_columns_that_lie_apart_are_tritons(launched):
    dy, x, at = torch.ones(5, 16), torch.ones(5, 32), offsets_of([2, 3], "cpu")
    total, apart = torch.zeros(2, 16, 32), torch.zeros(2, 32, 16).mT
    half = (dy.bfloat16(), x.bfloat16())
    for left, right, out in ((dy, x, total), (half[0], x, total), (dy, half[1], total), (*half, apart)):
        grouped_mm.grouped_mm_wgrad(left, right, at, out)
        gemm.wgrad(left, right, out[0])
    assert launched == [("triton", "grouped_mm_wgrad"), ("triton", "wgrad")] * 4
    launched.clear()
    grouped_mm.grouped_mm_wgrad(*half, at, total)
    gemm.wgrad(*half, total[0])
    assert [one[0] for one in launched] == ["tokens"] * 2
    assert [one[3]["GROUPED"] for one in launched] == [True, False]


def test_without_rows_or_groups_nothing_is_launched(launched):
    dy, x = torch.ones(5, 16).bfloat16(), torch.ones(5, 32).bfloat16()
    none = offsets_of([0, 0], "cpu")
    grouped_mm.grouped_mm_wgrad(dy[:0], x[:0], none, torch.zeros(2, 16, 32))
    grouped_mm.grouped_mm_wgrad(dy, x, none[:1], torch.zeros(0, 16, 32))
    gemm.wgrad(dy[:0], x[:0], torch.zeros(16, 32))
    gemm.wgrad(dy[:, :0], x, torch.zeros(0, 32))
    assert launched == []


@pytest.mark.parametrize(
    ("experts", "n", "k", "expected"),
    [
        (2, 128, 64, ADD_FETCHED),
        (2, 96, 64, ADD),  # a wave of 64 rows would reach into the next expert
        (1, 96, 64, ADD_FETCHED),
        (2, 128, 66, ADD),
    ],
)
def test_how_sums_are_added(experts, n, k, expected):
    for tile in TILES:
        assert tokens_epilogue(*layout_of(torch.empty(experts, n, k)), tile) == expected.value
    deep = Tile(128, 256, 4, 8, 4)
    assert launch_tokens.tokens_epilogue(*layout_of(torch.empty(2, 128, 64)), deep) == ADD.value, (
        "its ring leaves no room"
    )
    spread, late = torch.empty(2, 128, 128)[:, :, :64], torch.empty(2 * 128 * 64 + 1)[1:].view(2, 128, 64)
    for lies in (spread, late):
        assert tokens_epilogue(*layout_of(lies), TILES[0]) == ADD.value


def test_a_launch_takes_a_program_an_sm_and_operands_where_they_lie(launched):
    dy, x, at = (
        torch.ones(300, 256).bfloat16(),
        torch.ones(300, 600).bfloat16()[:, 8:520],
        offsets_of([100, 200], "cpu"),
    )
    total = torch.zeros(2, 256, 512)
    odd, apart = torch.ones(300, 516).bfloat16()[:, 3:515], x.t().contiguous().t()
    for right in (x, odd, apart):
        with chosen(TILES[0]), limited_sms(5):
            grouped_mm.grouped_mm_wgrad(dy, right, at, total)
        (_, grid, args, constants) = launched.pop()
        assert grid == (5,) and constants["EPILOGUE"] == ADD_FETCHED.value
        assert args[0].base is dy and (args[1].base is right) == (right is x)
        assert torch.equal(args[1].base, right) and args[1].base.stride(0) % 8 == 0
        assert args[2].base is total and args[2].shape == [512, 512]
    with chosen(TILES[0]):
        grouped_mm.grouped_mm_wgrad(dy, x, at, total)
    assert launched.pop()[1] == (8,), "2 experts of 2 x 2 tiles"
    assert launch.num_sms(torch.device("cpu")) == 132
