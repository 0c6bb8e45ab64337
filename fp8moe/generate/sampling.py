"""Which token comes next: the likeliest, or one drawn from the model's distribution.

Temperature divides the logits; 0 takes the likeliest token. top_p keeps the fewest likeliest tokens whose probabilities
reach it (nucleus sampling, arXiv 1904.09751), renormalised. Every completion draws from a generator of its own, seeded
by `seed` and its number, once a token: what is drawn depends neither on the other prompts of a batch nor on the ranks.

Legend: B completions, N rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.limits import Range, check_fields

DRAWN_VALUES = 1 << 25  # logits whose distribution is computed at once


@dataclass(frozen=True)
class SamplingConfig:
    """temperature: 0 for greedy decoding. top_p: share of the probability that is kept. seed: of the draws."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            "sampling",
            temperature=Range(least=0, most=100, use="use 0 for greedy decoding"),
            top_p=Range(above=0, most=1, use="use 1.0 for the whole distribution"),
            seed=Range(least=0, most=2**63 - 1),
        )


def probabilities(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """FP32 [B, V] that tokens are drawn from, at a temperature above 0."""
    kept = nucleus((logits_BV.float() / config.temperature).softmax(-1), config.top_p)
    return kept if config.top_p >= 1 else kept / kept.sum(-1, keepdim=True)


def nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V] with 0 for all but the fewest likeliest tokens that reach top_p; not renormalised."""
    if top_p >= 1:
        return p_BV
    ordered, order = p_BV.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # of likelier tokens; 0 for the first, which always stays
    return torch.zeros_like(p_BV).scatter_(-1, order, ordered.masked_fill(before >= top_p, 0.0))


def draw(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] by numbers FP64 in [0, 1), and their log-probabilities FP32 at the temperature.

    temperature 0: the likeliest tokens, with their log-probabilities at temperature 1. top_p: as above.
    """
    tokens, logprobs = [], []
    size = max(1, DRAWN_VALUES // logits_NV.shape[1])
    for logits, uniform in zip(logits_NV.split(size), uniform_N.split(size), strict=True):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            chosen = logp.argmax(-1)
        else:
            reached = nucleus(logp.double().exp_(), top_p).cumsum_(-1)
            chosen = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
            chosen = chosen.clamp(max=logp.shape[1] - 1)
        tokens.append(chosen)
        logprobs.append(logp.gather(1, chosen[:, None])[:, 0])
    return torch.cat(tokens), torch.cat(logprobs)


class Sampler:
    """Draws for the completions `numbers`, from ids below `num_ids`: those that the tokenizer can decode."""

    def __init__(self, config: SamplingConfig, numbers: Sequence[int], num_ids: int, device: torch.device) -> None:
        self._config, self._num_ids = config, num_ids
        self._generators = {number: _generator(config.seed, number, device) for number in numbers}

    def draw(self, numbers: Sequence[int], logits_BV: Tensor) -> list[int]:
        """The next token of completions `numbers`, of their logits."""
        logits_BV = logits_BV[:, : self._num_ids]
        if self._config.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        rows = probabilities(logits_BV, self._config)
        return [
            int(torch.multinomial(p_V, 1, generator=self._generators[number]))
            for number, p_V in zip(numbers, rows, strict=True)
        ]


def _generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))
