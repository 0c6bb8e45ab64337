"""Captured forwards of tokens are the forwards: what is drawn, its log-probabilities and experts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8moe.generate.captured import CapturedForward, DecodingGraphs, decoding_graphs
from fp8moe.generate.groups import Sampled, sample_groups
from fp8moe.generate.sampling import SamplingConfig
from fp8moe.generate.stages import PipelineStages
from fp8moe.layers import cuda_graph
from fp8moe.layers.cuda_graph import rounded
from fp8moe.layers.moe import MoE
from fp8moe.layers.recipe import Precision
from fp8moe.model.partition import partition
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh, build_mesh
from tests.generate.small import PROMPTS, TIMEOUT, alone, generated, small_model
from tests.generate.small import ids as texts
from tests.generate.test_decode import FAMILIES
from tests.generate.test_groups import NAMES, ids, options
from tests.parallel.ranks import run_ranks
from tests.train.recorded_graph import READS, RecordedGraph, as_on_a_gpu

TOKENS = 16
made: list[RecordedGraph] = []
replays: list[int] = []


class Counted(RecordedGraph):
    """Adds 1 to `replays` with each, the one that ends a capture included."""

    def replay(self) -> None:
        replays.append(1)
        super().replay()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms as on a GPU; lengths rounded up to multiples of 4, of which the completions reach several."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_graph, "LEAST_STEP", 4)


def make_graph() -> RecordedGraph:
    made.append(Counted())
    return made[-1]


def graphs_of(mesh: Mesh, batch: int = 64) -> DecodingGraphs:
    """And nothing made before."""
    made.clear()
    replays.clear()
    return decoding_graphs(mesh, 4, options(batch=batch).rows, lambda: make_graph)


def samples_of(model: Transformer, graphs: DecodingGraphs | None, **changes: Any) -> list[Sampled]:
    config = options(**({"routing": True, "max_tokens": TOKENS} | changes))
    groups = sample_groups(model, PROMPTS[:3], NAMES[:3], config, alone(), graphs=graphs)
    return [one for group in groups for one in group]


def as_it_is(self: CapturedForward, length: int, call: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return call(*given)


@pytest.mark.parametrize(("precision", "family"), [
    (Precision.FP32, "gqa, windows in every other layer, sinks"), (Precision.FP8, "mla"),
    (Precision.BF16, "gqa, norms of heads, biases, partial rotary"),
])  # fmt: skip
def test_graphs_draw_what_is_drawn_without(family: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave and lengths grow: each is captured anew, and the memory of the graph before is another's."""
    model = small_model(precision, **FAMILIES[family])
    found = samples_of(model, graphs_of(alone()))
    assert 3 <= len(made) < len(replays) / 1.5, (len(made), len(replays))
    with monkeypatch.context() as patched:
        patched.setattr(CapturedForward, "run", as_it_is)
        expected = samples_of(model, graphs_of(alone()))
    for one, other in zip(found, expected, strict=True):
        assert one == other
        assert one.routing is not None and other.routing is not None and np.array_equal(one.routing, other.routing)
    if precision is Precision.FP32:
        assert [one.ids for one in found] == [one.ids for one in samples_of(model, None)]
    assert all(type(module.dispatcher).__name__ == "LocalDispatcher" for module in model.modules() if _is_moe(module))


def _is_moe(module: nn.Module) -> bool:
    return isinstance(module, MoE)


def on_ranks() -> tuple[list[list[tuple[int, ...]]], int]:
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    model = small_model(dispatcher=make_dispatcher("all_to_all", mesh, 4, max_tokens=1), ep_rank=mesh.ep_rank)
    found = sample_groups(model, PROMPTS, NAMES, options(batch=6), mesh, graphs=graphs_of(mesh, 6))
    return ids(found), len(made)


def test_ranks_that_share_experts_capture_at_different_times() -> None:
    """5 prompts, 2 at once, over 2 ranks, whose rows leave when each one's own have ended."""
    expected = ids(sample_groups(small_model(), PROMPTS, NAMES, options(), alone()))
    ranks = run_ranks(on_ranks, 2)
    for found, graphs in ranks:
        assert found == expected and graphs > 5
    assert ranks[0][1] != ranks[1][1]


def in_a_pipeline(placement: tuple[int, ...], ep: int) -> tuple[list[list[tuple[int, ...]]], int]:
    mesh = build_mesh(2, ep, ep, timeout=TIMEOUT)
    shape = {"num_layers": len(placement), "mtp_depth": 0}
    stages = partition(small_model(**shape).config, len(placement))
    held = [one for one in stages if placement[one.index] == mesh.pp_rank]
    dispatcher = make_dispatcher("all_to_all", mesh, 4, max_tokens=1)
    model = small_model(dispatcher=dispatcher, ep_rank=mesh.ep_rank, held=held, **shape)
    local = PipelineStages(model, stages, placement, Links(mesh, TIMEOUT), mesh)
    found = sample_groups(model, PROMPTS, NAMES, options(batch=6), mesh, local, graphs_of(mesh, 6))
    return ids(found), len(made)


def test_stages_of_a_pipeline_are_captured_each() -> None:
    model = small_model(num_layers=3, mtp_depth=0)
    expected = ids(sample_groups(model, PROMPTS, NAMES, options(), alone()))
    (first, graphs_of_first), (second, graphs_of_second) = run_ranks(in_a_pipeline, 2, (0, 1, 0), 1)
    assert first == second == expected
    assert graphs_of_first == 2 * graphs_of_second > 4, "two stages of the first rank"


def test_ranks_of_a_pipeline_may_share_experts() -> None:
    model = small_model(mtp_depth=0)
    expected = ids(sample_groups(model, PROMPTS, NAMES, options(), alone()))
    for found, graphs in run_ranks(in_a_pipeline, 4, (0, 1), 2):
        assert found == expected and graphs > 4


@pytest.mark.parametrize(("mtp", "family"), [(False, "gqa, windows in every other layer, sinks"), (True, "mla")])
def test_texts_for_people_are_the_same(mtp: bool, family: str) -> None:
    """Sequences that end leave one by one; with drafts two tokens go together, and the MTP module is captured too."""
    model = small_model(**FAMILIES[family])
    sampling = SamplingConfig(0.9)
    whole = texts(generated(model, PROMPTS[:3], max_tokens=TOKENS, sampling=sampling)[0])
    stop = whole[0][3]
    expected = [one[: one.index(stop) + 1] if stop in one else one for one in whole]
    options = {"max_tokens": TOKENS, "mtp": mtp, "sampling": sampling, "stop": stop}
    found, _ = generated(model, PROMPTS[:3], graphs=graphs_of(alone()), **options)
    assert texts(found) == expected and 3 <= len(made) < len(replays)


def speculating() -> list[list[int]]:
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    model = small_model(dispatcher=make_dispatcher("all_to_all", mesh, 4, max_tokens=1), ep_rank=mesh.ep_rank)
    return texts(generated(model, PROMPTS, mesh, graphs=graphs_of(mesh, 12), max_tokens=TOKENS, mtp=True, batch=4)[0])


def test_ranks_give_the_same_texts() -> None:
    """5 prompts in batches of 4 and 1 over 2 ranks: one repeats a sequence that is not its own."""
    expected = texts(generated(small_model(), PROMPTS, max_tokens=TOKENS)[0])
    assert run_ranks(speculating, 2) == [expected] * 2


class _Reads(TorchDispatchMode):
    """Counts what the host reads of the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_token() -> None:
    """For the number of rows that go on. With one row more tokens bring nothing but that."""
    counts = []
    for max_tokens in (6, 9):
        with _Reads() as reads:
            samples_of(small_model(), graphs_of(alone()), max_tokens=max_tokens, ends=frozenset())
        counts.append(reads.count)
    assert counts[1] - counts[0] == 3


def test_a_host_that_reads_within_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MoE.forward
    monkeypatch.setattr(MoE, "forward", lambda self, routed: forward(self, routed) * float(routed.balance_loss + 1))
    with pytest.raises(AssertionError, match="the host reads by aten::_local_scalar_dense"):
        samples_of(small_model(), graphs_of(alone()))


def test_lengths_are_rounded_so_that_a_graph_serves_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [rounded(length, 10_000) for length in (1, 64, 65, 512, 513, 1024, 1025, 9_999)] == [
        64, 64, 128, 512, 576, 1024, 1152, 10_000,
    ]  # fmt: skip
    for length in range(1, 5000, 7):
        more = rounded(length, 1 << 20)
        assert 0 <= more - length < max(64, length / 8 + 1)
    assert len({rounded(length, 1 << 20) for length in range(1024, 32_768)}) == 1 + 8 * 5
