"""Bytes of attention whose keys come from the ranks that share sequences (`context`): messages, what a layer keeps.

`MlaConfig.kept_bytes`, `input_bytes` and `work_bytes` count a layer that makes all it reads. With `cp` ranks a layer
keeps the rows that were gathered, of whole sequences, and while it runs it holds keys, values and their gradients of
whole sequences: in latent attention of every head, made of the rows by an up projection that each rank multiplies for
all tokens. For DeepSeek-V3 at 131,072 tokens that is 32 GB in one layer's backward, whatever cp is. Heads taken in
groups would need `heads_at_once` of them; all bytes of that kind are `whole_keys_bytes`.

Every figure is of one token: of a row that is gathered (`row_bytes`, `ring_row_bytes`, `whole_keys_bytes`), or of one
of the rank's own tokens, of which there are cp times as many in whole sequences (the others).
"""

from __future__ import annotations

from fp8moe.layers.attention.gqa import GqaConfig
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
    since rows stand for it. Gathered keys and values are kept in place of the rank's own.
    """
    if cp == 1:
        return 0.0
    wide, again = recipe.dtype.itemsize, recipe.recompute
    if isinstance(a, GqaConfig):
        return cp * row_bytes(a, recipe) - (0 if Recompute.MLA_UP in again else wide * 2 * a.keys)
    total = cp * (row_bytes(a, recipe) + _scales(a, recipe))
    if Recompute.NORM not in again:
        total -= wide * a.kv_lora_rank
    if Recompute.MLA_UP not in again:
        total += (cp - 1) * wide * a.num_heads * (a.qk_dim + a.nope_dim + a.v_dim)
    return total


def context_deferred_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int) -> float:
    """Bytes that weight gradients which are put off keep beyond those of a layer of one rank; 0 for that.

    Of latent attention's up projection: the gradients of its output for all tokens, under FP8 cast along columns, and
    the gathered rows.
    """
    if cp == 1 or isinstance(a, GqaConfig):
        return 0.0
    wide, outputs = recipe.dtype.itemsize, a.num_heads * (a.nope_dim + a.v_dim)
    gradient = (1 + 4 / SCALE_TILE if recipe.fp8 else wide) * outputs
    normed = 0 if Recompute.NORM in recipe.recompute else wide * a.kv_lora_rank
    return (cp - 1) * gradient + cp * (row_bytes(a, recipe) + _scales(a, recipe)) - normed


def whole_keys_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, heads_at_once: int | None = None) -> float:
    """Bytes a token of whole sequences that its keys, values and their gradients take in a layer's backward.

    heads_at_once: heads of keys that exist together; None: all. Every run of queries (`Context.runs`) has gradients of
    its own keys, which are widened to all tokens and added; the second run's keys are half of the tokens at most. The
    most is there while a run's gradients are computed, beside keys and the product of keys and values, of which values
    are a view, where latent attention has made them again; or, where keys stay, as gathered ones do, while they are
    widened.
    """
    if isinstance(a, MlaConfig):
        heads, key, value = heads_at_once or a.num_heads, a.qk_dim, a.v_dim
        let_go = key + a.nope_dim + value
        made = let_go if Recompute.MLA_UP in recipe.recompute else 0
    else:
        heads, key, value = heads_at_once or a.num_kv_heads, a.head_dim, a.head_dim
        made = let_go = 0
    run = (key + value) / 2
    computed, widened = made + max(key, run), run + max(key, value) - let_go
    return heads * recipe.dtype.itemsize * (key + value + max(computed, widened))


def context_work_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int, heads_at_once: int | None = None) -> float:
    """What `work_bytes` is with keys of whole sequences; `work_bytes` itself for one rank."""
    total = a.work_bytes(recipe)
    if cp == 1:
        return total
    wide, again = recipe.dtype.itemsize, Recompute.MLA_UP in recipe.recompute
    if isinstance(a, MlaConfig):
        own = a.num_heads * (a.qk_dim + a.v_dim + again * (a.qk_dim + a.nope_dim + a.v_dim))
    else:
        own = 2 * a.keys
    return total - wide * own + cp * whole_keys_bytes(a, recipe, heads_at_once)


def context_message_bytes(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int) -> float:
    """Bytes of the larger of a layer's two messages; 0 for one rank.

    Shares of the gradients joined, as they are cut for the ranks and as they arrive, and their sum in FP32.
    """
    values = gathered_values(a)
    return values * (3 * cp * recipe.dtype.itemsize + 4.0) if cp > 1 else 0.0


def _scales(a: MlaConfig, recipe: Recipe) -> float:
    """Bytes of a row's scales in FP32, unpacked."""
    return 4.0 * -(-a.kv_lora_rank // SCALE_TILE) if recipe.fp8 else 0.0
