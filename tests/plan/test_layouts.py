"""Legal layouts are those that train accepts, no more and no fewer; settings that follow a layout are legal too."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.layers.recipe import Precision, Recompute
from fp8moe.plan.layouts import as_written, changed, layouts, recompute_sets
from fp8moe.schedule.build import SCHEDULES
from fp8moe.train.config import TrainConfig, resolve

TINY = ["model=tiny", "seq_len=256", "batch.sequences=32"]


def accepted(config: TrainConfig, gpus: int) -> set[tuple[object, ...]]:
    """Every combination of sizes that `resolve` takes, tried one by one."""
    found = set()
    sizes = range(1, gpus + 1)
    shapes = itertools.product(sizes, sizes, SCHEDULES, range(1, 13), (False, True))
    for pp, ep, schedule, micro, graphs in shapes:
        parallel = replace(config.parallel, pp=pp, ep=ep, schedule=schedule, cuda_graphs=graphs)  # type: ignore[arg-type]
        try:
            resolve(replace(config, parallel=parallel, batch=replace(config.batch, micro_batch=micro)), gpus)
        except ValueError:
            continue
        found.add((pp, ep, schedule, micro, graphs))
    return found


def sizes_of(config: TrainConfig) -> tuple[object, ...]:
    parallel = config.parallel
    return parallel.pp, config.ep, parallel.schedule, config.micro_batch, parallel.cuda_graphs


@pytest.mark.parametrize("words", [(), ("parallel.capacity_factor=1.5",), ("parallel.cuda_graphs=true",)])
@pytest.mark.parametrize("gpus", [1, 4, 6])
def test_legal_is_what_train_accepts(gpus: int, words: tuple[str, ...]) -> None:
    config = compose([*TINY, "batch.sequences=12", "validation.samples=12", *words]).config
    found = list(layouts(config, gpus, 8))
    by_sizes = set(map(sizes_of, found))
    assert by_sizes == accepted(config, gpus)
    graphs = {one.ep for one in found if one.parallel.cuda_graphs}
    assert graphs == ({ep for _, ep, *_ in by_sizes} if "parallel.capacity_factor=1.5" in words else {1})
    assert len(found) == len(by_sizes) * 4  # FP8 has swiglu in all of 2^2 sets


def test_layouts_near_one_have_its_mesh() -> None:
    config = resolve(compose([*TINY, "parallel.pp=2", "parallel.ep=2"]).config, 8)
    every, near = (list(layouts(config, 8, 8, near=near)) for near in (False, True))
    alike = [one for one in every if (one.parallel.pp, one.ep, one.parallel.cp) == (2, 2, 1)]
    assert near == alike and {one.parallel.schedule for one in near} == set(SCHEDULES)
    shared = resolve(compose([*TINY, "seq_len=8192", "model.max_seq_len=8192", "parallel.cp=2"]).config, 8)
    assert {one.parallel.cp for one in layouts(shared, 8, 8)} == {1, 2, 4}
    assert {one.parallel.cp for one in layouts(shared, 8, 8, near=True)} == {2}
    spread = resolve(compose([*TINY, "parallel.ep=8"]).config, 8)
    assert [{one.ep for one in layouts(spread, 8, node, near=True)} for node in (8, 4, 3, 1)] == [
        {8},
        {4, 8},
        {2, 8},
        {1, 8},
    ]


def test_validation_samples_follow_the_layout() -> None:
    config = compose([*TINY, "batch.sequences=24", "validation.samples=50"]).config
    for one in layouts(config, 4, 8):
        one.validation.check(one.dp, one.micro_batch)
        assert abs(one.validation.samples - 50) < one.dp * one.micro_batch


def test_sets_of_what_is_computed_again() -> None:
    assert len(recompute_sets(Precision.BF16)) == 8 and recompute_sets(Precision.BF16)[0] == ()
    assert all(Recompute.SWIGLU in names for names in recompute_sets(Precision.FP8))
    for precision in Precision:
        sets = recompute_sets(precision)
        assert set(sets[-1]) == set(Recompute) and len(set(sets)) == len(sets)


def test_a_batch_that_grows_follows_the_layout() -> None:
    words = [*TINY, "batch.sequences=512", "batch.ramp_from=24", "batch.ramp_samples=9999", "batch.increment=40"]
    config = compose(words).config
    found = [one for one in layouts(config, 8, 8) if one.parallel.schedule == "dualpipe"]
    assert found
    for one in found[:: max(1, len(found) // 8)]:
        keys = changed(config, one, always=["batch.micro_batch"])
        again = resolve(compose([*words, *keys]).config, 8)  # accepts every size of the batch
        assert (again.parallel, again.batch, set(again.recompute)) == (one.parallel, one.batch, set(one.recompute))
        assert 24 <= one.batch.ramp_from <= 512 and one.batch.sequences == 512
        unit = one.dp * one.micro_batch * 2
        assert one.batch.ramp_from - 24 < max(unit, 2 * one.parallel.pp * one.dp * one.micro_batch)


def test_a_cut_by_hand_stays_where_it_has_as_many_stages() -> None:
    config = compose([*TINY, "parallel.pp=2", "parallel.layout=[1,3]"]).config
    for one in layouts(config, 4, 8):
        two = one.parallel.pp == 2 and one.parallel.schedule != "dualpipev"
        assert one.parallel.layout == (
            (1, 3) if two or (one.parallel.pp, one.parallel.schedule) == (1, "dualpipev") else None
        )


def test_deepspeed_and_two_hops_keep_their_rules() -> None:
    config = compose(
        [*TINY, "optimizer.sharding=deepspeed", "optimizer.moments=fp32", "checkpoint.background=false"]
    ).config
    assert {one.parallel.pp for one in layouts(config, 4, 8)} == {1} and not list(layouts(config, 1, 8))
    config = compose([*TINY, "parallel.dispatcher=node_limited"]).config
    assert {one.ep for one in layouts(config, 8, 3)} == {1, 2}  # 4 and 8 are no multiples of the 3 of a node
    assert {one.parallel.ranks_per_node for one in layouts(config, 8, 4)} == {4}


def test_what_cannot_run_as_written_is_named() -> None:
    words = ["experiment=dsv3_pretrain", "parallel=dsv3_2048", "data.paths=[a]"]
    cluster = compose_cluster(["cluster=h800_2048"])
    found, refused = as_written(compose(words).config, cluster)
    assert len(refused) == 1 and "makes 24 micro-batches" in refused[0] and "at least 32" in refused[0]
    assert (found.dp, found.ep, found.num_microbatches, found.batch.ramp_from) == (128, 64, 120, None)
    legal = compose([*words, "batch.ramp_from=4096", "batch.increment=1024"]).config
    assert as_written(legal, cluster) == (resolve(legal, 2048), ())
    odd = compose([*words, "validation.samples=100"]).config
    assert [sentence.partition("=")[0] for sentence in as_written(odd, cluster)[1]] == [
        "batch.ramp_from",
        "validation.samples",
    ]
    with pytest.raises(ValueError, match=r"parallel.pp=3 does not divide 2048 processes"):
        as_written(compose([*words, "parallel.pp=3"]).config, cluster)
