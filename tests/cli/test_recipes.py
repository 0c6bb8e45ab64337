"""Recipes that a user starts as they are: they compose, resolve for their GPUs, and fit 80 GB by the formulas."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.plan.faster import faster
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.prediction import predict
from fp8moe.train.checkpoint.state import differences, extended
from fp8moe.train.config import TrainConfig, resolve, stages_of
from fp8moe.train.lr import Progress, learning_rate

EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
# Name, cluster, layout (pp, ep, schedule), AdamW or Muon, tokens a step, peak, factor of the peak at the end, GB of the
# worst rank with balanced routing, the most times an even share on a rank that fits.
RECIPES = [
    ("dsv2_lite_8gpu", "h100_8", (1, 8, "1f1b"), "adamw", 512 * 4096, 4.2e-4, 0.316**2, 62.0, 4.0),
    ("qwen3_30b_8gpu", "h100_8", (1, 8, "1f1b"), "muon", 1024 * 2048, 3e-4, 0.0, 79.4, 1.8),
    ("moonlight_16gpu", "h100_2x8", (1, 8, "1f1b"), "muon", 512 * 8192, 4.2e-4, 0.1, 62.9, 2.5),
]
# Of a line of figures in a recipe's comment: tokens/s/GPU, GB, GB at a multiple of an even share, what is changed.
FIGURES = re.compile(r"^#   +([\d,]+) +([\d.]+) +([\d.]+) at ([\d.]+) +(.*)$", re.MULTILINE)


def processes(cluster: str) -> int:
    return compose_cluster([f"cluster={cluster}"]).gpus


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe[0])
def recipe(request: pytest.FixtureRequest) -> tuple[TrainConfig, tuple]:
    """The resolved configuration, with nothing typed but its data."""
    name, cluster = request.param[:2]
    config = compose([f"experiment={name}", "data.paths=[tokens/a]"]).config
    return resolve(config, processes(cluster)), request.param


def test_it_resolves_for_its_gpus(recipe: tuple[TrainConfig, tuple]) -> None:
    config, (name, cluster, layout, optimizer, tokens, peak, last, *_) = recipe
    parallel = config.parallel
    assert config.name == name and (parallel.pp, config.ep, parallel.schedule) == layout
    assert parallel.pp * config.dp == processes(cluster)
    assert config.precision.mode == "fp8" and config.optimizer.kind == optimizer
    assert config.batch.sequences * config.seq_len == tokens
    assert config.num_microbatches * config.dp * config.micro_batch == config.batch.sequences
    assert config.data.vocab_size == config.model.vocab_size and config.init_from is None
    assert sum(len(stage.layers) for stage in stages_of(config)) == config.model.num_layers
    schedule = config.optimizer.schedule
    assert schedule.peak == peak and math.isclose(schedule.phases[-1].factor, last, abs_tol=1e-9)
    assert 0.005 < schedule.warmup_steps / config.steps < 0.05


def test_it_fits_80_gb(recipe: tuple[TrainConfig, tuple]) -> None:
    """With balanced experts in 80e9 bytes; where a rank gets as many times the even share as is said, in the card's."""
    config, (*_, expected, most) = recipe
    balanced = worst_rank(rank_memory(config)).total
    assert balanced < 80e9
    assert balanced == pytest.approx(expected * 1e9, rel=0.03), "as the recipe was chosen: larger ones fit no more"
    assert most > 1.5 and worst_rank(rank_memory(config, imbalance=most)).total < 85e9
    if config.ep == 2:
        assert rank_memory(config, imbalance=2.0) == rank_memory(config, imbalance=9.0), "all rows there are"


def test_a_new_models_routing_ends_no_run(recipe: tuple[TrainConfig, tuple]) -> None:
    """No recipe from scratch bounds the rows of a rank: early routing is uneven, and past a bound a run ends."""
    parallel = recipe[0].parallel
    assert parallel.capacity_factor is None and parallel.max_imbalance is None and not parallel.cuda_graphs


def test_no_change_is_much_faster(recipe: tuple[TrainConfig, tuple]) -> None:
    config, (_, name, *_) = recipe
    proposed = faster(predict(config, compose_cluster([f"cluster={name}"]), 1e9))
    assert all(one.config.parallel.capacity_factor is not None for one in proposed), "but for messages of a fixed size"


def test_its_comment_says_what_is_predicted(recipe: tuple[TrainConfig, tuple]) -> None:
    """Each line is the plan of the recipe with the settings in it, within 5 % of the speed and 1 % of the memory."""
    _, (name, of_cluster, *_) = recipe
    cluster = compose_cluster([f"cluster={of_cluster}"])
    lines = FIGURES.findall((EXPERIMENTS / f"{name}.yaml").read_text())
    assert len(lines) == 5 and lines[0][-1].startswith("as it stands")
    for speed, even, uneven, times, changes in lines:
        words = [word.rstrip(",:;") for word in changes.split() if "=" in word]
        config = resolve(compose([f"experiment={name}", "data.paths=[a]", *words]).config, cluster.gpus)
        found = predict(config, cluster, 1e9)
        assert found.time.tokens_per_second_per_gpu == pytest.approx(float(speed.replace(",", "")), rel=0.05), words
        assert found.worst.total == pytest.approx(float(even) * 1e9, rel=0.01), words
        total = worst_rank(rank_memory(config, imbalance=float(times))).total
        assert total == pytest.approx(float(uneven) * 1e9, rel=0.01), words


def test_twice_the_nodes_take_it_as_it_is() -> None:
    for name, cluster, (pp, ep, _), *_ in RECIPES:
        config = resolve(compose([f"experiment={name}", "data.paths=[tokens/a]"]).config, 2 * processes(cluster))
        assert (config.parallel.pp * config.dp, config.ep) == (2 * processes(cluster), ep) and config.parallel.pp == pp


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
