"""Captions and tables, and DeepSeek's published step beside the simulated one."""

import pytest

from fp8moe.model.memory import MicroBatch
from fp8moe.model.partition import partition, relative_costs
from fp8moe.plan import schedule_tables as tables
from fp8moe.plan.schedule_tables import PUBLISHED, STEP, caption
from fp8moe.schedule.action import Kind
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.simulate import Costs, simulate
from tests.model.shapes import model_config

SMALL = model_config(
    vocab_size=512, dim=64, num_layers=9, num_dense_layers=1, num_heads=2, q_lora_rank=32, kv_lora_rank=32, nope_dim=16,
    rope_dim=16, v_dim=16, dense_hidden=128, expert_hidden=64, num_experts=8, topk=2, mtp_depth=1, max_seq_len=256,
)  # fmt: skip


def test_the_caption_has_bubble_formula_and_memory() -> None:
    first, second, third = caption(simulate(build_schedule("dualpipe", 8, 20), Costs(1, 2, 1, 2.6)))
    assert first == ("dualpipe: 8 ranks, 8 stages, each on two ranks, 20 micro-batches; F=1 B=2 W=1 F&B=2.6 message=0")
    assert second == (
        "makespan 60.4; bubble 4.8 (7.9%) on the rank that waits most, 4 on the one that waits least; "
        "published formula 4.8"
    )
    assert (
        third.startswith("memory: 9 micro-batches of a stage's activations held at most") and "parameters 2x" in third
    )
    assert "1 to 4 micro-batches" in caption(simulate(build_schedule("1f1b", 4, 8)))[2]


def test_all_schedules_at_one_cost() -> None:
    """Same model and work: on every row makespan minus bubble is what the fullest rank computes."""
    lines = tables.compare(8, 20, Costs(1, 2, 1, 3)).splitlines()
    rows = {cells[0]: cells[1:] for line in lines[3:] if (cells := line.split())}
    assert list(rows) == list(SCHEDULES)
    assert rows["1f1b"] == ["8", "81", "21", "25.9%", "21", "1x", "8"]
    assert rows["zb1p"] == ["8", "67", "7", "10.4%", "7", "1x", "8"]
    assert rows["dualpipe"] == ["8", "66", "6", "9.1%", "6", "2x", "9"]
    assert rows["dualpipev"] == ["16", "67", "7", "10.4%", "7", "1x", "8.5"]


def test_a_schedule_that_does_not_exist_says_why_in_the_table() -> None:
    text = tables.compare(3, 7, Costs())
    assert "dualpipe: dualpipe needs an even number of pipeline ranks, and pp=3 is odd: use 2 or 4" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("dualpipe ")]
    assert rows == [["dualpipe", *"-------"]]


def test_the_derivation_of_the_published_costs() -> None:
    """The first rank's chunks, counted by hand from the eight phases with half = 8, depth = 0, m = 60.

    forwards 14 + 2 + 7; split backwards 7 + 1 + 7 with as many W; whole ones 7 + 1; pairs 2 (60 - 16 + 1) + 7.
    """
    forwards, split, whole, pairs = 23, 15, 8, 97
    costs = tables.published_costs()
    assert costs.forward == pytest.approx(1.13 / forwards)
    assert costs.weight == pytest.approx(0.48 / split)
    assert costs.pair == pytest.approx(13.95 / pairs)
    assert split * (costs.backward - costs.weight) + whole * costs.backward == pytest.approx(1.99)
    assert forwards + pairs == split + whole + pairs == 120
    # A layer's published 32.25 ms, four layers a stage, is most of a pair; a pair gains on its halves.
    assert 4 * 0.03225 < costs.pair < costs.forward + costs.backward


def test_the_published_step_within_eight_per_cent() -> None:
    schedule = build_schedule("dualpipe", 16, 120)
    rows = tables.beside_published(simulate(schedule, tables.published_costs()))
    assert tables.is_published(schedule)
    simulated, published = rows["step"]
    assert published == STEP == 19.926 and abs(simulated / published - 1) < 0.08
    for phase in ("1F", "1B", "1W", "1F1B", "optimizer"):
        assert rows[phase][0] == pytest.approx(PUBLISHED[phase])
    assert sum(ours for phase, (ours, _) in rows.items() if phase != "step") == pytest.approx(simulated)
    # All that is missing is missing in the bubble.
    assert simulated - sum(PUBLISHED.values()) == pytest.approx(rows["bubble"][0] - PUBLISHED["bubble"])
    text = tables.published_table(rows)
    assert "bubble" in text and "2.06" in text and "19.93" in text and "-5.6%" in text


def test_middle_ranks_can_not_have_been_timed() -> None:
    """With their counts a whole backward alone would take longer than a pair that contains one."""
    with pytest.raises(ValueError, match="the longer of the pair"):
        tables.published_costs(7)


def test_a_models_ranks() -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    stages = partition(SMALL, 4, folded=True)
    made = simulate(schedule, Costs(1, 2, 1, 2.6, 0, relative_costs(SMALL, stages, 256)))
    text = tables.partition_table(SMALL, stages, made, MicroBatch(2, 256), 2)
    assert f"layout {','.join(str(stage.num_layers) for stage in stages)}" in text and "512 tokens" in text
    rows = [line for line in text.splitlines() if line.startswith("rank ")]
    assert len(rows) == 4 and "embedding + block" in rows[0] and "head + MTP" in rows[0] and rows[0][8:] == rows[3][8:]
    work = [float(line.split()[2]) for line in rows]
    assert sum(work) / 4 == pytest.approx(1, abs=1e-3) and f"heaviest rank {max(work):.3f} of the average" in text
    assert made.time_by_kind(0)[Kind.FB] > 0 and "stages scaled by their work" in caption(made)[0]
