"""`fp8moe plan`: whether a run fits a cluster's GPUs, how fast it will be and what it will cost; no GPU is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, check_file, make_parser, parse
from fp8moe.errors import EXIT, ConfigError, OutOfMemoryError

if TYPE_CHECKING:  # they load torch, which --help need not wait for
    from fp8moe.plan.cluster import Cluster
    from fp8moe.train.config import TrainConfig

DESCRIPTION = """\
Predict a run's memory, speed and cost on a cluster; no GPU and no data is needed. Settings are those of `fp8moe train`,
and cluster=NAME (h100_8 without it) with keys like cluster.nodes=4 cluster.price_per_gpu_hour=3. With --command they
are those of another command that trains, whose model and defaults init_from brings; of problems it is grpo.

  fp8moe plan experiment=dsv3_pretrain parallel=dsv3_2048 cluster=h800_2048
  fp8moe plan --search model=qwen3_30b_a3b seq_len=4096 batch.sequences=512 cluster=h100_8x8
  fp8moe plan --command sft init_from=models/moonlight distill.teacher=models/kimi data.paths=[chat.jsonl]
  fp8moe plan experiment=r1_zero model=moonlight_16b grpo.rollout_batch=64 cluster=h200_8x8

Exit codes: 0 it fits, 4 it does not (with --search: no layout does), 2 a setting is wrong.
"""

COMMANDS = ("train", "sft", "grpo")
PLACEHOLDER = "data.paths=[PREFIX]"
_TOKENS = re.compile(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", re.IGNORECASE)
_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("plan", DESCRIPTION, settings=True)
    add = parser.add_argument
    add(
        "--search", action="store_true", help="rank every layout of these GPUs, and print the line that trains the best"
    )
    add("--tokens", metavar="N", help="tokens that time and cost are counted to: 14.8T, 2e12 (those of all steps)")
    add(
        "--command",
        choices=COMMANDS,
        help="the command that is to train: with init_from its defaults and that model hold (grpo for problems, else "
        "train)",
    )
    add("--mean-tokens", metavar="N", help="tokens of a rollout's completion on average (half of grpo.max_tokens)")
    add("--json", metavar="FILE", help="write every figure")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 where the run, or with --search any layout of it, fits, and 4 where none does."""
    arguments = parse(command_parser(), argv)
    tokens = None if arguments.tokens is None else parse_tokens(arguments.tokens)
    mean_tokens = None if arguments.mean_tokens is None else parse_tokens(arguments.mean_tokens, "--mean-tokens")
    if arguments.json is not None:
        check_file("--json", Path(arguments.json), "plan.json")
    from fp8moe.cli.cluster import compose_cluster, split_settings
    from fp8moe.plan.layouts import as_written
    from fp8moe.plan.prediction import tokens_of

    of_cluster, settings = split_settings(arguments.settings)
    cluster = compose_cluster(of_cluster)
    config, refused = configuration(settings, cluster, arguments.command)
    command = arguments.command or ("grpo" if config.data.source == "problems" else "train")
    _check_mean(mean_tokens, config)
    config, refused = _with_teacher(config, refused)
    document: dict[str, Any] = {"figures": "predictions, none was measured", "cluster": asdict(cluster)}
    code = 0
    try:
        laid, more = as_written(config, cluster)
    except ValueError as error:
        if not arguments.search:
            raise
        print(f"can't be planned as written: {error}")
    else:
        count = tokens_of(config) if tokens is None else tokens
        code = _print_plan(laid, cluster, (count, mean_tokens), [*refused, *more], document)
    try:
        if arguments.search:
            code = _print_search(config, cluster, settings, refused, document, command)
    finally:
        _write(arguments.json, document)
    return code


def parse_tokens(text: str, name: str = "--tokens") -> float:
    """A number of tokens: 14.8T, 2e12, 300000. name: of the argument. Raises ConfigError."""
    match = _TOKENS.fullmatch(text.strip())
    try:
        number = float(match[1]) * _SCALES[match[2].upper()] if match else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < 1e18:
        example = "14.8T or 2e12" if name == "--tokens" else "2048"
        raise ConfigError(f"{name} {text!r} must be a number of tokens from 1 to 1e18: write for example {example}")
    return number


def configuration(
    settings: Sequence[str], cluster: Cluster, command: str | None = None
) -> tuple[TrainConfig, list[str]]:
    """The run's configuration, not resolved, and what of it is missing that a plan does without: token files.

    command: that is to run it; None: grpo where problems are its data, else train. A run that is resumed has its own
    configuration, as in `fp8moe train`. Raises ConfigError or ValueError.
    """
    from fp8moe.cli.compose import composed, tree_of
    from fp8moe.cli.resume import compose_run

    tree = tree_of(settings)
    if tree["resume"] != "none":
        return compose_run(settings, cluster.gpus)[0].config, []
    tree = _begun(command, settings, tree)
    refused = []
    data = tree["data"]
    if isinstance(data, dict) and data.get("source") in ("indexed", "chat") and not data.get("paths"):
        files = "token files" if data["source"] == "indexed" else "files of conversations"
        refused.append(f"data.paths=[] names no {files}: add {PLACEHOLDER}")
        tree["data"] = data | {"paths": ["PREFIX"], "weights": []}
    return composed(tree).config, refused


def _begun(command: str | None, settings: Sequence[str], tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of a new run as a tree, as the command that is to run it makes them of what is typed.

    Without `init_from` a plan takes the model that is typed, where the command itself would refuse to begin.
    """
    from fp8moe.cli import grpo, sft
    from fp8moe.cli.compose import parse, tree_of

    data = tree["data"]
    of_problems = isinstance(data, dict) and data.get("source") == "problems"
    command = command or ("grpo" if of_problems else "train")
    if command == "train":
        return tree
    module = grpo if command == "grpo" else sft
    if tree["init_from"] is not None:
        return module.begin(settings)
    if not any(parse(setting).key_or_group == "experiment" for setting in settings):
        tree = tree_of([f"experiment={module.EXPERIMENT}", *settings])
    return grpo.with_batch(tree, settings) if command == "grpo" else tree


def _check_mean(mean_tokens: float | None, config: TrainConfig) -> None:
    """Raise ConfigError unless completions can have so many tokens on average."""
    if mean_tokens is not None and not 1 <= mean_tokens <= config.grpo.max_tokens:
        raise ConfigError(
            f"--mean-tokens {mean_tokens:g} must be from 1 to grpo.max_tokens={config.grpo.max_tokens}: use "
            f"{min(max(1, round(mean_tokens)), config.grpo.max_tokens)}"
        )


def _with_teacher(config: TrainConfig, refused: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration with its teacher's sizes; without the teacher, and a sentence more, where none is found."""
    from fp8moe.cli.teacher import teacher_model
    from fp8moe.plan.teacher import unplanned, with_teacher

    try:
        return with_teacher(config, teacher_model(config)), refused
    except ConfigError as error:
        return unplanned(config), [*refused, f"{error}; planned without it"]


def _print_plan(
    laid: TrainConfig,
    cluster: Cluster,
    tokens: tuple[float, float | None],
    refused: list[str],
    document: dict[str, Any],
) -> int:
    """tokens: of the whole run, and of a completion on average."""
    from fp8moe.plan.faster import faster, faster_json, faster_text
    from fp8moe.plan.plan_text import plan_text
    from fp8moe.plan.prediction import as_json, predict, tokens_of
    from fp8moe.plan.rollouts import rollouts_json, rollouts_text

    of_run, mean = tokens
    found = predict(laid, cluster, of_run)
    epochs = None if laid.epochs is None or of_run != tokens_of(laid) else _of_epochs(laid)
    changes = faster(found)
    said = faster_text(found.time, changes, cluster)
    print("\n\n".join(filter(None, (plan_text(found, refused), epochs, rollouts_text(found, mean), said))))
    document |= {"refused": refused, **as_json(found), "rollouts": rollouts_json(found, mean)}
    document["faster"] = faster_json(changes)
    return 0 if found.fits else EXIT["memory"]


def _of_epochs(config: TrainConfig) -> str:
    return (
        f"steps of epochs={config.epochs:g} follow from the data, which a plan does not read: time and cost are those "
        f"of steps={config.steps}; --tokens N counts them to N tokens"
    )


def _print_search(
    config: TrainConfig,
    cluster: Cluster,
    settings: list[str],
    refused: list[str],
    document: dict[str, Any],
    command: str,
) -> int:
    from fp8moe.plan.search import paste, search
    from fp8moe.plan.search_text import search_json, search_text

    found = search(config, cluster)
    document["search"] = search_json(found)
    if not found.best:
        raise OutOfMemoryError(found.smaller)
    line = paste(config, [*settings, *([PLACEHOLDER] if refused else [])], found.best[0].config, cluster, command)
    document["search"]["command"] = line
    print(f"\n{search_text(found, cluster)}\n\nto train in the first{_where(cluster)}:\n  {line}\n\n{found.smaller}")
    return 0


def _where(cluster: Cluster) -> str:
    return "" if cluster.nodes == 1 else ", its settings under torchrun or Slurm on every node (launch/README.md)"


def _write(name: str | None, document: dict[str, Any]) -> None:
    if name is None:
        return
    try:
        Path(name).write_text(f"{json.dumps(document, indent=1)}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name} can't be written ({error.strerror}): choose another file") from error
    print(f"\nwrote {name}")
