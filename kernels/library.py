"""The ops as PyTorch knows them: registered, with the shapes of their results, for tracing and tensors without data.

`torch.compile`, FakeTensor and the meta device cannot enter a Triton launch, nor the specification's loops over groups
whose sizes are data. So every cast and product is also an opaque operator `fp8moe::name`, which declares what it
mutates and has a fake implementation that only allocates. Eager calls on real tensors never come through here: the
dispatcher of PyTorch would cost more than some of the casts.

An operator takes plain tensors only. A declaration (`declarations`) therefore names the logical arguments of the public
op, and this module takes an `Fp8Tensor` apart on the way in and puts one together on the way out; results are a flat
list of tensors. A registration written out by hand for each op was refused: it is the same ten lines forty times.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.declarations import DECLARATIONS, PARTS
from fp8moe.kernels.fake_results import set_layout
from fp8moe.kernels.fp8 import BLOCK_TILE, E5m6Tensor, Fp8Tensor, Rows
from fp8moe.kernels.message_layout import MessageLayout
from fp8moe.kernels.reference import permute as permutation
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.segments import Segments

NAMESPACE = "fp8moe"
FP8 = "_fp8"  # ends the name of the operator that takes FP8 where another takes tensors
_library: torch.library.Library | None = None


def register(run: Callable[..., Any], by_specification: Callable[[torch.device], bool]) -> None:
    """Register every op. run(name, *args, **kwargs) runs one; by_specification says whose layout casts have there."""
    global _library
    assert _library is None, "the ops are registered once"
    set_layout(by_specification)
    _library = torch.library.Library(NAMESPACE, "DEF")
    for name, declaration in DECLARATIONS.items():
        _library.define(name + declaration.schema)
        _library.impl(name, functools.partial(_run_flat, run, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", functools.partial(_fake_flat, name), lib=_library)


def traced(name: str) -> Callable[..., Any]:
    """The public op `name` through its registration."""
    special: dict[str, Callable[..., Any]] = {
        "gemm": _gemm,
        "plan_rows": _plan_rows,
        "plan_message": _plan_message,
        "unpack_message": _unpack_message,
        "unpermute": _unpermute,
    }
    if name in special:
        return special[name]
    return functools.partial(_call_by_kind if f"{name}{FP8}" in DECLARATIONS else _call, name)


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


def _call_by_kind(name: str, rows: Rows, *args: Any, **kwargs: Any) -> Any:
    """An operator takes FP8 rows or others, never both: there are two of the op."""
    return _call(f"{name}{FP8}" if isinstance(rows, Fp8Tensor) else name, rows, *args, **kwargs)


def _unpermute(y_R: Tensor, row_map: RowMap, *, out: Tensor | None) -> Tensor:
    """As of `_gemm`: writing where it is told is an op of its own."""
    if out is None:
        total: Tensor = _call("unpermute", y_R, row_map)
        return total
    _call("unpermute_into", y_R, row_map, out)
    return out


def _plan_rows(
    topk_ids: Tensor, num_experts: int, *, align: int, room: int | None, first: int | None, order: Tensor | None
) -> RowMap:
    """Without `room` the number of rows is data: the specification is traced through, as far as the tracer can."""
    if room is None:
        return permutation.plan_rows(topk_ids, num_experts, align=align, first=first, order=order)
    tensors = torch.ops.fp8moe.plan_rows(topk_ids, num_experts, order, align=align, room=room, first=first or 0)
    return _map(tensors, len(topk_ids), topk_ids.shape[1])


def _plan_message(topk_ids: Tensor, num_peers: int, *args: Any, **kwargs: Any) -> RowMap:
    tensors = torch.ops.fp8moe.plan_message(topk_ids, num_peers, *args, **kwargs)
    return _map(tensors, len(topk_ids), min(topk_ids.shape[1], num_peers))


def _map(tensors: list[Tensor], num_rows: int, topk: int) -> RowMap:
    source_R, slot_R, offsets, tokens_per_expert, row_of_slot = tensors
    return RowMap(source_R, slot_R, offsets, tokens_per_expert, row_of_slot, num_rows, topk)


def _unpack_message(message: Tensor, row_map: RowMap, layout: MessageLayout) -> Any:
    return _call("unpack_message" + FP8 * layout.fp8, message, row_map, layout)


def _run_flat(run: Callable[..., Any], name: str, *flat: Any, **kwargs: Any) -> Any:
    declaration = DECLARATIONS[name]
    args = _regroup(declaration.kinds, flat)
    if name == "gemm_add":
        run("gemm", *args[:2], out_dtype=torch.float32, accumulate=args[2])
        return None
    if name == "unpermute_into":
        run("unpermute", *args[:2], out=args[2])
        return None
    if name == "gemm":
        kwargs["accumulate"] = None
    if name == "plan_rows":
        kwargs["order"] = args.pop()
    result = run(name.removesuffix(FP8), *args, **kwargs)
    if result is None:
        return None
    given = [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]
    return declaration.returned(_flatten(given, tiles=False))


def _fake_flat(name: str, *flat: Any, **kwargs: Any) -> Any:
    declaration = DECLARATIONS[name]
    return declaration.returned(declaration.fake(*_regroup(declaration.kinds, flat), **kwargs))


def _flatten(values: Iterable[Any], *, tiles: bool = True) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, Fp8Tensor):
            flat += [value.data, value.scale, list(value.tile)] if tiles else [value.data, value.scale]
        elif isinstance(value, E5m6Tensor):
            flat += [value.data, value.scale]
        elif isinstance(value, MessageLayout):
            flat += [value.dtype, value.width, value.topk]
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
        elif kind == "Layout":
            args.append(MessageLayout(next(rest), next(rest), next(rest)))
        elif kind == "Map":
            args.append(RowMap(*itertools.islice(rest, len(PARTS["Map"]))))
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
