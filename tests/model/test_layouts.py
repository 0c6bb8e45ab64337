"""An FP8 step on four ranks is nearly the one-process step; in FP32 it is equal (tests/train/test_pipeline.py)."""

from __future__ import annotations

import pytest
import torch

from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.gradients import global_grad_norm, reduce_gradients
from fp8moe.parallel.mesh import build_mesh
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE
from tests.model.shapes import changed
from tests.parallel.ranks import TIMEOUT, run_ranks

CONFIG = changed(BASE, num_layers=3, mtp_depth=1)
SEQUENCES, SEQ_LEN = 4, 32


def one_step(ranks: int) -> tuple[float, float, bool]:
    """This rank's share of the loss, the global gradient norm, and whether every gradient is finite and not zero."""
    mesh = build_mesh(1, ranks, ranks, timeout=TIMEOUT)
    dispatcher = make_dispatcher("all_to_all", mesh, CONFIG.experts.num_experts, max_tokens=SEQUENCES * SEQ_LEN)
    model = Transformer(CONFIG, Recipe(Precision.FP8), dispatcher)
    init_weights(model, seed=0, ep_rank=mesh.ep_rank)
    batch = tokens(CONFIG.vocab_size, batch=SEQUENCES, seq_len=SEQ_LEN, seed=5)
    share = SEQUENCES // ranks
    counts = LossCounts(*count_predicted(batch.labels_BS), sequences=SEQUENCES)
    mine = batch.sequences(slice(mesh.rank * share, (mesh.rank + 1) * share))
    loss = total_loss(model(mine), loss_weights(counts, mtp_weight=0.3, balance_alpha=1e-2))
    loss.backward()
    reduce_gradients(model.main_grads, mesh)
    grads = [parameter.main_grad for parameter in model.parameters()]
    sound = all(torch.isfinite(grad).all() and grad.any() for grad in grads)  # type: ignore[operator,union-attr]
    return loss.item(), global_grad_norm(model.main_grads, mesh), sound


def test_fp8_step_hardly_depends_on_the_layout() -> None:
    loss, norm, _ = one_step(1)
    losses, norms, sound = zip(*run_ranks(one_step, 4, 4), strict=True)
    assert sum(losses) == pytest.approx(loss, rel=1e-4)
    assert norms[0] == pytest.approx(norm, rel=2e-2) and len(set(norms)) == 1
    assert all(sound)
