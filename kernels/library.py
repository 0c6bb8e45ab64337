"""The ops as PyTorch knows them: registered, with the shapes of their results, for tracing and tensors without data.

`torch.compile`, FakeTensor and the meta device cannot enter a Triton launch, nor the specification's loops over groups
whose sizes are data. So every cast and product is also an opaque operator `fp8moe::name`, which declares what it
mutates and has a fake implementation that only allocates. Eager calls on real tensors never come through here: the
dispatcher of PyTorch would cost more than some of the casts.

An operator takes plain tensors only. A declaration below therefore names the logical arguments of the public op, and
this module takes an `Fp8Tensor` apart on the way in and puts one together on the way out; results are a flat list of
tensors. A registration written out by hand for each op was refused: it is the same ten lines fifteen times.

Fakes must tell the strides of the real results, and those are the back end's: where scales and columns lie is asked of
the layout in force on the tensor's device.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, E5M6_VALUES, E5M6_WORDS, TILE, E5m6Tensor, Fp8Tensor, Rows, ceil_div
from fp8moe.kernels.reference import _arithmetic as specified
from fp8moe.kernels.reference import permute as permutation
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.triton import layout

NAMESPACE = "fp8moe"
_PARTS = {
    "Tensor": ("Tensor {}",),
    "Maybe": ("Tensor? {}",),
    "Total": ("Tensor({0}!) {0}",),  # mutated in place
    "MaybeTotal": ("Tensor({0}!)? {0}",),
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
        parts = [part.format(name) for kind, name in map(str.split, self.arguments) for part in _PARTS[kind]]
        parts += ["*", self.keywords] if self.keywords else []
        results = f"({', '.join(['Tensor'] * len(self.results))})" if self.adds else "Tensor[]"
        return f"({', '.join(parts)}) -> {results if self.results else '()'}"

    @property
    def adds(self) -> bool:
        """Whether it changes an argument: torch.compile then takes single tensors for results, and no list of them."""
        return any(kind in ("Total", "MaybeTotal") for kind in self.kinds)

    def returned(self, tensors: list[Tensor]) -> Any:
        """The results as the operator must return them."""
        return None if not self.results else tuple(tensors) if self.adds else tensors
        return f"({', '.join(parts)}) -> {'Tensor' if self.single else 'Tensor[]' if self.results else '()'}"

    @property
    def single(self) -> bool:
        """Whether it returns a tensor and no list: PyTorch lets an operator that mutates return nothing else."""
        return self.results == ("tensor",) and "Total" in self.kinds


_by_specification: Callable[[torch.device], bool] = lambda device: True  # noqa: E731  replaced by `register`
_library: torch.library.Library | None = None


def register(run: Callable[..., Any], by_specification: Callable[[torch.device], bool]) -> None:
    """Register every op. run(name, *args, **kwargs) runs one; by_specification says whose layout casts have there."""
    global _library, _by_specification
    assert _library is None, "the ops are registered once"
    _by_specification = by_specification
    _library = torch.library.Library(NAMESPACE, "DEF")
    for name, declaration in DECLARATIONS.items():
        _library.define(name + declaration.schema)
        _library.impl(name, functools.partial(_run_flat, run, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", functools.partial(_fake_flat, name), lib=_library)


def traced(name: str) -> Callable[..., Any]:
    """The public op `name` through its registration."""
    special: dict[str, Callable[..., Any]] = {"gemm": _gemm, "permute": _permute, "plan_rows": _plan_rows}
    return special[name] if name in special else functools.partial(_call, name)


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    tensors = getattr(torch.ops.fp8moe, name)(*_flatten(args), **kwargs)
    results = _assemble(DECLARATIONS[name].results, [tensors] if isinstance(tensors, Tensor) else tensors or [])
    return results[0] if len(results) == 1 else tuple(results) or None


def _gemm(a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype, accumulate: Tensor | None) -> Tensor:
    """An operator may not return what it was given: adding is an op of its own."""
    if accumulate is None:
        out: Tensor = _call("gemm", a, b, out_dtype=out_dtype)
        return out
    _call("gemm_add", a, b, accumulate)
    return accumulate


def _permute(x: Rows, row_map: RowMap) -> Rows:
    rows: Rows = _call("permute_fp8" if isinstance(x, Fp8Tensor) else "permute", x, row_map)
    return rows


def _plan_rows(topk_ids: Tensor, num_experts: int, *, align: int, room: int | None) -> RowMap:
    """Without `room` the number of rows is data: the specification is traced through, as far as the tracer can."""
    if room is None:
        return permutation.plan_rows(topk_ids, num_experts, align=align)
    tensors = torch.ops.fp8moe.plan_rows(topk_ids, num_experts, align=align, room=room)
    return RowMap(*tensors, *topk_ids.shape)


def _run_flat(run: Callable[..., Any], name: str, *flat: Any, **kwargs: Any) -> Any:
    declaration = DECLARATIONS[name]
    args = _regroup(declaration.kinds, flat)
def _run_flat(run: Callable[..., Any], name: str, *flat: Any, **kwargs: Any) -> list[Tensor] | Tensor | None:
    args = _regroup(DECLARATIONS[name].kinds, flat)
    if name == "gemm_add":
        run("gemm", *args[:2], out_dtype=torch.float32, accumulate=args[2])
        return None
    if name == "gemm":
        kwargs["accumulate"] = None
    result = run("permute" if name == "permute_fp8" else name, *args, **kwargs)
    if result is None:
        return None
    given = [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]
    return _flatten(given, tiles=False)
    return declaration.returned(_flatten(result if isinstance(result, tuple) else (result,), tiles=False))


def _fake_flat(name: str, *flat: Any, **kwargs: Any) -> Any:
    declaration = DECLARATIONS[name]
    return declaration.returned(declaration.fake(*_regroup(declaration.kinds, flat), **kwargs))
    if DECLARATIONS[name].single:
        return cast(Tensor, result)
    return _flatten(result if isinstance(result, tuple) else (result,), tiles=False) if result is not None else None


def _fake_flat(name: str, *flat: Any, **kwargs: Any) -> list[Tensor] | Tensor | None:
    declaration = DECLARATIONS[name]
    tensors = declaration.fake(*_regroup(declaration.kinds, flat), **kwargs)
    return tensors[0] if declaration.single else tensors if declaration.results else None


def _flatten(values: Iterable[Any], *, tiles: bool = True) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, Fp8Tensor):
            flat += [value.data, value.scale, list(value.tile)] if tiles else [value.data, value.scale]
        elif isinstance(value, E5m6Tensor):
            flat += [value.data, value.scale]
        elif isinstance(value, Segments):
            flat += [[number for span in value.spans for number in map(int, span)], value.parts]
        elif isinstance(value, RowMap):
            flat += [value.source_R, value.slot_R, value.group_offsets, value.tokens_per_expert, value.row_of_slot]
            flat += [value.num_rows, value.topk] if tiles else []
        else:
            flat.append(value)
    return flat


def _regroup(kinds: list[str], flat: Iterable[Any]) -> list[Any]:
    rest = iter(flat)
    args: list[Any] = []
    for kind in kinds:
        if kind in ("Fp8", "Fp8Total"):
            data, scale, (rows, columns) = next(rest), next(rest), next(rest)
            args.append(Fp8Tensor(data, scale, (rows, columns)))
        elif kind == "E5m6":
            args.append(E5m6Tensor(next(rest), next(rest)))
        elif kind == "Segments":
            numbers = iter(next(rest))
            spans = tuple((start, stop, bool(decays)) for start, stop, decays in zip(*[numbers] * 3, strict=True))
            args.append(Segments(spans, next(rest)))
        elif kind == "Map":
            args.append(RowMap(*itertools.islice(rest, len(_PARTS["Map"]))))
        else:
            args.append(next(rest))
    return args


def _assemble(results: tuple[str, ...], tensors: list[Tensor]) -> list[Any]:
    rest = iter(tensors)
    values: list[Any] = []
    for kind in results:
        if kind == "tensor":
            values.append(next(rest))
        elif kind == "maybe":
            values.append(next(rest, None))
        elif kind == "e5m6":
            values.append(E5m6Tensor(next(rest), next(rest)))
        else:
            data, scale = next(rest), next(rest)
            values.append(Fp8Tensor(data, scale, BLOCK_TILE) if kind == "blocks" else Fp8Tensor(data, scale))
    return values


def _rows(x: Tensor, **kwargs: Any) -> list[Tensor]:
    k = x.shape[-1]
    m = x.shape[:-1].numel()
    q = specified.empty_rows(m, k, x.device) if _by_specification(x.device) else layout.empty_rows(m, k, x.device)
    return [q.data.view(x.shape), q.scale.reshape(*x.shape[:-1], ceil_div(k, TILE))]


def _columns(x: Tensor | Fp8Tensor | E5m6Tensor, **kwargs: Any) -> list[Tensor]:
    m, k = x.shape
    empty = specified.empty_columns if _by_specification(x.device) else layout.empty_columns
    return _flatten([empty(m, k, x.device)], tiles=False)


def _blocks(w: Tensor, **kwargs: Any) -> list[Tensor]:
    shapes = (tuple(w.shape), (*w.shape[:-2], w.shape[-1], w.shape[-2]))
    return _flatten([layout.empty_blocks(shape, w.device) for shape in shapes], tiles=False)


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


def _nothing(*args: Any, **kwargs: Any) -> list[Tensor]:
def _activated(gate_up: Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    return _rows(gate_up[:, : gate_up.shape[1] // 2]) + _rows(gate_up)


def _activated_columns(cached: Fp8Tensor, weights: Tensor | None) -> list[Tensor]:
    r, both = cached.shape
    return _columns(torch.empty(r, both // 2, device=cached.device))


def _activation_gradients(dy: Tensor, cached: Fp8Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    grads = _rows(torch.empty(cached.shape, device=cached.device)) + _columns(cached)
    return grads if weights is None else [*grads, weights.new_empty(weights.shape)]


def _silu_mul(gate_up: Tensor, weights: Tensor | None) -> list[Tensor]:
    return [gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)]


def _silu_mul_gradients(dy: Tensor, gate_up: Tensor, weights: Tensor | None) -> list[Tensor]:
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


def _nothing(*args: Any) -> list[Tensor]:
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
    "swiglu": Declaration(("Tensor gate_up", "Maybe weights"), "bool power_of_two", ("rows", "rows"), _activated),
    "swiglu_columns": Declaration(("Fp8 cached", "Maybe weights"), "", ("rows",), _activated_columns),
    "swiglu_backward": Declaration(
        ("Tensor dy", "Fp8 cached", "Maybe weights"),
        "bool power_of_two",
        ("rows", "rows", "maybe"),
        _activation_gradients,
    ),
    "silu_mul": Declaration(("Tensor gate_up", "Maybe weights"), "", ("tensor",), _silu_mul),
    "silu_mul_backward": Declaration(
        ("Tensor dy", "Tensor gate_up", "Maybe weights"), "", ("tensor", "maybe"), _silu_mul_gradients
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
        (*_STATE, "Total weight", "Fp8Total blocks", "Fp8Total transposed"), _ADAMW, (), _nothing
    ),
    "squared_norm": Declaration(("Tensor flat",), "", ("tensor",), _sum),
    "cross_entropy": Declaration(("Tensor logits", "Tensor labels", "Total losses"), "", (), _nothing),
    "cross_entropy_with_gradient": Declaration(
        ("Total logits", "Tensor labels", "Tensor weight", "Total losses"), "", (), _nothing
    ),
    "embedding_wgrad": Declaration(("Tensor dy", "Tensor ids", "Total main_grad"), "", (), _nothing),
}
