"""What `fp8moe grpo` begins with: the model of init_from, the experiment's defaults, a batch by the samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.cli.compose import as_yaml, compose
from fp8moe.cli.grpo import begin
from fp8moe.errors import ConfigError


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A run directory with a configuration and a tokenizer, and a checkpoint elsewhere."""
    settings = ["model.dim=128", "model.vocab_size=300", "precision=bf16", f"checkpoint.path={tmp_path / 'saved'}"]
    (tmp_path / "config.yaml").write_text(as_yaml(compose(settings).config))
    (tmp_path / "tokenizer.json").write_text("{}")
    return str(tmp_path)


def test_a_new_run_takes_the_model_and_counts_its_samples(trained: str) -> None:
    tree = begin([f"init_from={trained}", "grpo.prompts=12", "grpo.samples=6", "grpo.minibatches=3"])
    assert tree["model"]["dim"] == 128 and tree["precision"]["mode"] == "bf16" and tree["model"]["mtp_weight"] == 0
    assert tree["data"]["source"] == "problems" and tree["data"]["tokenizer"] == f"{trained}/tokenizer.json"
    assert tree["data"]["vocab_size"] == 300 and tree["batch"]["sequences"] == 24
    assert begin([f"init_from={trained}", "batch.sequences=8"])["batch"]["sequences"] == 8
    zero = begin([f"init_from={trained}", "experiment=r1_zero"])
    assert zero["batch"]["sequences"] == 512 and zero["optimizer"]["schedule"]["peak"] == 3e-6
    assert zero["grpo"]["samples"] == 16 and zero["grpo"]["kl"] == 0.001 and zero["grpo"]["max_tokens"] == 32768
    assert zero["grpo"]["reference_every"] == 400


def test_a_batch_that_is_less_than_an_update_is_refused(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grpo", f"init_from={trained}", "grpo.prompts=6", "batch.sequences=16", "batch.micro_batch=16"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "fp8moe: batch.sequences=16 is below the 48 samples of an update, grpo.prompts x grpo.samples / "
        "grpo.minibatches = 6 x 8 / 1: use batch.sequences=48, or fewer samples\n"
    )


def test_it_begins_with_a_trained_model() -> None:
    with pytest.raises(ConfigError, match="fp8moe grpo begins with a trained model and init_from is null"):
        begin([])
