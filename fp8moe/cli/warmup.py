"""`fp8moe warmup`: compiles the kernels that a configuration needs, once a node, before its processes start.

Every cast and GEMM of one dense and one expert Linear of each size, the permutation of rows to experts and back, and
their messages between ranks run once on this machine's GPU, at the sizes of a micro-batch and through the ops of
training, so that the tile table makes the same choices. The compiled code stays in Triton's cache, which should be on
the node's own disk: a shared file system with a thousand readers is slower than compiling. Compiling without running
was refused: alignment and constants come from real operands.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import ConfigError
from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR, TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.message import MessageLayout, pack_message, plan_message, unpack_message
from fp8moe.kernels.permute import permute, plan_rows, unpermute
from fp8moe.kernels.quantize import (
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from fp8moe.model.config import ModelConfig

CACHE_VARIABLE = "TRITON_CACHE_DIR"
PEERS = 8  # ranks of a message; another number compiles nothing else
DESCRIPTION = """\
Compile the kernels that a run needs into a cache on this node. Settings are those of `fp8moe train`.

  fp8moe warmup experiment=dsv3_pretrain --processes 2048
"""


@dataclass(frozen=True)
class GemmSizes:
    """Sizes of a rank's products: (outputs, inputs) of each Linear, tokens of a micro-batch, rows its experts receive.

    unquantized: the Linears that stay in BF16 (head, router), whose weight gradient alone is a kernel of ours.
    dim, topk: width of a row that goes to experts, and how many it goes to.
    """

    linears: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]
    unquantized: tuple[tuple[int, int], ...]
    num_experts: int  # on one rank
    tokens: int
    rows: int
    dim: int
    topk: int


def gemm_sizes(model: ModelConfig, tokens: int, ep: int) -> GemmSizes:
    """The Linears of `model`, each size once, and the rows of a balanced routing, every group padded to 128."""
    c, e, topk = model, model.experts, model.router.topk
    shared = e.hidden * e.num_shared
    linears = [
        *c.attention.linears(c.dim),
        *([(2 * c.dense_hidden, c.dim), (c.dim, c.dense_hidden)] if any(map(c.is_dense, range(c.num_layers))) else []),
        *([(2 * shared, c.dim), (c.dim, shared)] if shared else []),
    ]
    num_experts = e.num_experts // ep
    return GemmSizes(
        linears=tuple(dict.fromkeys(linears)),
        experts=tuple(dict.fromkeys([(2 * e.hidden, c.dim), (c.dim, e.hidden)])),
        unquantized=((c.vocab_size, c.dim), (e.num_experts, c.dim)),
        num_experts=num_experts,
        tokens=tokens,
        rows=ceil_div(ceil_div(tokens * topk, num_experts), TILE) * TILE * num_experts,
        dim=c.dim,
        topk=topk,
    )


def calls(sizes: GemmSizes, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of every cast and product of a step, one size after the other."""
    tokens = ceil_div(sizes.tokens, 16) * 16
    for n, k in sizes.linears:
        yield f"Linear {n}x{k}", lambda n=n, k=k: linear(tokens, n, k, device)  # type: ignore[misc]
    for n, k in sizes.experts:
        yield f"{sizes.num_experts} experts {n}x{k}", lambda n=n, k=k: expert(sizes, n, k, device)  # type: ignore[misc]
    for n, k in sizes.unquantized:
        yield f"BF16 Linear {n}x{k}", lambda n=n, k=k: unquantized(tokens, n, k, device)  # type: ignore[misc]
    yield f"permutation of rows of {sizes.dim} to {sizes.topk} experts", lambda: expert_rows(tokens, sizes, device)
    yield f"messages of rows of {sizes.dim} to {sizes.topk} experts", lambda: messages(tokens, sizes, device)


def unquantized(tokens: int, n: int, k: int, device: torch.device) -> None:
    """Wgrad of a Linear that stays in BF16."""
    x, dy = (torch.zeros(tokens, size, dtype=torch.bfloat16, device=device) for size in (k, n))
    wgrad(dy, x, torch.zeros(n, k, device=device))


def linear(tokens: int, n: int, k: int, device: torch.device) -> None:
    """Fprop, Dgrad and Wgrad of a Linear, with the casts of its operands."""
    x, dy = (torch.zeros(tokens, size, dtype=torch.bfloat16, device=device) for size in (k, n))
    weight, transposed = quantize_blocks(torch.zeros(n, k, dtype=torch.bfloat16, device=device))
    for power_of_two in (False, True):
        rows, columns = quantize_rows(x, power_of_two=power_of_two), quantize_columns(x, power_of_two=power_of_two)
    dy_rows, dy_columns = quantize_rows_and_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR)
    gemm(rows, weight)
    gemm(dy_rows, transposed)
    gemm(dy_columns, columns, accumulate=torch.zeros(n, k, device=device))


def expert(sizes: GemmSizes, n: int, k: int, device: torch.device) -> None:
    """The grouped products of one expert Linear, with the casts of its operands."""
    x, dy = (torch.zeros(sizes.rows, size, dtype=torch.bfloat16, device=device) for size in (k, n))
    experts = torch.zeros(sizes.num_experts, n, k, dtype=torch.bfloat16, device=device)
    weight, transposed = quantize_blocks(experts)
    del experts
    each = sizes.rows // sizes.num_experts
    offsets = torch.arange(sizes.num_experts + 1, dtype=torch.int32, device=device) * each
    rows = quantize_rows(x, power_of_two=True)
    dy_rows, dy_columns = quantize_rows_and_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True)
    grouped_gemm(rows, weight, offsets)
    grouped_gemm(dy_rows, transposed, offsets)
    total = torch.zeros(sizes.num_experts, n, k, device=device)
    grouped_wgrad(dy_columns, requantize_columns(rows), offsets, total)


def expert_rows(tokens: int, sizes: GemmSizes, device: torch.device) -> None:
    """Plan, permute and unpermute, of rows cast here and of received rows (scales token-major)."""
    ids = torch.arange(tokens * sizes.topk, device=device).view(tokens, sizes.topk) % sizes.num_experts
    row_map = plan_rows(ids, sizes.num_experts)
    x = torch.zeros(tokens, sizes.dim, dtype=torch.bfloat16, device=device)
    rows = quantize_rows(x, power_of_two=True)
    permute(rows, row_map)
    permute(Fp8Tensor(rows.data, rows.scale.contiguous()), row_map)
    unpermute(torch.zeros(len(row_map.slot_R), sizes.dim, dtype=torch.bfloat16, device=device), row_map)


def messages(tokens: int, sizes: GemmSizes, device: torch.device) -> None:
    """Rows packed for other ranks, unpacked from them and summed in return, with their ids and without."""
    ids = torch.arange(tokens * sizes.topk, device=device).view(tokens, sizes.topk) % (PEERS * sizes.num_experts)
    x, weights = (
        torch.zeros(tokens, sizes.dim, dtype=torch.bfloat16, device=device),
        torch.zeros(ids.shape, device=device),
    )
    to_peers = plan_message(ids, PEERS, sizes.num_experts, room=tokens * PEERS, fixed=True)
    for rows in (x, quantize_rows(x, power_of_two=True)):
        layout, message = MessageLayout.of(rows, sizes.topk), pack_message(rows, to_peers, ids, weights)
        order = plan_rows(layout.sender_of(message), 1 + PEERS, align=1, room=len(message), first=-1).source_R
        for taken in (None, order):
            row_map = plan_rows(layout.ids_of(message), sizes.num_experts, room=sizes.rows, first=0, order=taken)
        received, _ = unpack_message(message, row_map, layout)
        unpack_message(pack_message(rows, to_peers), row_map, MessageLayout.of(rows))
        if isinstance(received, torch.Tensor):
            unpermute(received, row_map)
    permute(message, plan_message(layout.ids_of(message), PEERS, sizes.num_experts, room=len(message)))


def choose_cache(given: Path | None) -> Path:
    """Folder of compiled code: `given`, else the environment's, else one in this node's temporary folder."""
    if given is not None:
        return given
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir(), f"fp8moe-kernels-{os.getuid()}")


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("warmup", DESCRIPTION, settings=True)
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes of the whole run (the GPUs of this machine)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help=f"folder of compiled code (${CACHE_VARIABLE}, or one in the local temporary folder)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 when everything is compiled, or when the precision has nothing to compile."""
    arguments = parse(command_parser(), argv)
    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes={arguments.processes} must be at least 1")
    from fp8moe.cli.compose import compose
    from fp8moe.train.config import resolve

    config = compose(arguments.settings).config
    config = resolve(config, arguments.processes or max(1, torch.cuda.device_count()))
    if config.precision.mode != "fp8":
        print(f"precision {config.precision.mode} runs on PyTorch's own kernels: nothing to compile")
        return 0
    if not torch.cuda.is_available():
        raise ConfigError("warmup compiles for the GPU that it runs on and torch sees 0: run it on a node with GPUs")
    cache = choose_cache(arguments.cache)
    os.environ[CACHE_VARIABLE] = str(cache)
    sizes = gemm_sizes(config.model, config.rank_tokens, config.ep)
    start = time.perf_counter()
    for name, call in calls(sizes, torch.device("cuda")):
        call()
        torch.cuda.synchronize()
        print(f"{time.perf_counter() - start:7.1f} s  {name}", flush=True)
    print(f"compiled into {cache}; before the run: export {CACHE_VARIABLE}={cache}")
    return 0
