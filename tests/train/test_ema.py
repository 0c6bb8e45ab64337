"""The average of the weights: its values, what waits for it, and where it goes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp8moe.layers.linear import QuantizedWeight
from fp8moe.train import ema as module
from fp8moe.train.ema import Ema, EmaConfig
from fp8moe.train.loop import _validations, averaged_weights, run_to_end
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_checkpoint, start_checkpoint
from fp8moe.train.step import train_step, update
from tests.train.runs import averages, built, configured, masters


def some_masters() -> dict[str, Tensor]:
    """Whole parameters, a piece of one, a scalar and nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "piece": (37,), "norm": (1,), "gate": (), "none": (0,), "b": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("chunk", [1, 7, 16, 10**6])
def test_the_average_is_the_weighted_sum_of_all_masters(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    given = some_masters()
    ema = Ema(given, 0.75, chunk)
    history = [{name: master.double() for name, master in given.items()}]
    for step in range(4):
        ema.wait_copied()
        for master in given.values():
            master.mul_(-0.5).add_(step)
        history.append({name: master.double() for name, master in given.items()})
        ema.start_update()
    weights = [0.75**4, *(0.25 * 0.75 ** (3 - step) for step in range(4))]
    for name, average in ema.tensors().items():
        expected = sum(weight * values[name] for weight, values in zip(weights, history, strict=True))
        assert average.shape == given[name].shape and average.dtype is torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    assert ema.num_bytes == 4 * (15 + 37 + 1 + 1 + 24)


def test_chunks_change_no_bit() -> None:
    averages = []
    for chunk in (5, 64, 10**6):
        given = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(1))}
        ema = Ema(given, 0.999, chunk)
        given["a"].sin_()
        ema.start_update()
        averages.append(ema.tensors()["a"])
    assert all(torch.equal(averages[0], other) for other in averages)


class Slow(list):  # type: ignore[type-arg]
    """A chunk whose averaging begins when it is allowed; copying it is not held up."""

    def __init__(self, pieces: list[object], allowed: threading.Event) -> None:
        super().__init__(pieces)
        self._allowed, self._is_copied = allowed, False

    def __iter__(self):  # type: ignore[no-untyped-def]
        if self._is_copied:
            self._allowed.wait(20)
        self._is_copied = True
        return super().__iter__()


def test_the_optimizer_waits_for_copies_and_the_next_update_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"a": torch.zeros(8)}
    ema = Ema(given, 0.5, chunk=4)
    given["a"].fill_(1.0)
    may_copy, may_average, copy = threading.Event(), threading.Event(), module._copy
    monkeypatch.setattr(module, "_copy", lambda *arguments: (may_copy.wait(20), copy(*arguments))[1])
    ema._chunks[-1] = Slow(ema._chunks[-1], may_average)
    ema.start_update()
    waiting = threading.Thread(target=ema.wait_copied)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "masters may not change before they are copied"
    may_copy.set()
    waiting.join(20)
    assert not waiting.is_alive()
    given["a"].fill_(77.0)  # the next optimizer step
    after = threading.Thread(target=ema.start_update)
    after.start()
    after.join(0.1)
    assert after.is_alive(), "one update at a time"
    may_average.set()
    after.join(20)
    assert torch.equal(ema.tensors()["a"], torch.full((8,), (0.5 + 77.0) / 2))


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_call() -> None:
    ema = Ema({"a": torch.zeros(8)}, 0.5)
    ema._chunks[0][0].average.resize_(0)
    ema.start_update()
    ema.wait_copied()  # does not wait for what will never come
    for call in (ema.wait, ema.start_update, ema.tensors):
        with pytest.raises(RuntimeError, match=r"size|shape|broadcast"):
            call()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"decay": 1.0}, "ema.decay=1.0 must be above 0 and below 1: use 0.999, or null"),
        ({"decay": 0.0}, "ema.decay=0.0 must be above 0"),
        ({"decay": 0.9, "every": 0}, "ema.every=0 must be at least 1: use 1"),
    ],
)
def test_impossible_settings(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EmaConfig(**settings)  # type: ignore[arg-type]


def test_settings_that_ask_for_an_average_that_is_not_there(corpus: list[str]) -> None:
    with pytest.raises(ValueError, match=r"validation.ema=true needs an average and ema.decay is null: use em"):
        configured(corpus, "validation.ema=true")
    with pytest.raises(ValueError, match="init_from_ema=true and init_from is null"):
        configured(corpus, "init_from_ema=true")
    assert built(configured(corpus)).ema is None


def test_it_follows_accepted_updates_of_a_run(corpus: list[str]) -> None:
    run = built(configured(corpus, "precision=bf16", "ema.decay=0.5", "ema.every=2"))
    assert run.ema is not None
    expected = {name: master.clone() for name, master in masters(run.optimizer).items()}
    for step in range(1, 5):
        train_step(run)
        for name, master in masters(run.optimizer).items():
            if step % 2 == 0:
                expected[name] += 0.5 * (master - expected[name])
    update(run, 1e-2, 0.0, float("nan"), accepted=False)  # behind an update of the average, as one is due
    for name, average in averages(run).items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-7)
    assert run.optimizer.updates == 4


def test_a_step_waits_for_the_copy_and_a_checkpoint_for_the_average(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(configured(corpus, "precision=bf16", "ema.decay=0.5", f"run_dir={tmp_path}"))
    assert run.ema is not None
    begun = {name: average.clone() for name, average in averages(run).items()}
    as_held = {name: average.clone() for name, average in run.ema.tensors().items()}
    told: list[str] = []
    for owner, name in ((run.ema, "wait_copied"), (run.optimizer, "step"), (run.ema, "start_update")):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, method=method: (told.append(name), method(*a))[1])
    may_average = threading.Event()
    run.ema._chunks[-1] = Slow(run.ema._chunks[-1], may_average)
    train_step(run)
    assert told == ["wait_copied", "step", "start_update"]
    start_checkpoint(run)
    time.sleep(0.3)
    assert all(torch.equal(run.ema._averages[name], average) for name, average in as_held.items())
    may_average.set()
    run.saver.wait()
    saved = load_file(tmp_path / "checkpoints" / "step-1" / "rank-0.safetensors")
    for name, average in averages(run).items():
        assert torch.equal(saved[f"ema.{name}"], average.flatten()), name
    assert not torch.equal(saved["ema.head.weight"], begun["head.weight"].flatten())


def everything(run: Run) -> dict[str, Tensor]:
    """Copies of masters, parameters and the FP8 blocks that products read."""
    found = {f"master.{name}": master for name, master in masters(run.optimizer).items()}
    found |= dict(run.model.named_parameters())
    for name, module_ in run.model.named_modules():
        if isinstance(module_, QuantizedWeight) and module_.recipe.fp8:
            for kind, both in (("blocks", module_.blocks), ("transposed", module_.transposed_blocks)):
                found |= {f"{name}.{kind}": both.data.view(torch.uint8), f"{name}.{kind}.scale": both.scale}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_weights_are_swapped_for_a_validation_and_come_back(corpus: list[str], precision: str) -> None:
    run = built(configured(corpus, f"precision={precision}", "ema.decay=0.5", "validation.ema=true", "steps=2"))
    assert run.ema is not None
    for _ in range(2):
        train_step(run)
    before = everything(run)
    with averaged_weights(run, run.ema):
        inside = everything(run)
        for name, average in averages(run).items():
            assert torch.equal(inside[name], average.to(inside[name].dtype)), name
    same = {name for name in before if torch.equal(before[name], inside[name])}
    stay = {name for name in before if name.startswith("master.")} <= same
    assert stay == (precision == "fp8"), "masters stay, unless parameters are views of them"
    codes = [name for name in before if name.endswith((".blocks", ".transposed"))]
    assert bool(codes) == (precision == "fp8") and not same & {
        *codes,
        *(name for name, parameter in run.model.named_parameters() if parameter.ndim > 1),
    }
    own, averaged = _validations(run)
    assert own is not None and averaged is not None and averaged.loss > own.loss, "it lags behind"
    after = everything(run)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    pointers = {id(p) for p in run.model.parameters() if p.dtype is torch.float32}
    for name, (one,) in run.optimizer.held.items():
        if id(one.parameter) in pointers:
            assert one.parameter.data_ptr() == one.tensors["master"].data_ptr(), f"{name} is its own master"


def test_a_new_run_begins_from_the_average_that_was_validated(corpus: list[str], tmp_path: Path) -> None:
    settings = ["steps=2", "ema.decay=0.5", "validation.ema=true", "checkpoint.keep=1"]
    summary = run_to_end(built(configured(corpus, *settings, f"run_dir={tmp_path / 'a'}")), time.perf_counter())
    records = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert summary.val_loss_ema is not None and f'"val_loss_ema": {summary.val_loss_ema}' in records
    assert summary.val_loss_ema != summary.val_loss
    for averaged, loss in (("true", summary.val_loss_ema), ("false", summary.val_loss)):
        run = built(configured(corpus, "steps=1", f"init_from={tmp_path / 'a'}", f"init_from_ema={averaged}"))
        run.step = 1
        own, none = _validations(run)
        assert own is not None and own.loss == loss and none is None


def test_an_average_that_a_checkpoint_has_not_begins_from_its_masters(
    corpus: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = built(configured(corpus, f"run_dir={tmp_path}"))
    for master in masters(run.optimizer).values():
        master.mul_(3.0)
    path = save_checkpoint(run)
    caplog.set_level("INFO")
    resumed = built(configured(corpus, f"resume={path}", "ema.decay=0.9"))
    assert caplog.text.count("holds no average of the weights: it begins from the masters") == 1
    assert resumed.ema is not None
    for name, average in averages(resumed).items():
        assert torch.equal(average, masters(run.optimizer)[name]), name
    run.ema = Ema({str(i): master for i, master in enumerate(run.optimizer.masters())}, 0.9)
    path = save_checkpoint(run)
    assert built(configured(corpus, f"resume={path}")).ema is None, "one too many is left alone"
