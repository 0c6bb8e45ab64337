"""The Hopper kernels on a Hopper GPU: values against FP64 and against Triton, ragged groups, and bit-equal repetition.

Gluon has no interpreter: without a GPU only the compile gate (`test_sm90`) and the launchers' refusals are tested.
"""

import threading
from dataclasses import replace

import pytest
import torch

from fp8moe.kernels import backend, tiles
from fp8moe.kernels.fp8 import E4M3, Fp8Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of, product_bound

SIZES = [(256, 256, 512), (4096, 2112, 7168), (4096, 7168, 2112), (4096, 576, 512), (130, 1536, 16), (1, 272, 4096)]
GROUPS = [[128, 0, 384, 1024], [0, 0, 0], [4096, 2048, 8192, 0, 128], [128] * 16]
REPEATS = 20


def exact(a: Fp8Tensor, b: Fp8Tensor) -> torch.Tensor:
    return a.dequantize().double() @ b.dequantize().double().mT


@pytest.mark.gpu
def test_a_thread_may_begin_with_a_product(hopper):
    a = quantize_rows(data("normal", 256, 512, device=hopper))
    b = quantize_blocks(data("normal", 128, 512, device=hopper))[0]
    here, there = torch.zeros(2, 256, 128, device=hopper)
    gemm(a, b, accumulate=here)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: gemm(a, b, accumulate=there))
    thread.start()
    thread.join(timeout=60)
    torch.cuda.synchronize()
    assert here.any() and torch.equal(here, there)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_rows_by_blocks(hopper, m, n, k, kind):
    a = quantize_rows(data(kind, m, k, device=hopper))
    b = quantize_blocks(data("normal", n, k, device=hopper))[0]
    expected = exact(a, b)
    scale = a.dequantize(), b.dequantize()
    for dtype in (torch.bfloat16, torch.float32):
        assert calc_diff(gemm(a, b, out_dtype=dtype), expected, *scale) <= product_bound(dtype, kind, hopper)
    total = torch.randn(m, n, device=hopper)
    expected += total
    assert gemm(a, b, accumulate=total) is total
    assert calc_diff(total, expected, *scale) <= product_bound(torch.float32, kind, hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "t"), [(2112, 7168, 4096), (576, 512, 1040), (256, 16, 128), (7168, 2048, 16384)])
def test_columns_by_columns(hopper, n, k, t, kind):
    a, b = (quantize_columns(data(kind, t, size, device=hopper)) for size in (n, k))
    expected = exact(a, b)
    scale = a.dequantize(), b.dequantize()
    bound = product_bound(torch.float32, kind, hopper)
    assert calc_diff(gemm(a, b, out_dtype=torch.float32), expected, *scale) <= bound
    total = torch.zeros(n, k, device=hopper)
    assert calc_diff(gemm(a, b, accumulate=total), expected, *scale) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (7168, 2048), (576, 272)])
def test_grouped(hopper, sizes, n, k):
    offsets, rest = offsets_of(sizes, hopper), 200  # rows that belong to nobody
    r = int(offsets[-1]) + rest
    x, dy = data("normal", r, k, device=hopper), data("normal", r - rest, n, device=hopper)
    a, b = quantize_rows(x), quantize_blocks(data("normal", len(sizes), n, k, device=hopper))[0]
    y = grouped_gemm(a, b, offsets)
    assert not y[r - rest :].any()
    before = torch.randn(len(sizes), n, k, device=hopper)
    total = before.clone()
    if r > rest:
        grouped_wgrad(quantize_columns(dy), quantize_columns(x[: r - rest].contiguous()), offsets, total)
    for e, size in enumerate(sizes):
        rows = slice(int(offsets[e]), int(offsets[e]) + size)
        if size == 0:
            assert torch.equal(total[e], before[e])
            continue
        own = quantize_rows(x[rows])
        weight = Fp8Tensor(b.data[e], b.scale[e], b.tile)
        assert calc_diff(y[rows], exact(own, weight), own.dequantize(), weight.dequantize()) <= 5e-6
        left, right = quantize_columns(dy[rows].contiguous()), quantize_columns(x[rows].contiguous())
        change = total[e].double() - before[e].double()
        assert calc_diff(change, exact(left, right), left.dequantize(), right.dequantize()) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("sms", [None, 112, 1])
def test_repetition_and_the_number_of_sms_change_no_bit(hopper, sms):
    from fp8moe.kernels.backend import limit_sms

    m, n, k = (512, 512, 1024) if sms == 1 else (4096, 7168, 2048)
    a, b = quantize_rows(torch.randn(m, k, device=hopper)), quantize_blocks(torch.randn(n, k, device=hopper))[0]
    left, right = quantize_columns(torch.randn(m, n, device=hopper)), quantize_columns(torch.randn(m, k, device=hopper))
    first = gemm(a, b), gemm(left, right, out_dtype=torch.float32)
    limit_sms(sms)
    try:
        for _ in range(REPEATS):
            assert torch.equal(gemm(a, b), first[0])
            assert torch.equal(gemm(left, right, out_dtype=torch.float32), first[1])
    finally:
        limit_sms(None)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [128, 1024, 2048])
def test_short_groups_repeat_themselves(hopper, tokens):
    # Many tiles of few steps: slots are refilled while the other consumer's epilogue keeps shared memory busy.
    num_groups, n, k = 16, 4096, 7168
    offsets = offsets_of([tokens] * num_groups, hopper)
    dy, x = (quantize_columns(data("normal", num_groups * tokens, size, device=hopper)) for size in (n, k))
    first, total = (torch.zeros(num_groups, n, k, device=hopper) for _ in range(2))
    grouped_wgrad(dy, x, offsets, first)
    for _ in range(REPEATS):
        grouped_wgrad(dy, x, offsets, total.zero_())
        assert torch.equal(total, first)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 7168, 2048), (256, 576, 512), (130, 272, 4096)])
def test_pairs_change_no_bit(hopper, monkeypatch, m, n, k, sizes):
    from fp8moe.kernels.gluon import launch

    if backend.release_of(launch.triton.__version__) < launch.OLDEST_MULTICAST:
        pytest.skip("this Triton has no arrival at another CTA's barrier")
    offsets = offsets_of(sizes, hopper)
    r = max(128, int(offsets[-1]))
    a, b = quantize_rows(data("normal", m, k, device=hopper)), quantize_blocks(data("normal", n, k, device=hopper))[0]
    x, w = quantize_rows(data("normal", r, k, device=hopper)), data("normal", len(sizes), n, k, device=hopper)
    experts, dy = quantize_blocks(w)[0], quantize_columns(data("normal", r, n, device=hopper))
    columns = quantize_columns(data("normal", r, k, device=hopper))

    def run():
        total = torch.ones(len(sizes), n, k, device=hopper)
        grouped_wgrad(dy, columns, offsets, total)
        return gemm(a, b), gemm(dy, columns, out_dtype=torch.float32), grouped_gemm(x, experts, offsets), total

    choose = tiles.choose

    def with_pairs(on):
        monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: replace(choose(*args, **kwargs), multicast=on))

    with_pairs(False)
    alone = run()
    with_pairs(True)
    for _ in range(REPEATS):
        assert all(torch.equal(one, other) for one, other in zip(alone, run(), strict=True))


@pytest.mark.parametrize(
    ("version", "variable", "allowed"),
    [("3.8.0", None, False), ("3.8.0", "1", True), ("3.8.0", "0", False), ("3.7.1", "1", False), ("3.6.0", "1", False)],
)
def test_pairs_are_chosen_from_triton_3_8_on_where_they_are_asked_for(request, monkeypatch, version, variable, allowed):
    pytest.importorskip("triton")
    from fp8moe.kernels.gluon import launch

    monkeypatch.setattr(launch.triton, "__version__", version)
    monkeypatch.delenv(launch.PAIRS_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(launch.PAIRS_VARIABLE, variable)
    launch.pairs_allowed.cache_clear()
    request.addfinalizer(launch.pairs_allowed.cache_clear)
    cpu = torch.device("cpu")
    for op, groups in (("gemm", 1), ("grouped_gemm", 8)):
        assert launch.choose_tile(op, 4096, 7168, 4096, cpu, groups).multicast == allowed, op
    for op, groups in (("gemm_columns", 1), ("grouped_wgrad", 8)):  # whose sums TMA adds for one CTA alone
        assert not launch.choose_tile(op, 4096, 7168, 4096, cpu, groups).multicast, op
    with backend.limited_sms(1):
        assert not launch.choose_tile("gemm", 4096, 7168, 4096, cpu).multicast, "a pair takes two SMs"


@pytest.mark.parametrize("m", [1, 2, 130, 200])
@pytest.mark.parametrize("tiles_of_k", [1, 3])
def test_scales_of_rows_lie_where_tma_may_begin(m, tiles_of_k):
    pytest.importorskip("triton")
    from fp8moe.kernels.gluon import launch

    values = torch.arange(1.0, m * tiles_of_k + 1).view(m, tiles_of_k)
    m_major, later = values.t().contiguous().t(), torch.empty(m * tiles_of_k + 1)[1:].view(tiles_of_k, m).t()
    for scale in (values, m_major, later.copy_(values)):
        found = launch._m_major(scale)
        assert torch.equal(found, values) and found.data_ptr() % 16 == 0
        assert m == 1 or found.stride(0) == 1
        assert tiles_of_k == 1 or found.stride(1) % 4 == 0
    if m % 4 == 0:
        assert launch._m_major(m_major) is m_major, "what lies well is used in place"


def test_batches_of_about_one_size_take_one_tile():
    pytest.importorskip("triton")
    from fp8moe.kernels.gluon.launch import typical_rows

    assert [typical_rows(rows, 8) for rows in (8, 8 * 1000, 8 * 1024, 8 * 1024 + 1)] == [1, 1024, 1024, 2048]


def test_pairs_on_a_triton_that_cannot_are_refused(monkeypatch):
    pytest.importorskip("triton")
    from fp8moe.kernels.gluon import launch

    monkeypatch.setattr(launch.triton, "__version__", "3.7.1")
    with pytest.raises(ValueError, match=r"multicast needs Triton 3\.8 or newer, this is 3\.7\.1: take a tile without"):
        launch.launch_rows(
            Fp8Tensor(torch.empty(128, 128, dtype=E4M3), torch.empty(128, 1)),
            Fp8Tensor(torch.empty(128, 128, dtype=E4M3), torch.empty(1, 1), (128, 128)),
            torch.empty(128, 128),
            tile=tiles.Tile(128, 128, 4, 8, 4, multicast=True),
            sms=132,
        )


def test_a_limit_of_no_sms_is_refused():
    pytest.importorskip("triton")
    from fp8moe.kernels.backend import limit_sms, limited_sms
    from fp8moe.kernels.gluon.launch import num_sms

    with pytest.raises(ValueError, match=r"limit_sms must be at least 1, got 0"):
        limit_sms(0)
    with limited_sms(112):
        assert num_sms(torch.device("cpu")) == 112
        with limited_sms(None):
            assert num_sms(torch.device("cpu")) == 112, "no limit asked for leaves the one there is"
        with limited_sms(200):
            assert num_sms(torch.device("cpu")) == 132
        assert num_sms(torch.device("cpu")) == 112
    assert num_sms(torch.device("cpu")) == 132


@pytest.mark.parametrize(
    ("sms", "multicast", "rows", "columns"),
    [(132, False, 12, 24), (5, False, 5, 5), (5, True, 2, 2), (1, True, 1, 1), (132, True, 6, 12)],
)
def test_a_launch_takes_a_program_an_sm_and_no_more_than_it_has_tiles(monkeypatch, sms, multicast, rows, columns):
    """Rows: 304 x 512 in tiles of 128 x 128; columns: 2 experts of the same. A pair takes two SMs and two tiles."""
    pytest.importorskip("triton")
    from fp8moe.kernels.gluon import launch

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append(grid)

    grids = []
    monkeypatch.setattr(launch.triton, "__version__", "3.8.0")
    monkeypatch.setattr(launch, "rows_kernel", Kernel())
    monkeypatch.setattr(launch, "columns_kernel", Kernel())
    m, n, k, tile = 304, 512, 256, tiles.Tile(128, 128, 4, 8, 4, multicast=multicast)
    a, b = quantize_rows(torch.ones(m, k)), quantize_blocks(torch.ones(n, k))[0]
    launch.launch_rows(a, b, torch.empty(m, n, dtype=torch.bfloat16), tile=tile, sms=sms)
    dy, x = (quantize_columns(torch.ones(k, size)) for size in (m, n))
    launch.launch_columns(dy, x, torch.empty(2, m, n), tile=tile, sms=sms, group_offsets=torch.tensor([0, 128, 256]))
    assert grids == [(rows,), (columns,)]


# Last: one that does not end takes the rest of the file with it.
@pytest.mark.gpu
@pytest.mark.parametrize("consumers", ["turns", "pingpong"])
@pytest.mark.parametrize(("m", "n", "k", "sizes"), [(512, 512, 1024, GROUPS[0]), (4096, 7168, 2048, GROUPS[2])])
def test_an_order_of_the_consumers_changes_no_bit(hopper, monkeypatch, m, n, k, sizes, consumers):
    offsets = offsets_of(sizes, hopper)
    r = int(offsets[-1])
    a, b = quantize_rows(data("normal", m, k, device=hopper)), quantize_blocks(data("normal", n, k, device=hopper))[0]
    x, experts = quantize_rows(data("normal", r, k, device=hopper)), data("normal", len(sizes), n, k, device=hopper)
    experts, dy = quantize_blocks(experts)[0], quantize_columns(data("normal", r, n, device=hopper))
    columns = quantize_columns(data("normal", r, k, device=hopper))

    def run(order):
        tile = tiles.Tile(128, 128, 6, 8, 4, consumers=order)
        monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: tile)
        total = torch.ones(len(sizes), n, k, device=hopper)
        grouped_wgrad(dy, columns, offsets, total)
        return gemm(a, b), gemm(dy, columns, out_dtype=torch.float32), grouped_gemm(x, experts, offsets), total

    free = run("free")
    for _ in range(REPEATS):
        assert all(torch.equal(one, other) for one, other in zip(free, run(consumers), strict=True))
