"""What a training step does on a Hopper, without one: launches, waits of the host, bytes and memory have bounds.

The traces are of one rank at DeepSeek-V3's sizes: a mixture of 32 experts of 2048 features, one shared, top-8, width
7168, 128 heads; a dense block; head and loss; norm and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fp8moe.plan.rates import message_launches
from tests.fake_cuda import layer_page
from tests.fake_cuda.trace import Launch, Trace, bytes_by, count, counts_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
Traces = Callable[..., Trace]
PRECISIONS = ("fp8", "bf16")
TOKENS = (4096, 16384)
GB = 1e9
both = pytest.mark.parametrize("precision", PRECISIONS)
every = pytest.mark.parametrize("tokens", TOKENS)


def mixture(trace: Trace) -> list[Launch]:
    return trace.of(*layer_page.phases(trace))


@both
@every
def test_no_op_runs_by_the_specification(traces: Traces, precision: str, tokens: int) -> None:
    by = {call.op: call.backend for call in traces(precision, tokens).calls if call.backend != "torch"}
    assert [op for op, backend in by.items() if backend == "reference"] == []
    if precision == "fp8":
        assert {op for op, backend in by.items() if backend == "gluon"} >= {"gemm", "grouped_gemm", "grouped_wgrad"}


@both
def test_a_mixture_layer_takes_few_launches_whatever_its_tokens(traces: Traces, precision: str) -> None:
    """Forward, backward and weight gradients; the host spends about 4 us a launch, the layer 23 ms."""
    few, many = (counts_by(mixture(traces(precision, tokens)), lambda one: one.phase) for tokens in TOKENS)
    assert few == many
    assert few.total() <= 150, few


@both
@every
def test_the_host_waits_for_the_device_once_a_step(traces: Traces, precision: str, tokens: int) -> None:
    """For the gradients' norm, by which the guard decides: no phase waits, so no shape depends on data."""
    waits = [wait for wait in traces(precision, tokens).waits if wait.phase != "setup"]
    assert [(wait.phase, wait.what) for wait in waits] == [("norm", "_local_scalar_dense")], waits


@both
def test_grouped_query_attention_runs_by_kernels_too(traces: Traces, precision: str) -> None:
    """With norms of heads, biases and clipping: device kernels, few launches, no wait."""
    trace = traces(precision, 4096, "grouped")
    assert {call.op for call in trace.calls if call.backend == "reference"} == set()
    assert {"rope_queries", "rope_queries_backward", "rms_norm"} <= {call.op for call in trace.calls}
    assert count(mixture(trace)) <= 150
    assert [wait.phase for wait in trace.waits if wait.phase != "setup"] == ["norm"]


@both
def test_experts_with_biases_run_by_kernels_too(traces: Traces, precision: str) -> None:
    """GPT-OSS's sizes, no multiples of 128: device kernels, few launches, no wait."""
    trace = traces(precision, 4096, "gpt_oss")
    assert {call.op for call in trace.calls if call.backend == "reference"} == set()
    assert {"add_expert_bias", "expert_bias_dgrad", "expert_bias_wgrad"} <= {call.op for call in trace.calls}
    assert count(mixture(trace)) <= 150
    assert [wait.phase for wait in trace.waits if wait.phase != "setup"] == ["norm"]


@both
@pytest.mark.parametrize("model", [(), ("grouped",), ("gpt_oss",)], ids=lambda model: model[0] if model else "mla")
def test_a_micro_batch_can_be_captured(traces: Traces, precision: str, model: tuple[str, ...]) -> None:
    """From positions to the last weight gradient no wait and no copy from the host: a CUDA graph would hold neither.

    A trace has one stream and no events: who asks for another fails in it.
    """
    trace = traces(precision, 4096, *model)
    outside = ("setup", "norm", "optimizer")
    assert [one for one in (*trace.waits, *trace.copies) if one.phase not in outside] == []
    assert {"mixture F attn", "mixture W mlp", "loss F loss", "positions", "embedding W embed"} <= {
        one.phase for one in trace.launches
    }


def test_bytes_of_a_mixture_layer(traces: Traces) -> None:
    trace = traces("fp8", 4096)
    sizes, rows = bytes_by(mixture(trace), lambda one: one.kind), trace.facts["received rows"]
    swiglu = [one for one in trace.calls if one.kind == "swiglu" and any(f"{rows}" in made for made in one.results)]
    assert {one.phase for one in swiglu} == {"mixture F mlp", "mixture B mlp", "mixture W mlp"}
    assert sum(one.bytes for one in swiglu) * 32768 / rows <= 1.3 * GB
    assert sizes["cast and permute"] <= 5.5 * GB
    assert sizes["element-wise"] <= 4 * GB


@pytest.mark.parametrize("precision, most", [("fp8", 24), ("bf16", 22)])
def test_bytes_of_the_optimizer(traces: Traces, precision: str, most: int) -> None:
    """Gradient, master, moments and weight once each way; with FP8 the codes in both orientations as well."""
    trace = traces(precision, 4096)
    size = sum(one.bytes for one in trace.of("optimizer"))
    assert size / trace.facts["parameters"] <= most + 0.01  # scales of blocks, the list of parts


@both
def test_memory_beside_what_is_kept(traces: Traces, precision: str) -> None:
    trace = traces(precision, 16384)
    assert trace.peak["loss"] <= 1 * GB
    assert trace.peak.get("norm", 0) <= 256e6


def test_the_page_of_the_layer_shows_these_traces(traces: Traces) -> None:
    page = layer_page.PAGE.read_text()
    made = {f"{precision}-{tokens}": traces(precision, tokens) for precision in PRECISIONS for tokens in TOKENS}
    for name, table in layer_page.tables(made).items():
        assert layer_page.written(page, name) == table, f"{name}: python -m tests.fake_cuda FOLDER --docs"


@both
@pytest.mark.parametrize("route", ["one_hop", "two_hops"])
def test_a_dispatch_between_ranks_is_announced_without_a_wait(traces: Traces, precision: str, route: str) -> None:
    """With fixed messages nothing of it waits; exact counts are on their way, and waited for where they are needed."""
    fixed, exact = (traces(precision, route, counted).waits for counted in ("fixed", "exact"))
    assert fixed == []
    assert [wait for wait in exact if wait.phase != "setup"] == []


@both
@pytest.mark.parametrize("route", ["one_hop", "two_hops"])
def test_a_layer_whose_ranks_share_experts_takes_few_launches_too(traces: Traces, precision: str, route: str) -> None:
    """Its four messages in place of one rank's permutations, with their counts where those are exact."""
    layer, fixed, exact = traces(precision, 4096), traces(precision, route, "fixed"), traces(precision, route, "exact")
    alone = layer.of(*(f"mixture {phase}" for phase in ("F dispatch", "F combine", "B combine", "B dispatch")))
    messages = [one for one in fixed.launches if one.phase != "setup"]
    counts = [one for one in exact.launches if one.phase != "setup"]
    assert {one.phase for one in counts} == {"announce (communication)"} and count(counts) <= 21
    assert count(messages) <= (22 if route == "one_hop" else 35)
    planned = message_launches(1 if route == "one_hop" else 2, exact=False)  # half of a layer's launch each
    for part, verbs in {"F": ("dispatch", "combine"), "B": ("dispatch backward", "combine backward")}.items():
        made = count(fixed.of(*verbs, *(f"{verb} (communication)" for verb in verbs)))
        assert planned[part] == pytest.approx(0.5 * made, rel=0.15)
    assert count(mixture(layer)) - count(alone) + count(messages) + count(counts) <= 150


def test_launches_are_counted(traces: Traces) -> None:
    """The trace sees what it must: kernels, fills, ATen ops, autograd's own, each with its place."""
    trace = traces("fp8", 4096)
    kernels = {launch.kernel for launch in trace.launches}
    assert {"copy_kernel", "sum_kernel", "place_kernel", "rows_kernel", "columns_kernel"} <= kernels
    assert count(trace.of("mixture F attn")) > 10 and all(one.bytes >= 0 for one in trace.launches)
    placed = [one for one in mixture(trace) if ".py:" in one.site]
    assert count(placed) > 0.95 * count(mixture(trace))
