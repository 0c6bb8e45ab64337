"""Memory of the rollouts of a run of GRPO, by the built-in generator (`generate.groups`), on one pipeline rank.

A rank has problems of its own, the whole batch's dealt out over dp, `grpo.rollout_batch` samples at once and at least
one problem's. In a pipeline it caches its own blocks alone and works on as many sets of rows as there are pipeline
ranks, one after the other (`sets`). Counted is the most: no sample ends before grpo.max_tokens, and prompts are as long
as a row of seq_len + 1 tokens leaves room for. Held-out problems, which have one sample each, are another such batch.

Nothing of an update is there meanwhile but what lives from step to step. A rollout server's memory is none of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fp8moe.model.partition import Stage
from fp8moe.plan.forward_work import attend_bytes, cache_bytes, cache_width, draw_bytes, forward_bytes
from fp8moe.train.config import TrainConfig

# As in `generate.groups`, which stands beside this floor; a test holds them to it.
PROMPT_TOKENS = 1 << 14  # of prompts that go through the model together, about
DRAWN_VALUES = 1 << 25  # logits whose distribution is computed at once
NUMBERS = 8 + 8 + 4  # bytes of a token's drawn number, id and log-probability


@dataclass(frozen=True)
class RolloutSizes:
    """prompts: that a rank decodes at once, in `sets` parts; rounds: of so many. length: tokens of a cache's row."""

    prompts: int
    samples: int
    rounds: int
    sets: int
    length: int
    longest_prompt: int

    @property
    def rows(self) -> int:
        """Samples at once."""
        return self.prompts * self.samples

    @property
    def rows_of_set(self) -> int:
        """Of those that go through a stage together."""
        return math.ceil(self.prompts / self.sets) * self.samples

    @property
    def prompts_together(self) -> int:
        """Prompts of a set that go through a stage together."""
        return min(math.ceil(self.prompts / self.sets), max(1, PROMPT_TOKENS // self.longest_prompt))


def has_rollouts(config: TrainConfig) -> bool:
    """Whether the run itself samples completions."""
    return is_policy(config) and config.grpo.server is None


def is_policy(config: TrainConfig) -> bool:
    """Whether it is a run of GRPO."""
    return config.data.source == "problems"


def rollout_sizes(config: TrainConfig) -> RolloutSizes:
    """Of a batch of rollouts of a resolved configuration."""
    return _sizes(config, config.grpo.prompts, config.grpo.samples)


def sampled_sizes(config: TrainConfig) -> list[RolloutSizes]:
    """The same, and of held-out problems where there are any."""
    held_out = config.grpo.held_out_count
    return [rollout_sizes(config), *([_sizes(config, held_out, 1)] if held_out else [])]


def _sizes(config: TrainConfig, problems: int, samples: int) -> RolloutSizes:
    grpo = config.grpo
    mine = math.ceil(problems / config.dp)
    at_once = min(mine, max(1, grpo.rollout_batch // samples))
    longest = max(1, config.seq_len + 1 - grpo.max_tokens)
    length = min(config.model.max_seq_len, longest + grpo.max_tokens)
    return RolloutSizes(at_once, samples, math.ceil(mine / at_once), min(config.parallel.pp, at_once), length, longest)


def sampling_stages(config: TrainConfig, stages: tuple[Stage, ...], pp_rank: int) -> list[Stage]:
    """Stages that a pipeline rank samples with; a pipeline that goes both ways is used in its first direction."""
    folded = config.parallel.schedule == "dualpipev"
    return [stages[pp_rank], *([stages[len(stages) - 1 - pp_rank]] if folded else [])]


def cached_bytes(config: TrainConfig, stages: list[Stage], sizes: RolloutSizes) -> float:
    """What a batch of rows keeps: caches of the rank's blocks, numbers by which tokens are drawn, experts."""
    model, recipe = config.model, config.recipe
    layers = sum(stage.num_layers for stage in stages)
    shared = cache_bytes(model, recipe, 0, 0) * sizes.sets  # each set has caches of its own
    entries = cache_bytes(model, recipe, sizes.rows, sizes.length) - cache_bytes(model, recipe, 0, 0)
    noted = noted_bytes(config) * sizes.rows * sizes.length if sizes.samples > 1 else 0  # of held-out answers nothing
    return float(layers * (entries + shared) + NUMBERS * sizes.rows * config.grpo.max_tokens + noted)


def noted_bytes(config: TrainConfig, least: int = 1) -> int:
    """Bytes a token of its experts in all layers, where the rollout's are replayed, at least so many a number."""
    experts = config.model.experts.num_experts
    number = 1 if experts <= 2**8 else 2 if experts <= 2**15 else 4
    choices = len(config.model.expert_layers) * config.model.router.topk
    return max(number, least) * choices if config.grpo.router_replay else 0


def sampling_work(config: TrainConfig, stages: list[Stage], sizes: RolloutSizes, device: torch.device) -> float:
    """The most that comes and goes beside it: prompts, a token of each row, a copy of a layer's cache, drawing."""
    model, recipe, ep = config.model, config.recipe, config.ep
    layers = [layer for stage in stages for layer in stage.layers]
    rows = sizes.rows_of_set
    prompts = forward_bytes(model, recipe, layers, sizes.prompts_together * sizes.longest_prompt, ep)
    token = forward_bytes(model, recipe, layers, rows, ep, roomy=config.grpo.cuda_graphs)
    token += attend_bytes(model, recipe, rows, sizes.length, device)
    copied = recipe.dtype.itemsize * rows * sizes.length * cache_width(model.attention)
    head = any(stage.head for stage in stages)
    drawing = draw_bytes(recipe, rows, config.data.vocab_size, DRAWN_VALUES) if head else 0.0
    return max(prompts, token, float(copied), drawing)
