"""`fp8moe plan`: whether a run fits a cluster's GPUs, how fast it will be and what it will cost; no GPU is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import EXIT, ConfigError, OutOfMemoryError

if TYPE_CHECKING:  # they load torch, which --help need not wait for
    from fp8moe.plan.cluster import Cluster
    from fp8moe.train.config import TrainConfig

DESCRIPTION = """\
Predict a run's memory, speed and cost on a cluster; no GPU and no data is needed. Settings are those of `fp8moe train`,
and cluster=NAME (h100_8 without it) with keys like cluster.nodes=4 cluster.price_per_gpu_hour=3.

  fp8moe plan experiment=dsv3_pretrain parallel=dsv3_2048 cluster=h800_2048
  fp8moe plan --search model=qwen3_30b_a3b seq_len=4096 batch.sequences=512 cluster=h100_8x8

Exit codes: 0 it fits, 4 it does not (with --search: no layout does), 2 a setting is wrong.
"""

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
    add("--json", metavar="FILE", help="write every figure")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 where the run, or with --search any layout of it, fits, and 4 where none does."""
    arguments = parse(command_parser(), argv)
    tokens = None if arguments.tokens is None else parse_tokens(arguments.tokens)
    from fp8moe.cli.cluster import compose_cluster, split_settings
    from fp8moe.plan.layouts import as_written
    from fp8moe.plan.prediction import tokens_of

    of_cluster, settings = split_settings(arguments.settings)
    cluster = compose_cluster(of_cluster)
    config, refused = configuration(settings, cluster)
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
        code = _print_plan(laid, cluster, count, [*refused, *more], document)
    try:
        if arguments.search:
            code = _print_search(config, cluster, settings, refused, document)
    finally:
        _write(arguments.json, document)
    return code


def parse_tokens(text: str) -> float:
    """A number of tokens: 14.8T, 2e12, 300000. Raises ConfigError."""
    match = _TOKENS.fullmatch(text.strip())
    try:
        number = float(match[1]) * _SCALES[match[2].upper()] if match else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < 1e18:
        raise ConfigError(
            f"--tokens {text!r} must be a number of tokens from 1 to 1e18: write for example 14.8T or 2e12"
        )
    return number


def configuration(settings: Sequence[str], cluster: Cluster) -> tuple[TrainConfig, list[str]]:
    """The run's configuration, not resolved, and what of it is missing that a plan does without: token files.

    A run that is resumed has its own configuration, as in `fp8moe train`. Raises ConfigError or ValueError.
    """
    from fp8moe.cli.compose import composed, tree_of
    from fp8moe.cli.resume import compose_run

    tree = tree_of(settings)
    if tree["resume"] != "none":
        return compose_run(settings, cluster.gpus)[0].config, []
    refused = []
    data = tree["data"]
    if isinstance(data, dict) and data.get("source") in ("indexed", "chat") and not data.get("paths"):
        files = "token files" if data["source"] == "indexed" else "files of conversations"
        refused.append(f"data.paths=[] names no {files}: add {PLACEHOLDER}")
        tree["data"] = data | {"paths": ["PREFIX"], "weights": []}
    return composed(tree).config, refused


def _print_plan(
    laid: TrainConfig, cluster: Cluster, tokens: float, refused: list[str], document: dict[str, Any]
) -> int:
    from fp8moe.plan.plan_text import plan_text
    from fp8moe.plan.prediction import as_json, predict
    from fp8moe.plan.rollouts import rollouts, rollouts_text

    found = predict(laid, cluster, tokens)
    print("\n".join(filter(None, (plan_text(found, refused), rollouts_text(laid)))))
    document |= {"refused": refused, **as_json(found), "rollouts": rollouts(laid)}
    return 0 if found.fits else EXIT["memory"]


def _print_search(
    config: TrainConfig, cluster: Cluster, settings: list[str], refused: list[str], document: dict[str, Any]
) -> int:
    from fp8moe.plan.search import paste, search
    from fp8moe.plan.search_text import search_json, search_text

    found = search(config, cluster)
    document["search"] = search_json(found)
    if not found.best:
        raise OutOfMemoryError(found.smaller)
    line = paste(config, [*settings, *([PLACEHOLDER] if refused else [])], found.best[0].config, cluster)
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
