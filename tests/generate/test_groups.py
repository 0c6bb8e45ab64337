"""Groups of samples: the plainest way of drawing is the oracle; batches, ranks and compaction change nothing."""

from __future__ import annotations

from itertools import chain, count
from typing import Any

import pytest
import torch

from fp8moe.errors import ConfigError
from fp8moe.generate import groups as generate_groups
from fp8moe.generate.groups import GroupSampling, Sampled, sample_groups
from fp8moe.generate.sampling import draw
from fp8moe.generate.stages import PipelineStages
from fp8moe.model.partition import partition
from fp8moe.model.transformer import generator_of
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import build_mesh
from tests.generate.small import PROMPTS, TIMEOUT, VOCABULARY, alone, recomputed, small_model
from tests.parallel.ranks import run_ranks

COUNT = 12
NAMES = [f"prompt {i}" for i in range(len(PROMPTS))]
ENDS = frozenset({11, 23, 44, 60, 71, 83})


def options(**changes: Any) -> GroupSampling:
    given = {"samples": 3, "max_tokens": COUNT, "temperature": 0.9, "batch": 64, "num_ids": VOCABULARY, "ends": ENDS}
    return GroupSampling(**(given | changes))


def ids(groups: list[list[Sampled]]) -> list[list[tuple[int, ...]]]:
    return [[one.ids for one in group] for group in groups]


def plainly(prompt: list[int], name: str, sample: int, config: GroupSampling) -> Sampled:
    """One sample, by a forward of everything for each token and a search through the distribution in FP64."""
    model, found, logprobs = small_model(), list(prompt), []
    numbers = torch.rand(config.max_tokens, dtype=torch.float64, generator=generator_of(name, sample)).tolist()
    for number in numbers:
        with torch.no_grad():
            logits = model.logits(torch.tensor([found]))[0, -1].double()
        p = (logits / config.temperature).softmax(-1)
        total, token = 0.0, -1
        while total <= number:
            token += 1
            total += float(p[token])
        found.append(token)
        logprobs.append(float(p[token].log()))
        if token in config.ends or len(found) == model.config.max_seq_len:
            break
    return Sampled(tuple(found[len(prompt) :]), tuple(logprobs), found[-1] in config.ends)


def test_every_sample_is_drawn_as_if_it_were_alone() -> None:
    groups = sample_groups(small_model(), PROMPTS, NAMES, options(), alone())
    lengths = {len(one.ids) for group in groups for one in group}
    assert len(lengths) > 4 and min(lengths) < COUNT / 2, "rows leave while others go on"
    for prompt, name, group in zip(PROMPTS, NAMES, groups, strict=True):
        assert len(set(group)) == 3
        for sample, one in enumerate(group):
            expected = plainly(list(prompt), name, sample, options())
            assert (one.ids, one.has_ended) == (expected.ids, expected.has_ended)
            assert one.logprobs == pytest.approx(expected.logprobs, abs=2e-5)


def test_small_batches_and_repetition_draw_the_same() -> None:
    model = small_model().train()
    expected = ids(sample_groups(model, PROMPTS, NAMES, options(), alone()))
    assert model.training
    assert ids(sample_groups(model, PROMPTS, NAMES, options(batch=1), alone())) == expected
    assert ids(sample_groups(model, PROMPTS[::-1], NAMES[::-1], options(batch=6), alone())) == expected[::-1]
    assert ids(sample_groups(model, PROMPTS, ["other"] * 5, options(), alone())) != expected


def test_greedy_and_the_end_of_the_context() -> None:
    model = small_model(max_seq_len=26)
    greedy = options(samples=1, temperature=0.0, ends=frozenset())
    for (one,), prompt in zip(sample_groups(model, PROMPTS, NAMES, greedy, alone()), PROMPTS, strict=True):
        count = min(COUNT, 26 - len(prompt))
        assert list(one.ids) == recomputed(model, prompt, count) and not one.has_ended
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        sample_groups(model, [[]], ["one"], greedy, alone())


def on_ranks() -> list[list[tuple[int, ...]]]:
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    model = small_model(dispatcher=make_dispatcher("all_to_all", mesh, 4, max_tokens=1), ep_rank=mesh.ep_rank)
    return ids(sample_groups(model, PROMPTS, NAMES, options(batch=6), mesh))


def test_ranks_that_share_experts_draw_the_same() -> None:
    """5 prompts, 2 at once, over 2 ranks: one has a prompt more, of other lengths, and ends later."""
    expected = ids(sample_groups(small_model(), PROMPTS, NAMES, options(), alone()))
    for found in run_ranks(on_ranks, 2):
        assert found == expected


def in_a_pipeline(placement: tuple[int, ...], ep: int, changes: dict[str, Any]) -> list[list[tuple[int, ...]]]:
    """placement: the pipeline rank of each stage, of one block each."""
    pp = max(placement) + 1
    mesh = build_mesh(pp, ep, ep, timeout=TIMEOUT)
    shape = {"num_layers": len(placement), "mtp_depth": 0}
    stages = partition(small_model(**shape).config, len(placement))
    held = [stage for stage in stages if placement[stage.index] == mesh.pp_rank]
    dispatcher = make_dispatcher("all_to_all", mesh, 4, max_tokens=1)
    model = small_model(dispatcher=dispatcher, ep_rank=mesh.ep_rank, held=held, **shape)
    local = PipelineStages(model, stages, placement, Links(mesh, TIMEOUT), mesh)
    return ids(sample_groups(model, PROMPTS, NAMES, options(batch=6, **changes), mesh, local))


@pytest.mark.parametrize(("placement", "ep", "changes"), [
    ((0, 1, 2), 1, {}), ((0, 1, 1, 0), 1, {"top_p": 0.8}), ((0, 1), 2, {}),
])  # fmt: skip
def test_ranks_of_a_pipeline_draw_the_same(placement: tuple[int, ...], ep: int, changes: dict[str, Any]) -> None:
    """5 prompts in as many sets as there are ranks, some empty; in the second placement the first rank draws."""
    model = small_model(num_layers=len(placement), mtp_depth=0)
    expected = ids(sample_groups(model, PROMPTS, NAMES, options(**changes), alone()))
    assert len({len(one) for group in expected for one in group}) > 3
    for found in run_ranks(in_a_pipeline, (max(placement) + 1) * ep, placement, ep, changes):
        assert found == expected


def test_time_ends_completions_with_the_tokens_that_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a second with every token that is drawn; and a pipeline that has no time at all."""
    whole = sample_groups(small_model(), PROMPTS, NAMES, options(), alone())
    clock = count()
    monkeypatch.setattr(generate_groups.time, "perf_counter", lambda: float(next(clock)))
    cut = sample_groups(small_model(), PROMPTS, NAMES, options(seconds=4.5), alone())
    monkeypatch.undo()
    for before, after in zip(chain(*whole), chain(*cut), strict=True):
        assert after == Sampled(before.ids[:5], before.logprobs[:5], before.has_ended and len(before.ids) <= 5)
    for found in run_ranks(in_a_pipeline, 2, (0, 1), 1, {"seconds": 1e-9}):
        assert {len(one) for group in found for one in group} == {1}


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0, float("-inf")]]).expand(20_000, -1)
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, logprobs = draw(logits, numbers, 0.5)
    p = (logits[0].double() / 0.5).softmax(-1)
    shares = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(shares.double(), p, rtol=0, atol=1e-4)
    torch.testing.assert_close(logprobs.double(), p.log()[tokens], rtol=0, atol=1e-6)
    largest, _ = draw(logits[:2], torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), 0.5)
    assert largest.tolist() == [0, 2], "a token without probability is never drawn"


def test_top_p_leaves_out_unlikely_tokens_and_keeps_the_proportions_of_the_others() -> None:
    """Probabilities 0.5, 0.3, 0.15 and 0.05: 0.7 takes two to reach. Log-probabilities stay those of all tokens."""
    p = torch.tensor([0.3, 0.05, 0.5, 0.15], dtype=torch.float64)
    logits = p.log().float().expand(20_000, -1)
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, logprobs = draw(logits, numbers, 1.0, 0.7)
    shares = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.375, 0.0, 0.625, 0.0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(logprobs.double(), p.log()[tokens], rtol=0, atol=1e-6)
