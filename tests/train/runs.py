"""A run small enough for a test: a model of 60 thousand parameters on text that is made here and can be learnt."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8moe.cli.compose import compose
from fp8moe.data.indexed import IndexedWriter
from fp8moe.data.tokenizer import encode_pieces, end_of_text_id, train_tokenizer
from fp8moe.train import checkpoint
from fp8moe.train.build import build
from fp8moe.train.checkpoint import torch_checkpoint as torch_checkpoint  # loaded once, not by each rank that is forked
from fp8moe.train.config import TrainConfig, resolve
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from fp8moe.train.run_dir import make_run_dir
from fp8moe.train.run_state import state_tensors
from tests.parallel import ranks

VOCABULARY = 300
SMALL = (
    *("model.dim=64", "model.num_layers=2", "model.dense_hidden=64", "model.attention.num_heads=2"),
    *("model.attention.q_lora_rank=32", "model.attention.kv_lora_rank=32", "model.attention.nope_dim=16"),
    *("model.attention.rope_dim=16", "model.attention.v_dim=16"),
    *("model.experts.num_experts=4", "model.experts.hidden=32"),
    *("model.router.topk=2", "model.router.num_groups=2", "model.router.top_groups=2"),
    *(f"model.vocab_size={VOCABULARY}", "seq_len=32", "batch.sequences=8", "batch.micro_batch=2", "device=cpu"),
    *("validation.samples=8", "optimizer.schedule.warmup_steps=2", "parallel.timeout=60", "steps=6"),
)


def write_corpus(folder: Path) -> list[str]:
    """Token files of a small grammar under `folder`, with their tokenizer; the settings that name them."""
    generator = torch.Generator().manual_seed(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "self", "print"]

    def document() -> str:
        picks = torch.randint(len(words), (5,), generator=generator).tolist()
        return "\n".join(f"{words[i]} = {words[(i + 1) % 8]}({words[(i * 3) % 8]}, {i})" for i in picks)

    texts = [document() for _ in range(400)]
    tokenizer = train_tokenizer(iter(texts), VOCABULARY)
    prefix = folder / "grammar"
    with IndexedWriter(prefix, VOCABULARY) as writer:
        for ids, _ in encode_pieces(tokenizer, ((text, True) for text in texts), end_of_text_id(tokenizer)):
            writer.write(ids)
            writer.end_document()
    tokenizer.save(f"{prefix}.tokenizer.json")
    return ["data=indexed", f"data.paths=[{prefix}]", "data.validation_share=0.2", f"data.cache_dir={folder / 'cache'}"]


def configured(corpus: list[str], *settings: str, world_size: int = 1) -> TrainConfig:
    """The small run's configuration with `settings` over it, resolved for `world_size` processes.

    A `model=` among the settings brings all sizes of its own.
    """
    return resolve(_composed((*corpus, *settings)), world_size)


@functools.cache
def _composed(settings: tuple[str, ...]) -> TrainConfig:
    chosen = any(setting.startswith("model=") for setting in settings)
    small = [setting for setting in SMALL if not (chosen and setting.startswith("model."))]
    return compose([*small, *settings]).config


def _compose_before(arguments: tuple[Any, ...]) -> None:
    """Compose the settings among the ranks' arguments, which takes a tenth of a second, once and not on every rank."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)) and argument and all(isinstance(one, str) for one in argument):
            with contextlib.suppress(Exception):  # each rank says what is wrong with them
                _composed(tuple(argument))


ranks.BEFORE.append(_compose_before)


def kept(optimizer: Optimizer | DeepSpeedAdamW) -> dict[str, dict[str, Tensor]]:
    """What an optimizer that shards nothing keeps for each parameter, by kind, in the parameter's shape."""
    return {
        name: {kind: tensor.view(one.parameter.shape) for kind, tensor in one.tensors.items()}
        for name, (one,) in optimizer.held.items()
    }


def masters(optimizer: Optimizer) -> dict[str, Tensor]:
    """The masters of an optimizer that shards nothing, by name, in the parameter's shape."""
    return {name: kinds["master"] for name, kinds in kept(optimizer).items()}


def averages(run: Run) -> dict[str, Tensor]:
    """The average of a run's weights that shards nothing, by name, in the parameter's shape."""
    assert run.ema is not None and isinstance(run.optimizer, Optimizer)
    found = run.optimizer.named("ema", list(run.ema.tensors().values()))
    return {name: one.tensors["ema"].view(one.parameter.shape) for name, (one,) in found.items()}


def stored(run: Run) -> dict[str, Tensor]:
    """Copies of what a checkpoint would hold of this rank, flattened, by name@offset."""
    ranges = {
        f"{name}@{offset}": values.flatten().clone()
        for name, found in state_tensors(run).items()
        for offset, values in (found.ranges if isinstance(found, checkpoint.Pieces) else ((0, found),))
    }
    assert all(len(values) for values in ranges.values())
    return ranges


def joined(ranks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The logical tensors that the ranges of all ranks make up; ranges that several hold must be equal."""
    whole: dict[str, Tensor] = {}
    for ranges in ranks:
        for key, values in ranges.items():
            name, offset = key.split("@")
            start, end = int(offset), int(offset) + len(values)
            before = whole.get(name, values.new_zeros(0))
            if len(before) < end:
                missing = float("nan") if values.is_floating_point() else -1
                before = torch.cat([before, values.new_full((end - len(before),), missing)])
            there = before[start:end]
            is_set = ~torch.isnan(there) if values.is_floating_point() else there >= 0
            assert torch.equal(there[is_set], values[is_set]), f"{name} differs between ranks"
            before[start:end] = values
            whole[name] = before
    return whole


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def weights_of(run: Run) -> dict[str, Tensor]:
    """Copies of this rank's weights, when those of other ranks are here."""
    if run.zero is not None:
        run.zero.wait_weights()
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def built(config: TrainConfig) -> Run:
    """The run, for one process or inside `run_ranks`, its directory made where the configuration has one."""
    mesh = mesh_of(config, torch.device("cpu"))
    run_dir = Path(config.run_dir or "nowhere")
    if config.run_dir is not None and mesh.rank == 0:
        make_run_dir(config.run_dir, config.name, config.resume)
    return build(config, mesh, torch.device("cpu"), run_dir)
