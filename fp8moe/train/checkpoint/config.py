"""When a run saves checkpoints, and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept.

    every: steps between checkpoints (0: none before the end). at_end: one after the last step. keep: how many stay;
    keep_every: those of every so many steps stay as well (0: none). background: written while training goes on.
    """

    every: int = 0
    at_end: bool = True
    keep: int = 2
    keep_every: int = 0
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every={self.every} must be at least 0: use 0 for none before the end")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be at least 1: use 1 for the newest alone")
        if self.keep_every < 0:
            raise ValueError(f"checkpoint.keep_every={self.keep_every} must be at least 0: use 0 for none")

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of that step stays for good."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save after step number `step` (from 1) of `steps`."""
        return (self.at_end and step == steps) or (self.every > 0 and step % self.every == 0)
