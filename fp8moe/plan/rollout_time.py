"""Seconds of what a run of GRPO does between updates: rollouts, and log-probabilities of what was sampled.

Lengths of completions are an assumption, the mean `mean_tokens` and the longest grpo.max_tokens: of the rows of a batch
the share (1 - t / max_tokens)^(max_tokens / mean_tokens - 1) goes on behind token t, which is what even lengths are at
a mean of one half. Rows that have ended are computed until half of those that are there have. A batch takes as many
forwards as its longest completion has tokens, on all ranks.

In a pipeline a set of rows is at each stage at once: a token of all rows takes as long as the slowest stage needs for
all sets, or as one set needs for all stages. Scoring, the reward functions and the first token's wait are left out.

Log-probabilities are forwards of a batch's rows by the weights in training and, with grpo.kl, by the reference; the
reference's weights come from the host and go back, which is left out. Rows are taken to be full, as those of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fp8moe.plan.cluster import Cluster
from fp8moe.plan.forward_time import Decoding, forward_seconds, token_seconds
from fp8moe.plan.network import Exchange, neighbour_seconds
from fp8moe.plan.rates import Card
from fp8moe.plan.rollout_memory import has_rollouts, rollout_sizes, sampling_stages
from fp8moe.plan.step_time import sizes_of
from fp8moe.train.config import TrainConfig, stages_of

PARTS = 4  # of a stretch of tokens with as many rows, each timed at its middle


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of one batch of rollouts. prompts, tokens: of sampling, None where a server samples. scoring:
    log-probabilities. updates: the steps that learn from it. mean_tokens: the assumed mean of a completion."""

    prompts: float | None
    tokens: float | None
    scoring: float
    updates: float
    mean_tokens: float
    samples: int
    gpus: int

    @property
    def sampling(self) -> float:
        """Seconds of sampling; 0 where a server does it."""
        return (self.prompts or 0.0) + (self.tokens or 0.0)

    @property
    def seconds(self) -> float:
        """Of a batch and all its updates."""
        return self.sampling + self.scoring + self.updates

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        """Tokens that one GPU samples in a second of sampling."""
        return self.samples * self.mean_tokens / self.sampling / self.gpus if self.sampling else None


def rollout_time(config: TrainConfig, cluster: Cluster, step_seconds: float, mean_tokens: float) -> RolloutTime:
    """Of a resolved configuration of GRPO whose updates take `step_seconds` each."""
    grpo = config.grpo
    prompts = tokens = None
    if has_rollouts(config):
        rounds = rollout_sizes(config).rounds
        prompts, tokens = rounds * _prompts(config, cluster), rounds * _tokens(config, cluster, mean_tokens)
    return RolloutTime(
        prompts,
        tokens,
        scoring=(1 + (grpo.kl > 0)) * _scoring(config, cluster),
        updates=grpo.updates * step_seconds,
        mean_tokens=mean_tokens,
        samples=grpo.group_samples,
        gpus=config.parallel.pp * config.dp,
    )


def _card(config: TrainConfig, cluster: Cluster) -> Card:
    return Card(cluster.gpu, cluster.hbm_gb_per_second * 1e9, config.recipe.fp8)


def _exchange(config: TrainConfig, cluster: Cluster) -> Exchange:
    """In one hop, whatever the updates' dispatcher is."""
    return Exchange("all_to_all", config.ep, min(cluster.gpus_per_node, config.ep))


def _scoring(config: TrainConfig, cluster: Cluster) -> float:
    """Forwards of a whole batch of rollouts, the pipeline filled once."""
    sizes, card = sizes_of(config, cluster), _card(config, cluster)
    each = [forward_seconds(sizes, stage, card, cluster) for stage in stages_of(config)]
    if config.parallel.schedule == "dualpipe":  # both directions, half of the micro-batches each
        of_rank = [a + b for a, b in zip(each, reversed(each), strict=True)]
        passes = config.grpo.minibatches * config.num_microbatches / 2
    else:
        folded = config.parallel.schedule == "dualpipev"
        of_rank = [a + b for a, b in zip(each, reversed(each), strict=True)] if folded else each
        passes = config.grpo.minibatches * config.num_microbatches
    return passes * max(of_rank) + sum(each) - max(each)


def _prompts(config: TrainConfig, cluster: Cluster) -> float:
    """Of the prompts of one round, as long as they may be."""
    of = rollout_sizes(config)
    sizes = replace(
        sizes_of(config, cluster),
        tokens=of.prompts_together * of.longest_prompt,
        seq_len=of.longest_prompt,
        exchange=_exchange(config, cluster),
        gather=None,
    )
    card = _card(config, cluster)
    each = [forward_seconds(sizes, replace(stage, head=False), card, cluster) for stage in stages_of(config)]
    parts = math.ceil(of.prompts / of.prompts_together)
    return parts * max(each) + sum(each) - max(each)


def _tokens(config: TrainConfig, cluster: Cluster, mean_tokens: float) -> float:
    """Of all tokens of one round."""
    of, most = rollout_sizes(config), config.grpo.max_tokens
    stages = stages_of(config)
    ranks = [sampling_stages(config, stages, rank) for rank in range(config.parallel.pp)]
    ids, graphs = config.data.vocab_size, config.grpo.cuda_graphs
    decoding = Decoding(config.model, config.recipe, _exchange(config, cluster), ids, graphs)
    card = _card(config, cluster)
    seconds = 0.0
    for count, middle, rows in stretches(of.rows_of_set, most, mean_tokens):
        length = of.longest_prompt + middle
        each = [sum(token_seconds(decoding, one, rows, length, card, cluster) for one in held) for held in ranks]
        message = 2.0 * rows * config.model.dim
        passed = 0.0 if len(ranks) == 1 else len(ranks) * neighbour_seconds(cluster, config.dp, message)
        seconds += count * max(of.sets * max(each), sum(each) + passed)
    return seconds


def stretches(rows: int, most: int, mean: float) -> Iterator[tuple[float, float, int]]:
    """(tokens, the middle one's number, rows) of stretches in which as many rows are computed; `most` tokens in all."""
    exponent = most / min(mean, most) - 1
    begin = 0.0
    for halvings in range(rows.bit_length()):
        is_last = halvings == rows.bit_length() - 1 or exponent == 0
        end = most if is_last else most * (1 - 0.5 ** ((halvings + 1) / exponent))
        for part in range(PARTS):
            count = (end - begin) / PARTS
            yield count, begin + (part + 0.5) * count, max(1, rows >> halvings)
        if is_last:
            return
        begin = end
