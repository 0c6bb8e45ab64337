"""The stretches of a training step that are traced, at DeepSeek-V3's sizes: 32 of its experts on one rank.

A model of one dense block and one mixture with embedding, head and loss: forward, backward and weight gradients by the
pipeline's functions, as training runs them; then the gradients' norm and the optimizer, which casts the weights.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fp8moe.data.packing import Batch
from fp8moe.kernels.row_map import most_rows
from fp8moe.layers.attention import GqaConfig, MlaConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.phase import Pass
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig
from fp8moe.model.loss import LossTally, LossWeights
from fp8moe.model.phases import BalanceLoss, pass_through
from fp8moe.model.stage import EmbeddingPass, LossPass
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.gradients import global_grad_norm
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.overlap import deferred_wgrads, run_backward, run_forward, run_wgrads
from fp8moe.profile.spans import listening
from fp8moe.train.lr import LearningRateConfig, Segment
from fp8moe.train.optimizer import Optimizer, OptimizerConfig
from tests.fake_cuda.launching import on_fake_hopper
from tests.fake_cuda.recorder import Recorder
from tests.fake_cuda.trace import Trace

SEQ_LEN = 4096
TOKENS = (4096, 16384)
V3_SHARE = ModelConfig(
    vocab_size=129280,
    dim=7168,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden=18432,
    attention=MlaConfig(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128, backend="sdpa"
    ),  # PyTorch's call, which `launching` sends to cuDNN; auto would choose for the CPU that fakes the GPU
    router=RouterConfig(topk=8, num_groups=8, top_groups=4, route_scale=2.5),
    experts=ExpertsConfig(num_experts=32, hidden=2048, num_shared=1),
)
GROUPED_SHARE = ModelConfig(  # GLM-4.5's sizes, with every part that grouped-query attention can have
    vocab_size=151552,
    dim=5120,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden=12288,
    attention=GqaConfig(
        num_heads=96, num_kv_heads=8, head_dim=128, rope_dim=64, qk_norm="head", qkv_bias=True, o_bias=True,
        clip_qkv=8.0, backend="sdpa",
    ),
    router=RouterConfig(topk=8),
    experts=ExpertsConfig(num_experts=32, hidden=1536, num_shared=1),
)  # fmt: skip

GPT_OSS_SHARE = ModelConfig(  # sizes of 20B, without windows and sinks, whose FlexAttention is compiled on a GPU only
    vocab_size=201088,
    dim=2880,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden=2880,
    attention=GqaConfig(
        num_heads=64, num_kv_heads=8, head_dim=64, rope_dim=64, qkv_bias=True, o_bias=True, backend="sdpa"
    ),
    router=RouterConfig(topk=4, score="softmax_topk", gate_bias=True),
    experts=ExpertsConfig(num_experts=32, hidden=2880, num_shared=0, activation="swiglu_clamped", bias=True),
)  # fmt: skip


class _Phases:
    """Passes spans on to the recorder as phases, with the part of the model they belong to: "mixture F attn"."""

    def __init__(self, recorder: Recorder) -> None:
        self.part, self._recorder = "", recorder

    def began(self, name: str) -> Any:
        phase = self._recorder.in_phase(f"{self.part} {name}")
        phase.__enter__()
        return phase

    def ended(self, name: str, began: Any) -> None:
        began.__exit__(None, None, None)


def run_passes(recorder: Recorder, model: Transformer, tokens: int) -> None:
    """Forward, backward and weight gradients of one micro-batch through `model`, part by part."""
    ids_BS = torch.zeros(tokens // SEQ_LEN, SEQ_LEN, dtype=torch.int64, device="cuda")
    tally = LossTally(ids_BS.device)
    with recorder.in_phase("positions"):
        positions = model.positions(ids_BS)
    balance = BalanceLoss(1e-4, tally.add_balance)
    assert model.embedding is not None
    passes: dict[str, Pass] = {"embedding": EmbeddingPass(model.embedding, ids_BS.flatten())}

    def output_of(part: str) -> Tensor:
        with recorder.in_phase(f"{part} F output"):
            return passes[part].output

    for part, before, layer in (("dense", "embedding", 0), ("mixture", "dense", 1)):
        passes[part] = pass_through(model.block(layer), partial(output_of, before), positions, balance)
    batch = Batch(ids_BS, ids_BS, ids_BS, None)
    passes["loss"] = LossPass(model, partial(output_of, "mixture"), batch, LossWeights(1.0, 0.0, 1e-4), tally)
    for part, behind in pairwise(passes):
        passes[part].backward_from(lambda behind=behind: passes[behind].input_gradient)
    phases = _Phases(recorder)
    with listening(phases):
        for phases.part in ("embedding", "dense", "mixture"):
            run_forward((passes[phases.part],))
        phases.part = "loss"
        with recorder.in_phase("loss"):
            run_forward((passes["loss"],))
            run_whole_backward(passes["loss"])
        for phases.part in ("mixture", "dense", "embedding"):
            run_whole_backward(passes[phases.part])


def run_whole_backward(one: Pass) -> None:
    run_backward((one,))
    run_wgrads(deferred_wgrads((one,)))


def trace_step(precision: str, tokens: int, config: ModelConfig = V3_SHARE) -> Trace:
    """The trace of a whole step: embedding, dense block, mixture, losses; norm, optimizer with the weights' casts."""
    topk, num_experts = config.router.topk, config.experts.num_experts
    recorder = Recorder()
    with on_fake_hopper(recorder):
        with torch.device("cuda"):
            model = Transformer(config, Recipe(Precision(precision), FULL_RECOMPUTE), LocalDispatcher(num_experts))
        quantize_weights(model)
        recorder.trace.launches.clear()
        recorder.trace.calls.clear()
        recorder.trace.facts["received rows"] = most_rows(tokens * topk, num_experts)
        recorder.trace.facts["parameters"] = sum(p.numel() for p in model.parameters())
        model.train()
        run_passes(recorder, model, tokens)
        rates = LearningRateConfig(peak=1e-4, phases=(Segment("constant", 1.0, 1.0),))
        optimizer = Optimizer(model, model.main_grads, OptimizerConfig(rates))
        with recorder.in_phase("norm"):
            norm = global_grad_norm(model.main_grads, Mesh(1, 1, 1, rank=0))
        with recorder.in_phase("optimizer"):
            optimizer.step(1e-4, norm)
    return recorder.trace
