"""Numbers that turn wrong on one rank: NaN in a gradient or a router's bias, one flipped bit of what replicas share."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fp8moe.errors import EXIT
from fp8moe.train import loop, step
from fp8moe.train.consistency import WORDS, fingerprints, replicated
from fp8moe.train.run import Run
from tests.faults.runs import newest, start, steps
from tests.train.runs import stored

EVERY = 4  # steps between consistency checks
REPLICAS = ("parallel.ep=1", "batch.sequences=6", "validation.samples=6", "checkpoint.every=0")


def nan_in_a_gradient(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """One number of one rank's gradients: the step is skipped on all ranks, and the run ends as usual."""
    world_size, at, where = 2, rng.randrange(1, 8), rng.random()
    victim = rng.randrange(world_size)

    def spoil(run: Run) -> None:  # before the passes, which add to it and send it on as soon as it is whole
        gradients = [parameter.main_grad for parameter in run.model.parameters()]  # type: ignore[attr-defined]
        chosen = gradients[int(where * len(gradients))].view(-1)
        chosen[int(where * len(chosen))] = rng.choice((torch.nan, torch.inf))

    ranks = start(_words(corpus, folder), world_size, folder / "first",
                  lambda rank: _spoils(folder, rank, at, spoil if rank == victim else None))  # fmt: skip
    if (codes := ranks.wait()) != [0] * world_size:
        return f"exit codes {codes}: {ranks.sentence()}"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line.get("skipped")]
    if skipped != [at] or steps(folder / "run") != list(range(1, 9)):
        return f"in step {at}: the steps {skipped} were skipped"
    return _same_weights(folder, world_size, at)


def nan_in_a_bias(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """One router's bias on one rank: the step is skipped on all, and the run goes back to its last checkpoint."""
    world_size, at, where = 2, rng.randrange(3, 8), rng.random()
    victim = rng.randrange(world_size)

    def spoil(run: Run) -> None:
        run.saver.wait_copied()  # the checkpoint of the step before is of the state without it
        routers = list(run.routers().values())
        bias = routers[int(where * len(routers))].bias_E
        bias[int(where * 97) % len(bias)] = torch.nan

    ranks = start(_words(corpus, folder), world_size, folder / "first",
                  lambda rank: _spoils(folder, rank, at, spoil if rank == victim else None))  # fmt: skip
    if (codes := ranks.wait()) != [0] * world_size:
        return f"exit codes {codes}: {ranks.sentence()}"
    summary = json.loads((folder / "run" / "summary.json").read_text())
    if summary["rollbacks"] != 1 or summary["skipped_steps"] != 1 or steps(folder / "run") != list(range(1, 9)):
        return f"in step {at}: {summary['rollbacks']} rollbacks, {summary['skipped_steps']} skipped steps"
    if f"is not finite on rank {victim} in step {at}" not in ranks.said():
        return f"rank {victim} is not named: {ranks.sentence()}"
    return _same_weights(folder, world_size, at)


def _words(corpus: list[str], folder: Path) -> list[str]:
    return [*corpus, "checkpoint.every=1", f"run_dir={folder / 'run'}"]


def _spoils(folder: Path, rank: int, at: int, spoil: Callable[[Run], None] | None) -> None:
    """Call `spoil` before the passes of step `at`, and note what this rank holds before and after its update."""
    passes, update, times = step.forward_backward, step.update, [0]

    def spoilt(run: Run, *rest: object) -> object:
        times[0] += run.step == at - 1
        if run.step == at - 1 and times[0] == 1 and spoil is not None:
            spoil(run)
        return passes(run, *rest)  # type: ignore[arg-type]

    def noted(run: Run, *rest: object, **options: object) -> None:
        is_noted = run.step == at - 1 and times[0] == 1
        first = _held(run) if is_noted else {}
        update(run, *rest, **options)  # type: ignore[arg-type]
        if is_noted:
            (folder / f"held-{rank}.json").write_text(json.dumps([first, _held(run)]))

    step.forward_backward, step.update = spoilt, noted  # type: ignore[assignment]


def _held(run: Run) -> dict[str, int]:
    """Hashes of what a rank holds: weights, FP8 blocks, biases, masters, moments, averages."""
    if run.zero is not None:
        run.zero.wait_weights()
    if run.ema is not None:
        run.ema.wait()
    dense, expert = replicated(run)
    kept = {name: tensor for name, tensor in stored(run).items() if not name.startswith("random.")}
    return fingerprints({**kept, **dense, **expert})


def _same_weights(folder: Path, world_size: int, at: int) -> str | None:
    for rank in range(world_size):
        before, after = json.loads((folder / f"held-{rank}.json").read_text())
        if len(before) < 50:
            return f"rank {rank} holds {len(before)} tensors"
        if moved := [name for name in before if before[name] != after.get(name)]:
            return f"step {at} was skipped and {len(moved)} tensors of rank {rank} moved: {moved[0]}"
    return None


def flipped_bit(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """One bit of one of three replicas: the next check names the rank and the tensor.

    A copy of a weight lasts until the next update, so it is flipped in the step before a check; a master or a bias,
    which last, in any step.
    """
    world_size, lasting, where = 3, rng.random() < 0.5, rng.random()
    victim, check = rng.randrange(world_size), EVERY * rng.randrange(1, 4)
    at = check - rng.randrange(EVERY) if lasting else check
    sharding = "none" if lasting else "zero1"

    def flip(run: Run) -> None:
        if run.zero is not None:
            run.zero.wait_weights()
        dense, expert = replicated(run)
        found = {**dense, **expert}
        names = [name for name in found if name.startswith(("master.", "bias.")) == lasting and found[name].numel()]
        name = names[int(where * len(names))]
        _flip(found[name], int(where * 9973), int(where * 997))
        (folder / "flipped").write_text(name)

    words = [*corpus, *REPLICAS, f"run_dir={folder / 'run'}", "steps=16", f"guard.consistency_every={EVERY}",
             f"optimizer.sharding={sharding}", "ema.decay=null"]  # fmt: skip
    ranks = start(words, world_size, folder / "first", lambda rank: _flips(at, flip if rank == victim else None))
    codes = ranks.wait()
    if codes != [EXIT["nonfinite"]] * world_size:
        return f"{(folder / 'flipped').read_text()} flipped in step {at}: exit codes {codes}: {ranks.sentence()}"
    name = (folder / "flipped").read_text()
    # A master's weight and FP8 blocks differ with it by then; one of them is named and the others counted.
    module = re.escape(name.partition("blocks." if "blocks." in name else ".")[2].removesuffix(".weight"))
    wanted = rf"{module}\S* of rank {victim} differs from that of 2 other replicas( \(.*\))? after step {check}: "
    if re.search(wanted, ranks.said()):
        return None
    return f"{name} of rank {victim} flipped in step {at}, check after step {check}: {ranks.sentence()}"


def _flips(at: int, flip: Callable[[Run], None] | None) -> None:
    """Flip after the update of step `at`."""
    done = loop.train_step

    def flipping(run: Run, **options: bool) -> object:
        report = done(run, **options)
        if flip is not None and run.step == at:
            flip(run)
        return report

    loop.train_step = flipping  # type: ignore[assignment]


def _flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one element where it lies, whatever the strides."""
    element, index = element % tensor.numel(), []
    for size in reversed(tensor.shape):
        element, place = divmod(element, size)
        index.insert(0, place)
    one = tensor.detach()[tuple(slice(i, i + 1) for i in index)]
    word = one.view(WORDS[one.element_size()])
    bits = 8 * one.element_size() - 1  # the sign bit is no power of two of its type
    word.bitwise_xor_(torch.tensor(1 << bit % bits, dtype=word.dtype))


CALM = 2000  # steps without a fault
CALM_LIMIT = 1200.0  # seconds


def no_false_alarm(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """Two thousand steps in which nothing goes wrong: no check says otherwise."""
    words = [*corpus, f"run_dir={folder / 'run'}", f"steps={CALM}", f"guard.consistency_every={EVERY}",
             "checkpoint.every=0", "optimizer.schedule.peak=1e-3"]  # fmt: skip
    ranks = start(words, 2, folder / "first")
    codes = ranks.wait(CALM_LIMIT)
    if codes != [0, 0]:
        return f"exit codes {codes}: {ranks.sentence()}"
    summary = json.loads((folder / "run" / "summary.json").read_text())
    is_calm = summary["steps"] == CALM and summary["skipped_steps"] == summary["rollbacks"] == 0
    return None if is_calm and newest(folder / "run") is not None else f"{summary['skipped_steps']} skipped steps"
