"""Log-probabilities of labels: those of whole logits, on every layout, in the order of the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.post.logprobs import label_logprobs
from fp8moe.train.config import TrainConfig
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

SETTINGS = ("precision=fp32", "model.num_layers=4", "batch.sequences=16")
SAMPLES = 8


def of_samples(config: TrainConfig) -> tuple[list[int], Tensor, Tensor]:
    """(this rank's samples, their log-probabilities, their labels); in three micro-batches or so, none held back."""
    run = built(config)
    mine = list(range(SAMPLES))[run.mesh.dp_rank :: run.mesh.dp]
    batches = [run.data.train.batch(mine[i : i + 2]) for i in range(0, len(mine), 2)]
    logp = label_logprobs(run, batches)
    run.reader.close()
    return mine, logp.view(len(mine), -1), torch.cat([batch.labels_BS for batch in batches])


@pytest.fixture(scope="module")
def expected(corpus: list[str]) -> Tensor:
    """[SAMPLES, S] by log-softmax of the model's whole logits, in one process."""
    run = built(configured(corpus, *SETTINGS))
    run.model.eval()
    batch = run.data.train.batch(list(range(SAMPLES)))
    with torch.no_grad():
        positions = run.model.positions(batch.positions_BS, batch.document_lengths)
        hidden, _ = run.model.run_blocks(run.model.embedding(batch.inputs_BS.flatten()), positions)
        logits = run.model.head(run.model.norm(hidden)).double()
    labels = batch.labels_BS.flatten()
    found = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0)
    run.reader.close()
    return found.view(SAMPLES, -1)


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, ()),
        (1, ("parallel.schedule=dualpipev",)),
        (2, ("parallel.ep=2",)),
        (2, ("parallel.pp=2",)),
        (2, ("parallel.pp=2", "parallel.schedule=dualpipe")),
    ],
)
def test_they_are_those_of_whole_logits_on_every_layout(
    world_size: int, settings: tuple[str, ...], corpus: list[str], expected: Tensor
) -> None:
    config = configured(corpus, *SETTINGS, *settings, world_size=world_size)
    ranks = [of_samples(config)] if world_size == 1 else run_ranks(of_samples, world_size, config)
    seen = set()
    for mine, logp, labels in ranks:
        seen |= set(mine)
        assert logp.dtype is torch.float32 and torch.equal(logp == 0, labels < 0)
        torch.testing.assert_close(logp.double(), expected[mine], rtol=0, atol=2e-5)
    assert seen == set(range(SAMPLES))


def test_the_model_is_in_training_afterwards(corpus: list[str]) -> None:
    run = built(configured(corpus, *SETTINGS))
    label_logprobs(run, [run.data.train.batch([0, 1])])
    run.reader.close()
    assert run.model.training and not any(bool(router.counts_E.any()) for router in run.routers().values())
