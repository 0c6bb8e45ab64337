"""Recipes that a user starts as they are: they compose, resolve for their GPUs, and fit 80 GB by the formulas."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from fp8moe.cli.compose import compose
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.train.checkpoint.state import differences, extended
from fp8moe.train.config import TrainConfig, resolve, stages_of
from fp8moe.train.lr import Progress, learning_rate

# Name, processes, AdamW or Muon, tokens a step, peak, factor of the peak at the end, GB of the worst rank.
RECIPES = [
    ("dsv2_lite_8gpu", 8, "adamw", 512 * 4096, 4.2e-4, 0.316**2, 57.3),
    ("qwen3_30b_8gpu", 8, "muon", 1024 * 2048, 3e-4, 0.0, 73.8),
    ("moonlight_16gpu", 16, "muon", 512 * 8192, 4.2e-4, 0.1, 62.7),
]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe[0])
def recipe(request: pytest.FixtureRequest) -> tuple[TrainConfig, tuple]:
    """The resolved configuration, with nothing typed but its data."""
    name, processes = request.param[:2]
    return resolve(compose([f"experiment={name}", "data.paths=[tokens/a]"]).config, processes), request.param


def test_it_resolves_for_its_gpus(recipe: tuple[TrainConfig, tuple]) -> None:
    config, (name, processes, optimizer, tokens, peak, last, _) = recipe
    assert (config.name, config.dp, config.ep, config.parallel.pp) == (name, processes, 8, 1)
    assert config.precision.mode == "fp8" and config.optimizer.kind == optimizer
    assert config.batch.sequences * config.seq_len == tokens
    assert config.num_microbatches * config.dp * config.micro_batch == config.batch.sequences
    assert config.data.vocab_size == config.model.vocab_size and config.init_from is None
    (stage,) = stages_of(config)
    assert len(stage.layers) == config.model.num_layers
    schedule = config.optimizer.schedule
    assert schedule.peak == peak and math.isclose(schedule.phases[-1].factor, last, abs_tol=1e-9)
    assert 0.005 < schedule.warmup_steps / config.steps < 0.05


def test_it_fits_80_gb(recipe: tuple[TrainConfig, tuple]) -> None:
    """With balanced experts in 80e9 bytes; with 1.5 times the even share on one rank in the card's 85.5e9."""
    config, (*_, expected) = recipe
    balanced = worst_rank(rank_memory(config)).total
    assert balanced < 80e9
    assert balanced == pytest.approx(expected * 1e9, rel=0.03), "as the recipe was chosen: larger ones fit no more"
    assert worst_rank(rank_memory(config, imbalance=1.5)).total < 80e9


def test_twice_the_nodes_take_it_as_it_is() -> None:
    for name, processes, *_ in RECIPES:
        config = resolve(compose([f"experiment={name}", "data.paths=[tokens/a]"]).config, 2 * processes)
        assert (config.dp, config.ep) == (2 * processes, 8)


# DeepSeek-V3's context extension (report, section 4.3): sequence, sequences a step; processes, GB of a GPU.
EXTENSIONS = [("dsv3_extend_32k", 32768, 1920, 2048, 85.0), ("dsv3_extend_128k", 131072, 480, 2048, 150.0)]


@pytest.mark.parametrize(("name", "seq_len", "sequences", "processes", "_"), EXTENSIONS)
def test_the_extension_is_as_published(name: str, seq_len: int, sequences: int, processes: int, _: float) -> None:
    config = resolve(compose([f"experiment={name}", "data.paths=[tokens/a]"]).config, processes)
    assert (config.name, config.seq_len, config.batch.sequences, config.steps) == (name, seq_len, sequences, 1000)
    assert config.num_microbatches * config.data_ranks == sequences and config.precision.mode == "fp8"
    plain = compose(["model=dsv3_671b"]).config.model
    yarn = config.model.attention.yarn
    assert plain.attention.yarn is None and plain.max_seq_len == 4096, "pretraining at 4K is without YaRN"
    assert yarn is not None and (yarn.factor, yarn.beta_slow, yarn.beta_fast) == (40.0, 1.0, 32.0)
    assert yarn.original_max_seq_len == plain.max_seq_len and yarn.amplitude == 1.0
    assert yarn.softmax_factor == pytest.approx((0.1 * math.log(40.0) + 1) ** 2)
    schedule, pretraining = config.optimizer.schedule, compose(["optimizer=adamw_dsv3"]).config.optimizer.schedule
    rates = {learning_rate(schedule, Progress(step, 1000, 0)) for step in range(1000)}
    assert rates == {7.3e-6} and pretraining.peak * pretraining.phases[-1].factor == pytest.approx(7.3e-6, rel=1e-5)
    state = asdict(config.model), asdict(plain)
    assert [key for key, *_ in differences(extended(state[1], state[0]), state[0])] == [], "init_from takes it"


def test_the_extension_fits_because_ranks_share_a_sequence() -> None:
    """Activations of a sequence on one GPU exceed its memory; shared as the recipe says, all of a rank fits it."""
    for name, _, _, processes, gigabytes in EXTENSIONS:
        words = [f"experiment={name}", "data.paths=[tokens/a]"]
        alone = resolve(compose([*words, "parallel.cp=1", "parallel.ep=32"]).config, 512)
        assert worst_rank(rank_memory(alone)).kinds["activations"] > gigabytes * 1e9
        assert worst_rank(rank_memory(resolve(compose(words).config, processes))).total < gigabytes * 1e9
