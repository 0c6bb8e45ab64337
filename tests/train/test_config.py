"""What is refused before a process starts, and what is filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import configured


def test_the_mesh_is_filled_in(corpus: list[str]) -> None:
    alone = configured(corpus)
    assert (alone.dp, alone.ep) == (1, 1)
    four = configured(corpus, world_size=4)
    assert (four.dp, four.ep) == (4, 4)
    # Experts spread over as many ranks as divide both: 4 experts, 6 ranks.
    assert configured(corpus, "batch.sequences=12", "validation.samples=12", world_size=6).ep == 2
    assert configured(corpus, "parallel.ep=2", world_size=4).ep == 2
    # As large a micro-batch as leaves the schedule enough of them.
    free = ["batch.micro_batch=null", "batch.sequences=16"]
    for schedule, pp, size in (("1f1b", 1, 16), ("dualpipev", 1, 8), ("dualpipe", 2, 4), ("zb1p", 2, 16)):
        settings = [*free, f"parallel.schedule={schedule}", f"parallel.pp={pp}", "validation.samples=16"]
        assert configured(corpus, *settings, world_size=pp).micro_batch == size


ALONE = [  # settings of one process, and what the refusal says
    (["batch.sequences=7"], "batch.sequences=7 must be a multiple .*: use 8"),
    (["parallel.schedule=dualpipev", "model.num_layers=1"], "2 stages, .* has 1: use parallel.schedule=1f1b"),
    (["parallel.schedule=dualpipe"], "pipeline ranks, and pp=1 is odd: use 2"),
    (
        ["parallel.schedule=dualpipev", "batch.sequences=1", "batch.micro_batch=1"],
        "batch.sequences=1 makes 1 micro-batches .* needs at least 2: use 2",
    ),
    (
        ["seq_len=40", "batch.micro_batch=1"],
        "1 x 40 = 40 tokens must be a multiple of 16, which FP8 needs: use seq_len=32",
    ),
    (["seq_len=2048"], "seq_len=2048 exceeds model.max_seq_len=1024: use at most 1024"),
    (["data.vocab_size=500"], "data.vocab_size=500 exceeds model.vocab_size=300: use at most 300"),
    (["model.dim=72"], "model.dim=72 must be a multiple of 16, which FP8 needs: use 64"),
    (["steps=0"], "steps=0 must be at least 1"),
    (["recompute=[norms]"], "recompute.0.='norms' is not one of norm, mla_up, swiglu: did you mean norm?"),
    (["recompute=[norm,swiglu,norm]"], r"\[norm,swiglu,norm\] names one twice: use recompute=\[norm,swiglu\]"),
    (["seed=-1"], "seed=-1 must be at least 0"),
    (["parallel.timeout=0"], "parallel.timeout=0.0 must be above 0"),
    (["parallel.chunks=0"], "parallel.chunks=0 must be at least 1"),
    (["parallel.capacity_factor=0.5"], "parallel.capacity_factor=0.5 must be at least 1"),
    (["parallel.capacity_factor=2", "parallel.max_imbalance=3"], "use parallel.max_imbalance=null, not 3.0"),
    (["resume=nowhere"], "resume=nowhere does not exist: name a run directory"),
    (["resume=auto"], "resume=auto goes on in a run directory and run_dir is not set"),
    (["precision.backend=abacus"], "back end 'abacus' does not exist"),
    (["precision.backend=cublas"], "back end 'cublas' cannot run here: it needs a GPU"),
    (
        ["precision.scales=fp16"],
        "precision.scales='fp16' is not one of recipe, fp32, power_of_two",
    ),
    (
        ["precision=bf16", "precision.scales=fp32"],
        "precision.scales=fp32 concerns FP8 tensors and precision.mode is bf16: use precision=fp8",
    ),
    (["device=cuda"], "device=cuda needs at least 1 CUDA device and torch sees 0"),
]
TOGETHER = [  # the same with a number of processes
    (2, ["parallel.ep=4"], "parallel.ep=4 does not divide the 2 data-parallel processes: use 1 or 2"),
    (2, ["validation.samples=6"], "validation.samples=6 must be a multiple of .* = 2 x 2 = 4: use 8"),
    (2, ["parallel.pp=2", "parallel.schedule=dualpipev"], "has 4 stages, .* the model has 2: use parallel.pp=1"),
    (2, ["parallel.pp=2", "parallel.layout=[1,2]"], "layout 1,2 places 3 blocks, but the model has 2: take 1 away"),
    (2, ["parallel.pp=2", "parallel.ep=2"], "parallel.ep=2 does not divide the 1 data-parallel processes: use 1"),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=dualpipe", "batch.micro_batch=4"],
        "batch.sequences=8 makes 2 micro-batches of dp x batch.micro_batch = 1 x 4 sequences and .* needs at least 4, "
        "in multiples of 2: use 16",
    ),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=dualpipe", "batch.sequences=10"],
        "batch.sequences=10 makes 5 micro-batches .* needs at least 4, in multiples of 2: use 12",
    ),
    (2, ["parallel.dispatcher=deep_ep"], "needs the package deep_ep, which is not installed: use .*all_to_all"),
    (3, ["parallel.ep=3"], "parallel.ep=3 does not divide num_experts=4: use 1, 2 or 4"),
    (3, ["parallel.pp=3", "parallel.schedule=dualpipe"], "pipeline ranks, and pp=3 is odd: use 2 or 4"),
    (4, ["parallel.dp=2"], "needs 2 processes and there are 4: use parallel.dp=4 or start 2"),
    (4, ["parallel.pp=3"], "parallel.pp=3 does not divide 4 processes: use 1, 2 or 4"),
    (4, ["parallel.pp=4"], "4 stages, which need at least 1 block each, and the model has 2: use parallel.pp=2"),
    (4, ["parallel.pp=4", "parallel.schedule=dualpipe", "model.num_layers=3"], "the model has 3: use parallel.pp=2"),
    (4, ["parallel.dispatcher=node_limited", "parallel.ranks_per_node=3"], "node=3 does not divide parallel.ep=4"),
]


@pytest.mark.parametrize(("world_size", "settings", "says"), [*((1, *case) for case in ALONE), *TOGETHER])
def test_what_can_not_be(
    corpus: list[str], world_size: int, settings: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        configured(corpus, *settings, world_size=world_size)


def test_what_a_resolved_configuration_says(corpus: list[str]) -> None:
    # 8 sequences of the largest length and vocabulary, 2 at once on each of 2 data-parallel ranks.
    largest = configured(corpus, "seq_len=64", "model.max_seq_len=64", "parallel.pp=2", "steps=1", world_size=4)
    assert (largest.dp, largest.ep, largest.micro_batch, largest.num_microbatches) == (2, 2, 2, 2)
    assert largest.data.vocab_size == largest.model.vocab_size == 300
    assert configured(corpus, "max_skipped_steps=0").max_skipped_steps == 0


def test_other_precisions_take_any_length(corpus: list[str]) -> None:
    assert configured(corpus, "seq_len=40", "batch.micro_batch=1", "precision=bf16").seq_len == 40


def test_a_used_directory_is_refused_before_anything_starts(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    with pytest.raises(ValueError, match="holds 1 entries and a fresh run needs an empty directory"):
        configured(corpus, f"run_dir={tmp_path}")
