"""Memory of forwards that keep nothing: of a teacher, of log-probabilities, of prompts and of tokens behind a cache.

One block at a time: two tensors of the residual stream, and the larger of what attention and the MLP make before they
let go. Rows go to experts by exact counts (`generate.open.exact_dispatcher`), routing balanced. What attends to caches
keeps sums of each split of them; the specification, which a CPU takes, makes FP32 scores of some rows at once.
`tests/plan/test_rollout_memory.py` holds all of it against tensors of the layers themselves.

Legend: T tokens, D model, F hidden, B rows of a cache, L tokens of the longest, H heads, G heads of keys, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fp8moe.kernels.reference.decode_attention import WIDENED_VALUES
from fp8moe.layers.attention import GqaConfig, MlaConfig
from fp8moe.layers.recipe import Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.head_loss import chunk_tokens
from fp8moe.model.memory import TILE
from fp8moe.plan.expert_rows import visits

FP32, FP64 = 4, 8
PROGRAMS = 528  # that attend to caches at once, as in `kernels.triton.decode_attention`, which needs Triton


def forward_bytes(
    model: ModelConfig, recipe: Recipe, layers: Sequence[int], tokens: float, ep: int = 1, *, roomy: bool = False
) -> float:
    """Of `tokens` through these blocks, one after the other; roomy: messages have room for every routing."""
    if not layers:
        return 0.0
    stream = 2 * recipe.dtype.itemsize * model.dim * tokens
    mlps = [_mlp_bytes(model, recipe, tokens, ep, dense=model.is_dense(layer), roomy=roomy) for layer in layers]
    return stream + max(_attention_bytes(model, recipe) * tokens, *mlps)


def _attention_bytes(model: ModelConfig, recipe: Recipe) -> float:
    """A token: a norm's output, latents or the product, queries, keys and values before and behind the rotation, the
    output; under FP8 the casts of the inputs and the output in 12 bits."""
    a, wide, cast = model.attention, recipe.dtype.itemsize, 1 + 4 / TILE
    if isinstance(a, MlaConfig):
        latents = (a.q_lora_rank or a.queries) + a.kv_lora_rank + a.rope_dim
        values = latents + 3 * a.queries + a.num_heads * (a.nope_dim + 2 * a.v_dim)
        inputs, output = latents, a.num_heads * a.v_dim
    else:
        values, inputs, output = 3 * a.queries + 5 * a.keys, 0, a.queries
    of_casts = cast * (model.dim + inputs + output) + 1.5 * output if recipe.fp8 else 0.0
    return wide * (model.dim + values) + of_casts


def _mlp_bytes(model: ModelConfig, recipe: Recipe, tokens: float, ep: int, *, dense: bool, roomy: bool) -> float:
    """Input, gate and up, their product and the output; of a mixture for the shared experts and for each row, with the
    rows as they arrived and their sums."""
    wide, dim = recipe.dtype.itemsize, model.dim
    kept = 1 + 4 / TILE if recipe.fp8 else wide  # of a row that a product reads

    def of(rows: float, hidden: int) -> float:
        return rows * (kept * (dim + hidden) + wide * (2 * hidden + dim))

    own = tokens * (wide + kept) * dim
    if dense:
        return own + of(tokens, model.dense_hidden)
    e, topk = model.experts, model.router.topk
    local = e.num_experts // ep
    rows = tokens * topk + min(tokens * topk, local) * TILE / 2
    places = visits(model.router, e.num_experts, local) if ep > 1 else 1.0
    still = 0.0
    if roomy and ep > 1:  # and buffers, the same for all layers, that messages are sent from and arrive in, both ways
        rows, places = tokens * ep * min(topk, local) + local * TILE, float(ep)
        still = 2 * tokens * ep * (kept + wide) * dim
    arrived = tokens * places * (kept + (2 * wide if ep > 1 else wide)) * dim
    shared = tokens * wide * dim if e.num_shared else 0.0
    return own + still + max(of(tokens, e.num_shared * e.hidden), of(rows, e.hidden) + arrived + shared)


def head_bytes(model: ModelConfig, recipe: Recipe, tokens: int, device: torch.device) -> float:
    """The final norm's output and a chunk of logits."""
    wide = recipe.dtype.itemsize
    chunk = min(chunk_tokens(tokens, model.vocab_size, recipe.dtype, device), tokens)
    return float(wide * (tokens * model.dim + chunk * model.vocab_size))


def cache_width(attention: MlaConfig | GqaConfig) -> int:
    """Features that a cache keeps of a token and layer."""
    if isinstance(attention, MlaConfig):
        return attention.kv_lora_rank + attention.rope_dim
    return 2 * attention.keys


def entry_sizes(attention: MlaConfig | GqaConfig) -> tuple[int, int, int]:
    """(features of a token's keys, of its values, heads of them) as attention to a cache reads them."""
    if isinstance(attention, MlaConfig):
        return cache_width(attention), attention.kv_lora_rank, 1
    return attention.keys, attention.keys, attention.num_kv_heads


def cache_bytes(model: ModelConfig, recipe: Recipe, rows: int, length: int) -> int:
    """A layer's entries; of latent attention also the two halves of the up projection."""
    a, wide = model.attention, recipe.dtype.itemsize
    halves = a.num_heads * (a.nope_dim + a.v_dim) * a.kv_lora_rank if isinstance(a, MlaConfig) else 0
    return wide * (rows * length * cache_width(a) + halves)


def attend_bytes(model: ModelConfig, recipe: Recipe, rows: int, length: int, device: torch.device) -> float:
    """Of one new token of each row in one layer: its query, its output, and what lies between.

    BF16 on a GPU: sums of values, a maximum and a total of each split. Else scores and their softmax, and where entries
    are BF16 copies of them in FP32, of some rows at once; products lay the entries of a head side by side where there
    are several of several rows.
    """
    a, wide = model.attention, recipe.dtype.itemsize
    heads, (key, value, groups) = a.num_heads, entry_sizes(a)
    query, out = heads * (key // groups), heads * (value // groups)
    given = rows * (wide * (query + out) + 8)
    if wide < FP32 and device.type != "cpu":
        splits = max(rows * groups, PROGRAMS)
        return float(given + FP32 * splits * heads // groups * (value // groups + 2))
    at_once = rows if wide == FP32 else min(rows, max(1, WIDENED_VALUES // (length * key)))
    copied = FP32 * length * (groups > 1 and at_once > 1)
    widened = (FP32 * (length * (key + (groups > 1) * value) + query) if wide < FP32 else 0) + length
    scores = FP32 * heads * length
    making, softmax = copied * key + scores, 2 * scores + (wide * heads * length if wide < FP32 else 0)
    summing = 2 * scores + copied * value + FP32 * out
    return float(given + at_once * (widened + max(making, softmax, summing)))


def draw_bytes(recipe: Recipe, rows: int, num_ids: int, most_values: int) -> float:
    """Logits of every row, and of some of them at once log-probabilities in FP32 and their sums in FP64."""
    at_once = min(rows, max(1, most_values // num_ids))
    return float(num_ids * (recipe.dtype.itemsize * rows + (FP32 + FP64) * at_once))


def dealt(count: int, ranks: int) -> int:
    """The most that a rank has of what is dealt out."""
    return math.ceil(count / ranks)
