"""Layers to stages: against every possible cut, hand-made layouts, and counts that add up to the whole model."""

import itertools
import random
from dataclasses import replace

import pytest

from fp8moe.errors import ConfigError
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import block_parameters, flops_per_token
from fp8moe.model.partition import (
    Stage,
    block_cost,
    embedding_cost,
    head_cost,
    imbalance,
    mtp_cost,
    partition,
    relative_costs,
    stage_cost,
)
from tests.model.published import DSV3_671B
from tests.model.shapes import changed, model_config

SMALL = model_config(
    vocab_size=1024, dim=64, num_layers=8, num_dense_layers=2, num_heads=2, q_lora_rank=32, kv_lora_rank=32,
    nope_dim=16, rope_dim=16, v_dim=16, dense_hidden=256, expert_hidden=64, num_experts=8, topk=2, max_seq_len=128,
)  # fmt: skip


def small(**changes: int) -> ModelConfig:
    return changed(SMALL, **changes)


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
    config = DSV3_671B
    cut = partition(config, 16, seq_len=4096, folded=True)
    assert counts(cut) == (4,) * 15 + (1,)
    assert imbalance(config, cut, 4096, True) == pytest.approx(1.100, abs=5e-4)
    assert str(cut[0]) == "embedding + blocks 0-3" and str(cut[15]) == "block 60 + head + MTP"
    assert sum(relative_costs(config, cut, 4096)) == pytest.approx(16)


def test_costs_add_up_to_the_models_arithmetic() -> None:
    config = DSV3_671B
    stages = partition(replace(config, mtp_depth=0), 8)
    total = sum(stage_cost(replace(config, mtp_depth=0), stage, 4096) for stage in stages) - embedding_cost(config)
    assert total == pytest.approx(flops_per_token(config, 4096) / 3, rel=1e-5)  # norms aside, which do no products
    assert mtp_cost(config, 4096) > block_cost(config, 61, 4096) and mtp_cost(replace(config, mtp_depth=0), 4096) == 0


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


def test_costs_of_the_ends_by_hand() -> None:
    """The embedding reads and writes a row of BF16, a byte worth 300 FLOP; the MTP module runs both ends once more."""
    config = small(mtp_depth=1)
    assert embedding_cost(config) == 64 * (2 + 2) * 300
    assert head_cost(config) == 2 * 64 * 1024
    join = 2 * (2 * 64) * 64
    assert mtp_cost(config, 128) == block_cost(config, 8, 128) + join + embedding_cost(config) + head_cost(config)
    attention = config.attention.core_flops(128, causal=True, layer=0)
    assert block_cost(config, 0, 128) == 2 * block_parameters(config, 0) + attention
    assert block_cost(config, 2, 128) == 2 * (block_parameters(config, 2) - 6 * 3 * 64 * 64) + attention


def test_relative_costs_and_imbalance_by_hand() -> None:
    config = small()
    stages = partition(config, 4, layout=(1, 2, 2, 3))
    costs = [stage_cost(config, stage, 128) for stage in stages]
    mean = sum(costs) / 4
    assert relative_costs(config, stages, 128) == pytest.approx([cost / mean for cost in costs])
    assert imbalance(config, stages, 128, folded=False) == pytest.approx(max(costs) / mean)
    pairs = [costs[0] + costs[3], costs[1] + costs[2]]
    assert imbalance(config, stages, 128, folded=True) == pytest.approx(max(pairs) / (2 * mean))


def test_a_stages_name_says_what_it_holds() -> None:
    whole = partition(small(mtp_depth=1), 1)[0]
    assert str(whole) == "embedding + blocks 0-7 + head + MTP"
    assert [str(stage) for stage in partition(small(), 3, layout=(1, 6, 1))] == [
        "embedding + block 0", "blocks 1-6", "block 7 + head",
    ]  # fmt: skip
