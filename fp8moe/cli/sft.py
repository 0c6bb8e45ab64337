"""`fp8moe sft`: supervised fine-tuning on conversations. It is `fp8moe train` with other data and other defaults.

What a new run begins with is `experiment=sft`, or the experiment that is typed, over the model, precision and tokenizer
of `init_from`, a run or a released model: their sizes need not be typed again. A run that goes on has its own
configuration, so `fp8moe train resume=RUN` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fp8moe.errors import ConfigError

if TYPE_CHECKING:
    from fp8moe.cli.command import Parser

EXPERIMENT = "sft"
DESCRIPTION = """\
Fine-tune a model on conversations, learning what the assistant says. Files hold a conversation a row, {"messages":
[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, as JSON lines or parquet. Everything else is
as in fp8moe train: settings, processes, checkpoints, resume.

  fp8moe sft init_from=runs/base data.paths=[chat.jsonl] run_dir=runs/sft
  fp8moe sft init_from=runs/base data.paths=[chat.jsonl] experiment=sft_tiny epochs=3     a small model on a laptop
  fp8moe sft --nproc 8 init_from=models/moonlight data.paths=[a.jsonl,b.parquet] data.weights=[0.7,0.3]
  fp8moe sft resume=runs/sft                             goes on there
  torchrun --nproc-per-node 8 -m fp8moe sft ...          the same under torchrun, one machine or many
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    from fp8moe.cli.train import parser_of

    return parser_of("sft", DESCRIPTION)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code; a worker that fails ends its process with the failure's code."""
    from fp8moe.cli.train import Command, run

    return run(Command("sft", command_parser, begin), argv)


def begin(settings: Sequence[str]) -> dict[str, Any]:
    """The settings of a new run as a tree: typed ones, over those of the experiment, over the model of `init_from`.

    Raises ConfigError.
    """
    return over_trained("sft", EXPERIMENT, settings)


def over_trained(command: str, experiment: str, settings: Sequence[str]) -> dict[str, Any]:
    """The same for any command that begins with a trained model, by the experiment's name where none is typed."""
    from fp8moe.cli.compose import parse, plain_values, tree_of
    from fp8moe.cli.resume import overlaid
    from fp8moe.cli.run_kind import check_source
    from fp8moe.cli.trained import find_settings

    keys = {parse(setting).key_or_group for setting in settings}
    if "experiment" not in keys:
        settings = [f"experiment={experiment}", *settings]
    typed = tree_of(settings)
    if typed["init_from"] is None:
        raise ConfigError(
            f"fp8moe {command} begins with a trained model and init_from is null: name a run or a Hugging Face "
            "directory, init_from=PATH, or go on with resume=RUN"
        )
    found = find_settings(str(typed["init_from"]))
    tree = plain_values(typed)
    tree["model"] = plain_values(found.tree["model"])
    _take(tree, found.tree, "precision")
    tree = overlaid(tree, typed, tree_of([]), settings)
    if not isinstance(tree["data"], dict):
        return tree  # which is refused where it is made a configuration
    check_source(command, tree)
    if "seq_len" not in keys and isinstance(most := tree["model"].get("max_seq_len"), int):
        tree["seq_len"] = min(tree["seq_len"], most)
    if "data.vocab_size" not in keys:
        tree["data"]["vocab_size"] = tree["model"]["vocab_size"]
    if tree["data"].get("tokenizer") is None and found.tokenizer is not None:
        tree["data"]["tokenizer"] = str(found.tokenizer)
    return tree


def _take(tree: dict[str, Any], other: Mapping[str, Any], group: str) -> None:
    if other.get(group) is not None:
        tree[group] = other[group]
