"""Memory of a rank: planned bytes against what real processes allocate, and against published figures."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.cli.compose import compose
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recompute
from fp8moe.model.memory import rank_weights
from fp8moe.parallel.mesh import axis_ranks
from fp8moe.plan.communicators import group_sizes, on_node
from fp8moe.plan.expert_rows import expert_rows, visits
from fp8moe.plan.memory import KINDS, RankMemory, rank_memory, worst_rank
from fp8moe.train.build import empty_model, held_stages
from fp8moe.train.config import TrainConfig, is_tied, resolve, stages_of
from fp8moe.train.memory import KINDS as STATE
from fp8moe.train.memory import counted_weights
from tests.parallel.ranks import run_ranks
from tests.plan.live import Live, every
from tests.train.runs import write_corpus

WORLD = 4
SIZES = (
    "model.dim=128", "model.num_layers=4", "model.num_dense_layers=1", "model.dense_hidden=128", "model.vocab_size=300",
    "model.attention.num_heads=2", "model.attention.q_lora_rank=64", "model.attention.kv_lora_rank=64",
    "model.attention.nope_dim=32", "model.attention.rope_dim=16", "model.attention.v_dim=32",
    "model.experts.num_experts=8", "model.experts.hidden=128", "model.router.topk=4", "model.router.num_groups=1",
    "model.router.top_groups=1", "model.router.force_balance=true", "seq_len=64", "batch.sequences=16",
    "batch.micro_batch=2", "validation.samples=8", "run_dir=null",
)  # fmt: skip
# With a sequence on several ranks there are fewer of them, and so as many micro-batches as elsewhere.
CONTEXT = ("batch.sequences=8",)
WIDE = (*CONTEXT, "model.attention.num_heads=8", "model.attention.kv_lora_rank=128", "model.router.topk=1")  # wide keys
GROUPED = (
    "model=qwen3_30b_a3b", *(word for word in SIZES if "attention" not in word), "model.attention.num_heads=8",
    "model.attention.num_kv_heads=4", "model.attention.head_dim=32", "model.attention.rope_dim=32",
)  # fmt: skip
LAYOUTS = {
    "fp8, zero1, ep 2": ("precision=fp8", "parallel.ep=2"),
    "bf16, nothing sharded, pp 2": ("precision=bf16", "optimizer.sharding=none", "parallel.pp=2", "parallel.ep=1"),
    "fp8, dualpipe, ep 2, all recomputed": (
        "precision=fp8", "parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=2",
        "recompute=[norm,mla_up,swiglu]",
    ),
    "bf16, zb1p, ep 2, nothing recomputed": (
        "precision=bf16", "parallel.pp=2", "parallel.schedule=zb1p", "parallel.ep=2", "recompute=[]",
    ),
    "fp8, dualpipev, norms recomputed, fp32 moments": (
        "precision=fp8", "parallel.pp=2", "parallel.schedule=dualpipev", "parallel.ep=1", "recompute=[norm]",
        "optimizer.moments=fp32",
    ),
    "bf16, dualpipe, nothing sharded, mla_up recomputed": (
        "precision=bf16", "parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=1", "optimizer.sharding=none",
        "recompute=[mla_up]",
    ),
    "fp8, pp 4, a tied embedding": ("precision=fp8", "parallel.pp=4", "parallel.ep=1", "model.mtp_depth=1"),
    "bf16, ep 4 by nodes of 2": (
        "precision=bf16", "parallel.ep=4", "parallel.dispatcher=node_limited", "parallel.ranks_per_node=2",
    ),
    "fp8, cp 2, ep 2": ("precision=fp8", "parallel.ep=2", "parallel.cp=2", *WIDE),
    "bf16, cp 4, nothing recomputed": ("precision=bf16", "parallel.ep=1", "parallel.cp=4", "recompute=[]", *WIDE),
    "fp8, cp 2, zb1p, norms and mla_up recomputed": (
        "precision=fp8", "parallel.pp=2", "parallel.schedule=zb1p", "parallel.ep=1", "parallel.cp=2",
        "recompute=[norm,mla_up]", *WIDE,
    ),
    "grouped queries, bf16, cp 4, mla_up recomputed": (
        *GROUPED, *CONTEXT, "precision=bf16", "parallel.ep=1", "parallel.cp=4", "recompute=[mla_up]",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Live]]:
    """What four processes allocate in one step of each layout, by rank."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    run = ["device=cpu", "steps=4", *corpus]
    layouts = {
        name: resolve(compose([*(() if layout[0] in GROUPED else ("model=tiny", *SIZES)), *layout, *run]).config, WORLD)
        for name, layout in LAYOUTS.items()
    }
    return run_ranks(every, WORLD, layouts, timeout=280)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_is_allocated(measured: list[dict[str, Live]], layout: str) -> None:
    """Weights, FP8 blocks, gradients, masters, moments and activations within 2 %, on each of four ranks."""
    for rank, of_layouts in enumerate(measured):
        found = of_layouts[layout]
        kinds = found.planned.kinds
        for kind in STATE:
            assert found.state[kind] == pytest.approx(kinds[kind], rel=0.02), f"{kind} of rank {rank}"
        assert found.kept == pytest.approx(kinds["activations"] + kinds["data"], rel=0.02), f"rank {rank}"
        assert not any(kinds[kind] for kind in ("communicators", "CUDA context", "fragmentation"))


def resolved(world_size: int, *words: str) -> TrainConfig:
    """A configuration for so many processes; its data are never opened."""
    return resolve(compose(["data=indexed", "data.paths=[none]", *words]).config, world_size)


def dsv3(*words: str) -> TrainConfig:
    ramp = ("batch.ramp_from=4096", "batch.increment=1024")
    return resolved(2048, "experiment=dsv3_pretrain", "parallel=dsv3_2048", *ramp, *words)


def dsv2_lite(*words: str) -> TrainConfig:
    """DeepSeek-V2-Lite as pith-train benchmarks it: EP8, a sequence of 2,048 a micro-batch, BF16, two stages a rank."""
    batch = ("seq_len=2048", "batch.sequences=1024", "batch.micro_batch=1", "validation.samples=8")
    how = ("precision=bf16", "parallel.ep=8", "parallel.schedule=dualpipev", "optimizer.moments=fp32")
    return resolved(8, "model=dsv2_lite_16b", *batch, *how, *words)


def test_dsv3_fits_the_gpus_that_it_was_trained_on() -> None:
    """Balanced, on 80 GB (85.0e9 bytes, as torch counts them), and by little: a rank with 5 % more rows does not."""
    ranks = rank_memory(dsv3())
    assert [rank.pp_rank for rank in ranks] == list(range(16)) and all(
        list(rank.kinds) == list(KINDS) for rank in ranks
    )
    worst = worst_rank(ranks)
    assert 83e9 < worst.total < 85.0e9
    assert worst_rank(rank_memory(dsv3(), imbalance=1.05)).total > 85.0e9
    state = [sum(rank.kinds[kind] for kind in STATE) / 1e9 for rank in ranks]
    assert state == pytest.approx([36.95, *[29.03] * 14, 36.95], abs=0.006), "docs/sharding.md"


def test_a_rank_is_planned_in_milliseconds() -> None:
    config = dsv3()
    rank_memory(config)  # its partition and schedule are kept from here on
    started = time.process_time()
    rank_memory(config)
    assert time.process_time() - started < 0.05


def test_the_published_memory_of_dsv2_lite() -> None:
    """57.2 GB a GPU (pith-train); docs/planning.md says kind by kind where the two programs differ."""
    (rank,) = rank_memory(dsv2_lite())
    assert rank.total / 1e9 == pytest.approx(57.2, rel=0.10)


@pytest.mark.parametrize(
    "words",
    [
        ("model=tiny", "parallel.pp=2", "model.mtp_depth=1", "parallel.ep=2"),
        ("model=dsv3_671b", "parallel.pp=4", "parallel.schedule=dualpipe", "parallel.ep=16", "batch.micro_batch=1"),
        ("model=gpt_oss_20b", "parallel.pp=1", "parallel.ep=8"),
        ("model=qwen3_30b_a3b", "parallel.pp=2", "parallel.schedule=dualpipev", "parallel.ep=8"),
        ("model=glm45_air", "parallel.pp=4", "parallel.ep=4"),
        ("model=olmoe_7b", "parallel.pp=1", "parallel.ep=4"),
    ],
    ids=lambda words: words[0],
)
def test_weights_are_those_of_the_model(words: tuple[str, ...]) -> None:
    """By formula as counted on the model of each pipeline rank, which takes no memory on the meta device."""
    batch = () if any("micro_batch" in word for word in words) else ("batch.micro_batch=1",)
    config = resolved(64, *words, *batch, "batch.sequences=1024", "validation.samples=64")
    stages = stages_of(config)
    for pp_rank in range(config.parallel.pp):
        dispatcher = LocalDispatcher(config.model.experts.num_experts // config.ep)
        model = empty_model(config, pp_rank, stages, dispatcher, torch.device("meta"))
        held = [stages[index] for index in held_stages(config, pp_rank)]
        assert rank_weights(config.model, held, config.ep) == counted_weights(model)


@pytest.mark.parametrize("imbalance", [1.0, 1.25, 2.0])
def test_rows_of_the_busiest_rank(imbalance: float) -> None:
    """Activations grow with its experts' rows and by nothing else; nothing of the state does."""
    config = dsv3()
    even, more = worst_rank(rank_memory(config)), worst_rank(rank_memory(config, imbalance=imbalance))
    rows, most = expert_rows(config), expert_rows(config, imbalance)
    tokens = config.micro_batch * config.seq_len
    assert most.experts == pytest.approx(max(imbalance * tokens * 8, rows.experts), rel=0.01)
    a_row = (1 + 4 / 128) * (2 * 2048 + 7168) + 20
    grown = more.kinds["activations"] - even.kinds["activations"]
    blocks = grown / (a_row * (most.experts - rows.experts)) if imbalance > 1 else 4 * 17
    assert blocks == pytest.approx(4 * 17, rel=0.02), "17 micro-batches in stages of 4 blocks"
    assert all(more.kinds[kind] == even.kinds[kind] for kind in STATE)


def test_no_rank_gets_more_rows_than_there_are() -> None:
    rows = expert_rows(dsv3(), 1e6)
    assert rows.experts <= 64 * 4096 * 4 + 4 * 128 and rows.arrived == 64 * 4096


def test_places_that_a_token_visits() -> None:
    """Of even choices, by drawing them; experts in turn visit as few as can be."""
    router = dsv3().model.router
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(2000):
        groups = torch.randperm(8, generator=generator)[:4]
        experts = torch.cat([groups_of * 32 + torch.arange(32) for groups_of in groups])
        chosen = experts[torch.randperm(128, generator=generator)[:8]]
        seen.append([len(set((chosen // size).tolist())) for size in (4, 32)])
    drawn = torch.tensor(seen, dtype=torch.float64).mean(0).tolist()
    assert [visits(router, 256, 4), visits(router, 256, 32)] == pytest.approx(drawn, rel=0.02)
    in_turn = replace(router, force_balance=True)
    assert visits(in_turn, 256, 4) == 2 and visits(in_turn, 256, 32) == 1


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2048, ("parallel.pp=16", "parallel.ep=64", "parallel.schedule=dualpipe", "parallel.dispatcher=node_limited",
                "parallel.ranks_per_node=8")),
        (64, ("parallel.pp=4", "parallel.ep=8", "parallel.schedule=zb1p", "model.mtp_depth=1")),
        (8, ("parallel.pp=4", "parallel.ep=2")),
        (8, ("parallel.pp=1", "parallel.ep=8")),
        (32, ("parallel.pp=1", "parallel.ep=16", "parallel.dispatcher=node_limited", "parallel.ranks_per_node=4")),
        (64, ("parallel.pp=2", "parallel.ep=2", "parallel.cp=8")),
        (64, ("parallel.pp=1", "parallel.ep=8", "parallel.cp=4")),
        (64, ("parallel.pp=4", "parallel.ep=1", "parallel.cp=16", "parallel.schedule=dualpipe")),
    ],
)  # fmt: skip
def test_communicators_are_those_of_the_mesh(world: int, words: tuple[str, ...]) -> None:
    """Sizes, and ranks on the rank's own node, of the groups that a rank opens, against the mesh's lists of ranks."""
    model = ("model=tiny", "model.num_layers=16", "model.experts.num_experts=64", "batch.micro_batch=1")
    config = resolved(world, *model, "batch.sequences=8192", "validation.samples=2048", *words)
    parallel, dp = config.parallel, config.dp
    mirrored, tied = parallel.schedule == "dualpipe", is_tied(config)
    per_node = parallel.ranks_per_node if parallel.dispatcher == "node_limited" else None
    axes = axis_ranks(parallel.pp, dp, config.ep, per_node, mirrored=mirrored, tied=tied, cp=parallel.cp)
    unused = {"up", "down"} | ({"dp"} if parallel.pp > 1 else set())
    for pp_rank in {0, parallel.pp - 1}:
        rank = pp_rank * dp
        found = {axis: next((ranks for ranks in groups if rank in ranks), []) for axis, groups in axes.items()}
        mine = {axis: ranks for axis, ranks in found.items() if axis not in unused and len(ranks) > 1}
        sizes = group_sizes(config, pp_rank)
        assert sizes == {axis: len(ranks) for axis, ranks in mine.items()}
        beside = {axis: sum(other // 8 == rank // 8 for other in ranks) for axis, ranks in mine.items()}
        assert {axis: on_node(axis, size, config, 8) for axis, size in sizes.items()} == beside


@functools.cache
def small() -> TrainConfig:
    batch = ("batch.sequences=64", "batch.micro_batch=1", "validation.samples=16")
    return resolved(16, "model=tiny", "model.num_layers=8", "model.experts.num_experts=16", "parallel.ep=1", *batch)


PARALLEL = st.fixed_dictionaries(
    {
        "pp": st.sampled_from([1, 2, 4]),
        "schedule": st.sampled_from(["1f1b", "zb1p", "dualpipev"]),
        "ep": st.sampled_from([1, 2]),
        "overlap": st.booleans(),
    }
)
PRECISION, SHARDING = st.sampled_from([Precision.BF16, Precision.FP8]), st.sampled_from(["none", "zero1"])


@settings(max_examples=25, deadline=None)
@given(PARALLEL, PRECISION, SHARDING, st.sets(st.sampled_from(list(Recompute))))
def test_what_needs_more_memory_does(
    words: dict[str, Any], precision: Precision, sharding: Any, again: set[Recompute]
) -> None:
    """Longer sequences and busier ranks never need less; recomputation, sharing out, more expert ranks never more."""
    base = replace(
        small(),
        parallel=replace(small().parallel, dp=16 // words["pp"], **words),
        precision=replace(small().precision, mode=precision),
        optimizer=replace(small().optimizer, sharding=sharding),
        recompute=tuple(again),
    )

    def total(config: TrainConfig, **options: Any) -> float:
        return sum(rank.total for rank in rank_memory(config, **options))

    here = total(base)
    assert total(replace(base, seq_len=2 * base.seq_len)) > here
    assert total(base, imbalance=2.0) >= here >= total(base, on_gpu=False)
    if words["schedule"] == "1f1b":  # waiting weight gradients keep gate and up where SwiGLU is computed again
        for one, other in zip(rank_memory(base), rank_memory(_all_again(base)), strict=True):
            assert one.kinds["activations"] >= other.kinds["activations"]
    assert here <= total(replace(base, optimizer=replace(base.optimizer, sharding="none")))
    more = replace(base, parallel=replace(base.parallel, ep=2 * base.ep))
    for one, other in zip(rank_memory(more), rank_memory(base), strict=True):
        assert one.kinds["weights"] < other.kinds["weights"] and one.kinds["FP8 blocks"] <= other.kinds["FP8 blocks"]


def _all_again(config: TrainConfig) -> TrainConfig:
    return replace(config, recompute=tuple(Recompute))


def test_graphs_keep_memory_on_a_gpu_alone() -> None:
    graphs = ("parallel.schedule=1f1b", "parallel.capacity_factor=1.5", "parallel.cuda_graphs=true")
    config = dsv2_lite("optimizer.sharding=none", *graphs)
    ((on_gpu,), (on_cpu,)) = (rank_memory(config, on_gpu=there) for there in (True, False))
    assert on_gpu.kinds["beside graphs"] > 0 == on_cpu.kinds["beside graphs"]


def test_kinds_add_up_to_the_peak() -> None:
    rank = worst_rank(rank_memory(dsv3()))
    assert isinstance(rank, RankMemory) and rank.total == sum(rank.kinds.values())
    counted = [kind for kind in ("attention workspace", "MLP workspace", "logits and loss") if rank.kinds[kind]]
    assert len(counted) == 1 and rank.kinds[counted[0]] >= max(rank.left_out.values())
