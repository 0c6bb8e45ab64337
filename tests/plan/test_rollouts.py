"""What a run of GRPO samples, beside its plan."""

from __future__ import annotations

from fp8moe.cli.compose import compose
from fp8moe.plan.rollouts import rollouts, rollouts_text


def test_rollouts_are_counted_apart_from_updates() -> None:
    config = compose(["experiment=r1_zero", "model=moonlight_16b", "steps=8200"]).config
    assert rollouts(config) == {
        "updates_per_batch": 16,
        "batches": 513,
        "problems": 512,
        "samples_per_problem": 16,
        "most_tokens": 512 * 16 * 32768,
    }
    text = rollouts_text(config)
    assert text is not None and "513 batches of 512 problems x 16 completions, at most 268,435,456 tokens each" in text
    plain = compose([]).config
    assert rollouts(plain) is None and rollouts_text(plain) is None
