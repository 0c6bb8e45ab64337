"""`fp8moe grpo`: reinforcement learning by GRPO. It is `fp8moe train` with another method and other defaults.

What a new run begins with is `experiment=grpo`, or the experiment that is typed, over the model, precision and
tokenizer of `init_from`, a run or a released model. The samples of an update are its batch: batch.sequences follows
from grpo.* unless it is typed. A run that goes on has its own configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8moe.cli.command import Parser
    from fp8moe.train.method import Method

EXPERIMENT = "grpo"
DESCRIPTION = """\
Improve a fine-tuned model by GRPO: completions of problems are sampled in groups, rewarded by functions, and made more
or less likely by how they score beside the others of their group. Problems are a task's or JSON lines with prompt and
answer. Everything else is as in fp8moe train: settings, processes, checkpoints, resume.

  fp8moe grpo init_from=runs/sft run_dir=runs/rl steps=200
  fp8moe grpo init_from=runs/sft data.paths=[problems.jsonl] grpo.samples=16 run_dir=runs/rl
  fp8moe grpo --nproc 2 init_from=runs/sft parallel.ep=2 run_dir=runs/rl
  fp8moe grpo init_from=models/base experiment=r1_zero data.paths=[problems.jsonl] run_dir=runs/zero
  fp8moe grpo init_from=runs/sft run_dir=runs/rl grpo.server=http://HOST:30000/v1 grpo.server_model=policy
      grpo.refresh_url=http://HOST:30000/update_weights_from_disk grpo.stale=1
  fp8moe grpo resume=runs/rl steps=400                   goes on there
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    from fp8moe.cli.train import parser_of

    return parser_of("grpo", DESCRIPTION)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code; a worker that fails ends its process with the failure's code."""
    from fp8moe.cli.train import Command, run

    return run(Command("grpo", command_parser, begin, method), argv)


def method() -> Method:
    """What its steps work on."""
    from fp8moe.post.grpo import Grpo

    return Grpo(export_weights)


def export_weights(path: Path, run: Path, out: Path, precision: str) -> None:
    """A checkpoint of a run's masters as a Hugging Face directory, as `fp8moe export` writes it."""
    from fp8moe.cli.export_model import write_export

    write_export(path, run, out, precision)


def begin(settings: Sequence[str]) -> dict[str, Any]:
    """The settings of a new run as a tree: typed ones, over those of the experiment, over the model of `init_from`.

    Raises ConfigError.
    """
    from fp8moe.cli.sft import over_trained

    return with_batch(over_trained("grpo", EXPERIMENT, settings), settings)


def with_batch(tree: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The same with batch.sequences, unless it is typed: the samples of an update."""
    from fp8moe.cli.compose import parse

    keys = {parse(setting).key_or_group for setting in settings}
    grpo = tree.get("grpo")
    if "batch.sequences" not in keys and isinstance(grpo, dict) and isinstance(tree.get("batch"), dict):
        from fp8moe.train.grpo_config import GrpoConfig

        sizes = [grpo.get(name, getattr(GrpoConfig, name)) for name in ("prompts", "samples", "minibatches")]
        if all(isinstance(size, int) and size > 0 for size in sizes):
            prompts, samples, minibatches = sizes
            tree["batch"]["sequences"] = max(1, prompts * samples // minibatches)
    return tree
