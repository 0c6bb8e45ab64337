"""The loss by hand: labels, counts, sums and weights, where all three counts differ."""

from __future__ import annotations

import pytest
import torch

from fp8moe.model.loss import (
    IGNORE,
    LossCounts,
    LossSums,
    LossTally,
    LossWeights,
    count_predicted,
    loss_weights,
    mtp_labels,
    total_loss,
)
from fp8moe.model.transformer import next_ids
from tests.model.batches import Tokens

X = IGNORE
LABELS = torch.tensor([[11, 12, X, 14, 15], [X, 22, 23, 24, X], [31, 32, 33, 34, 35]])


def test_labels_of_the_mtp_module_are_those_after_the_next() -> None:
    """The last position has none; nor has one whose own label, or the one after it, is not predicted."""
    expected = [[12, X, X, 15, X], [X, 23, 24, X, X], [32, 33, 34, 35, X]]
    assert mtp_labels(LABELS).tolist() == expected
    assert count_predicted(LABELS) == (4 + 3 + 5, 2 + 2 + 4)
    assert LABELS[0, 0] == 11, "the given labels stay as they are"
    assert mtp_labels(torch.tensor([[7], [X]])).tolist() == [[X], [X]]


def test_ids_after_each_are_the_inputs_shifted_and_the_last_label() -> None:
    """Behind the last of a sequence stands its label; where that is not predicted, an id that the embedding has."""
    inputs = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]])
    ids = next_ids(Tokens(inputs, LABELS, torch.arange(5).expand(3, -1)))
    assert ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24, 0, 31, 32, 33, 34, 35]


def test_weights_divide_each_sum_by_its_own_count() -> None:
    weights = loss_weights(LossCounts(main_tokens=10, mtp_tokens=8, sequences=5), mtp_weight=0.3, balance_alpha=0.02)
    assert (weights.main, weights.mtp, weights.balance) == pytest.approx((1 / 10, 0.3 / 8, 0.02 / 5))
    sums = LossSums(*(torch.tensor(value, requires_grad=True) for value in (20.0, 24.0, 7.0)))
    loss = total_loss(sums, weights)
    assert loss.item() == pytest.approx(20 / 10 + 0.3 * 24 / 8 + 0.02 * 7 / 5)
    loss.backward()
    gradients = [getattr(sums, name).grad.item() for name in ("main", "mtp", "balance")]
    assert gradients == pytest.approx([1 / 10, 0.3 / 8, 0.02 / 5])


def test_a_batch_that_predicts_nothing_has_finite_weights() -> None:
    weights = loss_weights(LossCounts(0, 0, 0), mtp_weight=0.3, balance_alpha=0.02)
    assert weights == LossWeights(main=1.0, mtp=0.3, balance=0.02)


def test_the_tally_keeps_three_sums_apart_in_fp64() -> None:
    tally = LossTally(torch.device("cpu"))
    tally.add_losses(torch.tensor(1.0), torch.tensor(20.0))
    tally.add_losses(torch.tensor(2.0**-30))
    tally.add_balance(torch.tensor(300.0))
    tally.add_balance(torch.tensor(400.0))
    assert tally.sums.tolist() == [1 + 2.0**-30, 20.0, 700.0]
