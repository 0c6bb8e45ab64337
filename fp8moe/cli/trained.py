"""The trained model that a command uses: a run directory, a checkpoint or a Hugging Face directory; its settings, its
tokenizer.

The model's configuration is the run's own, or what config.json says, changed by the settings that are typed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser
from fp8moe.cli.compose import composed, parse, tree_of
from fp8moe.cli.released import settings_of
from fp8moe.cli.resume import CONFIG_FILE, overlaid, read_configuration
from fp8moe.errors import ConfigError
from fp8moe.generate.captured import DecodingGraphs, decoding_graphs
from fp8moe.generate.decode import GenerationConfig
from fp8moe.generate.open import for_use, load_model
from fp8moe.generate.text import Vocabulary
from fp8moe.interop.hf_dir import is_hf_directory
from fp8moe.interop.hf_model import HfModel, open_model
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.mesh import Mesh
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig
from fp8moe.train.processes import choose_device, processes

if TYPE_CHECKING:
    import torch

ADVICE = "name a run directory, its checkpoints/step-N, or a Hugging Face directory"


@dataclass(frozen=True)
class Trained:
    """A model that can be loaded: its run's configuration for these processes, where its checkpoints lie, or the opened
    Hugging Face directory, and its tokenizer's path."""

    config: TrainConfig
    source: str | HfModel
    tokenizer: Path

    def check_graphs(self, arguments: argparse.Namespace) -> None:
        """Raise ConfigError where CUDA graphs are asked for and there is no GPU."""
        if arguments.cuda_graphs and (device := choose_device(self.config)).type != "cuda":
            raise ConfigError(f"--cuda-graphs needs a GPU and the model computes on the {device.type}: leave it out")

    def graphs(self, arguments: argparse.Namespace, mesh: Mesh, generation: GenerationConfig) -> DecodingGraphs | None:
        """The CUDA graphs that are asked for."""
        if not arguments.cuda_graphs:
            return None
        return decoding_graphs(mesh, self.config.model.experts.num_experts, generation.tokens_at_once(mesh.dp))

    def vocabulary(self) -> Vocabulary:
        """Its tokenizer. Raises DataError."""
        return Vocabulary(self.tokenizer, self.config.model.vocab_size)

    @contextmanager
    def loaded(self, *, averaged: bool) -> Iterator[tuple[Transformer, Mesh, torch.device]]:
        """The model with its weights, on this rank's device; process groups exist while the block runs."""
        device = choose_device(self.config)
        with processes(self.config, device) as mesh:
            yield load_model(self.config, mesh, device, self.source, averaged=averaged), mesh, device


def add_arguments(parser: Parser) -> None:
    """The arguments by which every command takes a trained model."""
    parser.add_argument(
        "run", metavar="RUN", help="a run directory (its newest checkpoint), a checkpoint or a Hugging Face directory"
    )
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="key=value", help="parallel.ep=2, precision=bf16, device=cpu"
    )
    parser.add_argument("--nproc", metavar="N", help="processes to start on this machine; auto: one a GPU")
    parser.add_argument("--ema", action="store_true", help="use the average of the weights")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, where the run directory has none")


def find_trained(arguments: argparse.Namespace, world_size: int) -> Trained:
    """The model that the arguments name, on `world_size` processes; loads nothing. Raises ConfigError or ValueError."""
    return trained_at(arguments.run, arguments.settings, world_size, arguments.tokenizer)


@dataclass(frozen=True)
class Found:
    """What is known of a trained model before it is used: its settings; its name for `load_model`, or the opened
    Hugging Face directory; its run directory, where it has one; its tokenizer.json, where that exists."""

    tree: Mapping[str, Any]
    source: str | HfModel
    folder: Path | None
    tokenizer: Path | None


def find_settings(run: str) -> Found:
    """The settings of the model at `run`. Raises ConfigError."""
    if "://" not in run and is_hf_directory(Path(run)) and not (Path(run) / CONFIG_FILE).is_file():
        released, own = open_model(Path(run)), Path(run, "tokenizer.json")
        tokenizer = own if own.is_file() else None
        return Found(settings_of(released, tokenizer), released, Path(run), tokenizer)
    where = checkpoint.location(run)
    with checkpoint.looking_up(run):
        found = [where] if checkpoint.is_complete(where) else checkpoint.below(where)
    folder = _run_directory(where, found)
    tree = read_configuration(folder) if folder is not None else _stored_configuration(found)
    if tree is None:
        raise ConfigError(_not_a_run(run, where))
    name = run if found else tree.get("checkpoint", {}).get("path")
    if name is None:
        raise ConfigError(f"{run} holds no complete checkpoint: {ADVICE}")
    own, given = (folder or Path(run)) / "tokenizer.json", tree.get("data", {}).get("tokenizer")
    tokenizer = own if own.is_file() else None if given is None else Path(given)
    return Found(tree, str(name), folder, tokenizer)


def trained_at(run: str, settings: Sequence[str], world_size: int, tokenizer: str | None = None) -> Trained:
    """The model at `run`, its configuration changed by `settings`."""
    found = find_settings(run)
    config = _for_use(found.tree, settings, world_size)
    if isinstance(found.source, HfModel):
        found.source.check(config.model)
    own = found.tokenizer or (found.folder or Path(run)) / "tokenizer.json"
    return Trained(config, found.source, own if tokenizer is None else Path(tokenizer))


def _for_use(tree: Mapping[str, Any], settings: Sequence[str], world_size: int) -> TrainConfig:
    """A run's configuration, changed by `settings`, for `world_size` processes."""
    config = composed(overlaid(tree, tree_of(settings), tree_of([]), settings)).config
    typed = {parse(setting).key_or_group for setting in settings}
    if "parallel.pp" in typed and config.parallel.pp != 1:
        raise ConfigError(f"parallel.pp={config.parallel.pp} is for training: use parallel.ep, or leave it out")
    return for_use(config, world_size, config.parallel.ep if "parallel.ep" in typed else None)


def _run_directory(where: checkpoint.Location, found: Sequence[checkpoint.Location]) -> Path | None:
    """The run directory that a path means: itself, or that of its checkpoints; None where there is none."""
    candidates = [where, *(one.parent.parent for one in found[-1:])]
    if isinstance(where, Path):
        candidates += [one.absolute().parent.parent for one in found[-1:] if isinstance(one, Path)]
    return next((one for one in candidates if isinstance(one, Path) and (one / CONFIG_FILE).is_file()), None)


def _stored_configuration(found: Sequence[checkpoint.Location]) -> dict[str, Any] | None:
    return checkpoint.run_configuration(found[-1]) if found else None


def _not_a_run(run: str, where: checkpoint.Location) -> str:
    if isinstance(where, Path) and not where.exists():
        return f"{run} does not exist: {ADVICE}"
    return f"{run} is neither a run directory, with its {CONFIG_FILE}, nor a checkpoint: {ADVICE}"
