"""A flipped bit in one replica is found, with its rank, and where nothing is wrong nothing is said."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8moe.errors import ReplicaError
from fp8moe.layers.linear import QuantizedWeight
from fp8moe.train import consistency, loop
from fp8moe.train.consistency import WORDS, check_consistency, fingerprints, replicated, word_sum
from fp8moe.train.loop import run_to_end
from fp8moe.train.run import Run
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

DUALPIPE = ("parallel.schedule=dualpipe", "parallel.pp=2", "batch.micro_batch=1", "batch.sequences=4")
THREE = ("parallel.ep=1", "batch.sequences=6", "validation.samples=6")
MODULE = "blocks.1.attn.o"


def flip(tensor: Tensor, element: int = 5, bit: int = 1) -> None:
    """Flip one bit of one element, wherever it lies; once more flips it back."""
    assert tensor.data_ptr(), "the tensor itself, not a copy"
    index = []
    for size in reversed(tensor.shape):
        element, place = divmod(element, size)
        index.insert(0, place)
    one = tensor.detach()[tuple(slice(i, i + 1) for i in index)]
    word = one.view(WORDS[one.element_size()])
    word.bitwise_xor_(torch.tensor(1 << bit, dtype=word.dtype))


def targets(run: Run) -> dict[str, Tensor]:
    """A tensor of each kind that is compared, by the name that the check gives it."""
    module = run.model.get_submodule(MODULE)
    assert isinstance(module, QuantizedWeight)
    experts = "blocks.1.moe.experts.down.weight"
    found = {
        f"{MODULE}.weight": module.weight,
        f"FP8 blocks of {MODULE}.weight": module.blocks.data,
        f"transposed FP8 blocks of {MODULE}.weight": module.transposed_blocks.data,
        f"scales of the FP8 blocks of {MODULE}.weight": module.blocks.scale,
        experts: run.model.get_parameter(experts),
        "bias.blocks.1.moe.router": run.routers()["blocks.1.moe.router"].bias_E,
    }
    if run.zero is None:
        held = run.optimizer.held[experts][0].tensors
        found |= {f"master.{experts}": held["master"], f"exp_avg.{experts}": held["exp_avg"]}
    return found


def sentences(settings: list[str], world_size: int, at_fault: int) -> dict[str, str]:
    """What the check says of one flipped bit on that rank, by the tensor; nothing where it is flipped back."""
    run = built(configured(settings, world_size=world_size))
    for _ in range(2):
        train_step(run)
    check_consistency(run)  # nothing is wrong so far, and all weights are here
    said = {}
    for number, (name, tensor) in enumerate(targets(run).items()):
        element, bit = (0 if tensor.numel() < 9 else 5), number % 8
        if run.mesh.rank == at_fault:
            flip(tensor, element, bit)
        with pytest.raises(ReplicaError) as caught:
            check_consistency(run)
        said[name] = str(caught.value)
        if run.mesh.rank == at_fault:
            flip(tensor, element, bit)
    check_consistency(run)
    return said


@pytest.mark.parametrize("sharding", ["zero1", "none"])
def test_the_rank_whose_bit_flipped_is_named(corpus: list[str], sharding: str) -> None:
    settings = [*corpus, *THREE, f"optimizer.sharding={sharding}", "guard.consistency_every=1"]
    ranks = run_ranks(sentences, 3, settings, 3, 1)
    assert ranks[0] == ranks[1] == ranks[2] and len(ranks[0]) == (6 if sharding == "zero1" else 8)
    for name, said in ranks[0].items():
        assert said == (
            f"{name} of rank 1 differs from that of 2 other replicas after step 2: replace the device and resume from "
            "a checkpoint of step 1, where nothing differed, or before"
        )


def test_of_two_replicas_both_are_named(corpus: list[str]) -> None:
    """In a mirrored pipeline: both ranks hold both stages."""
    first, second = run_ranks(sentences, 2, [*corpus, *DUALPIPE, "guard.consistency_every=2"], 2, 0)
    assert first == second and len(first) == 6
    for name, said in first.items():
        assert said == (
            f"{name} differs between the ranks 0, 1, which should hold the same bits after step 2: replace the device "
            "and start anew"
        )


def fifty_steps(settings: list[str]) -> int:
    run = built(configured(settings, world_size=2))
    for _ in range(50):
        train_step(run)
        if run.config.guard.consistency_is_due(run.step):
            check_consistency(run)
    return run.step


def test_nothing_is_said_in_fifty_steps_of_a_mirrored_pipeline(corpus: list[str]) -> None:
    settings = [*corpus, *DUALPIPE, "model.mtp_depth=0", "steps=50", "guard.consistency_every=2"]
    assert run_ranks(fifty_steps, 2, settings) == [50, 50]


def wrong_forward(settings: list[str]) -> str:
    """What is said where the second forward of rank 1 differs in the last bit."""
    run = built(configured(settings, world_size=2))
    original, calls = consistency.forward_passes, [0]

    def passes(*given: object) -> Tensor:
        calls[0] += 1
        sums = original(*given)  # type: ignore[arg-type]
        return sums.nextafter(sums + 1) if run.mesh.rank == 1 and calls[0] == 2 else sums

    consistency.forward_passes = passes  # type: ignore[assignment]
    with pytest.raises(ReplicaError) as caught:
        check_consistency(run)
    return str(caught.value)


def test_a_forward_that_does_not_repeat_is_found(corpus: list[str]) -> None:
    first, second = run_ranks(wrong_forward, 2, [*corpus, "precision=bf16", "parallel.ep=2"])
    assert first == second and first.startswith("one forward done twice gave two losses on rank 1 after step 0: ")
    assert ReplicaError("a").exit_code == 5


def test_the_loop_checks_when_it_is_due(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(loop, "check_consistency", lambda run: checked.append(run.step))
    settings = [*corpus, "precision=bf16", "steps=5", "checkpoint.at_end=false"]
    run_to_end(built(configured([*settings, f"run_dir={tmp_path / 'a'}"])), time.perf_counter())
    assert checked == []
    every = ["guard.consistency_every=2", f"run_dir={tmp_path / 'b'}"]
    run_to_end(built(configured([*settings, *every])), time.perf_counter())
    assert checked == [2, 4]


def test_one_process_has_nothing_to_compare_and_checks_its_forward(corpus: list[str]) -> None:
    run = built(configured(corpus))
    check_consistency(run)
    dense, expert = replicated(run)
    named = {name for name in [*dense, *expert] if " " not in name and not name.startswith("bias.")}
    kinds = {"master.", "exp_avg.", "exp_avg_sq.", ""}
    assert named == {f"{kind}{name}" for kind in kinds for name, _ in run.model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_bit_counts(dtype: torch.dtype, transposed: bool) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    tensor = values.t() if transposed else values
    seen, sums = {fingerprints({"a": tensor})["a"]}, {int(word_sum(tensor))}
    words = tensor.contiguous().view(-1).view(WORDS[tensor.element_size()]).tolist()
    assert sums == {(sum(words) + 2**63) % 2**64 - 2**63}
    bits = 8 * tensor.element_size() - 1  # the sign bit is no power of two of its type
    for bit in range(bits):
        flip(tensor, element=17, bit=bit)
        seen.add(fingerprints({"a": tensor})["a"])
        sums.add(int(word_sum(tensor)))
        flip(tensor, element=17, bit=bit)
    assert len(seen) == len(sums) == bits + 1
    assert fingerprints({"a": tensor})["a"] == fingerprints({"a": tensor.clone()})["a"]
