"""Memory of a stage: parameters that add up to the model's; bytes kept, by hand and against what a forward holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.live_memory import TrackStorages
from fp8moe.layers.attention import GqaConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import count_parameters
from fp8moe.model.loss import LossTally, LossWeights
from fp8moe.model.memory import MicroBatch, rank_parameters, stage_activation_bytes, stage_parameters
from fp8moe.model.partition import Stage, partition
from fp8moe.model.stage import StagePasses
from fp8moe.model.transformer import Transformer, init_weights
from tests.model import passes, test_partition
from tests.model.batches import tokens
from tests.model.passes import CHOICES, NOTHING
from tests.model.published import DSV2_LITE_16B, DSV3_671B
from tests.model.shapes import changed


@pytest.mark.parametrize("config", [DSV2_LITE_16B, DSV3_671B], ids=["dsv2_lite_16b", "dsv3_671b"])
def test_parameters_add_up_to_the_model(config: ModelConfig) -> None:
    stages = partition(config, 4)
    whole = count_parameters(config)
    assert sum(stage_parameters(config, stage) for stage in stages) == whole.total + whole.mtp
    # Folded, embedding and head share a rank; in a line the MTP module's rank holds a tied copy.
    assert rank_parameters(config, [stages[0], stages[3]]) == sum(stage_parameters(config, stages[i]) for i in (0, 3))
    tied = config.mtp_depth * config.vocab_size * config.dim
    assert rank_parameters(config, [stages[3]]) == stage_parameters(config, stages[3]) + tied


def test_expert_parallel_ranks_share_the_routed_experts_only() -> None:
    config = test_partition.small(mtp_depth=1)
    stage = partition(config, 1)[0]
    routed = (config.num_layers - config.num_dense_layers + 1) * 8 * 3 * 64 * 64
    assert stage_parameters(config, stage) - stage_parameters(config, stage, 4) == routed * 3 // 4


def test_activation_bytes_by_hand() -> None:
    """One mixture block, FP8: residual twice, latents, four 1/rms, E5M6 output, log-sum-exp, received rows with weight
    and place, gate and up, logits and choice; then what each kind of recomputation spares."""
    config = test_partition.small(num_layers=1, num_dense_layers=0)
    stage = Stage(0, range(1), True, False, False)
    tile = 1 + 4 / 128
    per_token = (
        2 * 64 * 2 + 2 * (32 + 32 + 16) + (1.5 + 4 / 128) * 2 * 16 + 4 * 2 + tile * (2 * 64 + 2 * 64 * 3) + 2 * (4 + 20)
        + 4 * 8 + 8 * 2 + 4 * 4
    )  # fmt: skip
    assert stage_activation_bytes(config, stage, MicroBatch(3, 10)) == pytest.approx(30 * per_token)

    def one(precision: str, names: frozenset[Recompute] = FULL_RECOMPUTE) -> MicroBatch:
        return MicroBatch(1, 1, Recipe(Precision(precision), names))

    wide = [stage_activation_bytes(config, stage, one(precision)) for precision in ("fp8", "bf16", "fp32")]
    assert wide == sorted(wide) and wide[2] > 1.8 * wide[1]
    with_head = replace(stage, head=True)
    assert stage_activation_bytes(config, with_head, MicroBatch(1, 1)) - wide[0] == 2 * (64 + 64) + 4

    def spared(name: Recompute, precision: str, where: Stage = stage) -> float:
        every, without = (one(precision, names) for names in (FULL_RECOMPUTE, FULL_RECOMPUTE - {name}))
        return stage_activation_bytes(config, where, without) - stage_activation_bytes(config, where, every)

    assert spared(Recompute.NORM, "fp8") == 2 * (64 + 64 + 32 + 32)
    assert spared(Recompute.NORM, "fp8", with_head) == spared(Recompute.NORM, "fp8"), "the head keeps no norm's output"
    with_mtp = replace(with_head, mtp=True)
    mtp = 2 * (64 + 64 + 32 + 32) + 2 * (2 * 64)  # its block's norms and the two that it joins
    assert spared(Recompute.NORM, "fp8", with_mtp) == 2 * (64 + 64 + 32 + 32) + mtp
    assert spared(Recompute.MLA_UP, "fp8") == 2 * 2 * (32 + 32 + 16 + 16)
    assert [spared(Recompute.SWIGLU, precision) for precision in ("fp8", "bf16", "fp32")] == [0, 2 * 3 * 64, 4 * 3 * 64]


SMALL = changed(passes.CONFIG, dim=128, expert_hidden=64, dense_hidden=128, topk=4, force_balance=True, max_seq_len=256)
TOKENS = 256  # fall on 8 experts evenly, in groups of 128, so that no row is padding


def built(config: ModelConfig, recipe: Recipe) -> Transformer:
    model = Transformer(config, recipe, LocalDispatcher(config.experts.num_experts))
    init_weights(model, seed=3)
    return model


def live_and_estimated(config: ModelConfig, layer: int, recipe: Recipe, *, phases: bool) -> tuple[int, float]:
    """Bytes alive after the forward of a block, and what the formula says."""
    stage = Stage(0, range(layer, layer + 1), embedding=False, head=False, mtp=False)
    model = built(config, recipe)
    positions = model.positions(torch.arange(TOKENS)[None])
    x = torch.randn(TOKENS, config.dim).to(recipe.dtype).requires_grad_()
    with TrackStorages() as tracked:
        if phases:
            block_pass = passes.start_at(model.block(layer), x, positions)
            alive: Any = (block_pass, passes.forward(block_pass))
        else:
            alive = model.block(layer)(x, positions)
    measured = tracked.live_bytes()
    del alive
    return measured, stage_activation_bytes(config, stage, MicroBatch(1, TOKENS, recipe))


@pytest.mark.parametrize("recompute", [NOTHING, FULL_RECOMPUTE], ids=["nothing", "all"])
@pytest.mark.parametrize("precision", list(Precision))
def test_the_estimate_holds_for_grouped_queries(precision: Precision, recompute: frozenset[Recompute]) -> None:
    attention = GqaConfig(num_heads=6, num_kv_heads=2, head_dim=32, rope_dim=16, qk_norm="head", qkv_bias=True)
    config = replace(SMALL, attention=attention, dense_layers=(2,), num_layers=3)
    for layer in (1, 2):  # a mixture, a dense one behind it
        measured, estimate = live_and_estimated(config, layer, Recipe(precision, recompute), phases=True)
        assert measured == pytest.approx(estimate, rel=0.01), layer


@pytest.mark.parametrize("phases", [False, True], ids=["autograd", "phases"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_the_estimate_is_what_is_kept(precision: Precision, layer: int, phases: bool) -> None:
    """Bytes alive after a block's forward against `stage_activation_bytes`: within 1 %.

    The block's output is counted in the place of its input, which is the caller's.
    """
    measured = {}
    for recompute in (NOTHING, *CHOICES):
        recipe = Recipe(precision, recompute)
        measured[recompute], estimate = live_and_estimated(SMALL, layer, recipe, phases=phases)
        assert measured[recompute] == pytest.approx(estimate, rel=0.01), recompute
    assert measured[FULL_RECOMPUTE] < min(kept for names, kept in measured.items() if names != FULL_RECOMPUTE)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("mtp", [False, True], ids=["head", "head and MTP"])
def test_the_estimate_of_a_last_stage_is_what_is_kept(
    precision: Precision, mtp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes alive after the forward of the losses, where the gradients of their norms wait: within 0.2 %.

    Left out are the rotations, which all micro-batches may share.
    """
    config = changed(SMALL, mtp_depth=int(mtp), num_layers=1, num_dense_layers=0, vocab_size=512)
    recipe = Recipe(precision, FULL_RECOMPUTE)
    model = built(config, recipe)
    positions = model.positions(torch.arange(TOKENS)[None])
    monkeypatch.setattr(model, "positions", lambda *_: positions)
    stage = Stage(0, range(1), embedding=False, head=True, mtp=mtp)
    batch = tokens(config.vocab_size, batch=1, seq_len=TOKENS)
    make = StagePasses(model, [stage], [batch], LossWeights(1.0, 0.3, 0.0), LossTally(torch.device("cpu")))
    with TrackStorages() as tracked:
        x = torch.ones(TOKENS, config.dim, dtype=recipe.dtype) * torch.randn(TOKENS, 1).to(recipe.dtype)
        chain = make(0, 0, lambda: x)
        for phase in (phase for one in chain for phase in one.phases):
            phase.forward()
    estimate = stage_activation_bytes(config, stage, MicroBatch(1, TOKENS, recipe))
    assert tracked.live_bytes() == pytest.approx(estimate, rel=2e-3)
