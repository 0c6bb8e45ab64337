"""The model against `transformers`: same weights, same logits, same gradients; and how its weights are drawn."""

from __future__ import annotations

import pytest
import torch

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.model.transformer import Transformer, init_weights, next_ids
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE, CASES, hf_names, pair
from tests.model.shapes import changed


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_agree_with_transformers(case: str) -> None:
    config = CASES[case]
    ours, theirs = pair(config)
    batch = tokens(config.vocab_size)

    with torch.no_grad():
        expected = theirs(batch.inputs_BS).logits
        assert (ours.logits(batch.inputs_BS) - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 0.1, "the comparison would be blind"

    theirs.train()
    torch.nn.functional.cross_entropy(
        theirs(batch.inputs_BS).logits.flatten(0, 1), batch.labels_BS.flatten()
    ).backward()
    counts = LossCounts(*count_predicted(batch.labels_BS), sequences=2)
    total_loss(ours(batch), loss_weights(counts, mtp_weight=0.0, balance_alpha=0.0)).backward()
    grads = {name: p.main_grad for name, p in ours.named_parameters()}
    for name, ours_grad in hf_names(config, grads).items():
        expected = theirs.get_parameter(name).grad
        assert expected is not None, name
        distance = (ours_grad - expected).norm() / expected.norm().clamp(min=1e-12)
        assert distance <= 1e-4, f"{name}: {distance:.2e}"


def drawn(seed: int, *, ep: int = 1, ep_rank: int = 0) -> dict[str, torch.Tensor]:
    config = changed(BASE, mtp_depth=1)
    model = Transformer(config, Recipe(Precision.BF16), LocalDispatcher(config.experts.num_experts // ep))
    init_weights(model, seed, ep_rank=ep_rank)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_are_normal_and_norms_are_ones() -> None:
    for name, weight in drawn(0).items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            assert weight.float().std().item() == pytest.approx(BASE.init_std, rel=0.1), name
            assert abs(weight.float().mean().item()) < 0.1 * BASE.init_std, name


def test_weights_depend_on_seed_name_and_expert_alone() -> None:
    """Expert-parallel ranks hold shares of one model; no two matrices are alike; a seed's model never changes."""
    whole, other = drawn(0), drawn(1)
    shares = [drawn(0, ep=2, ep_rank=rank) for rank in (0, 1)]
    matrices = []
    for name, weight in whole.items():
        parts = [share[name] for share in shares]
        if weight.dim() == 3:
            assert torch.equal(torch.cat(parts), weight), name
            matrices += list(weight)
        else:
            assert all(torch.equal(part, weight) for part in parts), name
            matrices += [weight] if weight.dim() == 2 else []
        assert weight.dim() == 1 or not torch.equal(weight, other[name])
    firsts = [tuple(matrix.flatten()[:16].tolist()) for matrix in matrices]
    assert len(set(firsts)) == len(firsts)
    assert whole["head.weight"][0, :3].tolist() == [-0.046630859375, 0.05712890625, -0.032958984375]


def test_fp8_leaves_the_head_alone() -> None:
    model = Transformer(BASE, Recipe(Precision.FP8), LocalDispatcher(BASE.experts.num_experts))
    init_weights(model, seed=0)
    assert model.head is not None and model.norm is not None
    x = torch.randn(8, BASE.dim).bfloat16()
    plain = x.double() @ model.head.weight.detach().double().T
    assert (model.head(x) - plain).norm() < 0.005 * plain.norm(), "E4M3 operands would cost 3 %"


def test_the_balance_loss_is_the_sum_over_blocks() -> None:
    model = Transformer(BASE, Recipe(Precision.FP32), LocalDispatcher(BASE.experts.num_experts))
    init_weights(model, seed=1)
    batch = tokens(BASE.vocab_size)
    positions = model.positions(batch.positions_BS)
    with torch.no_grad():
        x_TD = model.embedding(batch.inputs_BS.flatten())  # type: ignore[misc]
        hidden_TD, balance = model.run_blocks(x_TD, positions)
        losses = []
        for layer in range(BASE.num_layers):
            x_TD, loss = model.block(layer)(x_TD, positions)
            losses.append(float(loss))
    assert torch.equal(hidden_TD, x_TD)
    assert losses[0] == 0.0 and all(loss > 0 for loss in losses[1:])  # the first block is dense
    assert float(balance) == pytest.approx(sum(losses), rel=1e-6)


def test_the_balance_loss_of_training_has_the_mtp_modules_too() -> None:
    config = changed(BASE, mtp_depth=1)
    model = Transformer(config, Recipe(Precision.FP32), LocalDispatcher(config.experts.num_experts))
    init_weights(model, seed=1)
    batch = tokens(config.vocab_size)
    positions = model.positions(batch.positions_BS)
    with torch.no_grad():
        hidden_TD, blocks = model.run_blocks(model.embedding(batch.inputs_BS.flatten()), positions)  # type: ignore[misc]
        _, module = model.mtp(model.norm(hidden_TD).tensor, model.embedding(next_ids(batch)), positions)  # type: ignore[misc]
        assert float(module) > 0
        assert float(model(batch).balance) == pytest.approx(float(blocks) + float(module), rel=1e-6)
        assert float(model.eval()(batch).balance) == pytest.approx(float(blocks), rel=1e-6)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[0, 1, 2, BASE.vocab_size]], rf"token id {BASE.vocab_size} is outside .*: use 0 to {BASE.vocab_size - 1}$"),
        ([[0, -1]], "token id -1 is outside the vocabulary"),
        (
            [[0] * (BASE.max_seq_len + 1)],
            rf"of {BASE.max_seq_len + 1} tokens is longer .*: use at most {BASE.max_seq_len}$",
        ),
    ],
)
def test_ids_and_lengths_that_the_model_does_not_have(ids: list[list[int]], says: str) -> None:
    model = Transformer(BASE, Recipe(Precision.FP32), LocalDispatcher(BASE.experts.num_experts))
    init_weights(model, seed=0)
    with pytest.raises(ValueError, match=says):
        model.logits(torch.tensor(ids))
    assert model.logits(torch.tensor([[BASE.vocab_size - 1] * BASE.max_seq_len])).isfinite().all()
