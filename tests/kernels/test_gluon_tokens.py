"""The Hopper kernel of BF16 weight gradients: on a Hopper GPU values against FP64, ragged groups and equal bits.

Without a GPU what its launcher decides: who runs it, how sums are added, what is copied. Its machine code runs in
`tests/ptx` (`token_cases`).
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fp8moe.kernels import tiles
from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.gemm import wgrad
from fp8moe.kernels.grouped_mm import grouped_mm_wgrad
from fp8moe.kernels.tiles import LENGTHS, Tile, production_tiles
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of

pytest.importorskip("triton")

from fp8moe.kernels.gluon import gemm, grouped_mm, launch, launch_tokens
from fp8moe.kernels.gluon.epilogues import ADD, ADD_FETCHED, ADD_TMA
from tests.kernels.sm90_cases import SUMS, chosen, summed

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
@pytest.mark.parametrize("added", SUMS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_n}x{tile.stages} of {tile.tokens}")
def test_every_way_to_add_gives_the_same_bits_every_time(hopper, tile, added):
    dy, x, offsets = operands("normal", hopper, [1024, 1000, 0, 1111, 1], 1024, 1536)
    before, totals = torch.randn(5, 1024, 1536, device=hopper), []
    for sums in ("add", *[added] * REPEATS):
        if sums == "add_fetched" and not launch_tokens.fetched_waves(tile):
            pytest.skip("no room beside the ring")
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
    note = lambda kernel, grid, *args, **constants: found.append(("tokens", grid, args, constants))  # noqa: E731
    monkeypatch.setattr(launch_tokens, "launch", note)
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
    ("experts", "n", "k", "tokens", "expected"),
    [
        (2, 128, 64, 1024, ADD_FETCHED),
        (2, 128, 64, 2048, ADD_FETCHED),
        (2, 128, 64, 2049, ADD_TMA),
        (2, 96, 64, 1024, ADD),  # a wave of 64 rows would reach into the next expert
        (1, 96, 64, 1024, ADD_FETCHED),
        (2, 128, 66, 1024, ADD),
    ],
)
def test_how_sums_are_added(experts, n, k, tokens, expected):
    for length in LENGTHS:
        tile = Tile(**tiles.read_table()["default"]["gluon"]["grouped_mm_wgrad"][length][0])
        found = launch_tokens._epilogue(torch.empty(experts, n, k), tokens, tile)
        no_room = expected is ADD_FETCHED and length == "long"
        assert found == (ADD if no_room else expected).value
    spread, late = torch.empty(2, 128, 128)[:, :, :64], torch.empty(2 * 128 * 64 + 1)[1:].view(2, 128, 64)
    for lies in (spread, late):
        assert launch_tokens._epilogue(lies, 1024, TILES[0]) == ADD.value


def test_shared_memory_holds_what_both_waves_are_added_to_beside_a_ring_of_short_steps():
    assert launch_tokens.fetched_waves(Tile(128, 256, 4, 8, 4, tokens=32)) == 2
    assert launch_tokens.fetched_waves(Tile(128, 256, 3, 8, 4)) == 1
    assert launch_tokens.fetched_waves(Tile(128, 256, 4, 8, 4)) == 0
    assert launch_tokens.fetched_waves(Tile(128, 128, 4, 8, 4)) == 1, "a tile of one wave a consumer"


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
