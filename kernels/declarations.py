"""What PyTorch is told of each op: its arguments, what it changes, its results and how to allocate them.

`library` registers every op by its row of DECLARATIONS. A fake allocates the results of one call and computes nothing;
it must tell the strides of the real results, and those are the back end's: where scales and columns lie is asked of the
layout in force on the tensor's device (`set_layout`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E5M6_VALUES, E5M6_WORDS, TILE, E5m6Tensor, Fp8Tensor, Rows, ceil_div
from fp8moe.kernels.reference import _arithmetic as specified
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.triton import layout

PARTS = {
    "Tensor": ("Tensor {}",),
    "Maybe": ("Tensor? {}",),
    "Total": ("Tensor({0}!) {0}",),  # mutated in place
    "MaybeTotal": ("Tensor({0}!)? {0}",),  # likewise, where it is not None
    "Fp8": ("Tensor {}_data", "Tensor {}_scale", "int[] {}_tile"),
    "Fp8Total": ("Tensor({0}_data!) {0}_data", "Tensor({0}_scale!) {0}_scale", "int[] {0}_tile"),
    "E5m6": ("Tensor {}_data", "Tensor {}_scale"),
    "Map": (
        *("Tensor {}_source", "Tensor {}_slot", "Tensor {}_offsets", "Tensor {}_tokens", "Tensor {}_rows"),
        *("SymInt {}_num_rows", "SymInt {}_topk"),
    ),
    "Segments": ("int[] {}_spans", "Tensor {}_parts"),
    "int": ("int {}",),
}
_ADAMW = "float lr, float beta1, float beta2, float eps, float weight_decay, int step, Tensor? grad_scale"
_STATE = ("Total master", "Tensor grad", "Total exp_avg", "Total exp_avg_sq")
_CAST = "float amax_floor, bool power_of_two"
_LIMIT = "float? limit"
_ROUTING = "str score, bool normalize, float route_scale"
_ANGLES = ("Tensor cos", "Tensor sin")

Fake = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Declaration:
    """An op: its arguments as "Kind name", its keyword arguments as a schema, its results, and how to allocate them.

    results: "rows", "blocks", "e5m6" or "tensor" each; "maybe" stands last, a tensor that only some arguments give.
    """

    arguments: tuple[str, ...]
    keywords: str
    results: tuple[str, ...]
    fake: Fake

    @property
    def kinds(self) -> list[str]:
        """The kind of each positional argument."""
        return [argument.split()[0] for argument in self.arguments]

    @property
    def schema(self) -> str:
        """Arguments and result in PyTorch's schema language."""
        parts = [part.format(name) for kind, name in map(str.split, self.arguments) for part in PARTS[kind]]
        parts += ["*", self.keywords] if self.keywords else []
        results = f"({', '.join(['Tensor'] * len(self.results))})" if self.mutates else "Tensor[]"
        return f"({', '.join(parts)}) -> {results if self.results else '()'}"

    @property
    def mutates(self) -> bool:
        """Whether it changes an argument: torch.compile then takes single tensors for results, and no list of them."""
        return any(kind in ("Total", "MaybeTotal", "Fp8Total") for kind in self.kinds)

    def returned(self, tensors: list[Tensor]) -> Any:
        """The results as the operator must return them."""
        if not self.results:
            return None
        if not self.mutates:
            return tensors
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


@dataclass
class _Layout:
    """Whose layout casts have on a device: True for the specification's."""

    by_specification: Callable[[torch.device], bool]


_layout = _Layout(lambda device: True)


def set_layout(by_specification: Callable[[torch.device], bool]) -> None:
    """Say on which devices casts lie as the specification has them."""
    _layout.by_specification = by_specification


def _rows(x: Tensor, **kwargs: Any) -> list[Tensor]:
    k = x.shape[-1]
    m = x.shape[:-1].numel()
    q = (
        specified.empty_rows(m, k, x.device)
        if _layout.by_specification(x.device)
        else layout.empty_rows(m, k, x.device)
    )
    return [q.data.view(x.shape), q.scale.reshape(*x.shape[:-1], ceil_div(k, TILE))]


def _columns(x: Tensor | Fp8Tensor | E5m6Tensor, **kwargs: Any) -> list[Tensor]:
    m, k = x.shape
    empty = specified.empty_columns if _layout.by_specification(x.device) else layout.empty_columns
    columns = empty(m, k, x.device)
    return [columns.data, columns.scale]


def _blocks(w: Tensor, **kwargs: Any) -> list[Tensor]:
    shapes = (tuple(w.shape), (*w.shape[:-2], w.shape[-1], w.shape[-2]))
    return [part for shape in shapes for q in [layout.empty_blocks(shape, w.device)] for part in (q.data, q.scale)]


def _packed(x: Tensor, **kwargs: Any) -> list[Tensor]:
    words = x.new_empty(*x.shape[:-1], x.shape[-1] // E5M6_VALUES * E5M6_WORDS, dtype=torch.int32)
    return [words, _rows(x)[1]]


def _product(a: Any, b: Any, *rest: Any, out_dtype: torch.dtype | None = None) -> list[Tensor]:
    first = a.data if isinstance(a, Fp8Tensor) else a
    return [torch.empty(a.shape[0], b.shape[-2], dtype=out_dtype or first.dtype, device=a.device)]


def _unpacked(packed: E5m6Tensor, *, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(packed.shape, dtype=dtype, device=packed.device)]


def _planned(topk_ids: Tensor, num_experts: int, *, align: int, room: int) -> list[Tensor]:
    long, int_ = torch.int64, torch.int32
    sizes = (room, long), (room, long), (num_experts + 1, int_), (num_experts, long), (topk_ids.numel(), int_)
    return [topk_ids.new_empty(size, dtype=dtype) for size, dtype in sizes]


def _moved(x: Tensor, row_map: RowMap, **kwargs: Any) -> list[Tensor]:
    return [torch.empty(len(row_map.source_R), *x.shape[1:], dtype=x.dtype, device=x.device)]


def _cast_copies(x: Rows, row_map: RowMap, **kwargs: Any) -> list[Tensor]:
    return _rows(torch.empty(len(row_map.source_R), x.shape[1], device=x.device))


def _summed(y_R: Tensor, row_map: RowMap) -> list[Tensor]:
    return [torch.empty(row_map.num_rows, y_R.shape[1], dtype=y_R.dtype, device=y_R.device)]


def _activated(gate_up: Tensor, *rest: Any, **kwargs: Any) -> list[Tensor]:
    return _rows(gate_up[:, : gate_up.shape[1] // 2]) + _rows(gate_up)


def _activated_columns(cached: Fp8Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    r, both = cached.shape
    return _columns(torch.empty(r, both // 2, device=cached.device))


def _activation_gradients(dy: Tensor, cached: Fp8Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    grads = _rows(torch.empty(cached.shape, device=cached.device)) + _columns(cached)
    return grads if weights is None else [*grads, weights.new_empty(weights.shape)]


def _silu_mul(gate_up: Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    return [gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)]


def _silu_mul_gradients(dy: Tensor, gate_up: Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    grads = [gate_up.new_empty(gate_up.shape)]
    return grads if weights is None else [*grads, weights.new_empty(weights.shape)]


def _routed(logits_TE: Tensor, *rest: Any, topk: int, num_sequences: int, **kwargs: Any) -> list[Tensor]:
    t, e = logits_TE.shape
    ids = logits_TE.new_empty(t, topk, dtype=torch.int64)
    return [ids, *(logits_TE.new_empty(size) for size in ((t, topk), (), (num_sequences, e)))]


def _d_logits(logits_TE: Tensor, *rest: Any, **kwargs: Any) -> list[Tensor]:
    return [logits_TE.new_empty(logits_TE.shape)]


def _normed(
    x: Tensor, weight: Tensor, delta: Tensor | None, *, eps: float, tensor: bool, rows: bool, power_of_two: bool
) -> list[Tensor]:
    t, d = x.shape
    h, y, source = (x.new_empty(t if asked else 0, d) for asked in (delta is not None, tensor, rows))
    return [h, y, *_rows(source), torch.empty(t, dtype=torch.float32, device=x.device)]


def _contiguous(x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


def _nothing(*args: Any, **kwargs: Any) -> list[Tensor]:
    return []


def _sum(x: Tensor) -> list[Tensor]:
    return [torch.empty((), dtype=torch.float64, device=x.device)]


DECLARATIONS = {
    "quantize_rows": Declaration(("Tensor x",), _CAST, ("rows",), _rows),
    "quantize_columns": Declaration(("Tensor x",), _CAST, ("rows",), _columns),
    "quantize_rows_and_columns": Declaration(
        ("Tensor x",), _CAST, ("rows", "rows"), lambda x, **kwargs: _rows(x) + _columns(x)
    ),
    "quantize_blocks": Declaration(("Tensor w",), _CAST, ("blocks", "blocks"), _blocks),
    "requantize_columns": Declaration(("Fp8 rows",), "float amax_floor", ("rows",), _columns),
    "pack_e5m6": Declaration(("Tensor x",), "float amax_floor", ("e5m6",), _packed),
    "unpack_e5m6": Declaration(("E5m6 packed",), "ScalarType dtype", ("tensor",), _unpacked),
    "e5m6_to_columns": Declaration(("E5m6 packed",), "float amax_floor", ("rows",), _columns),
    "rms_norm": Declaration(
        ("Tensor x", "Tensor weight", "Maybe delta"),
        "float eps, bool tensor, bool rows, bool power_of_two",
        ("tensor", "tensor", "rows", "tensor"),
        _normed,
    ),
    "rms_norm_columns": Declaration(
        ("Tensor x", "Tensor weight", "Tensor inverse_rms"),
        "bool power_of_two",
        ("rows",),
        lambda x, *_, **__: _columns(x),
    ),
    "rms_norm_backward": Declaration(
        ("Tensor dy", "Tensor x", "Tensor weight", "Tensor inverse_rms", "Total main_grad", "Maybe residual"),
        "",
        ("tensor",),
        _contiguous,
    ),
    "rope_queries": Declaration(("Tensor q", *_ANGLES), "", ("tensor",), _contiguous),
    "rope_queries_backward": Declaration(("Tensor dq", *_ANGLES), "", ("tensor",), _contiguous),
    "rope_keys": Declaration(("Tensor kv", "Tensor k_rope", *_ANGLES), "int nope_dim", ("tensor",), layout.empty_keys),
    "rope_keys_backward": Declaration(
        ("Tensor dk", "Tensor dv", *_ANGLES), "", ("tensor", "tensor"), layout.empty_keys_gradient
    ),
    "plan_rows": Declaration(
        ("Tensor topk_ids", "int num_experts"), "int align, SymInt room", ("tensor",) * 5, _planned
    ),
    "permute": Declaration(("Tensor x", "Map row_map"), "", ("tensor",), _moved),
    "permute_fp8": Declaration(("Fp8 x", "Map row_map"), "", ("rows",), _cast_copies),
    "permute_quantize": Declaration(("Tensor x", "Map row_map"), _CAST, ("rows",), _cast_copies),
    "unpermute": Declaration(("Tensor y_R", "Map row_map"), "", ("tensor",), _summed),
    "swiglu": Declaration(
        ("Tensor gate_up", "Maybe weights", "Maybe bias", "Maybe group_offsets"),
        f"{_LIMIT}, bool power_of_two",
        ("rows", "rows"),
        _activated,
    ),
    "swiglu_columns": Declaration(("Fp8 cached", "Maybe weights"), _LIMIT, ("rows",), _activated_columns),
    "swiglu_backward": Declaration(
        ("Tensor dy", "Fp8 cached", "Maybe weights"),
        f"{_LIMIT}, bool power_of_two",
        ("rows", "rows", "maybe"),
        _activation_gradients,
    ),
    "silu_mul": Declaration(("Tensor gate_up", "Maybe weights"), _LIMIT, ("tensor",), _silu_mul),
    "silu_mul_backward": Declaration(
        ("Tensor dy", "Tensor gate_up", "Maybe weights"), _LIMIT, ("tensor", "maybe"), _silu_mul_gradients
    ),
    "add_expert_bias": Declaration(
        ("Total y", "Tensor bias", "Tensor group_offsets", "Maybe weights"), "", (), _nothing
    ),
    **{
        f"expert_bias_dgrad{suffix}": Declaration(
            (f"{kind} dy", "Tensor bias", "Tensor group_offsets", "Total d_weights"), "", (), _nothing
        )
        for kind, suffix in (("Tensor", ""), ("Fp8", "_fp8"))
    },
    **{
        f"expert_bias_wgrad{suffix}": Declaration(
            (f"{kind} dy", "Tensor group_offsets", "Total main_grad", "Maybe weights"), "", (), _nothing
        )
        for kind, suffix in (("Tensor", ""), ("Fp8", "_fp8"))
    },
    "route": Declaration(
        ("Tensor logits", "Tensor bias", "MaybeTotal counts"),
        f"int topk, int num_groups, int top_groups, str group_score, {_ROUTING}, int num_sequences, bool force_balance",
        ("tensor",) * 4,
        _routed,
    ),
    "route_backward": Declaration(
        ("Tensor logits", "Tensor topk_ids", "Tensor f", "Tensor d_weights", "Tensor d_loss"),
        _ROUTING,
        ("tensor",),
        _d_logits,
    ),
    "gemm": Declaration(("Fp8 a", "Fp8 b"), "ScalarType out_dtype", ("tensor",), _product),
    "gemm_add": Declaration(("Fp8 a", "Fp8 b", "Total total"), "", (), _nothing),
    "wgrad": Declaration(("Tensor dy", "Tensor x", "Total main_grad"), "", (), _nothing),
    "grouped_gemm": Declaration(
        ("Fp8 a", "Fp8 b", "Tensor group_offsets"), "ScalarType out_dtype", ("tensor",), _product
    ),
    "grouped_wgrad": Declaration(
        ("Fp8 dy_columns", "Fp8 x_columns", "Tensor group_offsets", "Total main_grad"), "", (), _nothing
    ),
    "grouped_mm": Declaration(("Tensor x", "Tensor w", "Tensor group_offsets"), "", ("tensor",), _product),
    "grouped_mm_wgrad": Declaration(
        ("Tensor dy", "Tensor x", "Tensor group_offsets", "Total main_grad"), "", (), _nothing
    ),
    "adamw_step": Declaration((*_STATE, "Segments segments", "MaybeTotal weight"), _ADAMW, (), _nothing),
    "adamw_step_quantize": Declaration(
        (*_STATE, "Total weight", "Fp8Total blocks", "Fp8Total transposed"),
        f"{_ADAMW}, bool power_of_two",
        (),
        _nothing,
    ),
    "squared_norm": Declaration(("Tensor flat",), "", ("tensor",), _sum),
    "cross_entropy": Declaration(("Tensor logits", "Tensor labels", "Total losses"), "", (), _nothing),
    "cross_entropy_with_gradient": Declaration(
        ("Total logits", "Tensor labels", "Tensor weight", "Total losses"), "", (), _nothing
    ),
    "embedding_wgrad": Declaration(("Tensor dy", "Tensor ids", "Total main_grad"), "", (), _nothing),
}
