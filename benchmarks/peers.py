"""Who a GEMM is measured beside, in one run: our back ends, cuBLAS in BF16, and other libraries where importable.

Every candidate computes the same product from the same values. Operands are cast and laid out before the clock starts,
each library's own way: only the product is timed. A library that is missing or refuses a shape is left out with its
reason, never replaced.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.shapes import Problem
from fp8moe.kernels import backend, tiles
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows

ALONE = "gluon without pairs"
OURS = ("gluon", ALONE, "triton", "cublas", "te")
OURS_GROUPED = ("gluon", ALONE, "triton")
ORDERED = {order: f"gluon {order}" for order in tiles.CONSUMERS}
BF16 = "bf16 cublas"


@dataclass
class Contest:
    """Candidates by name, each a call that returns its output; `left_out` says why others are not there.

    total: what the candidates add into, where they do.
    """

    candidates: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    total: Tensor | None = None

    def enter(self, name: str, make: Callable[[], Callable[[], Tensor]]) -> None:
        """Add a candidate if `make` and one call of it succeed."""
        try:
            call = make()
            call()
            torch.cuda.synchronize()
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            self.left_out[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        else:
            self.candidates[name] = call


def without_pairs(op: Callable[..., Any]) -> Callable[..., Any]:
    """The Gluon op with the tiles that the table has for one CTA alone. Raises ValueError where it has no others."""
    if not importlib.import_module("fp8moe.kernels.gluon.launch").pairs_allowed():
        raise ValueError("no pairs of CTAs here: gluon itself runs without")
    return _choosing(op, lambda choose, *args, **kwargs: choose(*args, **kwargs | {"pairs": False}))


def with_order(op: Callable[..., Any], consumers: str) -> Callable[..., Any]:
    """The Gluon op with consumers free or in turns, in the table's tile, or in ping-pong.

    A call raises ValueError where ping-pong is not for its contraction.
    """

    def tile(choose: Callable[..., tiles.Tile], *args: Any, **kwargs: Any) -> tiles.Tile:
        if consumers != "pingpong":
            return replace(choose(*args, **kwargs), consumers=consumers)
        if (k := args[4]) > tiles.SHORT_CONTRACTION:
            raise ValueError(f"ping-pong is for contractions up to {tiles.SHORT_CONTRACTION}, this one is {k}")
        return tiles.Tile(128, 128, 6, 8, 4, consumers=consumers)

    return _choosing(op, tile)


def _choosing(op: Callable[..., Any], tile: Callable[..., tiles.Tile]) -> Callable[..., Any]:
    """`op` with the tile that `tile(choose, ...)` gives, which gets the arguments of `tiles.choose`."""
    choose = partial(tile, tiles.choose)

    def run(*args: Any, **kwargs: Any) -> Any:
        with patch.object(tiles, "choose", choose):
            return op(*args, **kwargs)

    return run


def implementation(name: str, module: str, op: str) -> Callable[..., Any]:
    """Op of one back end, without the choice in force. Raises ValueError where it can't run here."""
    if name == ALONE:
        return without_pairs(implementation("gluon", module, op))
    if name in ORDERED.values():
        return with_order(implementation("gluon", module, op), name.split()[-1])
    if reason := backend.why_not(name):
        raise ValueError(reason)
    found: Callable[..., Any] = getattr(importlib.import_module(f"fp8moe.kernels.{name}.{module}"), op)
    return found


@dataclass(frozen=True)
class Operands:
    """One problem's values: unquantized, quantized, and where the groups start."""

    left: Tensor  # rows: [groups * M, K]; columns: dy [groups * K, M]
    right: Tensor  # rows: [groups, N, K] or [N, K]; columns: x [groups * K, N]
    a: Fp8Tensor
    b: Fp8Tensor
    offsets: Tensor

    @classmethod
    def make(cls, p: Problem, device: torch.device) -> "Operands":
        """Random normal values of problem `p`."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        size = p.m if p.kind == "rows" else p.k
        offsets = torch.arange(p.groups + 1, dtype=torch.int32, device=device) * size
        if p.kind == "rows":
            left, right = normal(p.groups * p.m, p.k), normal(p.groups, p.n, p.k)
            right = right if p.groups > 1 else right[0]
            return cls(left, right, quantize_rows(left), quantize_blocks(right)[0], offsets)
        left, right = normal(p.groups * p.k, p.m), normal(p.groups * p.k, p.n)
        return cls(left, right, quantize_columns(left), quantize_columns(right), offsets)


def dense(p: Problem, x: Operands, orders: Sequence[str] = ()) -> Contest:
    """gemm: rows by blocks into BF16, or columns by columns added into FP32; with `orders` of the consumers beside."""
    total = torch.zeros(p.m, p.n, device=x.left.device) if p.kind == "columns" else None
    contest = Contest(total=total)
    for name in (*OURS, *(ORDERED[order] for order in orders)):

        def make(name: str = name) -> Callable[[], Tensor]:
            gemm = implementation(name, "gemm", "gemm")
            return lambda: gemm(x.a, x.b, accumulate=total)

        contest.enter(name, make)
    if total is not None:
        contest.enter(BF16, lambda: lambda: torch.mm(x.left.t(), x.right))
    else:
        contest.enter(BF16, lambda: lambda: torch.mm(x.left, x.right.t()))
        contest.enter("deepgemm", lambda: _deepgemm(x))
        contest.enter("te linear", lambda: _transformer_engine(p, x))
    return contest


def grouped(p: Problem, x: Operands, orders: Sequence[str] = ()) -> Contest:
    """grouped_gemm into BF16; with `orders` of the consumers beside."""
    contest = Contest()
    for name in (*OURS_GROUPED, *(ORDERED[order] for order in orders)):

        def make(name: str = name) -> Callable[[], Tensor]:
            op = implementation(name, "grouped_gemm", "grouped_gemm")
            return lambda: op(x.a, x.b, x.offsets)

        contest.enter(name, make)
    ends = x.offsets[1:]
    contest.enter(BF16, lambda: lambda: torch.nn.functional.grouped_mm(x.left, x.right.mT, offs=ends))
    contest.enter("deepgemm", lambda: _deepgemm_grouped(p, x))
    return contest


def grouped_wgrad(p: Problem, x: Operands, orders: Sequence[str] = ()) -> Contest:
    """grouped_wgrad added into FP32; the BF16 peer writes BF16 and adds nothing, which is less work.

    With `orders` of the consumers beside.
    """
    total = torch.zeros(p.groups, p.m, p.n, device=x.left.device)
    contest = Contest(total=total)
    for name in (*OURS_GROUPED, *(ORDERED[order] for order in orders)):

        def make(name: str = name) -> Callable[[], Tensor]:
            op = implementation(name, "grouped_gemm", "grouped_wgrad")

            def call() -> Tensor:
                op(x.a, x.b, x.offsets, total)
                return total

            return call

        contest.enter(name, make)
    ends = x.offsets[1:]
    contest.enter(BF16, lambda: lambda: torch.nn.functional.grouped_mm(x.left.t(), x.right, offs=ends))
    return contest


def _deepgemm(x: Operands) -> Callable[[], Tensor]:
    deep_gemm = importlib.import_module("deep_gemm")
    call = getattr(deep_gemm, "fp8_gemm_nt", None) or deep_gemm.gemm_fp8_fp8_bf16_nt
    out = torch.empty(x.a.shape[0], x.b.shape[0], dtype=torch.bfloat16, device=x.left.device)
    left, right = (x.a.data, x.a.scale), (x.b.data, x.b.scale.contiguous())

    def run() -> Tensor:
        call(left, right, out)
        return out

    return run


def _deepgemm_grouped(p: Problem, x: Operands) -> Callable[[], Tensor]:
    deep_gemm = importlib.import_module("deep_gemm")
    new = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_contiguous", None)
    call = new or deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous
    out = torch.empty(x.a.shape[0], p.n, dtype=torch.bfloat16, device=x.left.device)
    expert = torch.arange(p.groups, dtype=torch.int32, device=x.left.device).repeat_interleave(p.m)
    left, right = (x.a.data, x.a.scale), (x.b.data, x.b.scale.contiguous())

    def run() -> Tensor:
        call(left, right, out, expert)
        return out

    return run


def _transformer_engine(p: Problem, x: Operands) -> Callable[[], Tensor]:
    te = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
    linear = te.Linear(p.k, p.n, bias=False, params_dtype=torch.bfloat16, device=x.left.device)
    linear.weight.data.copy_(x.right)

    def run() -> Tensor:
        # Its quantization of the activations is inside: it has no public call without.
        with torch.no_grad(), te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            out: Tensor = linear(x.left, is_first_microbatch=False)
        return out

    return run
