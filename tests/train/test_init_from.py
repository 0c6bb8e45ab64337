"""init_from: a new run begins from another's weights and from nothing else of it."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8moe.cli.compose import as_yaml
from fp8moe.cli.resume import compose_run
from fp8moe.data.tokenizer import save_tokenizer, train_tokenizer
from fp8moe.errors import ConfigError, DataError
from fp8moe.train.loop import run_to_end
from fp8moe.train.opening import opening, other_tokenizer
from fp8moe.train.run_dir import describe_start
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, differing, joined, masters, stored

LAYOUT = ["parallel.schedule=1f1b", "parallel.pp=2", "parallel.ep=2", "batch.micro_batch=1"]


@pytest.fixture(scope="module")
def origin(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with an average; its checkpoints are of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("origin")
    config = configured(corpus, "steps=2", "checkpoint.every=1", "ema.decay=0.5", "precision=bf16", f"run_dir={folder}")
    run_to_end(built(config), time.perf_counter())
    return folder


def theirs_of(origin: Path, corpus: list[str], step: int = 2) -> dict[str, Tensor]:
    """The tensors of a checkpoint, flat, by canonical name."""
    path = origin / "checkpoints" / f"step-{step}"
    run = built(configured(corpus, "precision=bf16", "ema.decay=0.5", f"resume={path}", "steps=9"))
    return joined([stored(run)])


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_and_biases_are_taken_and_nothing_else(corpus: list[str], origin: Path, averaged: bool) -> None:
    theirs = theirs_of(origin, corpus)
    settings = [
        f"init_from={origin}",
        f"init_from_ema={str(averaged).lower()}",
        "ema.decay=0.9",
        "seq_len=64",
        "seed=5",
    ]
    run = built(configured(corpus, *settings, "data.validation_share=0.3"))  # FP8, where the other was BF16
    ours, kind = joined([stored(run)]), "ema" if averaged else "master"
    for name, master in masters(run.optimizer).items():
        assert torch.equal(master.flatten(), theirs[f"{kind}.{name}"]), name
        assert torch.equal(ours[f"ema.{name}"], master.flatten()), name
        parameter = run.model.get_parameter(name)
        assert torch.equal(parameter, master.to(parameter.dtype)), name
    biases = [name for name in ours if name.startswith("bias.")]
    assert biases and all(torch.equal(ours[name], theirs[name]) and ours[name].any() for name in biases)
    assert not any(tensor.any() for name, tensor in ours.items() if name.startswith(("exp_avg", "load.")))
    assert (run.step, run.optimizer.updates, run.sampler.consumed, run.guard.skipped) == (0, 0, 0, 0)
    assert any(not torch.equal(theirs[f"ema.{name}"], theirs[f"master.{name}"]) for name in masters(run.optimizer))


def held(settings: list[str]) -> dict[str, Tensor]:
    """What a rank of four holds of the weights and biases."""
    tensors = stored(built(configured(settings, world_size=4)))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("master.", "bias."))}


def test_any_layout_begins_from_any_other(corpus: list[str], origin: Path) -> None:
    theirs = theirs_of(origin, corpus)
    ours = joined(run_ranks(held, 4, [*corpus, *LAYOUT, f"init_from={origin}"]))
    assert differing(ours, {name: theirs[name] for name in theirs if name.startswith(("master.", "bias."))}) == []


def test_a_run_that_has_a_checkpoint_goes_on_from_it(corpus: list[str], origin: Path, tmp_path: Path) -> None:
    again = ["resume=auto", f"run_dir={tmp_path / 'new'}", f"init_from={origin}", "precision=bf16", "steps=2"]
    first = built(configured(corpus, *again))
    assert f"begins from the weights of {origin}" in opening(first)
    assert first.step == 0 and torch.equal(masters(first.optimizer)["head.weight"].flatten(), _head(origin, corpus))
    run_to_end(first, time.perf_counter())
    second = built(configured(corpus, *again, "steps=3"))
    assert second.step == 2 and second.optimizer.updates == 2
    assert "begins from" not in opening(second) and "resumed after step 2" in opening(second)
    for name, master in masters(second.optimizer).items():
        assert torch.equal(master, masters(first.optimizer)[name]), name
    gone = [*again[:2], f"init_from={tmp_path / 'gone'}", *again[3:], "steps=3"]
    assert built(configured(corpus, *gone)).step == 2, "what it began from may be deleted"


def test_weights_that_have_learned_another_tokenizer_are_named(corpus: list[str], origin: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(origin, tmp_path / "copy")
    assert other_tokenizer(built(configured(corpus, f"init_from={copy}", "precision=bf16"))) is None, "none is there"
    save_tokenizer(train_tokenizer(["xyxy yyxx " * 9], 270), copy / "tokenizer.json")
    run = built(configured(corpus, f"init_from={copy / 'checkpoints' / 'step-2'}", "precision=bf16"))
    assert run.data.tokenizer is not None and re.search(
        rf"have learned other tokens: \d of \d+ ids differ between {run.data.tokenizer.path} and {copy}/tokenizer.json",
        str(other_tokenizer(run)),
    )
    shutil.copyfile(run.data.tokenizer.path, copy / "tokenizer.json")
    assert other_tokenizer(run) is None


def _head(origin: Path, corpus: list[str]) -> Tensor:
    return theirs_of(origin, corpus)["master.head.weight"]


def test_a_damaged_one_is_passed_over_and_what_can_not_serve_is_said(
    corpus: list[str], origin: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(origin, copy)
    file = copy / "checkpoints" / "step-2" / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run = built(configured(corpus, f"init_from={copy}", "precision=bf16"))
    ours = masters(run.optimizer)["head.weight"].flatten()
    assert torch.equal(ours, theirs_of(origin, corpus, 1)["master.head.weight"])
    assert "rank-0.safetensors has" in capfd.readouterr().err
    newest = f"init_from={copy / 'checkpoints' / 'step-2'}"
    with pytest.raises(
        DataError, match=r"none of the 1 checkpoints that init_from=.*step-2 may use is whole .*: name an"
    ):
        built(configured(corpus, newest))
    with pytest.raises(ConfigError, match=r"init_from=.*nowhere does not exist: name a run directory"):
        configured(corpus, f"init_from={tmp_path / 'nowhere'}")
    with pytest.raises(
        ConfigError,
        match=r"another model: model.dim=64 there and 96 here: use model.dim=64",
    ):
        configured(corpus, f"init_from={origin}", "model.dim=96")
    plain = built(configured(corpus, "steps=1", f"run_dir={tmp_path / 'plain'}"))
    run_to_end(plain, time.perf_counter())
    with pytest.raises(ConfigError, match=r"step-1 holds no average of the weights, which init_from_ema=true asks for"):
        configured(corpus, f"init_from={tmp_path / 'plain'}", "init_from_ema=true")


def test_a_longer_context_begins_from_the_weights_and_is_not_resumed(corpus: list[str], origin: Path) -> None:
    yarn = "model.attention.yarn={factor: 8.0, original_max_seq_len: 32}"
    longer = ["seq_len=256", "model.max_seq_len=2048", "precision=bf16", yarn]
    run = built(configured(corpus, f"init_from={origin}", *longer))
    assert run.model.config.attention.yarn is not None and run.model.config.max_seq_len == 2048
    assert torch.equal(masters(run.optimizer)["head.weight"].flatten(), _head(origin, corpus))
    path = origin / "checkpoints" / "step-2"
    with pytest.raises(ConfigError, match=r"another model: model\.attention\.yarn=None there and \{"):
        configured(corpus, f"resume={path}", "precision=bf16", yarn, "steps=3")


def test_a_run_like_another_has_weights_of_its_own(origin: Path, corpus: list[str], tmp_path: Path) -> None:
    typed = configured(corpus, f"init_from={origin}", f"run_dir={tmp_path}")
    describe_start(tmp_path, 0, as_yaml(typed), None)
    like, _ = compose_run([], 1, str(tmp_path))
    assert like.config.init_from is None
    again, _ = compose_run(["resume=auto", f"run_dir={tmp_path}"], 1)
    assert again.config.init_from == str(origin), "started again before its first checkpoint it begins there"
