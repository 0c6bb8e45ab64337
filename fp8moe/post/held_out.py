"""Accuracy on held-out problems, by the likeliest answer to each; some answers, before and after, for a reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fp8moe.data.durable import write_text
from fp8moe.generate.groups import GroupSampling
from fp8moe.post.problems import Posed
from fp8moe.post.rewards import accuracy
from fp8moe.post.rollouts import Generator
from fp8moe.post.tasks import Problem
from fp8moe.train.json_lines import SAMPLES
from fp8moe.train.run import Run

SHOWN = 4  # answers that are kept for a reader


class HeldOut:
    """Problems that are never trained on, at most `max_tokens` an answer, `batch` answers of a rank at once."""

    def __init__(self, problems: Sequence[Problem], posed: Posed, max_tokens: int, batch: int) -> None:
        self._problems, self._posed = problems, posed
        self._prompts = [posed.prompt(problem) for problem in problems]
        self._sampling = GroupSampling(1, max_tokens, 0.0, batch, posed.vocabulary.num_ids, posed.ends)

    def score(self, run: Run, generator: Generator, when: str) -> dict[str, Any]:
        """Share of the problems answered rightly, and the mean length of the answers; nothing without problems.

        The first answers are kept in the run directory, beside those of the run's beginning. Collective.
        """
        if not self._problems:
            return {}
        names = [str(number) for number in range(len(self._problems))]
        found = [group[0] for group in generator.sample(self._prompts, names, self._sampling)]
        texts = [self._posed.text(one.ids) for one in found]
        right = sum(accuracy(problem, text) for problem, text in zip(self._problems, texts, strict=True))
        figures = {
            "held_out_accuracy": right / len(texts),
            "held_out_length": sum(len(one.ids) for one in found) / len(found),
        }
        if run.is_first and run.run_dir.is_dir():
            self._keep(run, texts, when, figures["held_out_accuracy"])
        return figures

    def _keep(self, run: Run, texts: Sequence[str], when: str, share: float) -> None:
        path = run.run_dir / SAMPLES
        before: list[dict[str, Any]] = []
        with suppress(OSError, ValueError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))["samples"]
            before = [one for one in kept if one.get("when") == "before"]
        now = [
            {"prompt": f"{problem.prompt}\n", "text": text, "when": when, "accuracy": share}
            for problem, text in zip(self._problems[:SHOWN], texts, strict=False)
        ]
        with suppress(OSError):
            write_text(path, json.dumps({"step": run.step, "samples": [*before, *now]}, indent=1) + "\n")
        if when == "before":
            print(f"held-out accuracy before step 1: {share:.1%} of {len(texts)} problems", flush=True)
