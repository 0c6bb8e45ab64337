"""What a plan ends with: a change gives its figures when planned alone, is legal, fits, and is worth its keys."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.plan.faster import GAIN, ROOM, faster, faster_json, faster_text, removable, with_fixed_messages
from fp8moe.plan.layouts import as_written, changed, layouts
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.prediction import Prediction, memory_of, predict
from fp8moe.plan.step_time import step_time
from fp8moe.train.config import resolve

LITE = ["model=dsv2_lite_16b", "seq_len=1024", "batch.sequences=128", "validation.samples=64", "parallel.ep=8"]
QWEN = ["experiment=qwen3_30b_8gpu", "data.paths=[a]", "batch.micro_batch=1"]
PLANS = {
    "host": ([*LITE, "batch.micro_batch=1"], ["cluster=h100_8"]),
    "fixed": (QWEN, ["cluster=h100_8", "cluster.memory_gb=80"]),
    "schedule": ([*LITE, "seq_len=4096", "batch.micro_batch=2"], ["cluster=h100_8", "cluster.nvlink_gb_per_second=60"]),
    "pipeline": ([*LITE, "parallel.pp=2", "parallel.ep=4", "batch.micro_batch=1"], ["cluster=h100_8"]),
    "bound": ([*QWEN, "parallel.max_imbalance=1.25"], ["cluster=h100_8", "cluster.memory_gb=80"]),
    "both": (["model=qwen3_30b_a3b", "seq_len=4096", "batch.sequences=512", "batch.micro_batch=1"], ["cluster=h200_8"]),
    "pads": ([*LITE, "validation.samples=8", "batch.micro_batch=1"], ["cluster=h100_8", "cluster.memory_gb=64"]),
}


def planned(words: list[str], of_cluster: list[str]) -> Prediction:
    cluster = compose_cluster(of_cluster)
    config, _ = as_written(compose(words).config, cluster)
    return predict(config, cluster, 1e9)


@pytest.fixture(scope="module", params=PLANS, ids=list(PLANS))
def plan(request: pytest.FixtureRequest) -> tuple[str, Prediction]:
    return request.param, planned(*PLANS[request.param])


def test_each_change_planned_alone_gives_its_figures(plan: tuple[str, Prediction]) -> None:
    """The settings that are printed, typed behind those of the plan, for the command that trains."""
    name, before = plan
    words, of_cluster = PLANS[name]
    found = faster(before)
    assert found, "the plan was chosen to have some"
    for one in found:
        typed = [word for word in words if word.partition("=")[0] not in {s.partition("=")[0] for s in one.settings}]
        resolve(compose([*typed, *one.settings]).config, 8)
        alone = planned([*typed, *one.settings], of_cluster)
        assert alone.time == one.time and alone.worst.total == one.bytes
        uneven = worst_rank(rank_memory(alone.config, imbalance=one.imbalance)).total
        assert uneven == one.uneven_bytes <= (1 - ROOM) * memory_of(alone.cluster)
        assert one.time.seconds * (1 + GAIN) <= before.time.seconds


def test_more_keys_bring_more(plan: tuple[str, Prediction]) -> None:
    name, before = plan
    found = faster(before)
    kinds = ["parallel.capacity_factor" in " ".join(one.settings) for one in found]
    assert kinds == sorted(kinds), "fixed messages come last"
    for kind in (False, True):
        keys = [len(one.settings) for one, fixed in zip(found, kinds, strict=True) if fixed is kind]
        assert keys == sorted(set(keys))
    times = [one.time.seconds for one in found]
    assert all(after * (1 + GAIN) <= earlier for earlier, after in pairwise(times))
    assert any(kinds) is (name in ("fixed", "bound"))
    assert any("parallel.schedule=dualpipev" in one.settings for one in found) or name != "schedule"


def test_nothing_near_is_left_out(plan: tuple[str, Prediction]) -> None:
    """No layout with the same pp, ep and cp that fits as these must is GAIN faster than the fastest of them, and none
    that is GAIN faster than the plan changes fewer keys than the first."""
    name, before = plan
    found, limit = faster(before), (1 - ROOM) * memory_of(before.cluster)
    assert len(found) > 1 or name not in ("both", "fixed")
    fewest: list[int] = []
    for base in (before.config, with_fixed_messages(before.config)):
        for one in layouts(base, 8, 8, near=True) if base is not None else ():
            if worst_rank(rank_memory(one, imbalance=found[0].imbalance)).total > limit:
                continue
            seconds = step_time(one, before.cluster).seconds
            assert seconds * (1 + GAIN) > found[-1].time.seconds
            if seconds * (1 + GAIN) <= before.time.seconds:
                fewest.append(len(changed(before.config, one)))
    assert min(fewest) == len(found[0].settings)


def test_nothing_to_gain_is_nothing_said() -> None:
    before = planned(*PLANS["host"])
    best = predict(faster(before)[-1].config, before.cluster, 1e9)
    assert faster(best) == () and faster_text(best.time, (), best.cluster) == ""
    tight = predict(before.config, replace(before.cluster, memory_gb=before.worst.total / 1e9 + 0.01), 1e9)
    assert tight.fits and faster(tight) == (), "no room"
    pairs = planned([*PLANS["host"][0], "parallel.schedule=dualpipev"], ["cluster=h100_8"])
    too_large = predict(pairs.config, replace(pairs.cluster, memory_gb=pairs.worst.total / 1e9 - 0.01), 1e9)
    assert not too_large.fits and faster(too_large) == (), "a search says what fits"


def test_graphs_between_ranks_are_named_for_what_they_refuse() -> None:
    before = planned(*PLANS["fixed"])
    *_, last = faster(before)
    assert {"parallel.cuda_graphs=true", "parallel.capacity_factor=1.5"} <= set(last.settings)
    text = faster_text(before.time, faster(before), before.cluster)
    assert "parallel.capacity_factor=1.5 makes it an error if a message has more than 1.5 times an even share" in text
    bound = faster(planned(*PLANS["bound"]))[-1]
    assert {"parallel.max_imbalance=null", "parallel.capacity_factor=1.25"} <= set(bound.settings)
    others = [["parallel.schedule=1f1b", "parallel.ep=1"], ["parallel.pp=2", "parallel.ep=4"]]
    for words in others:
        assert with_fixed_messages(planned([*LITE, *words], ["cluster=h100_8"]).config) is None


@pytest.mark.parametrize("words", [["data.document_mask=true"], ["parallel.dispatcher=deep_ep"], ["profile=true"]])
def test_what_graphs_refuse_is_not_proposed(words: list[str]) -> None:
    _, of_cluster = PLANS["fixed"]
    for one in faster(planned([*QWEN, *words], of_cluster)):
        assert not one.config.parallel.cuda_graphs and one.config.parallel.capacity_factor is None


def test_text_and_json(plan: tuple[str, Prediction]) -> None:
    _, before = plan
    found = faster(before)
    text = faster_text(before.time, found, before.cluster)
    lines = text.splitlines()
    assert lines[0].startswith("faster by prediction (of the step now: ")
    for name, share in removable(before.time):
        assert f"{name} {share:.1%}" in lines[0] and share >= GAIN
    for one, line, figures in zip(found, lines[3:], faster_json(found), strict=False):
        speed = one.time.tokens_per_second_per_gpu
        assert shlex.split(line)[: len(one.settings)] == list(one.settings) == figures["settings"]
        assert re.search(rf" {speed:,.0f} +{before.time.seconds / one.time.seconds:.2f}x +{one.bytes / 1e9:.1f} ", line)
        assert line.endswith(f" {one.uneven_bytes / 1e9:.1f} at {one.imbalance:g} times")
        assert (figures["tokens_per_second_per_gpu"], figures["bytes"]) == (speed, one.bytes)
        assert figures["layout"]["micro_batch"] == one.config.micro_batch
