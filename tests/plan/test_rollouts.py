"""What a run of GRPO samples, and how long it takes, beside its plan; what a teacher adds to a step."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision
from fp8moe.model.flops import count_parameters
from fp8moe.parallel.dispatch.counts import Capacity, EpTopology, fixed
from fp8moe.plan import rates
from fp8moe.plan.faster_rollouts import faster_rollouts
from fp8moe.plan.forward_time import Decoding, token_seconds
from fp8moe.plan.forward_work import forward_bytes
from fp8moe.plan.network import Exchange, exchange_seconds
from fp8moe.plan.prediction import predict
from fp8moe.plan.rates import HOST_SECONDS, Card
from fp8moe.plan.rollout_time import rollout_time, stretches
from fp8moe.plan.rollouts import rollouts, rollouts_json, rollouts_text
from fp8moe.plan.step_time import StepTime, least_seconds, step_time
from fp8moe.plan.teacher import TeacherModel, teacher_seconds, with_teacher
from fp8moe.train.config import TrainConfig, resolve, stages_of

ZERO = ("experiment=r1_zero", "model=moonlight_16b", "batch.micro_batch=1", "grpo.rollout_batch=64")
CLUSTER = compose_cluster(["cluster=h200_8x8"])


def configured(*words: str, world_size: int = 64) -> TrainConfig:
    return resolve(compose([*words]).config, world_size)


def test_rollouts_are_counted_apart_from_updates() -> None:
    config = configured(*ZERO, "steps=8200")
    counts = {
        "updates_per_batch": 16,
        "batches": 513,
        "problems": 512,
        "samples_per_problem": 16,
        "most_tokens": 512 * 16 * 32768,
    }
    assert rollouts(config) == counts
    found = predict(config, CLUSTER, 1e9)
    text, figures = rollouts_text(found), rollouts_json(found)
    assert text is not None and figures is not None and counts.items() <= figures.items()
    assert "513 batches of 512 problems x 16 completions, at most 268,435,456 tokens each" in text
    assert "64 completions at once, 2 times a batch, in caches of 34,816 tokens" in text
    of_host = figures["host_bytes"]
    assert of_host["node"] == 8 * of_host["rank"] and f"{of_host['rank'] / 1e9:.2f} GB of the host's memory" in text
    time = rollout_time(config, CLUSTER, found.time.seconds, 16384)
    assert figures["time"]["updates"] == time.updates == 16 * found.time.seconds
    assert figures["share"] == time.sampling / time.seconds and f"sampling is {figures['share']:.1%} of it" in text
    plain = predict(
        configured("data.paths=[a]", "data=indexed", "model=moonlight_16b", "batch.sequences=64"), CLUSTER, 1e9
    )
    assert rollouts(plain.config) is rollouts_json(plain) is rollouts_text(plain) is None


def test_a_server_samples_at_its_own_cost() -> None:
    config = configured(*ZERO)
    served = replace(config, grpo=replace(config.grpo, server="http://a/v1", server_model="b", refresh_url="http://a"))
    found = predict(served, CLUSTER, 1e9)
    text, figures = rollouts_text(found), rollouts_json(found)
    assert text is not None and "the server's sampling not counted, which is not predicted" in text
    assert figures is not None and figures["time"]["tokens"] is figures["share"] is figures["rows_at_once"] is None
    own, other = (rollout_time(one, CLUSTER, 10.0, 100.0) for one in (config, served))
    assert other.seconds == pytest.approx(own.seconds - own.sampling)


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.8, 1.0])
def test_rows_are_those_of_drawn_lengths(mean: float) -> None:
    """Rows of all forwards, by lengths with that mean and the generator's own rule: half must end before any leaves."""
    most, rows = 1000, 256
    exponent = 1 / mean - 1
    places = (np.arange(rows) + 0.5) / rows
    lengths = most * (1 - (1 - places) ** (1 / exponent)) if exponent else np.full(rows, float(most))
    assert lengths.mean() == pytest.approx(mean * most, rel=0.01)
    there, computed = lengths, 0
    for step in range(most):
        alive = there[there > step]
        if 0 < 2 * len(alive) <= len(there):
            there = alive
        computed += len(there)
    parts = list(stretches(rows, most, mean * most))
    assert sum(count for count, *_ in parts) == pytest.approx(most)
    assert sum(count * n for count, _, n in parts) == pytest.approx(computed, rel=0.03)
    assert all(0 < middle < most for _, middle, _ in parts) and parts[0][2] == rows


def test_a_token_takes_what_it_reads() -> None:
    """All weights in FP8 and each entry of the caches once at least; or the launches; or products, for many heads."""
    config = configured("model=moonlight_16b", "data=indexed", "data.paths=[a]", "seq_len=8192", world_size=1)
    model, (stage,) = config.model, stages_of(config)
    launched = Decoding(model, config.recipe, Exchange("all_to_all", 1, 1), model.vocab_size)
    of = replace(launched, graphs=True)
    card = Card("H200", CLUSTER.hbm_gb_per_second * 1e9, fp8=True)
    rows = 512  # every expert is read
    weights = count_parameters(model).total / card.hbm
    cache = rows * 8192 * 2 * 576 * model.num_layers / card.hbm  # latents are keys and values
    took = token_seconds(of, stage, rows, 8192, card, CLUSTER)
    assert weights + cache < took < 2.2 * (weights + cache)
    longer = token_seconds(of, stage, rows, 16384, card, CLUSTER) - took
    assert cache < longer < 1.3 * cache
    fewest = token_seconds(launched, stage, 1, 1, card, CLUSTER)
    assert fewest / HOST_SECONDS == pytest.approx(round(fewest / HOST_SECONDS)), "launches alone"
    assert 30 * model.num_layers < fewest / HOST_SECONDS < 80 * model.num_layers
    more_heads = replace(model, attention=replace(model.attention, num_heads=128))
    wide = token_seconds(replace(of, model=more_heads), stage, rows, 65536, card, CLUSTER)
    flops = 2.0 * rows * 65536 * 128 * (576 + 512) * model.num_layers
    assert wide > flops / 500e12 > 8 * cache


def test_a_layer_with_a_window_reads_that() -> None:
    config = configured("model=gpt_oss_20b", "data=indexed", "data.paths=[a]", "seq_len=8192", world_size=1)
    model, (stage,), card = config.model, stages_of(config), Card("H200", 1e12, fp8=False)
    of = Decoding(model, config.recipe, Exchange("all_to_all", 1, 1), model.vocab_size, graphs=True)
    longer = token_seconds(of, stage, 64, 8192, card, CLUSTER) - token_seconds(of, stage, 64, 4096, card, CLUSTER)
    entry = 2 * 2 * 8 * 64  # bytes of keys and values
    assert longer == pytest.approx(64 * 4096 * entry * model.num_layers / 2 / card.hbm, rel=0.2)


def test_rollouts_take_longer_with_less() -> None:
    """Of rows at once, where launches bind; of bandwidth, where longer completions show; a reference is a forward."""
    config = configured(*ZERO, "grpo.cuda_graphs=false")

    def time(changed: TrainConfig, mean: float = 16384, cluster: object = CLUSTER) -> float:
        return rollout_time(changed, cluster, 10.0, mean).sampling  # type: ignore[arg-type]

    half = replace(config, grpo=replace(config.grpo, rollout_batch=32))
    assert time(half) == pytest.approx(2 * time(config), rel=0.01), "launches alone"
    slow = replace(CLUSTER, hbm_gb_per_second=CLUSTER.hbm_gb_per_second / 50)
    assert time(config, 32768, slow) > 1.5 * time(config, 16384, slow) > 2 * time(config)
    alone = replace(config, grpo=replace(config.grpo, kl=0.0))
    scoring = [rollout_time(one, CLUSTER, 10.0, 100.0).scoring for one in (config, alone)]
    assert scoring[0] == pytest.approx(2 * scoring[1])
    step = step_time(config, CLUSTER)
    assert scoring[1] == pytest.approx(16 * step.forward_seconds, rel=0.1), "and the logits"
    assert rollout_time(config, CLUSTER, 10.0, 100.0).updates == 160.0


def test_a_pipeline_of_rollouts() -> None:
    """Sets keep every stage busy: a token of all rows takes the slowest stage's time for each set, and no less."""
    words = ("experiment=r1_zero", "model=dsv3_671b", "batch.micro_batch=1", "grpo.rollout_batch=64")
    cut = configured(*words, "parallel.pp=4", "parallel.ep=8", world_size=32)
    large = replace(CLUSTER, nodes=4)
    one_set = replace(cut, grpo=replace(cut.grpo, rollout_batch=16))
    many, few = (rollout_time(one, large, 1.0, 32768) for one in (cut, one_set))
    assert many.tokens is not None and few.tokens is not None
    assert many.tokens < 0.5 * few.tokens, "four sets are under way at once, where one waits for each stage in turn"
    assert many.tokens >= 0.25 * few.tokens * 0.9


def test_a_teachers_forwards_are_part_of_a_step() -> None:
    words = ("model=moonlight_16b", "data=indexed", "data.paths=[a]", "seq_len=4096", "batch.micro_batch=1")
    config = configured(*words, "batch.sequences=256", "validation.samples=64")
    plain = step_time(config, CLUSTER)
    named = replace(config, distill=replace(config.distill, teacher="a"))
    teacher = TeacherModel(config.model, config.recipe)
    taught = step_time(with_teacher(named, teacher), CLUSTER)
    more = taught.seconds - plain.seconds
    assert more == pytest.approx(teacher_seconds(with_teacher(named, teacher), CLUSTER)) and parts(taught) == more
    assert more == pytest.approx(plain.forward_seconds, rel=0.15), "the student's own sizes, without gradients"
    assert sum(part.seconds for part in taught.parts) == pytest.approx(taught.seconds)
    assert least_seconds(with_teacher(named, teacher), CLUSTER) <= taught.seconds
    exact = TeacherModel(config.model, replace(config.recipe, precision=Precision.FP32))
    with pytest.raises(ConfigError, match=r"distill\.teacher computes in FP32"):
        step_time(with_teacher(named, exact), CLUSTER)


def parts(time: StepTime) -> float:
    return pytest.approx(sum(part.seconds for part in time.parts if part.name == "teacher's forwards"))  # type: ignore[no-any-return]


def test_graphs_leave_the_host_messages_and_what_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row and kernels that take no time: on one rank a few small launches, and all of them twice a graph."""
    config = configured("model=moonlight_16b", "data=indexed", "data.paths=[a]", "seq_len=8192", world_size=1)
    (stage,), card = stages_of(config), Card("H200", 2e15, fp8=True)  # of this test alone: layers are remembered
    for name in ("PASS_SECONDS", "SMALL_SECONDS"):
        monkeypatch.setattr(rates, name, 0.0)
    alone = Decoding(config.model, config.recipe, Exchange("all_to_all", 1, 1), 1000)
    shared = replace(alone, exchange=Exchange("all_to_all", 8, 8))

    def launches(of: Decoding, length: float = 2048.0) -> float:
        return token_seconds(of, stage, 1, length, card, CLUSTER) / HOST_SECONDS

    layers = config.model.num_layers - 1
    of_messages = launches(shared) - launches(alone)
    assert of_messages == pytest.approx(layers * (7 + 2), rel=0.05)
    graphs = launches(replace(shared, graphs=True))
    assert graphs == pytest.approx(
        layers * 2 * (1 + 0.1 + 10 / 75) + 2 + 2 * (launches(shared) - layers * 2) / 256, rel=0.02
    )
    monkeypatch.undo()
    slower = Card("H200", 3e15, fp8=True)
    device = token_seconds(replace(alone, graphs=True), stage, 1, 2048.0, slower, CLUSTER)
    assert device < 0.15 * token_seconds(alone, stage, 1, 2048.0, slower, CLUSTER), "kernels bind"


def test_sampling_that_is_faster_by_prediction() -> None:
    """Graphs, then as many rows as are there; each change fits, and its figures are those of its own plan."""
    words = ("experiment=r1_zero", "grpo.cuda_graphs=false", "grpo.rollout_batch=64")
    found = predict(configured(*words), CLUSTER, 1e9)
    first, *more = faster_rollouts(found, 16384)
    assert first.settings == ("grpo.cuda_graphs=true",) and [len(one.settings) for one in more] == [2]
    now = rollout_time(found.config, CLUSTER, 0.0, 16384).sampling
    assert first.seconds < now / 3 and more[0].seconds < first.seconds / 1.03
    for one in (first, *more):
        again = predict(configured(*words, *one.settings), CLUSTER, 1e9)
        assert rollout_time(again.config, CLUSTER, 0.0, 16384).sampling == one.seconds
        assert again.worst.total == one.bytes < 0.98 * CLUSTER.memory_gb * 1e9
    text, figures = rollouts_text(found, 16384), rollouts_json(found, 16384)
    assert text is not None and f"=true {first.tokens_per_second_per_gpu:,.0f} " in re.sub(" +", " ", text)
    assert figures is not None and figures["faster"][0]["settings"] == ["grpo.cuda_graphs=true"]
    assert faster_rollouts(predict(configured(*words, *more[-1].settings), CLUSTER, 1e9), 16384) == ()
    small = replace(CLUSTER, memory_gb=found.worst.total / 1e9 + 0.5)
    assert faster_rollouts(predict(found.config, small, 1e9), 16384)[-1].bytes < 0.98 * small.memory_gb * 1e9
    assert faster_rollouts(predict(found.config, replace(CLUSTER, memory_gb=1.0), 1e9), 16384) == ()


def test_messages_of_graphs_have_room_for_every_routing() -> None:
    config = configured(*ZERO, "parallel.ep=8", world_size=8)
    model, rows = config.model, 64
    topology = EpTopology(None, model.experts.num_experts, 8, 1)  # type: ignore[arg-type]  # sizes alone
    sizes = fixed(1, model.router.topk, topology, Capacity(rows, float("inf")))
    received = sum(sizes.splits[0][0].received)
    assert received == 8 * rows and sizes.room >= 8 * rows * min(model.router.topk, topology.local_experts)
    roomy, usual = (forward_bytes(model, config.recipe, [5], rows, 8, roomy=one) for one in (True, False))
    row = 1 + 4 / 128  # of a value that a product reads
    least = sizes.room * ((row + 2 * 2) * model.experts.hidden + (row + 2) * model.dim) + received * row * model.dim
    buffers = 2 * received * (row + 2) * model.dim  # sent, and as many that arrive
    assert least + buffers < roomy < 1.15 * (least + buffers) and usual < roomy / 4


def test_messages_of_graphs_travel_in_full() -> None:
    """Of 64 experts on as many ranks a token visits 6 at most, and room for it goes to all."""
    model = configured("model=moonlight_16b", "data=indexed", "data.paths=[a]", world_size=1).model
    exchange = Exchange("all_to_all", 64, 8)
    instant = replace(CLUSTER, nvlink_microseconds=0.0, network_microseconds=0.0)
    usual, full = (
        exchange_seconds(model, exchange, instant, 64, fp8=False, with_ids=False, roomy=one) for one in (False, True)
    )
    network = 64 * 56 * 2 * model.dim / (CLUSTER.network_gb_per_second * 1e9)
    assert network < full < 1.2 * network and usual < full / 8
