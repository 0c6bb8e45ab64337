"""Seconds of forwards alone, of whole micro-batches and of single tokens behind a cache.

    forward      a stage's blocks as in training, nothing beside them (`layer_time`), and where it has the head the
                 final norm, the logits and two passes over them; no less than the launches take the host
    token        one new token of each of B rows of L tokens: a roofline. Every weight is read for few rows, and of the
                 caches what a row has, once (`kernels.decode_attention`); many heads to a key are bound by DECODE_FLOPS

A token's seconds are a bound from below: exact counts make the host wait in each mixture, drawn ids once a token, and
none of that hides under anything. No GPU has decoded with this code, so no record stands against it.

With CUDA graphs (`generate.captured`) the host starts messages, whose packing is captured like the rest, and launches
what draws; and, once for the tokens that a graph serves, all launches twice: when a kind of forward is met, and when it
is captured. Messages have room for every routing and travel in full.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fp8moe.layers.attention import MlaConfig
from fp8moe.layers.cuda_graph import step_of
from fp8moe.layers.recipe import Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.partition import Stage
from fp8moe.plan.attention_work import add_attention
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.forward_work import FP32, FP64, entry_sizes
from fp8moe.plan.graph_costs import COPY_LAUNCHES
from fp8moe.plan.layer_time import Sizes, alone_seconds, block_time
from fp8moe.plan.mlp_work import add_mlp
from fp8moe.plan.network import Exchange, exchange_seconds
from fp8moe.plan.rates import HOST_SECONDS, Card, host_seconds, launches_of, message_launches, parts_of, total
from fp8moe.plan.work import Attention, BlockWork, Pass, Piece, Product, Small

CACHE, HEAD = "caches", "head and drawing"
# Of attention to a cache, by whether it keeps latents: what is kept rotated, laid together and written, queries laid
# together, the kernel's two.
LAUNCHES = {True: 7, False: 5}
DECODE_FLOPS = 300e12  # half of what its tensor core instructions, `mma.sync`, reach at best on an H100; not measured
# Of a mixture between graphs, in launches: two collectives, which are taken to cost as much as a launch, a copy of what
# arrives behind each, and two graphs of 10 microseconds.
BETWEEN = 2 * (1 + COPY_LAUNCHES + 10e-6 / HOST_SECONDS)


def forward_seconds(sizes: Sizes, stage: Stage, card: Card, cluster: Cluster) -> float:
    """Of a stage on one micro-batch, without gradients; the MTP module rests."""
    model, tokens = sizes.model, sizes.tokens
    blocks = [block_time(sizes, model.is_dense(layer), layer, card, cluster) for layer in stage.layers]
    ends: list[Piece] = [Pass("add", HEAD, tokens * model.dim * 4)] * stage.embedding
    if stage.head:
        logits = Pass("cross entropy", HEAD, tokens * model.vocab_size * 2)
        ends += [
            Pass("norm", HEAD, tokens * model.dim * 4),
            Product(tokens, model.vocab_size, model.dim),
            *(logits, logits),
        ]
    launches = sum(block.launches["F"] for block in blocks) + launches_of(ends)
    return max(alone_seconds(blocks, "F") + total(parts_of(ends, card)), host_seconds(launches))


@dataclass(frozen=True)
class Decoding:
    """What a token's time depends on beside its stage: the model, how rows reach the experts, ids that are drawn.

    graphs: forwards are CUDA graphs.
    """

    model: ModelConfig
    recipe: Recipe
    exchange: Exchange
    num_ids: int
    graphs: bool = False


def token_seconds(of: Decoding, stage: Stage, rows: int, length: float, card: Card, cluster: Cluster) -> float:
    """Of one new token of each of `rows` sequences of `length` tokens in a stage, drawn behind the head."""
    model, step = of.model, step_of(max(1, int(length)))
    kinds = [model.is_dense(layer) for layer in stage.layers]
    seconds, launches = 0.0, 0
    for layer, dense in zip(stage.layers, kinds, strict=True):
        one, count = _layer(of, stage.layers[kinds.index(dense)], rows, card, cluster)
        attended, more = _attention(of, rows, min(length, _window(model, layer) or length), card)
        seconds += one + attended
        launches += count + more
    ends: list[Piece] = [Small(2)] * stage.embedding
    if stage.head:
        wide = of.recipe.dtype.itemsize
        drawn = wide + 6 * FP32 + 4 * FP64  # widened, divided, normalised, their exponentials and sums
        ends += [Pass("norm", HEAD, rows * model.dim * 4), Product(rows, model.vocab_size, model.dim)]
        ends += [Pass("add", HEAD, rows * of.num_ids * drawn), Small(20)]
    seconds += total(parts_of(ends, card))
    mixtures = kinds.count(False) if of.exchange.ep > 1 else 0
    messages = mixtures * message_launches(of.exchange.hops, exact=not of.graphs)["F"]
    all_launches = launches + launches_of(ends) + messages
    if not of.graphs:
        return max(seconds, host_seconds(all_launches))
    left = mixtures * BETWEEN + COPY_LAUNCHES * launches_of(ends) + 2 * all_launches / step
    return max(seconds, host_seconds(left))


@functools.lru_cache(maxsize=4096)
def _layer(of: Decoding, layer: int, rows: int, card: Card, cluster: Cluster) -> tuple[float, int]:
    """(seconds, launches) of a block but for its attention to the cache, the messages to its experts included."""
    model, recipe, work = of.model, of.recipe, BlockWork()
    a = model.attention
    add_attention(work, model, recipe, layer, rows, 1)
    add_mlp(work, model, recipe, layer, rows, of.exchange.ep, 1.0)
    absorbed = a.linears(model.dim)[-2] if isinstance(a, MlaConfig) else None
    pieces = [
        piece
        for piece in (*work.attn["F"], *work.shared["F"], *work.mlp["F"])
        if not isinstance(piece, Attention) and not (isinstance(piece, Product) and (piece.n, piece.k) == absorbed)
    ]
    if isinstance(a, MlaConfig):
        pieces.append(Product(rows, a.kv_lora_rank, a.nope_dim, groups=a.num_heads))
        pieces.append(Product(rows, a.v_dim, a.kv_lora_rank, groups=a.num_heads))
    seconds = total(parts_of(pieces, card))
    if not model.is_dense(layer) and of.exchange.ep > 1:
        for coded, ids in ((recipe.fp8, True), (False, False)):
            seconds += exchange_seconds(model, of.exchange, cluster, rows, fp8=coded, with_ids=ids, roomy=of.graphs)
    return seconds, launches_of(pieces)


def _window(model: ModelConfig, layer: int) -> int | None:
    """Tokens that a query of a layer sees, None for all before it."""
    return None if isinstance(model.attention, MlaConfig) else model.attention.window_of(layer)


def _attention(of: Decoding, rows: int, length: float, card: Card) -> tuple[float, int]:
    """(seconds, launches) of a layer's attention to the last `length` entries of each row, each read once."""
    a, latents = of.model.attention, isinstance(of.model.attention, MlaConfig)
    key, value, groups = entry_sizes(a)
    entries = rows * length * of.recipe.dtype.itemsize * (key + (0 if latents else value))
    products = 2 * rows * length * a.num_heads * (key + value) // groups
    pieces: list[Piece] = [Pass("add", CACHE, entries), Small(LAUNCHES[latents] - 1)]
    return max(total(parts_of(pieces, card)), products / DECODE_FLOPS), launches_of(pieces)
