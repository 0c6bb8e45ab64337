"""Names of other programs, and settings typed as options: each error says what to write instead."""

from __future__ import annotations

import pytest

from fp8moe.__main__ import main
from fp8moe.cli import numerics, schedule, tokenize, train
from fp8moe.cli.command import parse
from fp8moe.cli.compose import compose, config_groups, keys_of
from fp8moe.cli.key_names import _NAMES, ADVICE, ALIASES, advice_for
from fp8moe.errors import ConfigError
from fp8moe.train.config import TrainConfig

KEYS = keys_of(TrainConfig)


def test_every_name_leads_to_a_key_and_is_none_itself() -> None:
    assert set(ALIASES.values()) <= {*KEYS, *config_groups()}
    assert sum(len(names.split()) for names in _NAMES.values()) == len(ALIASES) > 200  # none stands twice
    last = {key.rpartition(".")[2] for key in KEYS} | set(KEYS)
    assert not last & {*ALIASES, *ADVICE} and not set(ALIASES) & set(ADVICE)
    assert all(name == name.lower() and "-" not in name for name in (*ALIASES, *ADVICE))


def test_every_key_that_an_advice_names_is_one() -> None:
    for advice in set(ADVICE.values()):
        for word in advice.replace("=", " ").replace(",", " ").split():
            if "." in word.strip(".") and word != "...":
                assert word.strip("():.") in KEYS, word
        assert compose(["steps=3"])  # the least of them


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lr=3e-4", "lr is not a key: use optimizer.schedule.peak=3e-4"),
        ("learning_rate=1", "learning_rate is not a key: use optimizer.schedule.peak=1"),
        ("optimizer.lr=1", "optimizer.lr is not a key: use optimizer.schedule.peak=1"),
        ("hidden_size=64", "hidden_size is not a key: use model.dim=64"),
        ("model.num_hidden_layers=2", "model.num_hidden_layers is not a key: use model.num_layers=2"),
        ("batch_size=8", "batch_size is not a key: use batch.sequences=8"),
        ("training.local_batch_size=8", "training.local_batch_size is not a key: use batch.micro_batch=8"),
        ("max_steps=8", "max_steps is not a key: use steps=8"),
        ("output_dir=runs/a", "output_dir is not a key: use run_dir=runs/a"),
        ("checkpoint.interval=5", "checkpoint.interval is not a key: use checkpoint.every=5"),
        ("zero_stage=1", "zero_stage is not a key: use optimizer.sharding=..."),  # whose values are others
        ("bf16=true", "bf16 is not a key: use precision=bf16"),
        ("tp=8", "tp is not a key: no matrix is split over ranks here: use parallel.ep=..., p"),
        ("world_size=8", "world_size is not a key: the launcher starts the processes: use fp8moe train --nproc N, or "),
        ("gradient_accumulation_steps=8", "gradient_accumulation_steps is not a key: a step accumulates batch.sequen"),
        ("+lr=1", "lr is not a key: use optimizer.schedule.peak=1"),
        ("~lr", "lr is not a key: use optimizer.schedule.peak=..."),
    ],
)
def test_a_name_of_another_program(setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([setting])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_the_advice_can_be_typed() -> None:
    """Each setting that is advised with its value composes."""
    for name, value in {"lr": "3e-4", "hidden_size": "64", "gbs": "32", "train_iters": "9", "clip_grad": "0.5"}.items():
        said = advice_for(name, value)
        assert said is not None and said.startswith("use ")
        compose([said.removeprefix("use ")])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "20"], "--steps is no option, settings are key=value: write steps=20"),
        (["--steps=20"], "--steps is no option, settings are key=value: write steps=20"),
        (["steps=3", "--lr", "3e-4"], "--lr is no option, settings are key=value: write optimizer.schedule.peak=3e-4"),
        (["--seq-len", "512"], "--seq-len is no option, settings are key=value: write seq_len=512"),
        (["--micro-batch=2"], "--micro-batch is no option, settings are key=value: write batch.micro_batch=2"),
        (["--batch.sequences", "8"], "--batch.sequences is no option, settings are key=value: write batch.sequences=8"),
        (["-lr", "-3"], "-lr is no option, settings are key=value: write optimizer.schedule.peak=-3"),
        (["--profile", "--nproc", "2"], "--profile is no option, settings are key=value: write profile=..."),
        (["--profile", "steps=2"], "--profile is no option, settings are key=value: write profile=..."),
        (["--bf16"], "--bf16 is no option, settings are key=value: write precision=bf16"),
        (["--nproc-per-node", "4"], "--nproc-per-node is no option, settings are key=value: the launcher starts the "),
        (["--bogus", "3"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_setting_typed_as_an_option(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err.startswith(f"fp8moe: {says}")


def test_the_options_that_a_command_has_stay() -> None:
    assert parse(numerics.command_parser(), ["--steps", "5", "steps=3"]).steps == 5
    assert parse(train.command_parser(), ["--nproc", "2", "seed=3"]).settings == ["seed=3"]
    assert parse(schedule.command_parser(), ["--pp", "4"]).pp == 4
    with pytest.raises(ConfigError, match="unrecognized arguments: --seed"):  # it takes no settings
        parse(tokenize.command_parser(), ["--input", "a", "--output", "b", "--seed", "3"])
