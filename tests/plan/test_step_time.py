"""The step on paper against figures made by hand, the simulator, the records, and what must never turn around."""

import time
from dataclasses import replace

import pytest

from benchmarks.layers import LAYERS
from benchmarks.published import planned, read_cluster
from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.plan import stage_time, step_time
from fp8moe.plan.gemm_model import Problem, predict, work_of
from fp8moe.plan.gemm_time import product_time
from fp8moe.plan.kernel_records import RECORDS, records
from fp8moe.plan.layer_time import Sizes, block_time
from fp8moe.plan.network import Exchange, collective_seconds, exchange_seconds, neighbour_seconds, places_hit
from fp8moe.plan.rates import HOST_SECONDS, SHARES, Card
from fp8moe.plan.update_time import held, update_time
from fp8moe.plan.work import Product
from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.simulate import published_bubble, simulate

V3 = ("model=dsv3_671b", "optimizer=adamw_dsv3", "precision=fp8", "seq_len=4096", "batch.micro_batch=1")
SMALL = ("model=dsv2_lite_16b", "precision=bf16", "seq_len=4096", "batch.micro_batch=1", "batch.sequences=64")
BIG = Product(4096, 7168, 16384, fp8=True)


def small(*settings, **changes):
    there = replace(read_cluster("h100_8"), **changes)
    return step_time.step_time(planned((*SMALL, *settings), there.gpus), there)


def v3(*settings, count=15360, **changes):
    there = replace(read_cluster("h800_2048"), **changes)
    config = planned((*V3, "parallel=dsv3_2048", f"batch.sequences={count}", *settings), there.gpus)
    return config, there


def recorded(name, shape, metric):
    """The value of an H100's record; of a kernel's the last file's, of a layer's the first's."""
    found = [r["value"] for r in records("H100") if (r["name"], r["shape"], r["metric"]) == (name, shape, metric)]
    return found[-1] if metric == "throughput" else found[0]


# Products


def test_a_record_is_used_on_its_own_card_alone():
    measured = recorded("gemm gluon", "M4096 N7168 K16384", "throughput")
    problem = Problem("gemm", 4096, 7168, 16384)
    assert product_time(BIG, "H100") == (pytest.approx(BIG.flops / measured / 1e12), "record")
    for card in ("H200", "H800"):
        assert not records(card)
        expected = predict(problem, work_of(problem, pairs=False)[0], device=card).seconds
        assert product_time(BIG, card) == (pytest.approx(expected), "model")
    assert product_time(replace(BIG, m=4224), "H100").source == "model"
    turned = Product(16384, 7168, 4096, columns=True, fp8=True)  # measured as [7168, 16384]
    assert product_time(turned, "H100").source == "record" and product_time(turned, "H200").source == "model"
    assert product_time(replace(BIG, m=7168, n=4096), "H100").source == "model", "only gradients count turned"


def test_bf16_products_of_the_model_are_close_to_the_records():
    for record in records("H100"):
        op, _, candidate = record["name"].partition(" ")
        if candidate != "bf16 cublas" or record["metric"] != "throughput" or op not in ("gemm", "grouped_gemm"):
            continue
        sizes = {word[0]: int(word[1:]) for word in record["shape"].split()}
        product = Product(sizes["M"], sizes["N"], sizes["K"], sizes.get("E", 1), grouped=op != "gemm")
        modelled = product.flops / product_time(product, "H800").seconds / 1e12
        assert modelled == pytest.approx(record["value"], rel=0.11), record["shape"]


@pytest.mark.parametrize("product", [BIG, replace(BIG, fp8=False), Product(7168, 16384, 4096, columns=True)])
def test_fewer_sms_make_a_product_slower(product):
    times = [product_time(product, "H100", sms).seconds for sms in (132, 112, 66)]
    assert times == sorted(times) and times[2] > 1.5 * times[0] and times[1] > 1.03 * times[0]


def test_shares_of_a_copy_are_those_measured():
    def share(name, shape, baseline="copy"):
        found = {r["name"]: r["value"] for r in records("H100") if r["shape"] == shape and r["metric"] == "bandwidth"}
        return found[name] / found[baseline]

    cast, layer, rows = "M32768 K4096", "T4096 D7168", "R32768 F2048"
    measured = {
        "cast": share("quantize_rows", cast),
        "cast both": share("quantize_rows_and_columns", cast),
        "columns of rows": share("requantize_columns", cast),
        "pack": share("pack_e5m6", cast),
        "columns of 12 bits": share("e5m6_to_columns", cast),
        "norm": share("triton rows", layer),
        "norm, residual": share("triton residual, tensor, rows", layer),
        "norm columns": share("triton columns", layer),
        "rotation": share("triton keys", "T4096 H128"),
        "swiglu": share("swiglu", rows),
        "swiglu backward": share("swiglu_backward", rows),
        "swiglu columns": share("swiglu_columns", rows),
        "permute": share("triton permute fp8", "N4096 D7168 top-8 of 32 R35072"),
        "unpermute": share("triton unpermute bf16", "N4096 D7168 top-8 of 32 R35072"),
        "update": share("triton adamw_step_quantize", "32x512x1024 + 32x1024x256"),
    }
    for kernel, value in measured.items():
        assert SHARES[kernel] == pytest.approx(value, rel=0.08), kernel


LAYER_RECORDS = [("dsv3", 4096), ("dsv3", 16384), ("dsv2_lite", 16384), ("qwen3_mixture", 16384)]


@pytest.mark.parametrize(("name", "tokens"), LAYER_RECORDS)
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_a_whole_layer_takes_what_it_took(name, tokens, precision):
    model, h100 = LAYERS["cuda"][name], read_cluster("h100_1")
    shape = f"T{tokens} D{model.dim} E{model.experts.num_experts}"
    measured = recorded(f"{name} {precision}", shape, "time") / 1e3
    sizes = Sizes(model, Recipe(precision), tokens, tokens, Exchange("all_to_all", 1, 1))
    block = block_time(sizes, False, model.num_layers - 1, Card("H100", 2.96e12, precision is Precision.FP8), h100)
    assert sum(block.compute(part) for part in "FBW") == pytest.approx(measured, rel=0.06)


# Messages


def test_places_hit_is_an_expectation_without_replacement():
    model = v3()[0].model
    limited = replace(model.router, topk=2, num_groups=8, top_groups=1)
    two = replace(model, router=limited, experts=replace(model.experts, num_experts=32))
    assert places_hit(two, 8) == 1  # a group is a node
    assert places_hit(two, 16) == pytest.approx(2 * (1 - 2 / 4 * 1 / 3))  # 2 of 4 experts on 2 ranks of 2
    free = replace(two, router=replace(limited, num_groups=1))
    assert places_hit(free, 32) == pytest.approx(2) and places_hit(free, 1) == 1
    assert 3 < places_hit(model, 8) < 4, "at most four nodes a token"


def test_messages_by_hand():
    model = v3()[0].model
    there = replace(read_cluster("h800_2048"), hbm_gb_per_second=2e9)  # so fast that packing costs nothing
    nodes, ranks = places_hit(model, 8), places_hit(model, 64)
    fp8_row = 7168 * (1 + 1 / 128) + 8 * 6

    def seconds(dispatcher, **options):
        exchange = Exchange(dispatcher, 64, 8, options.pop("chunks", 1))
        return exchange_seconds(model, exchange, there, 4096, **{"fp8": True, "with_ids": True} | options)

    network = 4096 * nodes * 7 / 8 * fp8_row / 40e9 + 25e-6
    nvlink = 4096 * ranks * 7 / 8 * fp8_row / 155e9 + 10e-6
    assert seconds("node_limited") == pytest.approx(network + nvlink)
    assert seconds("node_limited", chunks=4) == pytest.approx(network + nvlink / 4)
    assert seconds("deep_ep") == pytest.approx(max(network, nvlink))
    assert seconds("all_to_all") == pytest.approx(4096 * ranks * 7 / 8 * fp8_row / 40e9 + 25e-6)
    slow = exchange_seconds(model, Exchange("deep_ep", 64, 8), read_cluster("h800_2048"), 4096, fp8=True, with_ids=True)
    assert slow - seconds("deep_ep") == pytest.approx(2 * 4096 * ranks * fp8_row / 2.96e12, rel=1e-3)
    back = seconds("deep_ep", fp8=False, with_ids=False)
    assert back == pytest.approx(4096 * nodes * 7 / 8 * 2 * 7168 / 40e9 + 25e-6)
    assert exchange_seconds(model, Exchange("deep_ep", 1, 1), there, 4096, fp8=True, with_ids=True) == 0


def test_collectives_and_neighbours_by_hand():
    there = read_cluster("h800_2048")
    assert collective_seconds(there, 1, 1, 1e9) == 0
    assert collective_seconds(there, 8, 8, 155e9) == pytest.approx(7 / 8 + 3 * 10e-6)
    assert collective_seconds(there, 16, 8, 155e9) == pytest.approx(15 / 16 + 4 * 25e-6), "NVLink bounds eight ports"
    assert collective_seconds(there, 4, 1, 40e9) == pytest.approx(3 / 4 + 2 * 25e-6)
    assert neighbour_seconds(there, 4, 155e9) == pytest.approx(1 + 10e-6)
    assert neighbour_seconds(there, 128, 40e9) == pytest.approx(1 + 25e-6)


# Pairs and schedules


def test_a_step_is_the_simulators_makespan_and_what_follows_it():
    config, there = v3()
    times = step_time._times(config, there, step_time._stages(config))
    message = neighbour_seconds(there, config.dp, 2.0 * 4096 * 7168)
    costs = step_time._costs(config, times, message, stage_time.WHOLE)
    timeline = simulate(build_schedule("dualpipe", 16, 120), costs)
    step = step_time.step_time(config, there)
    busiest = max(range(16), key=timeline.busy.__getitem__)
    stages = step_time._stages(config)
    mine = (busiest, 15 - busiest)
    update = update_time(config, there, tuple(stages[i] for i in mine), backward=sum(costs.alone[i][3] for i in mine),
                         forward=sum(costs.alone[i][0] for i in mine))  # fmt: skip
    assert step.seconds == pytest.approx(timeline.makespan + update.exposed + update.update, rel=1e-6)
    assert step.bubble * step.seconds == pytest.approx(timeline.bubble[busiest], rel=1e-6)
    assert sum(part.seconds for part in step.parts) == pytest.approx(step.seconds)
    assert min(part.seconds for part in step.parts) >= 0
    sources = {part.source for part in step.parts}
    assert sources == {"model", "bytes", "FLOPs", "network model", "launches", "simulator"}


def test_one_rank_by_hand():
    step, there = small("parallel.ep=1"), read_cluster("h100_8")
    config = planned((*SMALL, "parallel.ep=1"), 8)
    (stage,) = step_time._stages(config)
    (time_,) = step_time._times(config, there, (stage,))
    forward = sum(block.compute("F") for block in time_.blocks) + time_.end("F")
    backward = sum(block.compute(part) for block in time_.blocks for part in "BW") + time_.end("BW")
    alone = max(forward, HOST_SECONDS * time_.launches["F"])
    alone += max(backward, HOST_SECONDS * (time_.launches["B"] + time_.launches["W"]))
    outside = sum(p.seconds for p in step.parts if p.name in ("optimizer", "gradients and weights between replicas"))
    assert step.seconds == pytest.approx(8 * alone + outside)
    assert step.tokens == 64 * 4096 and step.gpus == 8 and step.hidden == 1.0 and 0 <= step.bubble < 1e-12
    assert step.tokens_per_second_per_gpu == pytest.approx(64 * 4096 / 8 / step.seconds)


def test_the_bubble_is_the_published_formulas_where_stages_are_alike():
    alike = ("model.mtp_depth=0", "model.num_layers=64", "model.num_dense_layers=0", "model.vocab_size=272")
    free = {"network_microseconds": 0.0, "network_gb_per_second": 1e9}
    config, there = v3(*alike, "parallel.schedule=1f1b", count=128 * 40, **free)
    step, times = step_time.step_time(config, there), step_time._times(config, there, step_time._stages(config))
    costs = stage_time.Costs(times[3].alone("F"), times[3].backward(overlap=True), 0)
    assert step.bubble * step.seconds == pytest.approx(published_bubble("1f1b", 16, costs), rel=0.02)
    assert step_time.least_seconds(config, there) == pytest.approx(step.seconds, rel=1e-4), "no wait but the schedule's"


# What must never turn around


def test_more_bandwidth_is_never_slower():
    for name in ("nvlink_gb_per_second", "hbm_gb_per_second"):
        many = ("parallel.ep=8", "batch.micro_batch=4")
        rates = [small(*many, **{name: value}).seconds for value in (50.0, 200.0, 3000.0)]
        assert rates == sorted(rates, reverse=True) and rates[0] > rates[2], name
    config, there = v3()
    clusters = [replace(there, network_gb_per_second=value) for value in (5.0, 20.0, 80.0)]
    network = [step_time.step_time(config, one).seconds for one in clusters]
    assert network == sorted(network, reverse=True) and network[0] > 1.5 * network[2]


def test_messages_that_are_hidden_cost_their_sms():
    config, there = v3()
    fewer = replace(config, parallel=replace(config.parallel, communication_sms=60))
    step, contended = step_time.step_time(config, there), step_time.step_time(fewer, there)
    assert contended.seconds > 1.1 * step.seconds
    parts = [{part.name: part.seconds for part in one.parts} for one in (step, contended)]
    assert parts[1]["fewer SMs beside messages"] > 2 * parts[0]["fewer SMs beside messages"] > 0
    serial = step_time.step_time(replace(config, parallel=replace(config.parallel, overlap=False)), there)
    assert serial.seconds > step.seconds and serial.hidden < 0.05 < step.hidden <= 1


def test_recomputation_and_the_host_cost_time():
    config, there = v3("recompute=[swiglu]")
    again, _ = v3("recompute=[norm,mla_up,swiglu]")
    plain, more = (step_time.step_time(one, there).seconds for one in (config, again))
    assert 1.01 * plain < more < 1.15 * plain
    waits = {p.name: p.seconds for p in small("parallel.ep=8", "seq_len=2048").parts}
    assert waits["waits for the host"] > 0.2 * small("parallel.ep=8", "seq_len=2048").seconds
    assert {p.name: p.seconds for p in step_time.step_time(config, there).parts}["waits for the host"] == 0


def test_uneven_routing_and_padded_messages_cost_time():
    config, there = v3()
    even, uneven = (step_time.step_time(config, there, imbalance=value).seconds for value in (1.0, 1.5))
    assert 1.1 * even < uneven < 1.5 * even
    padded = replace(config, parallel=replace(config.parallel, capacity_factor=2.0))
    assert step_time.step_time(padded, there).seconds > 1.1 * even


def test_a_rank_holds_what_its_stages_have():
    config, _ = v3()
    stages = step_time._stages(config)
    mine = held(config, stages)
    assert mine.experts == pytest.approx(59 * 4 * 3 * 7168 * 2048)
    assert mine.dense + mine.experts * 64 == pytest.approx(671e9 + 11.5e9, rel=0.005)


def test_gradients_weights_and_the_update_by_hand():
    config, there = v3()
    stages = step_time._stages(config)[:1]
    mine = held(config, stages)
    long = update_time(config, there, stages, backward=1e9, forward=1e9)
    dense = mine.dense * 255 / 256 / 155e9  # both ranks of a stage, 128 each; eight ports of a node, NVLink bounds them
    expert = mine.experts * 3 / 4 / 40e9  # 128 / 64 x 2 ranks, none of them on one node
    latency = (8 + 2) * 25e-6
    assert long.reduce == pytest.approx(4 * (dense + expert) + latency)
    assert long.gather == pytest.approx(2 * (dense + expert) + latency)
    assert long.exposed == pytest.approx((long.reduce + long.gather) / stages[0].num_layers)
    short = update_time(config, there, stages, backward=0.0, forward=0.0)
    assert short.exposed == pytest.approx(short.reduce + short.gather)
    owned, held_ = mine.dense / 256 + mine.experts / 4, mine.dense + mine.experts
    moved = owned * (4 + 8 + 8 + 2) + held_ * (4 + 2 + 2 * (1 + 4 / 128))
    assert long.update == pytest.approx(moved / (2.96e12 * 0.93))


def test_fp32_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"precision\.mode=fp32 .*: use precision=bf16 or precision=fp8$"):
        small("precision=fp32", "parallel.ep=1")


def test_a_call_is_quick_once_its_parts_are_cached():
    config, there = v3()
    step_time.step_time(config, there)
    started = time.process_time()
    for sms in (19, 18, 17):
        step_time.step_time(replace(config, parallel=replace(config.parallel, communication_sms=sms)), there)
    assert (time.process_time() - started) / 3 < 0.15, "50 ms on an idle machine"


def test_records_lie_where_the_wheel_takes_them_from():
    assert RECORDS.is_symlink() or RECORDS.is_dir()
    assert (RECORDS / "gemm-h100.json").is_file()
