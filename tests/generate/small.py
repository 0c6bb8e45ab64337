"""Small models for generation, and the plainest way to continue a prompt: all of it, for every token."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from fp8moe.generate.captured import DecodingGraphs
from fp8moe.generate.decode import Completion, Figures, GenerationConfig, generate
from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.partition import Stage
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.mesh import Mesh, build_mesh
from tests.model.shapes import model_config

VOCABULARY = 97
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, dim=64, num_layers=2, num_dense_layers=1, dense_hidden=64, num_heads=3, q_lora_rank=32,
    kv_lora_rank=48, nope_dim=32, rope_dim=16, v_dim=16, topk=2, num_groups=2, top_groups=2, num_experts=4,
    expert_hidden=32, mtp_depth=1, init_std=0.15, max_seq_len=64,
)  # fmt: skip
OF_MLA = ("num_heads", "q_lora_rank", "kv_lora_rank", "nope_dim", "rope_dim", "v_dim")
TIMEOUT = timedelta(seconds=60)
PROMPTS = [[5, 3, 90], [7] * 11, [1, 2], list(range(20, 43)), [96]]


def small_model(
    precision: Precision = Precision.FP32,
    dispatcher: Dispatcher | None = None,
    ep_rank: int = 0,
    *,
    held: Sequence[Stage] | None = None,
    **changes: Any,
) -> Transformer:
    """A model of random weights whose greedy text does not repeat itself at once; held: the stages it has, not all."""
    shape = {name: size for name, size in SHAPE.items() if changes.get("kind") != "gqa" or name not in OF_MLA}
    config: ModelConfig = model_config(**shape | changes)
    part: dict[str, Any] = {}
    if held is not None:
        part["layers"] = [layer for stage in held for layer in stage.layers]
        part |= {"embedding": any(one.embedding for one in held), "head": any(one.head for one in held)}
    model = Transformer(config, Recipe(precision), dispatcher or LocalDispatcher(4), gradients=False, **part)
    init_weights(model, seed=3, ep_rank=ep_rank)
    quantize_weights(model)
    return model.eval()


def alone() -> Mesh:
    return build_mesh(1, 1, 1, timeout=TIMEOUT)


@torch.no_grad()
def recomputed(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens after a prompt, greedy: every token from a forward of everything before it, without caches."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def generated(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    mesh: Mesh | None = None,
    *,
    stop: int | None = None,
    graphs: DecodingGraphs | None = None,
    **options: Any,
) -> tuple[list[Completion], Figures]:
    """Completions by `generate`, which end at the token `stop`."""
    return generate(
        model, prompts, GenerationConfig(**options), mesh or alone(), num_ids=VOCABULARY,
        accept=lambda _, token: token == stop, graphs=graphs,
    )  # fmt: skip


def ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [one.ids for one in completions]
