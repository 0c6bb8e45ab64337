"""The model against `transformers`: same weights, same logits, same gradients."""

from __future__ import annotations

import pytest
import torch

from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from tests.model.batches import tokens
from tests.model.hf_oracle import CASES, hf_names, pair


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
