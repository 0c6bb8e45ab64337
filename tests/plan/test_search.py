"""The search against brute force, its bounds, the line to paste, and what is said of less memory and of too little."""

from __future__ import annotations

import random
import re
import shlex
import sys
from dataclasses import replace

import pytest

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.fitting import legal_layouts
from fp8moe.plan.layouts import KEYS, layouts
from fp8moe.plan.memory import rank_memory
from fp8moe.plan.search import can_fit, fastest, paste, search
from fp8moe.plan.step_time import least_seconds, step_time
from fp8moe.train.config import TrainConfig, resolve

WORDS = ["model=dsv2_lite_16b", "seq_len=2048", "batch.sequences=64"]


def cluster_of(*keys: str) -> Cluster:
    return compose_cluster(["cluster=h100_8", *keys])


def need(config: TrainConfig) -> float:
    return max(rank.total for rank in rank_memory(config, gpus_per_node=8))


def shape(config: TrainConfig) -> tuple[object, ...]:
    parallel = config.parallel
    sizes = parallel.pp, config.ep, parallel.cp, config.micro_batch
    return *sizes, parallel.schedule, parallel.cuda_graphs, tuple(sorted(config.recompute))


FIXED = ["parallel.capacity_factor=1.5", "seq_len=1024"]  # CUDA graphs between ranks, and a host that they relieve
LONG = ["seq_len=8192", "batch.sequences=8", "model.max_seq_len=8192"]  # parts of 4,096 and 2,048 tokens are tried


@pytest.mark.parametrize(
    ("words", "share"),
    [([], 1.0), ([], 0.4), (["precision=bf16"], 0.1), (LONG, 0.5), ([*LONG, "parallel.cp=2"], 0.1), (FIXED, 0.5)],
)
def test_brute_force_agrees(words: list[str], share: float) -> None:
    config = compose([*WORDS, "batch.sequences=16", *words]).config
    every = list(layouts(config, 8, 8))
    assert {one.parallel.cp for one in every} == ({1, 2, 4} if config.seq_len == 8192 else {1})
    needs = list(map(need, every))
    limit = sorted(needs)[int(share * len(every)) - 1]
    cluster = replace(cluster_of(), memory_gb=limit / 1e9)
    fit = [one for one, size in zip(every, needs, strict=True) if size <= cluster.memory_gb * 1e9]
    times = {shape(one): step_time(one, cluster).seconds for one in fit}
    found = search(config, cluster)
    assert (found.legal, found.fit) == (len(every), len(fit))
    if words is FIXED:
        assert {one.ep for one in every if one.parallel.cuda_graphs} == {1, 2, 4, 8}
    assert all(times[shape(one.config)] == one.time.seconds for one in found.best)
    legal = legal_layouts(config, 8, 8)
    for count in (1, 2, 5, 30, len(fit)):
        best = fastest(legal, legal.fitting(limit), cluster, count)
        wanted = sorted(times.values())[:count]
        assert [one.time.seconds for one in best] == pytest.approx(wanted, rel=1e-12)
        assert len({shape(one.config) for one in best}) == len(best)
        assert count != 5 or best == found.best
    assert legal.bytes(legal.least()) == min(needs)


def test_no_layout_is_faster_than_its_bound() -> None:
    cluster = compose_cluster(["cluster=h100_4x8"])
    config = compose(["model=qwen3_30b_a3b", "seq_len=4096", "batch.sequences=256"]).config
    every = list(layouts(config, 32, 8))
    for one in random.Random(0).sample(every, 40):
        assert least_seconds(one, cluster) <= step_time(one, cluster).seconds * (1 + 1e-9), shape(one)


def test_the_pasted_line_is_what_was_found() -> None:
    words = [
        *WORDS,
        "parallel.pp=2",
        "recompute=[norm]",
        "steps=77",
        "name=mine",
        "optimizer.eps=1e-7",
        "parallel.dp=4",
    ]
    words += ["batch.ramp_from=8", "batch.ramp_samples=1000", "validation.samples=30"]
    config, cluster = compose(words).config, cluster_of()
    best = search(config, cluster).best[0].config
    line = shlex.split(paste(config, words, best, cluster))
    assert line[:4] == ["fp8moe", "train", "--nproc", "8"] and len(line) == len(set(line))
    assert {"steps=77", "name=mine", "optimizer.eps=1e-7"} <= set(line) and "parallel.pp=2" not in line[4:8]
    whole = [word.partition("=")[0] for word in shlex.split(paste(best, words, best, cluster))]
    assert sorted(key for key in whole if key in KEYS) == sorted(KEYS), "the whole layout, were it the run's own"
    again = resolve(compose(line[4:]).config, 8)
    assert again == replace(best, name="mine", recompute=again.recompute) and shape(again) == shape(best)
    many = shlex.split(paste(config, words, best, cluster_of("cluster.nodes=2")))
    assert "--nproc" not in many


def test_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cluster = compose(WORDS).config, cluster_of()
    legal = legal_layouts(config, 8, 8)
    least = legal.bytes(legal.least()) / 1e9
    module = sys.modules["fp8moe.plan.search"]
    monkeypatch.setattr(module, "HOPPERS", (10.0, least - 0.1, 85.0))
    assert search(config, cluster).smaller.startswith(
        f"GPUs of {least - 0.1:g} GB, the next smaller, would not do: the"
    )
    assert f" {least:.1f} GB (pp=" in search(config, cluster).smaller
    monkeypatch.setattr(module, "HOPPERS", (10.0, least + 0.1, 85.0))
    smaller = search(config, cluster).smaller
    before, after = (
        search(config, replace(cluster, memory_gb=size)).best[0].time.tokens_per_second_per_gpu
        for size in (85.0, least + 0.1)
    )
    assert (
        after < before and f" would be {1 - after / before:.1%} slower: " in smaller and f" {after:,.0f} to" in smaller
    )
    monkeypatch.setattr(module, "HOPPERS", (84.5, 85.0))
    assert search(config, cluster).smaller.startswith("no Hopper GPU has less memory; ")


def test_what_fits_nowhere_says_what_would() -> None:
    words = [*WORDS, "optimizer.sharding=none", "optimizer.moments=fp32"]
    config, cluster = compose(words).config, compose_cluster(["cluster=h100_1", "cluster.gpus_per_node=2"])
    found = search(config, cluster)
    assert not found.best and found.fit == 0
    match = re.search(r"needs ([\d.]+) GB, ([\d.]+) GB too much: use (.*)$", found.smaller)
    assert match is not None and float(match[1]) - 85.0 == pytest.approx(float(match[2]), abs=0.11)
    nodes = re.search(r"cluster\.nodes=(\d+)", match[3])
    assert nodes is not None
    more = replace(cluster, nodes=int(nodes[1]))
    assert can_fit(config, more) and not can_fit(config, replace(cluster, nodes=int(nodes[1]) // 2))
    assert search(config, more).best
    size = re.search(r"GPUs of (\d+) GB", match[3].rpartition("or ")[2])
    assert size is not None and search(config, replace(cluster, memory_gb=float(size[1]))).best
    assert not search(config, replace(cluster, memory_gb=float(size[1]) - 1)).best
    for key in re.findall(r"optimizer\.\w+=\w+|seq_len=\d+", match[3]):
        assert search(compose([*words, key]).config, cluster).best, key
