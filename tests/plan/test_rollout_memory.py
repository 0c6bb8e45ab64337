"""Memory of rollouts, teachers and references: planned bytes against what the real objects and their forwards hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.live_memory import TrackPeak
from fp8moe.cli.compose import compose
from fp8moe.data.packing import Batch
from fp8moe.generate import groups, sampling
from fp8moe.generate.groups import GroupSampling, Sampled, sample_groups
from fp8moe.generate.routing import RoutingRecord
from fp8moe.generate.session import Session
from fp8moe.kernels.decode_attention import decode_attention
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import QuantizedWeight, quantize_weights
from fp8moe.layers.recipe import Precision
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from fp8moe.plan import forward_work, rollout_memory
from fp8moe.plan.forward_work import attend_bytes, cache_bytes
from fp8moe.plan.memory import RankMemory, _data_bytes, rank_memory, worst_rank
from fp8moe.plan.phases import ROLLOUTS, SCORING, TEACHER, UPDATES, policy_bytes
from fp8moe.plan.rollout_memory import cached_bytes, rollout_sizes, sampling_stages, sampling_work
from fp8moe.plan.rollouts import reference_bytes
from fp8moe.plan.teacher import (
    TeacherModel,
    teacher_bytes,
    teacher_forward_bytes,
    teacher_of,
    topk_bytes,
    with_teacher,
    without_teacher,
)
from fp8moe.post.distill.teacher_topk import teacher_topk
from fp8moe.post.packed import _experts
from fp8moe.post.rollouts import rollouts_of
from fp8moe.train.config import TrainConfig, resolve, stages_of
from tests.generate.small import TIMEOUT
from tests.parallel.ranks import run_ranks
from tests.plan.test_memory import GROUPED, SIZES
from tests.post.runs import policy_config, policy_run
from tests.train.runs import write_corpus

CPU = torch.device("cpu")
MLA = ("model=tiny", *SIZES)
PROBLEMS = (
    *("data=problems", "device=cpu", "seq_len=224", "grpo.max_tokens=5", "grpo.prompts=6", "grpo.samples=4"),
    *("grpo.rollout_batch=12", "grpo.held_out_count=0", "batch.sequences=24", "batch.micro_batch=2"),
)


def configured(*words: str, world_size: int = 1) -> TrainConfig:
    return resolve(compose([*words]).config, world_size)


def model_of(config: TrainConfig, ep: int = 1) -> Transformer:
    """Random weights, quantized where they are FP8."""
    dispatcher = LocalDispatcher(config.model.experts.num_experts // ep)
    model = Transformer(config.model, config.recipe, dispatcher, gradients=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    quantize_weights(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [300, 9000])
@pytest.mark.parametrize("words", [MLA, GROUPED], ids=["latent", "grouped"])
def test_attention_to_a_cache(words: tuple[str, ...], length: int, dtype: torch.dtype) -> None:
    """The most that one new token of each row allocates, within 1 %; fewer tokens than the cache has room for. The keys
    of all rows go together, and those of one."""
    precision = Precision.FP32 if dtype is torch.float32 else Precision.BF16
    config = configured(*words, f"precision={precision.value}", "data=indexed", "data.paths=[a]")
    a, rows = config.model.attention, 5
    if a.kind == "mla":
        entries = torch.randn(rows, length + 40, a.kv_lora_rank + a.rope_dim, dtype=dtype)[:, :length].unsqueeze(2)
        keys, values, width = entries, entries[..., : a.kv_lora_rank], a.kv_lora_rank + a.rope_dim
    else:
        entries = torch.randn(rows, length + 40, 2 * a.keys, dtype=dtype)[:, :length]
        keys, values = entries.unflatten(-1, (2, a.num_kv_heads, -1)).unbind(2)
        width = a.head_dim
    with TrackPeak() as tracked:
        q = torch.randn(rows, 1, a.num_heads, width, dtype=dtype)
        positions = torch.full((rows, 1), length - 1)
        decode_attention(q, keys, values, positions, length=length, scale=1.0)
    assert attend_bytes(config.model, config.recipe, rows, length, CPU) == pytest.approx(tracked.most, rel=0.01)


@pytest.mark.parametrize("words", [(*MLA, "precision=fp8"), (*GROUPED, "precision=bf16")], ids=["latent", "grouped"])
def test_caches(words: tuple[str, ...]) -> None:
    """Every byte of a session's caches, the two halves of the up projection included."""
    config = configured(*words, "data=indexed", "data.paths=[a]")
    session = Session(model_of(config), 3, 70)
    held = [t for cache in session._caches.values() for t in vars(cache).values()]
    planned = config.model.num_layers * cache_bytes(config.model, config.recipe, 3, 70)
    assert sum(t.nbytes for t in held) == planned


def sampled(config: TrainConfig) -> int:
    """The most bytes that sampling takes on this rank, inside `run_ranks` or alone, all samples as long as they may be.

    Prompts fill what a row leaves beside the completion.
    """
    grpo, world = config.grpo, config.dp
    mesh = build_mesh(world, 1, config.ep, timeout=TIMEOUT)
    model = model_of(config)
    if world > 1:
        dispatcher = make_dispatcher("all_to_all", mesh, config.model.experts.num_experts, max_tokens=1)
        model = Transformer(config.model, config.recipe, dispatcher, gradients=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    prompts = [[1 + i] * (config.seq_len + 1 - grpo.max_tokens) for i in range(grpo.prompts)]
    num_ids = config.data.vocab_size
    how = GroupSampling(grpo.samples, grpo.max_tokens, 1.0, grpo.rollout_batch, num_ids, frozenset())
    with TrackPeak() as tracked:
        found = sample_groups(model, prompts, list(map(str, range(len(prompts)))), how, mesh)
    assert {len(one.ids) for group in found for one in group} == {grpo.max_tokens}
    return tracked.most


def planned(config: TrainConfig) -> float:
    stages = sampling_stages(config, stages_of(config), 0)
    sizes = rollout_sizes(config)
    return cached_bytes(config, stages, sizes) + sampling_work(config, stages, sizes, CPU)


MORE_ROWS = ("grpo.samples=24", "grpo.rollout_batch=48", "batch.sequences=144", "model.router.topk=1")


@pytest.mark.parametrize(
    ("words", "largest"),
    [((*MLA, "precision=fp32", *PROBLEMS), "prompts"), ((*GROUPED, "precision=bf16", *PROBLEMS, *MORE_ROWS), "tokens")],
    ids=["latent", "grouped"],
)
def test_the_peak_of_sampling(words: tuple[str, ...], largest: str) -> None:
    """Of two rounds or more, within 12 %, where prompts need most beside the caches and where tokens do."""
    config = configured(*words, "model.max_seq_len=225")
    sizes = rollout_sizes(config)
    assert sizes.rounds > 1 and sizes.rows == config.grpo.rollout_batch
    of_tokens = attend_bytes(config.model, config.recipe, sizes.rows, sizes.length, CPU)
    work = sampling_work(config, list(stages_of(config)), sizes, CPU)
    assert (work > 2 * of_tokens) if largest == "prompts" else (work < 1.5 * of_tokens)
    assert planned(config) == pytest.approx(sampled(config), rel=0.12)


@dataclass(frozen=True)
class Held:
    """Bytes of one rank: of sampling, of the references on the host, of what an update of the policy reads beside."""

    sampling: int
    references: list[int]
    policy: int


def held(sampling: TrainConfig, runs: list[TrainConfig]) -> Held:
    """Inside `run_ranks`."""
    most, references = sampled(sampling), []
    for config in runs:
        run, method = policy_run(config)
        assert run.reference is not None
        references.append(run.reference.num_bytes)
    method.work(run)
    assert method._loss is not None
    tokens = [t for t in vars(method._loss._tokens).values() if t is not None]
    return Held(most, references, sum(t.nbytes for t in tokens))


def test_two_ranks_sample_and_keep_a_reference(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of a rank's own problems, experts on two ranks; its part of the masters, of experts and of all else."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    sampling = configured(*MLA, *PROBLEMS, "precision=bf16", "model.max_seq_len=225", "parallel.ep=2", world_size=2)
    rows = ("precision=bf16", "batch.sequences=32", "data.document_mask=false", "grpo.held_out_count=0")
    runs = [
        policy_config(corpus, *rows, f"parallel.ep={ep}", f"optimizer.sharding={how}", world_size=2)
        for ep, how in ((1, "none"), (2, "zero1"))
    ]
    for rank in run_ranks(held, 2, sampling, runs):
        assert rank.sampling == pytest.approx(planned(sampling), rel=0.15)
        assert rank.references == pytest.approx([reference_bytes(run) for run in runs], rel=0.01)
        assert rank.policy == policy_bytes(runs[1])
    without = replace(runs[0], grpo=replace(runs[0].grpo, kl=0.0))
    assert reference_bytes(without) == 0 and policy_bytes(without) == pytest.approx(0.8 * policy_bytes(runs[0]))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("words", [(*MLA, "model.mtp_depth=1"), GROUPED], ids=["latent", "grouped"])
def test_a_teacher(words: tuple[str, ...], precision: str) -> None:
    """Parameters and FP8 blocks, whole and with experts over two ranks, to 1 %; its top k to the byte."""
    size = (
        "batch.sequences=32",
        "batch.micro_batch=16",
        "distill.topk=7",
    )  # tokens outweigh the weights that a CPU copies
    config = configured(
        *words, *size, f"precision={precision}", "data=indexed", "data.paths=[a]", "validation.samples=16"
    )
    teacher = TeacherModel(config.model, config.recipe)
    for ep in (1, 2):
        model = model_of(config, ep)
        real = sum(p.nbytes for p in model.parameters())
        for module in model.modules():
            if isinstance(module, QuantizedWeight) and module.recipe.fp8:
                real += sum(q.data.nbytes + q.scale.nbytes for q in (module.blocks, module.transposed_blocks))
        assert teacher_bytes(teacher, ep) == pytest.approx(real, rel=0.01)
    if precision == "fp8":
        return  # whose reference products have FP32 copies that no GPU makes
    model, (rows, seq_len) = model_of(config), (config.micro_batch, config.seq_len)
    ids = torch.randint(300, (rows, seq_len))
    positions = torch.arange(seq_len).expand(rows, seq_len)
    with TrackPeak() as tracked:
        found = teacher_topk(model, Batch(ids, ids, positions, None), config.distill.topk)
    kept = sum(t.nbytes for t in vars(found).values())
    assert topk_bytes(config) == config.num_microbatches * kept
    work = teacher_forward_bytes(config, teacher, CPU)
    assert 0.85 * (tracked.most - kept) < work < 1.25 * tracked.most


def test_a_taught_configuration_keeps_its_teacher() -> None:
    config = configured(*MLA, "precision=bf16", "data=indexed", "data.paths=[a]", "distill.teacher=a")
    taught = with_teacher(config, TeacherModel(config.model, config.recipe))
    assert teacher_of(replace(taught, seq_len=32)) is not None and without_teacher(taught) == config
    with pytest.raises(AssertionError, match="with_teacher"):
        rank_memory(config)


def total(config: TrainConfig, teacher: TeacherModel | None = None) -> RankMemory:
    return worst_rank(rank_memory(with_teacher(config, teacher)))


def test_stretches_are_never_there_together() -> None:
    """A rank's peak is the largest stretch; what lives from step to step is in each, activations in one alone."""
    small = ("model=dsv2_lite_16b", "data=indexed", "data.paths=[a]", "seq_len=2048", "batch.sequences=64")
    config = configured(*small, "batch.micro_batch=1", world_size=8)
    plain = total(config)
    large = TeacherModel(compose(["model=moonlight_16b"]).config.model, config.recipe)
    named = replace(config, distill=replace(config.distill, teacher="a", temperature=2.0))
    taught = total(named, large)
    assert plain.phases == {} and set(taught.phases) == {UPDATES, TEACHER}
    assert taught.total == max(taught.phases.values()) == taught.phases[UPDATES]
    more = {kind: taught.kinds[kind] - plain.kinds[kind] for kind in plain.kinds}
    assert more.pop("teacher") == teacher_bytes(large, 8) and more.pop("teacher's top k") == topk_bytes(named)
    second = more.pop("logits and loss")
    assert second == 2 * 102400 * 2048 and sum(map(abs, more.values())) == 0, "logits divided by the temperature"


def test_rollouts_count_where_they_need_most() -> None:
    words = ("experiment=r1_zero", "model=moonlight_16b", "batch.micro_batch=1")
    config = configured(*words, "grpo.rollout_batch=512", world_size=64)
    many = total(config)
    assert set(many.phases) == {UPDATES, SCORING, ROLLOUTS} and many.total == many.phases[ROLLOUTS] > 150e9
    assert many.kinds["activations"] == 0 < many.kinds["rollout caches"]
    few = total(configured(*words, "grpo.rollout_batch=16", world_size=64))
    assert few.total == few.phases[UPDATES] == many.phases[UPDATES] and few.kinds["rollout caches"] == 0
    served = replace(config, grpo=replace(config.grpo, server="http://a/v1", server_model="b", refresh_url="http://a"))
    assert set(total(served).phases) == {UPDATES, SCORING} and total(served).total == few.total


def test_a_pipeline_caches_its_own_blocks() -> None:
    """Of all ranks together those of one rank without a pipeline, but for what is drawn with."""
    words = ("experiment=r1_zero", "model=dsv3_671b", "batch.micro_batch=1", "grpo.samples=16", "grpo.rollout_batch=64")
    whole = configured(*words, "parallel.ep=8", world_size=8)
    cut = configured(*words, "parallel.pp=4", "parallel.ep=8", world_size=32)
    numbers = rollout_memory.NUMBERS * 64 * 32768
    halves = cache_bytes(whole.model, whole.recipe, 0, 0)

    def cached(config: TrainConfig) -> float:
        stages, sizes = stages_of(config), rollout_sizes(config)
        each = [cached_bytes(config, sampling_stages(config, stages, rank), sizes) for rank in range(len(stages))]
        return sum(each) - len(each) * numbers - 61 * sizes.sets * halves

    assert rollout_sizes(whole).sets == 1 and rollout_sizes(cut).sets == 4 and rollout_sizes(cut).rows == 64
    assert cached(whole) == cached(cut) == 61 * 64 * rollout_sizes(cut).length * 1152
    assert rollout_sizes(cut).rows_of_set == 16


def test_experts_that_are_replayed() -> None:
    """Of a rank's rows while it samples; of an update's tokens in numbers that can say -1."""
    plain = configured(*MLA, *PROBLEMS)
    replayed = configured(*MLA, *PROBLEMS, "grpo.router_replay=true")
    sizes, stages = rollout_sizes(plain), list(stages_of(plain))
    record = RoutingRecord(model_of(plain), sizes.rows, sizes.length)
    assert cached_bytes(replayed, stages, sizes) - cached_bytes(plain, stages, sizes) == record._ids_NPLK.nbytes > 0
    sampled = [np.zeros((7, *record._ids_NPLK.shape[2:]), dtype=np.uint8)]
    rollouts = rollouts_of([[1, 2, 3]], [[Sampled((1,) * 5, (0.0,) * 5, True, sampled[0])]], 1)
    experts = _experts(rollouts, sampled, [[0]], plain.seq_len)
    assert experts.nbytes == (_data_bytes(replayed) - _data_bytes(plain)) * plain.seq_len


def test_bounds_are_those_of_the_generator() -> None:
    source = Path(forward_work.__file__).parents[1] / "kernels" / "triton" / "decode_attention.py"
    assert f"\nPROGRAMS = {forward_work.PROGRAMS} " in source.read_text()  # which needs Triton
    assert rollout_memory.PROMPT_TOKENS == groups.PROMPT_TOKENS
    assert rollout_memory.DRAWN_VALUES == sampling.DRAWN_VALUES
