"""Rollouts of a run of GRPO, counted apart from its updates, which are what the rest of a plan is of.

Their time is not predicted: it depends on how long the answers become, and on a generator's rate that was never
measured on a GPU here.
"""

from __future__ import annotations

from fp8moe.train.config import TrainConfig


def rollouts(config: TrainConfig) -> dict[str, int] | None:
    """What the run samples: updates a batch, batches, completions, the most tokens of a batch; None of other runs."""
    if config.data.source != "problems":
        return None
    grpo = config.grpo
    return {
        "updates_per_batch": grpo.updates,
        "batches": -(-config.steps // grpo.updates),
        "problems": grpo.prompts,
        "samples_per_problem": grpo.samples,
        "most_tokens": grpo.group_samples * grpo.max_tokens,
    }


def rollouts_text(config: TrainConfig) -> str | None:
    """The same as a line; None of other runs."""
    found = rollouts(config)
    if found is None:
        return None
    return (
        f"rollouts, which none of these figures counts: {found['batches']:,} batches of {found['problems']:,} problems "
        f"x {found['samples_per_problem']} completions, at most {found['most_tokens']:,} tokens each, for "
        f"{found['updates_per_batch']} updates"
    )
