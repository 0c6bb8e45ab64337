"""Context parallelism on paper: messages and work by hand, layouts, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.errors import ConfigError
from fp8moe.layers.attention import MlaConfig
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe
from fp8moe.parallel.overlap import LEFT_OVER
from fp8moe.plan import fit
from fp8moe.plan.attention_work import add_attention
from fp8moe.plan.layer_time import ORDER, BlockTime, alone_seconds, pair_seconds
from fp8moe.plan.layouts import changed, layouts
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.micro_batch import choose_for
from fp8moe.plan.network import Gather
from fp8moe.plan.plan_text import plan_text
from fp8moe.plan.prediction import as_json, predict
from fp8moe.plan.rates import REDUNDANT, Card, launches_of, parts_of
from fp8moe.plan.step_time import StepTime, step_time
from fp8moe.plan.work import Attention, BlockWork, Piece, Product, Shared
from fp8moe.train.config import TrainConfig, resolve

BF16, FP8 = (Recipe(precision, FULL_RECOMPUTE, gathered=True) for precision in (Precision.BF16, Precision.FP8))


def v3(*words: str, name: str = "dsv3_extend_128k") -> TrainConfig:
    return compose([f"experiment={name}", "data.paths=[a]", "parallel.layout=null", *words]).config


# Time


def split(pieces: Sequence[Piece]) -> tuple[float, float, float]:
    """FLOPs of products that are a rank's own, of those for all ranks, and of core attention."""
    own = sum(piece.flops for piece in pieces if isinstance(piece, Product))
    shared = sum(one.piece.flops for one in pieces if isinstance(one, Shared) and isinstance(one.piece, Product))
    return own, shared, sum(piece.flops for piece in pieces if isinstance(piece, Attention))


@pytest.mark.parametrize("name", ["dsv3_671b", "qwen3_30b_a3b"])
def test_a_rank_computes_its_part_and_the_keys_of_all(name: str) -> None:
    model, tokens, cp = compose([f"model={name}"]).config.model, 16384, 4
    whole, part = BlockWork(), BlockWork()
    add_attention(whole, model, FP8, 3, tokens, tokens)
    add_attention(part, model, FP8, 3, tokens // cp, tokens, cp)
    a = model.attention
    up = 2.0 * tokens * a.kv_lora_rank * a.num_heads * (a.nope_dim + a.v_dim) if isinstance(a, MlaConfig) else 0.0
    for which, passes in (("F", 1), ("B", 3), ("W", 0)):  # B: the forward again, both gradients
        mine = split([*part.keys[which], *part.queries[which], *part.attn[which]])
        all_of_it = split(whole.attn[which])
        assert mine[1] == pytest.approx(passes * up)
        before = {"F": 1, "B": 2, "W": 1}[which] * up  # what of it a rank alone computes there
        assert mine[0] * cp == pytest.approx(all_of_it[0] - before)
        assert mine[2] * cp == pytest.approx(all_of_it[2]), "every rank multiplies the same"
    assert not whole.keys["F"] and not whole.queries["F"] and len(part.keys["W"]) >= 1
    assert bool(part.queries["F"]) == isinstance(a, MlaConfig), "grouped queries are ready before the gather"


def test_what_others_compute_too_is_told_apart() -> None:
    card, product = Card("H800", 2.96e12, True), Product(65536, 32768, 512, fp8=True)
    (whole,) = parts_of([product], card).values()
    found = parts_of([Shared(product, 4)], card)
    assert found == {
        ("FP8 products", "model"): pytest.approx(whole / 4),
        (REDUNDANT, "model"): pytest.approx(whole * 0.75),
    }
    assert launches_of([Shared(product, 4)]) == 1


def test_messages_by_hand() -> None:
    there = replace(compose_cluster(["cluster=h800_2048"]), hbm_gb_per_second=2e9)  # passes over them cost nothing
    across, beside = Gather(8, 1), Gather(4, 4)
    assert across.seconds(there, 4096, 644) == pytest.approx(7 * 4096 * 644 / 40e9 + 3 * 25e-6)
    assert beside.seconds(there, 4096, 644) == pytest.approx(3 * 4096 * 644 / 155e9 + 2 * 10e-6)
    assert across.scatter_seconds(there, 4096, 576, 2) == pytest.approx(7 * 4096 * 1152 / 40e9 + 25e-6)
    assert beside.scatter_seconds(there, 4096, 576, 2) == pytest.approx(3 * 4096 * 1152 / 155e9 + 10e-6)
    mixed = Gather(8, 4).scatter_seconds(there, 4096, 576, 2)
    assert mixed == pytest.approx(4 * 4096 * 1152 / 40e9 + 25e-6), "NVLink's three shares travel beside"
    slow = replace(there, hbm_gb_per_second=1e-3)
    assert across.seconds(slow, 10, 100) == pytest.approx(2 * 8 * 10 * 100 / 1e6, rel=0.01)
    assert across.scatter_seconds(slow, 10, 50, 2) == pytest.approx(8 * 10 * 50 * (4 * 2 + 2 + 8) / 1e6, rel=0.01)


def block(gather: float) -> BlockTime:
    compute = {"keys": 1.0, "queries": 0.5, "attn": 2.0, "mlp": 1.0}
    seconds = {(part, phase): length for part in "FBW" for phase, length in compute.items()}
    del seconds["B", "queries"], seconds["W", "queries"]
    return BlockTime(seconds | {("F", "gather"): gather, ("B", "gather"): gather}, dict.fromkeys("FBW", 0), {})


def test_the_gather_hides_behind_queries_and_weight_gradients() -> None:
    assert {("F", "keys"), ("F", "queries"), ("B", "gather"), LEFT_OVER} < set(ORDER)
    assert alone_seconds([block(0.5)], "F") == 4.5 and alone_seconds([block(2.0)], "F") == 4.5 + 1.5
    assert alone_seconds([block(0.5)], "B") == 4.5 and alone_seconds([block(0.5)], "W") == 4.0
    assert pair_seconds([block(0.5)], []) == 4.5, "under the queries"
    assert pair_seconds([block(2.0)], []) == 6.0, "1.5 of it is waited for"
    assert pair_seconds([], [block(2.0)]) == 8.0, "under attn's weight gradients"
    assert pair_seconds([], [block(3.0)]) == 9.0
    assert pair_seconds([block(0.5)], [block(2.0)]) == 12.5
    assert block(9.0).without("gather") == BlockTime(
        {key: value for key, value in block(9.0).seconds.items() if key[1] != "gather"}, dict.fromkeys("FBW", 0), {}
    )


def named(time: StepTime, name: str) -> float:
    return sum(part.seconds for part in time.parts if part.name == name)


def test_a_step_with_shared_sequences() -> None:
    there = compose_cluster(["cluster=h800_2048", "cluster.nodes=512"])
    config = resolve(v3("parallel.cp=32", "parallel.overlap=false"), 4096)
    time = step_time(config, there)
    assert sum(part.seconds for part in time.parts) == pytest.approx(time.seconds)
    assert time.tokens == 480 * 131072
    assert named(time, REDUNDANT) > 0.1 * time.seconds and named(time, "waits for messages of keys") > 0
    slow = step_time(config, replace(there, network_gb_per_second=4.0))
    assert named(slow, "waits for messages of keys") > 5 * named(time, "waits for messages of keys")
    alone = step_time(resolve(v3("parallel.cp=1", "parallel.ep=32"), 512), there)
    assert REDUNDANT not in {part.name for part in alone.parts} and named(alone, "waits for messages of keys") == 0
    a_token = named(time, "attention") * 4096, named(alone, "attention") * 512
    assert 1.0 < a_token[0] / a_token[1] < 1.4, "the same products, 16 heads at once"


# Layouts


def test_layouts_share_sequences_of_long_parts_alone() -> None:
    words = ["model=tiny", "model.max_seq_len=16384", "batch.sequences=16", "validation.samples=16"]

    def shares(*more: str) -> set[tuple[int, int]]:
        return {(one.parallel.cp, one.micro_batch) for one in layouts(compose([*words, *more]).config, 8, 8)}

    assert {cp for cp, _ in shares("seq_len=2048")} == {1}
    found = shares("seq_len=8192")
    assert {one for one in found if one[0] > 1} == {(2, 1), (4, 1)}
    own = shares("seq_len=256", "parallel.cp=2")
    assert {micro for cp, micro in own if cp == 2} >= {1, 2, 4}, "the settings' own with any micro-batch"
    for one in layouts(compose([*words, "seq_len=8192"]).config, 8, 8):
        again = replace(one, parallel=replace(one.parallel, dp=None))
        assert resolve(again, 8) == one and one.dp % (one.ep * one.parallel.cp) == 0
        one.validation.check(one.data_ranks, one.micro_batch)


def test_the_nearest_layout_may_share_sequences() -> None:
    words = ["model=dsv2_lite_16b", "seq_len=32768", "model.max_seq_len=32768", "batch.sequences=64", "device=auto",
             "batch.micro_batch=1", "recompute=[norm,mla_up,swiglu]", "parallel.ep=4"]  # fmt: skip
    config = resolve(compose(words).config, 8)
    shared = resolve(compose([*words, "parallel.cp=2"]).config, 8)
    assert changed(config, shared) == ["parallel.cp=2"]
    need = worst_rank(rank_memory(shared)).total
    with pytest.raises(ConfigError, match=r": use parallel\.cp=2 \(") as caught:
        fit.check_gpu(config, int(need) + 1, 8)
    assert f"({need / 1e9:.1f} GB)" in str(caught.value)
    fit.check_gpu(shared, int(need) + 1, 8)


def test_a_micro_batch_is_chosen_by_the_ranks_that_read_their_own() -> None:
    words = ("experiment=dsv2_lite_8gpu", "data.paths=[a]", "batch.micro_batch=null", "validation.samples=4096")
    config = compose([*words, "parallel.ep=2", "parallel.cp=2"]).config
    found = choose_for(config, 8, 8, 200 * 10**9).config
    assert found.batch.micro_batch is not None

    def need(size: int) -> float:
        typed = replace(config, batch=replace(config.batch, micro_batch=size))
        return worst_rank(rank_memory(resolve(typed, 8), imbalance=1.5)).total

    assert found.batch.micro_batch == max(size for size in (1, 2, 4, 8, 16, 32, 64) if need(size) <= 200e9)


# What is said


def test_plan_names_the_ranks_that_share_a_sequence() -> None:
    there = compose_cluster(["cluster=h800_2048"])
    config = resolve(compose(["experiment=dsv3_extend_32k", "data.paths=[a]"]).config, 2048)
    found = predict(config, there, 1e9)
    text: Any = plan_text(found, ())
    assert "pp=16 dp=128 ep=16 cp=8 1f1b" in text and "8 ranks share a sequence, 4,096 tokens each" in text
    assert "gathers 644 bytes a token (81,920 where" in text and "a rank receives 18.5 MB" in text
    assert "of 32,768 tokens take 3.4 GB, 64 heads" in text and f"\n{REDUNDANT} " in text
    assert as_json(found)["layout"]["cp"] == 8
    assert found.fits and found.worst.total == pytest.approx(80.65e9, rel=0.002), "docs/planning.md, the recipe"
    alone = resolve(replace(config, parallel=replace(config.parallel, cp=1, dp=None)), 1024)
    assert "share a sequence" not in plan_text(predict(alone, there, 1e9), ())
