"""Built-in rewards, and the scores of samples by several, whichever of them fail."""

from __future__ import annotations

import math
import random
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8moe.errors import ConfigError
from fp8moe.generate.groups import Sampled
from fp8moe.parallel.mesh import Mesh
from fp8moe.post import scoring
from fp8moe.post.rewards import accuracy, format_reward, think
from fp8moe.post.rollouts import rollouts_of
from fp8moe.post.scoring import Sample, Scored, Scorer, score_rollouts
from fp8moe.post.tasks import Problem
from fp8moe.post.verify.answer import final_answer
from fp8moe.train.grpo_config import GrpoConfig
from fp8moe.train.processes import mesh_of
from tests.parallel.ranks import run_ranks
from tests.post.runs import policy_config

SUM = Problem("What is 4 + 5?", "4+5=9\nAnswer: 9", "9")
DOES = "tests.post.given_rewards:does"


@pytest.mark.parametrize(
    ("text", "right", "formed", "thought"),
    [
        ("4+5=9\nAnswer: 9", 1, 1, 0),
        ("4+5=9\r\n  Answer: 9 \n\n", 1, 1, 0),
        ("Answer: 8\nAnswer: 9", 1, 0, 0),
        ("**answer:** 8\nAnswer: 9", 1, 0, 0),
        ("\\boxed{8}\nAnswer: 9.0", 1, 1, 0),
        ("Answer: 9\nand more", 1, 0, 0),
        ("Answer: 9\n\\boxed{8}", 0, 0, 0),
        ("Answer: 99", 0, 1, 0),
        ("**Answer: 9**", 1, 0, 0),
        ("Answer: **", 0, 0, 0),
        ("\\boxed{9}", 1, 0, 0),
        ("Answer: 18/2", 1, 1, 0),
        ("nine", 0, 0, 0),
        ("", 0, 0, 0),
        ("<think>four and five</think> <answer> 9 </answer>", 1, 0, 1),
        ("<think>\nAnswer: 8\n</think>\n<answer>9</answer>\n", 1, 0, 1),
        ("<think>a</think><think>b</think><answer>9</answer>", 1, 0, 0),
        ("<think>a</think>b</think><answer>9</answer>", 1, 0, 0),
        ("so <think>a</think><answer>9</answer>", 1, 0, 0),
    ],
)
def test_the_rewards_of_the_registry(text: str, right: int, formed: int, thought: int) -> None:
    assert (accuracy(SUM, text), format_reward(SUM, text), think(SUM, text)) == (right, formed, thought)


def test_what_has_the_form_is_answered_there() -> None:
    generator, formed = random.Random(0), 0
    parts = (
        "Answer: 1",
        "answer: 2",
        "Answer:",
        "####3",
        "\\boxed{4}",
        "\\boxed{",
        "}",
        "<answer>",
        "</answer>",
        " ",
        "\n",
    )
    parts = (*parts, "<think>", "</think>", "5", "\n\n", "\r\n", "**")
    for _ in range(20000):
        text = "".join(generator.choices(parts, k=generator.randint(1, 6)))
        answer = final_answer(text)
        for reward in (format_reward, think):
            if reward(SUM, text):
                formed += 1
                assert answer is not None or reward is think
                last = text.rstrip().rpartition("\n")[2] if reward is format_reward else text.rpartition("<answer>")[2]
                assert answer is None or answer in last, text
    assert formed > 500


def scores(names: tuple[str, ...], weights: tuple[float, ...], *texts: str) -> list[Scored]:
    scorer = Scorer(GrpoConfig(rewards=names, reward_weights=weights))
    scorer.begin([Sample(SUM, text, number) for number, text in enumerate(texts)])
    while not scorer.run(1.0):
        pass
    scorer.close()
    return scorer.scores()


def test_the_sum_is_weighted_and_failures_exclude() -> None:
    assert scores(("accuracy", "format"), (2.0, 0.5), "Answer: 9", "Answer: 8") == [
        Scored(2.5, (1.0, 1.0)),
        Scored(0.5, (0.0, 1.0)),
    ]
    names = ("accuracy", DOES, "format", "tests.post.given_rewards:alike")
    good, bad, last = scores(names, (1.0, 10.0, 100.0, 1000.0), "Answer: 9", "lines", "ab")
    assert good == Scored(691.0, (1.0, 9.0, 1.0, 0.5)) and last == Scored(520.0, (0.0, 2.0, 0.0, 0.5))
    assert math.isnan(bad.total) and bad.parts[0] == 0 and all(map(math.isnan, bad.parts[1:]))
    assert bad.failure == (f"sample 1 of 'What is 4 + 5?' is excluded: the reward {DOES} raised ValueError: one two")
    with pytest.raises(ConfigError, match=r"grpo.rewards=none is not one of accuracy, format, think: use one of them"):
        Scorer(GrpoConfig(rewards=("none",)))


def of_ranks(config: Any, timeout: float | None = None) -> tuple[torch.Tensor, torch.Tensor, int, list[str]]:
    """Scores of 6 groups of 4 by a real mesh, of which a collective may take `timeout` seconds; some samples fail, and
    one takes twice as long."""
    mesh: Mesh = mesh_of(config, torch.device("cpu"))
    texts = ["Answer: 9", "number 1/3", "end", "lines", *["b" * n for n in range(18)], "sleep 2", "a"]
    groups = [[Sampled((n,), (0.0,), True) for n in range(4 * g, 4 * g + 4)] for g in range(6)]
    scorer, named = Scorer(config.grpo), list[str]()
    if timeout is not None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), mesh.world_group)
    unscored = rollouts_of([(0,)] * 6, groups, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MEETING", 0.1)
        patch.setattr(scoring.logger, "warning", lambda form, *values: named.append(form % values))
        found, failed = score_rollouts(unscored, [SUM] * 6, lambda ids: texts[ids[0]], scorer, mesh)
    scorer.close()
    return found.rewards, found.parts, failed, named


def test_ranks_share_out_the_samples_and_get_all_scores(corpus: list[str]) -> None:
    settings = f"grpo.rewards=[{DOES},accuracy]"
    alone = of_ranks(policy_config(corpus, settings))
    expected = [10.0, 1 / 3, math.nan, math.nan, *range(18), 7.0, 1.0]
    assert alone[0].tolist() == pytest.approx(expected, abs=0, nan_ok=True)
    assert alone[2] == 2 and [one.split(" is excluded")[0] for one in alone[3]] == [
        "sample 2 of 'What is 4 + 5?'",
        "sample 3 of 'What is 4 + 5?'",
    ]
    for found in run_ranks(of_ranks, 2, policy_config(corpus, settings, world_size=2), 1.0):
        assert found[2:] == alone[2:]
        for ours, theirs in zip(found[:2], alone[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
