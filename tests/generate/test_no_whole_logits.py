"""No path makes the logits of all tokens at once: training with MTP, validation, scores, a prompt's forward.

A spy sees every tensor that an operation returns. The vocabulary has a factor 25, which no other size of the model has,
so a tensor of more rows of the vocabulary than a chunk's is the logits, whatever its shape and dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8moe.data.packing import Batch
from fp8moe.generate.decode import GenerationConfig, generate
from fp8moe.generate.scoring import token_nats
from fp8moe.model import head_loss as module
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.profile.spans import Stopwatch
from fp8moe.train.loop import run_to_end
from fp8moe.train.run import Run
from fp8moe.train.step import forward_backward, forward_passes, next_batches
from tests.model.batches import tokens
from tests.parallel.ranks import run_ranks
from tests.train.runs import VOCABULARY, built, configured, write_corpus

CHUNK, SEQ_LEN = 128, 256  # tokens


class Spy(TorchDispatchMode):
    """Most rows of the vocabulary that one tensor has, and the operations that returned more than a chunk's."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.whole = 0, set[str]()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            rows, rest = divmod(tensor.numel(), VOCABULARY) if isinstance(tensor, Tensor) else (0, 1)
            if not rest:
                self.most = max(self.most, rows)
                self.whole |= {str(function)} if rows > CHUNK else set()
        return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Two sequences of 256 tokens a micro-batch: four chunks of 128."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    sizes = [f"seq_len={SEQ_LEN}", "batch.sequences=2", "validation.samples=2", "steps=1", "precision=bf16"]
    run = built(configured(corpus, *sizes, f"run_dir={tmp_path / 'run'}", "model.max_seq_len=512", "report=false"))
    assert run.model.mtp is not None
    return run


def under_autograd(run: Run) -> None:
    batch = tokens(VOCABULARY, seq_len=SEQ_LEN)
    counts = LossCounts(*count_predicted(batch.labels_BS), sequences=2)
    total_loss(run.model(batch), loss_weights(counts, mtp_weight=0.3, balance_alpha=0.0)).backward()


def steps_validation_and_completions(run: Run) -> None:
    run_to_end(run, time.perf_counter())


def scores(run: Run) -> None:
    batch = tokens(VOCABULARY, seq_len=SEQ_LEN)
    token_nats(run.model.eval(), Batch(batch.inputs_BS, batch.labels_BS, batch.positions_BS, None))


def long_prompt(run: Run, *, mtp: bool) -> None:
    ids = tokens(VOCABULARY, batch=1, seq_len=400).inputs_BS[0].tolist()
    config = GenerationConfig(max_tokens=3, mtp=mtp)
    (one,), _ = generate(run.model, [ids], config, run.mesh, num_ids=VOCABULARY, accept=lambda *_: False)
    assert len(one.ids) == 3


PATHS: dict[str, tuple[Callable[[Run], None], int]] = {  # and the rows of logits that it needs at once
    "autograd": (under_autograd, CHUNK),
    "a whole run": (steps_validation_and_completions, CHUNK),
    "scores": (scores, CHUNK),
    "a prompt": (lambda run: long_prompt(run, mtp=False), 64),  # the head's weight has 64 rows of the vocabulary
    "a prompt, with the MTP module": (lambda run: long_prompt(run, mtp=True), 64),
}


@pytest.mark.parametrize("path", PATHS)
def test_no_path_makes_whole_logits(run: Run, path: str) -> None:
    walk, rows = PATHS[path]
    with Spy() as spy:
        walk(run)
    assert not spy.whole
    assert spy.most == rows, "the spy sees what the path makes"


def shared_step(settings: list[str]) -> tuple[set[str], int]:
    """What of a step and a validation of two ranks that share sequences made whole logits; the most rows of them."""
    run = built(configured(settings, world_size=2))
    with Spy() as spy:
        batches, counts = next_batches(run)
        forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
        forward_passes(run, batches)
    return spy.whole, spy.most


def test_ranks_that_share_sequences_make_none(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    sizes = [f"seq_len={2 * SEQ_LEN}", "batch.sequences=2", "validation.samples=2", "parallel.cp=2", "precision=bf16"]
    assert run_ranks(shared_step, 2, [*corpus, *sizes, "run_dir=null"]) == [(set(), CHUNK)] * 2


def test_the_spy_finds_whole_logits(run: Run) -> None:
    with Spy() as spy, torch.no_grad():
        run.model.logits(tokens(VOCABULARY, seq_len=SEQ_LEN).inputs_BS)
    assert spy.most == 2 * SEQ_LEN and spy.whole
