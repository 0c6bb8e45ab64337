"""A failed allocation in a step: exit code 4, and a sentence that says what the rank holds and what to lower."""

from __future__ import annotations

import pytest
import torch

from fp8moe.cli.command import explain
from fp8moe.errors import EXIT, OutOfMemoryError, is_out_of_memory
from fp8moe.train.loop import run_to_end
from fp8moe.train.memory import KINDS, measured_bytes, out_of_memory_in_words
from fp8moe.train.run import Run
from tests.train.runs import built, configured, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return built(configured(write_corpus(folder), "precision=fp8", "seq_len=64", f"run_dir={folder / 'run'}"))


def test_an_allocation_that_fails_within_a_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A petabyte, which the real allocator of the CPU refuses, in the first forward."""

    def forward(*args: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    monkeypatch.setattr("fp8moe.train.step.train_passes", forward)
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory_in_words(run):
        run_to_end(run, 0.0)
    failure = explain(caught.value)
    assert failure.code == EXIT["memory"] == 4 and not failure.traceback and not failure.shared
    said = failure.sentence
    assert (
        said.startswith("out of memory in step 1 on rank 0 (")
        and "you tried to allocate 1125899906842624 bytes" in said
    )
    assert "alloc_cpu" not in said and ".cpp" not in said
    assert (
        ", and activations and messages beside: use batch.micro_batch=1, or recompute=[norm,mla_up,swiglu], or " in said
    )
    held = measured_bytes(run.model, run.optimizer)
    assert all(held[kind] for kind in KINDS)
    for kind in KINDS:
        assert f"{kind} {held[kind] / 1e9:.3g}" in said


def test_other_errors_pass(run: Run) -> None:
    for error in (RuntimeError("gloo"), ValueError("no"), OutOfMemoryError("said already")):
        with pytest.raises(type(error)) as caught, out_of_memory_in_words(run):
            raise error
        assert caught.value is error
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")):
        assert is_out_of_memory(error)
        with pytest.raises(OutOfMemoryError, match="out of memory in step 1 on rank 0"), out_of_memory_in_words(run):
            raise error
