"""Fine-tuning runs: what they begin with, epochs, resume by bits, experts over ranks; it is `train`'s loop."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from fp8moe.__main__ import main as command
from fp8moe.cli.compose import as_yaml, compose
from fp8moe.cli.epochs import with_steps
from fp8moe.cli.resume import compose_run
from fp8moe.cli.sft import begin, main
from fp8moe.data.chat_template import open_template
from fp8moe.data.tokenizer import load_tokenizer
from fp8moe.errors import ConfigError
from fp8moe.generate.samples import _prompt
from fp8moe.train.batch import BatchConfig, steps_for, total_samples
from fp8moe.train.config import TrainConfig, resolve
from fp8moe.train.loop import run_to_end
from fp8moe.train.lr import Progress, learning_rate
from fp8moe.train.opening import opening
from fp8moe.train.run_dir import describe_start
from tests.data.chats import exchange, write_rows
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, differing, joined, stored

ROWS = [exchange(f"alpha {i}", f"beta {i % 5} = gamma") for i in range(60)]
TINY = ("experiment=sft_tiny", "seq_len=32", "batch.sequences=8", "batch.micro_batch=2", "device=cpu")
MORE = ("validation.samples=8", "validation.completions=0", "report=false", "checkpoint.background=false")


@pytest.fixture(scope="module")
def base(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, in BF16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    run = built(configured(corpus, "steps=1", "precision=bf16", f"run_dir={folder}"))
    assert run.data.tokenizer is not None
    describe_start(folder, 0, as_yaml(run.config), run.data.tokenizer.path)
    run_to_end(run, time.perf_counter())
    return folder


@pytest.fixture(scope="module")
def chat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a fine-tuning on a small file."""
    folder = tmp_path_factory.mktemp("chat")
    path = write_rows(folder / "chat.jsonl", ROWS)
    return [*TINY, *MORE, f"init_from={base}", f"data.paths=[{path}]", f"data.cache_dir={folder / 'cache'}"]


def fine_tuning(settings: list[str], world_size: int = 1) -> TrainConfig:
    composed, _ = compose_run(settings, world_size, None, begin)
    return resolve(with_steps(composed.config, world_size)[0], world_size)


def finished(settings: list[str], world_size: int = 1) -> dict[str, Tensor]:
    """This rank's tensors at the end of a run."""
    run = built(fine_tuning(settings, world_size))
    run_to_end(run, time.perf_counter())
    return stored(run)


def test_a_run_begins_with_the_model_precision_and_tokenizer_of_init_from(base: Path, chat: list[str]) -> None:
    config, theirs = fine_tuning(chat), yaml.safe_load((base / "config.yaml").read_text())
    ours = yaml.safe_load(as_yaml(config))
    assert ours["model"] == theirs["model"] | {
        "mtp_weight": 0.1,
        "router": theirs["model"]["router"] | {"bias_gamma": 0.0},
    }
    assert ours["precision"] == theirs["precision"] and config.precision.mode == "bf16"
    assert config.data.tokenizer == str(base / "tokenizer.json") and config.data.vocab_size == config.model.vocab_size
    assert (config.data.source, config.data.document_mask, config.data.packing) == ("chat", True, "documents")
    typed = fine_tuning([*chat, "model.mtp_weight=0.2", "precision=fp32", "steps=3", "data.chat_template=plain"])
    assert (typed.model.mtp_weight, typed.precision.mode, typed.steps, typed.epochs) == (0.2, "fp32", 3, None)


def test_without_an_experiment_it_is_deepseeks_rate_over_two_epochs(chat: list[str]) -> None:
    tree = begin([one for one in chat if not one.startswith(("experiment", "seq_len"))])
    assert (tree["name"], tree["epochs"], tree["seq_len"]) == ("sft", 2, 1024), "1024: the model's longest"
    schedule = compose(["experiment=sft", "model=dsv3_671b", "data.paths=[a]"]).config.optimizer.schedule
    rates = [learning_rate(schedule, Progress(step, 100, 0)) for step in (0, 50, 100)]
    assert rates == pytest.approx([5e-6, 3e-6, 1e-6])


def test_epochs_set_the_steps_and_steps_take_epochs_back(chat: list[str], base: Path) -> None:
    composed, _ = compose_run([*chat, "epochs=3"], 1, None, begin)
    config, sentence = with_steps(composed.config, 1)
    samples = int(str(sentence).split()[-1])
    assert config.steps == -(-3 * samples // 8) and str(sentence).startswith(f"epochs=3: steps={config.steps} of 8 sam")
    assert with_steps(fine_tuning([*chat, "steps=5"]), 1)[1] is None
    assert compose_run([*chat, "steps=5", "epochs=2"], 1, None, begin)[0].config.epochs == 2
    ramp = BatchConfig(8, ramp_from=2, ramp_samples=20, increment=2)
    for number in (1, 2, 3, 19, 20, 21, 200):
        steps = steps_for(ramp, number)
        assert total_samples(ramp, steps) >= number and (steps == 1 or total_samples(ramp, steps - 1) < number)
    with pytest.raises(ConfigError, match=r"^fp8moe sft begins with a trained model and init_from is null: name"):
        begin(["data.paths=[a]"])
    with pytest.raises(ValueError, match=r"^the mesh pp=1 x dp=3 needs 3 processes and there are 1"):
        fine_tuning([*chat, "parallel.dp=3"])
    with pytest.raises(ValueError, match=r"^epochs=0.0 must be above 0: use 2, or null"):
        fine_tuning([*chat, "epochs=0"])


def test_resuming_changes_no_bit_and_another_seed_does(chat: list[str], tmp_path: Path) -> None:
    settings = [*chat, "steps=4", "checkpoint.every=2", "checkpoint.keep=9"]
    whole = finished([*settings, f"run_dir={tmp_path / 'whole'}"])
    middle = tmp_path / "whole" / "checkpoints" / "step-2"
    config = resolve(compose_run([*settings, f"run_dir={tmp_path / 'other'}"], 1, None, begin)[0].config, 1)
    run = built(replace(config, resume=str(middle)))
    assert run.step == 2
    run_to_end(run, time.perf_counter())
    assert differing(stored(run), whole) == []
    assert differing(finished([*settings, "seed=1", f"run_dir={tmp_path / 'seed'}"]), whole)


LAYOUTS = [("parallel.ep=2", 2), ("parallel.schedule=dualpipev", 1)]


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_experts_over_ranks_and_a_pipeline_learn_the_same(
    chat: list[str], tmp_path: Path, layout: str, world_size: int
) -> None:
    """One step in FP32: afterwards near ties in the routing may part."""
    settings = [*chat, "precision=fp32", "steps=1", "optimizer.schedule.warmup_steps=0", "optimizer.moments=fp32"]
    alone = joined([finished([*settings, f"run_dir={tmp_path / 'alone'}"])])
    words = [*settings, layout, f"run_dir={tmp_path / 'other'}"]
    ranks = run_ranks(finished, world_size, words, world_size) if world_size > 1 else [finished(words)]
    other = joined(ranks)
    assert alone.keys() == other.keys()
    moved = [name for name in alone if name.startswith("exp_avg.")]
    assert moved and all(torch.allclose(alone[name], other[name], rtol=1e-3, atol=1e-6) for name in moved)
    losses = [json.loads((tmp_path / one / "metrics.jsonl").read_text())["loss"] for one in ("alone", "other")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_command_trains_and_leaves_what_a_chat_needs(chat: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert main([*chat, "epochs=0.5", f"run_dir={run_dir}"]) == 0
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert config["epochs"] == 0.5 and records[-1]["step"] == config["steps"]
    assert records[-1]["tokens"] < 8 * 32 / 2, "the tokens of answers alone"
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    template = open_template(None, run_dir / "tokenizer.json", tokenizer)
    assert template.render([{"role": "user", "content": "a"}], asks=True) == "User:\na\nAssistant:\n"
    assert template.names["eos_token"] == "<|endoftext|>"
    assert command(["export", str(run_dir), str(tmp_path / "out"), "--precision", "bf16"]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.text
    # Another fine-tuning of it needs no template to be named, and goes on where it ended.
    again = fine_tuning([*(one for one in chat if not one.startswith("init_from")), f"init_from={run_dir}"])
    assert again.data.tokenizer == str(run_dir / "tokenizer.json")
    composed, origin = compose_run([f"resume={run_dir}", "steps=9"], 1, None, begin)
    assert origin is not None and (composed.config.steps, composed.config.epochs) == (9, None)
    assert composed.config.data.source == "chat"


def test_the_last_lines_answer_held_out_questions(chat: list[str]) -> None:
    run = built(fine_tuning([*chat, "steps=1"]))
    assert run.data.tokenizer is not None
    tokenizer = load_tokenizer(run.data.tokenizer.path)
    for sample in range(3):
        asked = tokenizer.decode(_prompt(run, sample), skip_special_tokens=False)
        assert asked.startswith("User:\nalpha ") and asked.endswith("\nAssistant:\n") and asked.count("User") == 1


def test_the_opening_says_what_is_left_out_and_learned(chat: list[str]) -> None:
    lines = opening(built(fine_tuning([*chat, "steps=1"]))).splitlines()
    assert any(line.startswith("chat.jsonl: 60 conversations") and "tokens are learned" in line for line in lines)
