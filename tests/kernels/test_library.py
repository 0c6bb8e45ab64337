"""The registered ops: what tracing sees has the shapes, strides and dtypes of what runs, and computes the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8moe.kernels import backend, library
from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import (
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)


@pytest.fixture(params=["reference", "triton"])
def layout(request):
    torch.manual_seed(0)
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend(None)


def parts(*values):
    """The plain tensors inside."""
    return [
        t
        for v in values
        for t in (
            (v,)
            if isinstance(v, torch.Tensor)
            else (v.source_R, v.slot_R, v.group_offsets, v.tokens_per_expert)
            if isinstance(v, RowMap)
            else (v.data, v.scale)
        )
    ]


def every_cast(x, w):
    rows = quantize_rows(x)
    packed = pack_e5m6(x[0])
    return parts(
        rows,
        quantize_columns(x[0], power_of_two=True),
        *quantize_rows_and_columns(x[1], amax_floor=1e-30),
        *quantize_blocks(w),
        requantize_columns(quantize_rows(x[0])),
        packed,
        unpack_e5m6(packed),
        e5m6_to_columns(packed),
    )


def every_product(x, dy, w, offsets, total, totals):
    """One step of an expert Linear; adds into total and totals."""
    rows, (blocks, transposed) = quantize_rows(x), quantize_blocks(w)
    dy_rows, dy_columns = quantize_rows_and_columns(dy, amax_floor=1e-30)
    x_columns = requantize_columns(rows)
    first, back = quantize_blocks(w[0])
    y, dx = grouped_gemm(rows, blocks, offsets), grouped_gemm(dy_rows, transposed, offsets, out_dtype=torch.float32)
    grouped_wgrad(dy_columns, x_columns, offsets, totals)
    gemm(dy_columns, x_columns, accumulate=total)
    wgrad(dy, x, total)
    grouped_mm_wgrad(dy, x, offsets, totals)
    return y, dx, gemm(rows, first), gemm(dy_rows, back, out_dtype=torch.float32), grouped_mm(x, w, offsets)


def every_way(x, ids):
    """Rows to experts and back."""
    row_map = plan_rows(ids, 3, room=512)
    copies = permute(x, row_map)
    rows = permute(quantize_rows(x), row_map)
    return parts(row_map, copies, rows, permute_quantize(x, row_map, power_of_two=True), unpermute(copies, row_map))


def ways_arguments():
    return torch.randn(40, 144).bfloat16(), torch.tensor([[0, 2], [2, -1]]).repeat(20, 1)


def casts_arguments():
    return torch.randn(2, 48, 144).bfloat16(), torch.randn(3, 32, 144).bfloat16()


def products_arguments():
    x, dy, w = torch.randn(256, 48).bfloat16(), torch.randn(256, 32).bfloat16(), torch.randn(2, 32, 48).bfloat16()
    return x, dy, w, torch.tensor([0, 128, 256], dtype=torch.int32), torch.zeros(32, 48), torch.zeros(2, 32, 48)


CASES = [(every_cast, casts_arguments), (every_product, products_arguments), (every_way, ways_arguments)]


def look(tensors):
    return [(t.dtype, tuple(t.shape), t.stride()) for t in tensors]


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_tensors_without_data_get_the_shapes_and_strides_of_the_real_ones(layout, function, arguments):
    args = arguments()
    real = look(function(*args))
    assert look(function(*(a.to("meta") for a in args))) == real
    with FakeTensorMode() as mode:
        assert look(function(*(mode.from_tensor(a) for a in args))) == real


@pytest.mark.filterwarnings("error:.*may not alias")
@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_compiled_whole_it_computes_the_same(layout, function, arguments):
    torch.manual_seed(1)
    eager_args = arguments()
    compiled_args = [a.clone() for a in eager_args]
    eager = function(*eager_args)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled_args)
    assert look(compiled) == look(eager)
    for ours, theirs in zip((*compiled, *compiled_args), (*eager, *eager_args), strict=True):
        assert torch.equal(
            ours.contiguous().flatten().view(torch.uint8), theirs.contiguous().flatten().view(torch.uint8)
        )


def test_every_cast_and_product_is_registered():
    registered = {name for name in backend.OPS if name in library.DECLARATIONS}
    modules = {"quantize", "e5m6", "gemm", "grouped_gemm", "grouped_mm", "permute"}
    assert registered == {name for name, module in backend._MODULE_OF.items() if module in modules}
    for name in registered:
        assert hasattr(torch.ops.fp8moe, name)


def test_what_an_op_changes_is_declared():
    mutated = {
        name
        for name in library.DECLARATIONS
        if any(a.alias_info is not None for a in getattr(torch.ops.fp8moe, name).default._schema.arguments)
    }
    assert mutated == {"gemm_add", "wgrad", "grouped_wgrad", "grouped_mm_wgrad"}
