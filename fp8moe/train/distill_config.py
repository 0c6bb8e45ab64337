"""Settings of learning from a teacher's distribution over the next token, in `fp8moe sft` and `fp8moe train`.

They stand on this floor, below `fp8moe.post.distill` which reads them, because a run's configuration is one class
(`train.config.TrainConfig`): a run that goes on then opens the same teacher again.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8moe.errors import ConfigError
from fp8moe.limits import POSITIVE, Range, check_fields
from fp8moe.parallel.config import ParallelConfig
from fp8moe.train import checkpoint


@dataclass(frozen=True)
class DistillConfig:
    """A teacher with the same tokenizer, and how much of the loss is the KL from its distribution to the model's."""

    # a run, checkpoint or Hugging Face directory, whose model is evaluated on the batches of every step; None: no
    # teacher
    teacher: str | None = None
    topk: int = 64  # likeliest tokens of the teacher that keep their own probability; all others are one outcome
    weight: float = 0.5  # of the KL in the loss; the cross entropy of the labels has 1 - this
    temperature: float = 1.0  # the logits of both are divided by it in the KL, which is multiplied by its square

    def __post_init__(self) -> None:
        check_fields(
            self,
            "distill",
            topk=POSITIVE,
            weight=Range(above=0, most=1, use="use distill.teacher=null for none"),
            temperature=Range(least=0.01, most=100),
        )

    @property
    def has_two_softmaxes(self) -> bool:
        """Whether a chunk's logits are there twice: divided by the temperature for the KL, and as they are."""
        return self.teacher is not None and self.temperature != 1 and self.weight < 1

    def check(self, parallel: ParallelConfig, vocab_size: int) -> None:
        """Raises ConfigError or ValueError where a run so laid out can't have the teacher; opens nothing."""
        if self.teacher is None:
            return
        checkpoint.refuse_password("distill.teacher", self.teacher)
        if parallel.pp > 1:
            raise ConfigError(
                f"a teacher is held whole, beside the head, and parallel.pp={parallel.pp} cuts models: use "
                "parallel.pp=1, or distill.teacher=null"
            )
        if parallel.cp > 1:
            raise ConfigError(
                f"a teacher reads whole sequences and parallel.cp={parallel.cp} gives each rank a part: use "
                "parallel.cp=1, or distill.teacher=null"
            )
        if self.topk > vocab_size:
            raise ValueError(
                f"distill.topk={self.topk} exceeds model.vocab_size={vocab_size}: use at most {vocab_size}, which "
                "gives the exact KL"
            )
