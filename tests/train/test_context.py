"""Ranks that share sequences take the one-process step: under every layout, schedule and family, with documents."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import run_ranks
from tests.train.test_pipeline import SETTINGS, check, one_step

# cp, ep, pp, schedule
LAYOUTS = [
    (2, 1, 1, "1f1b"),
    (4, 1, 1, "1f1b"),
    (2, 2, 1, "dualpipev"),
    (2, 1, 2, "zb1p"),
    (2, 1, 2, "dualpipe"),
]


@pytest.fixture(scope="module")
def alone(corpus: list[str]) -> dict[str, Any]:
    answer = one_step([*corpus, *SETTINGS, "precision=fp32"], 1)
    assert answer["gap"] > 1e-5, f"two experts nearly tie ({answer['gap']:.1e}): choose another seed"
    return answer


@pytest.mark.parametrize("cp, ep, pp, schedule", LAYOUTS)
def test_fp32_step_is_the_one_process_step(
    corpus: list[str], alone: dict[str, Any], cp: int, ep: int, pp: int, schedule: str
) -> None:
    world = cp * ep * pp
    settings = [*corpus, *SETTINGS, "precision=fp32", f"parallel.cp={cp}", f"parallel.ep={ep}", f"parallel.pp={pp}",
                f"parallel.schedule={schedule}"]  # fmt: skip
    check(run_ranks(one_step, world, settings, world), alone, mtp_tied=schedule == "zb1p")
