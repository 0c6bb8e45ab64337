"""Draws: their distribution against torch's multinomial, temperature and top-p by hand, generators apart."""

from __future__ import annotations

import math

import pytest
import torch

from fp8moe.generate.sampling import Sampler, SamplingConfig, probabilities

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5, -3.0]])


def counts(config: SamplingConfig, draws: int = 6000) -> torch.Tensor:
    """How often each token is drawn, by one completion's generator."""
    sampler = Sampler(config, [4], 6, CPU)
    return torch.bincount(torch.tensor([sampler.draw([4], LOGITS)[0] for _ in range(draws)]), minlength=6)


@pytest.mark.parametrize("config", [SamplingConfig(1.0), SamplingConfig(0.6, 0.8, seed=2), SamplingConfig(3.0, 0.99)])
def test_draws_are_distributed_as_those_of_torch(config: SamplingConfig) -> None:
    """Both chi-squared distances to the probabilities are below what 1 of 10,000 honest samplers exceeds."""
    expected = probabilities(LOGITS, config)[0].double()
    by_torch = torch.bincount(
        torch.multinomial(expected, 6000, replacement=True, generator=torch.Generator().manual_seed(0)), minlength=6
    )
    kept = expected > 0
    for found in (counts(config), by_torch):
        assert found[~kept].sum() == 0
        distance = ((found[kept] - 6000 * expected[kept]) ** 2 / (6000 * expected[kept])).sum()
        assert distance < 23.5


def test_temperature_and_top_p_by_hand() -> None:
    weights = [math.exp(logit / 0.5) for logit in LOGITS[0].tolist()]
    whole = torch.tensor([[w / sum(weights) for w in weights]])
    torch.testing.assert_close(probabilities(LOGITS, SamplingConfig(0.5)), whole)
    first, second = whole[0, 0].item(), whole[0, 4].item()
    cut = probabilities(LOGITS, SamplingConfig(0.5, top_p=first + 0.5 * second))
    expected = torch.tensor([[first, 0, 0, 0, second, 0]]) / (first + second)
    torch.testing.assert_close(cut, expected)
    torch.testing.assert_close(probabilities(LOGITS, SamplingConfig(0.5, 1e-6)), torch.eye(6)[:1])


def test_greedy_takes_the_likeliest_that_the_tokenizer_has() -> None:
    sampler = Sampler(SamplingConfig(), [0, 1], 4, CPU)
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0, 9.0], [5.0, 1.0, 3.0, 2.0, 9.0]])
    assert sampler.draw([0, 1], logits) == [2, 0]
    drawn = Sampler(SamplingConfig(50.0), [0], 4, CPU)
    assert {drawn.draw([0], logits[:1])[0] for _ in range(100)} == {0, 1, 2, 3}


def test_a_completion_draws_by_its_number_and_seed_alone() -> None:
    logits = torch.zeros(1, 1000)

    def drawn(seed: int, number: int, others: tuple[int, ...] = ()) -> list[int]:
        sampler = Sampler(SamplingConfig(1.0, seed=seed), [number, *others], 1000, CPU)
        found = []
        for _ in range(5):
            found.append(sampler.draw([*others, number], logits.expand(len(others) + 1, -1))[-1])
        return found

    assert drawn(1, 2) == drawn(1, 2, (7, 0))
    assert len({tuple(drawn(seed, number)) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("name, value", [
    ("temperature", -1.0), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1), ("seed", -1),
])  # fmt: skip
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^sampling\.{name}="):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
