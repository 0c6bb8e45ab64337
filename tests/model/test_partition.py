"""Layers to stages: against every possible cut, hand-made layouts, and counts that add up to the whole model."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import fp8moe
from fp8moe.errors import ConfigError
from fp8moe.layers.recompute import RECIPE, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import count_parameters, flops_per_token
from fp8moe.model.memory import MicroBatch, rank_parameters, stage_activation_bytes, stage_parameters
from fp8moe.model.partition import (
    Stage,
    block_cost,
    embedding_cost,
    imbalance,
    mtp_cost,
    partition,
    relative_costs,
    stage_cost,
)


def model(name: str) -> ModelConfig:
    file = Path(fp8moe.__file__).resolve().parent / "configs" / "model" / f"{name}.yaml"
    return ModelConfig(**yaml.safe_load(file.read_text()))


def small(**changes: int) -> ModelConfig:
    base = ModelConfig(
        vocab_size=1024, dim=64, num_layers=8, num_dense_layers=2, num_heads=2, q_lora_rank=32, kv_lora_rank=32,
        nope_dim=16, rope_dim=16, v_dim=16, dense_hidden=256, expert_hidden=64, num_experts=8, topk=2, max_seq_len=128,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def counts(stages: tuple[Stage, ...]) -> tuple[int, ...]:
    return tuple(stage.num_layers for stage in stages)


def cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Every way to give each of `stages` at least one of `layers` blocks."""
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *marks, layers)))
        for marks in itertools.combinations(range(1, layers), stages - 1)
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("folded", [False, True])
def test_no_cut_has_a_lighter_heaviest_rank(seed: int, folded: bool) -> None:
    draw = random.Random(seed)
    config = small(
        num_layers=draw.randint(6, 11), num_dense_layers=draw.randint(0, 3), mtp_depth=draw.randint(0, 1),
        dense_hidden=16 * draw.randint(1, 60), expert_hidden=16 * draw.randint(1, 20),
        vocab_size=draw.choice([64, 4096]),
    )  # fmt: skip
    stages = draw.choice([2, 4, 6]) if folded else draw.randint(1, 6)
    best = min(
        imbalance(config, partition(config, stages, layout=cut), 128, folded) for cut in cuts(config.num_layers, stages)
    )
    found = partition(config, stages, folded=folded)
    assert imbalance(config, found, 128, folded) == pytest.approx(best, rel=1e-9)


def test_the_embedding_weighs_too() -> None:
    """Beside small blocks the bytes it moves count: its stage gets fewer of them."""
    config = small(num_layers=12, num_dense_layers=0, expert_hidden=16, vocab_size=16)
    assert embedding_cost(config) > block_cost(config, 0, 128)
    first, *others = counts(partition(config, 3))
    assert first < min(others)


def test_the_heaviest_rank_comes_before_evenness() -> None:
    """Here the cut with the least sum of squares has a heavier rank than need be."""
    config = small(num_layers=9, num_dense_layers=3, dense_hidden=544, expert_hidden=32, vocab_size=2048)
    loads = {
        cut: [stage_cost(config, stage, 128) for stage in partition(config, 4, layout=cut)]
        for cut in cuts(config.num_layers, 4)
    }
    even = min(loads, key=lambda cut: sum(load**2 for load in loads[cut]))
    found = counts(partition(config, 4))
    assert found != even and max(loads[found]) < max(loads[even])


def test_ties_go_to_the_most_even_cut() -> None:
    config = small(num_layers=10, num_dense_layers=0, vocab_size=16)
    assert sorted(counts(partition(config, 4))) == [2, 2, 3, 3]
    assert counts(partition(config, 2, folded=True)) == (5, 5)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_every_block_is_placed_once_and_the_ends_where_they_belong(stages: int, folded: bool) -> None:
    config = small(mtp_depth=1)
    cut = partition(config, stages, folded=folded)
    assert [layer for stage in cut for layer in stage.layers] == list(range(8))
    assert [stage.embedding for stage in cut] == [True] + [False] * (stages - 1)
    assert [stage.head and stage.mtp for stage in cut] == [False] * (stages - 1) + [True]
    assert [stage.index for stage in cut] == list(range(stages))


def test_v3_on_sixteen_ranks() -> None:
    config = model("dsv3_671b")
    cut = partition(config, 16, seq_len=4096, folded=True)
    assert counts(cut) == (4,) * 15 + (1,)
    assert imbalance(config, cut, 4096, True) == pytest.approx(1.100, abs=5e-4)
    assert str(cut[0]) == "embedding + blocks 0-3" and str(cut[15]) == "block 60 + head + MTP"
    assert sum(relative_costs(config, cut, 4096)) == pytest.approx(16)


@pytest.mark.parametrize("name", ["tiny", "dsv2_lite_16b", "dsv3_671b"])
def test_parameters_add_up_to_the_model(name: str) -> None:
    config = model(name)
    stages = partition(config, 4)
    whole = count_parameters(config)
    assert sum(stage_parameters(config, stage) for stage in stages) == whole.total + whole.mtp
    # Folded, embedding and head share a rank; in a line the MTP module's rank holds a tied copy.
    assert rank_parameters(config, [stages[0], stages[3]]) == sum(stage_parameters(config, stages[i]) for i in (0, 3))
    tied = config.mtp_depth * config.vocab_size * config.dim
    assert rank_parameters(config, [stages[3]]) == stage_parameters(config, stages[3]) + tied


def test_expert_parallel_ranks_share_the_routed_experts_only() -> None:
    config = small(mtp_depth=1)
    stage = partition(config, 1)[0]
    routed = (config.num_layers - config.num_dense_layers + 1) * 8 * 3 * 64 * 64
    assert stage_parameters(config, stage) - stage_parameters(config, stage, 4) == routed * 3 // 4


def test_costs_add_up_to_the_models_arithmetic() -> None:
    config = model("dsv3_671b")
    stages = partition(replace(config, mtp_depth=0), 8)
    total = sum(stage_cost(replace(config, mtp_depth=0), stage, 4096) for stage in stages) - embedding_cost(config)
    assert total == pytest.approx(flops_per_token(config, 4096) / 3, rel=1e-5)  # norms aside, which do no products
    assert mtp_cost(config, 4096) > block_cost(config, 61, 4096) and mtp_cost(replace(config, mtp_depth=0), 4096) == 0


def test_activation_bytes_by_hand() -> None:
    """One mixture block, FP8: residual twice, latents, E5M6 output, log-sum-exp, received rows with weight and place,
    gate and up, scores, choice and sums; then what each kind of recomputation spares."""
    config = small(num_layers=1, num_dense_layers=0)
    stage = Stage(0, 0, 1, True, False, False)
    tile = 1 + 4 / 128
    per_token = (
        2 * 64 * 2 + 2 * (32 + 32 + 16) + (1.5 + 4 / 128) * 2 * 16 + 4 * 2 + tile * (2 * 64 + 2 * 64 * 3) + 2 * (4 + 16)
        + 4 * 8 + 12 * 2 + 4 * 2
    )  # fmt: skip
    assert stage_activation_bytes(config, stage, MicroBatch(3, 10)) == pytest.approx(30 * per_token)
    wide = [stage_activation_bytes(config, stage, MicroBatch(1, 1, precision)) for precision in ("fp8", "bf16", "fp32")]
    assert wide == sorted(wide) and wide[2] > 1.8 * wide[1]
    with_head = replace(stage, head=True)
    assert stage_activation_bytes(config, with_head, MicroBatch(1, 1)) - wide[0] == 2 * (64 + 1024)

    def spared(name: Recompute, precision: str, where: Stage = stage) -> float:
        every, without = (MicroBatch(1, 1, precision, names) for names in (RECIPE, RECIPE - {name}))
        return stage_activation_bytes(config, where, without) - stage_activation_bytes(config, where, every)

    assert spared(Recompute.NORM, "fp8") == 2 * (64 + 64 + 32 + 32)
    assert spared(Recompute.NORM, "fp8", with_head) == 2 * (64 + 64 + 32 + 32 + 64)
    assert spared(Recompute.MLA_UP, "fp8") == 2 * 2 * (32 + 32 + 16 + 16)
    assert [spared(Recompute.SWIGLU, precision) for precision in ("fp8", "bf16", "fp32")] == [0, 2 * 3 * 64, 4 * 3 * 64]


@pytest.mark.parametrize(
    ("layout", "stages", "says"),
    [
        ((4, 3), 2, "layout 4,3 places 7 blocks, but the model has 8: add 1 more"),
        ((4, 6), 2, "layout 4,6 places 10 blocks, but the model has 8: take 2 away"),
        ((4, 4), 4, "layout 4,4 has 2 stages, but the schedule has 4: name 4 counts"),
        ((4, 0, 2, 2), 4, "layout 4,0,2,2 has a stage of 0 blocks: give each at least 1"),
        ((9, -1), 2, "layout 9,-1 has a stage of -1 blocks: give each at least 1"),
    ],
)
def test_layouts_that_lose_or_invent_blocks(layout: tuple[int, ...], stages: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(small(), stages, layout=layout)
    assert str(caught.value) == says and caught.value.exit_code == 2


def test_a_layout_by_hand_is_kept() -> None:
    cut = partition(small(), 3, layout=(1, 5, 2))
    assert [list(stage.layers) for stage in cut] == [[0], [1, 2, 3, 4, 5], [6, 7]]


def test_more_stages_than_blocks() -> None:
    with pytest.raises(ConfigError, match="8 blocks can't fill 9 pipeline stages, one each at least: use at most 8"):
        partition(small(), 9)
    with pytest.raises(ConfigError, match="0 stages can't be cut"):
        partition(small(), 0)
