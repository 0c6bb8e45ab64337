"""The batches of a step read ahead: the same bits as without, under a growing batch, a rollback and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8moe.data.packing import Batch
from fp8moe.errors import DataError
from fp8moe.model.loss import count_predicted
from fp8moe.train.loop import run_to_end
from fp8moe.train.run import Run
from fp8moe.train.step import next_batches, train_step
from tests.train.runs import built, configured

RAMP = ("batch.ramp_from=2", "batch.increment=2", "batch.ramp_samples=20", "precision=fp32")


def reads(run: Run, steps: int) -> list[tuple[Batch, ...]]:
    found = []
    for _ in range(steps):
        batches, counts = next_batches(run)
        predicted = [count_predicted(batch.labels_BS)[0] for batch in batches]
        assert counts.main_tokens == sum(predicted) and counts.sequences == 2 * len(batches)
        found.append(tuple(batches))
    return found


def same(one: list[tuple[Batch, ...]], other: list[tuple[Batch, ...]]) -> bool:
    return [len(step) for step in one] == [len(step) for step in other] and all(
        torch.equal(a.inputs_BS, b.inputs_BS)
        and torch.equal(a.labels_BS, b.labels_BS)
        and a.document_lengths == b.document_lengths
        for one_step, other_step in zip(one, other, strict=True)
        for a, b in zip(one_step, other_step, strict=True)
    )


@pytest.mark.parametrize("mask", ["true", "false"])
def test_batches_are_the_same_read_ahead_or_not(corpus: list[str], mask: str) -> None:
    settings = (*corpus, *RAMP, f"data.document_mask={mask}")
    plain, ahead = (built(configured([*settings], f"data.prefetch={n}")) for n in (0, 3))
    found = reads(ahead, 9)
    assert same(found, reads(plain, 9)) and len(found[0]) < len(found[-1])
    assert ahead.sampler.state_dict() == plain.sampler.state_dict()
    for consumed in (3, 1000, 3):  # where a checkpoint may send a run, and back
        plain.sampler.consumed = ahead.sampler.consumed = consumed
        assert same(reads(ahead, 2), reads(plain, 2))
    ahead.reader.close()


def test_nothing_is_read_twice_while_the_batch_grows(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = built(configured([*corpus, *RAMP], "data.prefetch=2"))
    batch, firsts = run.data.train.batch, list[int]()
    monkeypatch.setattr(run.data.train, "batch", lambda ids: firsts.append(ids[0]) or batch(ids))
    reads(run, 9)
    run.reader.close()
    assert firsts == sorted(set(firsts))


def test_a_run_has_the_same_losses_read_ahead_or_not(corpus: list[str], tmp_path: Path) -> None:
    losses = []
    for ahead in (0, 2):
        run = built(configured(corpus, f"data.prefetch={ahead}", "precision=fp32", f"run_dir={tmp_path / str(ahead)}"))
        losses.append([train_step(run).loss for _ in range(3)])
        run.reader.close()
    assert losses[0] == losses[1]


def test_an_error_of_the_data_ends_the_run_as_before(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(configured(corpus, "precision=fp32", f"run_dir={tmp_path / 'run'}"))
    batch = run.data.train.batch

    def broken(ids: list[int]) -> Batch:
        if ids[0] >= 16:
            raise DataError("token 7 has id 999, outside a vocabulary of 300")
        return batch(ids)

    monkeypatch.setattr(run.data.train, "batch", broken)
    with pytest.raises(DataError, match="token 7 has id 999"):
        run_to_end(run, 0.0)
    assert run.step == 2
    assert run.reader._thread is None, "the loop closes its reader"
