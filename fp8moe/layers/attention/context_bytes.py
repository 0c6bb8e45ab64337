"""Bytes of attention whose keys come from the ranks that share sequences (`context`): messages, what a layer keeps.

`MlaConfig.kept_bytes`, `input_bytes` and `work_bytes` count a layer that makes all it reads. With `cp` ranks a layer
keeps the rows that were gathered, of whole sequences, and while it runs it holds keys, values and their gradients of
whole sequences, for as many heads as run at once: grouped-query attention's few, of latent attention those of a group
(`latent_context.heads_at_once`). All of DeepSeek-V3's heads would take 26 GB at 131,072 tokens, whatever cp is; its
groups of 16 take 5.1 GB. Kernels are those of variable length, which read a copy of each run's keys (`Context.by_run`),
half a chunk more than there are, together.

Every figure is of one token: of whole sequences (`row_bytes`, `ring_row_bytes`, `whole_keys_bytes`), or of a rank's
own, of which there are cp times fewer (the others).
"""

from __future__ import annotations

from fp8moe.layers.attention.gqa import GqaConfig
from fp8moe.layers.attention.latent_context import heads_at_once
from fp8moe.layers.attention.mla import MlaConfig
from fp8moe.layers.recipe import Recipe, Recompute

SCALE_TILE = 128  # values of a row with one scale: a byte in a message, FP32 in memory


def gathered_values(a: MlaConfig | GqaConfig) -> int:
    """Values of a token that other ranks make keys and values of: its latent and rotary part, or both themselves."""
    return a.kv_lora_rank + a.rope_dim if isinstance(a, MlaConfig) else 2 * a.keys


def row_bytes(a: MlaConfig | GqaConfig, recipe: Recipe) -> float:
    """Bytes of a token's row in the gather; under FP8 a latent is codes and a byte a scale."""
    wide = recipe.dtype.itemsize
    if isinstance(a, MlaConfig) and recipe.fp8:
        return a.kv_lora_rank + -(-a.kv_lora_rank // SCALE_TILE) + wide * a.rope_dim
    return float(wide * gathered_values(a))


def ring_row_bytes(a: MlaConfig | GqaConfig, recipe: Recipe) -> float:
    """Bytes of the same token where keys and values of all heads travel, as ring attention sends them."""
    features = a.num_heads * (a.qk_dim + a.v_dim) if isinstance(a, MlaConfig) else 2 * a.keys
    return float(recipe.dtype.itemsize * features)


def context_kept_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int) -> float:
    """Bytes that a layer keeps for its backward beyond `kept_bytes`; 0 for one rank.

    The rows of whole sequences, as they arrived, and their unpacked scales. Latent attention without `mla_up` keeps
    keys and the product of keys and values of whole sequences; without `norm` the normed latent itself is not kept,
    since rows stand for it. Gathered keys and values are kept in place of the rank's own, without `mla_up` with a copy
    for the kernel.
    """
    if cp == 1:
        return 0.0
    wide, again = recipe.dtype.itemsize, recipe.recompute
    if isinstance(a, GqaConfig):
        copies = 0.0 if Recompute.MLA_UP in again else _in_runs(cp) - 1 / cp
        return cp * (row_bytes(a, recipe) + copies * wide * 2 * a.keys)
    total = cp * (row_bytes(a, recipe) + _scales(a, recipe))
    if Recompute.NORM not in again:
        total -= wide * a.kv_lora_rank
    if Recompute.MLA_UP not in again:
        total += (cp - 1) * wide * a.num_heads * (a.qk_dim + a.nope_dim + a.v_dim)
    return total


def context_deferred_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int) -> float:
    """What weight gradients that are put off keep beyond those of a layer of one rank: bytes below 0, or 0 for that.

    Latent attention's up projection of keys has its weight gradient at once: nothing of its output's gradients is kept,
    and nothing of what columns of its input are made of.
    """
    if cp == 1 or isinstance(a, GqaConfig):
        return 0.0
    wide, outputs = recipe.dtype.itemsize, a.num_heads * (a.nope_dim + a.v_dim)
    normed = 0 if Recompute.NORM in recipe.recompute else wide * a.kv_lora_rank
    return -((1 + 4 / SCALE_TILE if recipe.fp8 else wide) * outputs + 4 * recipe.fp8 + normed)


def key_heads_at_once(a: MlaConfig | GqaConfig, recipe: Recipe, tokens: int) -> int:
    """Heads of keys that exist together, at `tokens` of whole sequences."""
    return heads_at_once(a, recipe, tokens) if isinstance(a, MlaConfig) else a.num_kv_heads


def whole_keys_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int, heads: int) -> float:
    """Bytes a token of whole sequences that `heads` heads of keys, values and their gradients take while a layer runs.

    With `mla_up` latent attention makes keys and the product of keys and values, of which values are a view, and copies
    them for the kernel; grouped-query attention copies what was gathered. Then the copies and their gradients are
    there, and these are widened to all tokens, run by run. Beside it stand latent attention's gradients of latents, of
    two groups and their sum.
    """
    mla = isinstance(a, MlaConfig)
    key, value = (a.qk_dim, a.v_dim) if isinstance(a, MlaConfig) else (a.head_dim, a.head_dim)
    run = (key + value) * _in_runs(cp)
    made = key + a.nope_dim + value if isinstance(a, MlaConfig) else 0
    features = run + max(made, run) if Recompute.MLA_UP in recipe.recompute else max(run, 2 * key)
    return recipe.dtype.itemsize * (heads * features + (3 * gathered_values(a) if mla else 0))


def context_work_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int, tokens: int) -> float:
    """What `work_bytes` is with keys of whole sequences of `tokens` tokens in all; `work_bytes` itself for one rank."""
    total, wide = a.work_bytes(recipe), recipe.dtype.itemsize
    if cp == 1:
        return total
    heads = key_heads_at_once(a, recipe, tokens)
    whole, again = cp * whole_keys_bytes(a, recipe, cp, heads), Recompute.MLA_UP in recipe.recompute
    if isinstance(a, GqaConfig):  # queries are made again with the product that they are cut from
        return total - wide * 2 * a.keys + again * wide * (a.queries + 2 * a.keys) + whole
    # Forward the queries, then the outputs, of all heads; going back a group's queries, output and their gradients.
    forward = wide * a.num_heads * max(a.qk_dim, a.v_dim)
    of_group = wide * ((1 + again) * a.qk_dim + a.v_dim * recipe.fp8) + 4 * a.qk_dim + 4
    return max(forward, heads * of_group + wide * a.num_heads * a.v_dim) + whole


def _in_runs(cp: int) -> float:
    """Keys of a sequence's two runs over its tokens, whatever the rank."""
    return 1 + 1 / (2 * cp)


def context_message_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int) -> float:
    """Bytes of the larger of a layer's two messages; 0 for one rank.

    Shares of the gradients joined, as they are cut for the ranks and as they arrive, and their sum in FP32.
    """
    values = gathered_values(a)
    return values * (3 * cp * recipe.dtype.itemsize + 4.0) if cp > 1 else 0.0


def _scales(a: MlaConfig, recipe: Recipe) -> float:
    """Bytes of a row's scales in FP32, unpacked."""
    return 4.0 * -(-a.kv_lora_rank // SCALE_TILE) if recipe.fp8 else 0.0
