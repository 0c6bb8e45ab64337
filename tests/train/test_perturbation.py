"""init_perturbation: each initial weight moves by that share of itself, on any layout, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8moe.layers.linear import QuantizedWeight
from fp8moe.train.run_state import save_checkpoint
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, differing, joined, masters, stored

SIZE = 2e-3
LAYOUT = ["parallel.schedule=1f1b", "parallel.pp=2", "parallel.ep=2", "batch.micro_batch=1"]


def held(settings: list[str]) -> dict[str, Tensor]:
    return stored(built(configured(settings, world_size=4)))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_each_weight_moves_by_its_share_and_nothing_else(corpus: list[str], precision: str) -> None:
    settings = [*corpus, f"precision={precision}", "ema.decay=0.9"]
    plain, other = (
        joined([stored(built(configured([*settings, *more])))]) for more in ([], ["init_perturbation=2e-3"])
    )
    moved = differing(plain, other)
    assert set(moved) == {name for name in plain if name.startswith(("master.", "ema."))}
    for name in moved:
        change = other[name].double() / plain[name].double() - 1
        assert torch.allclose(change.abs(), torch.full_like(change, SIZE), rtol=1e-3), name
        up, count = int((change > 0).sum()), len(change)
        assert abs(up - count / 2) < 4 * count**0.5 / 2 + 1, f"{name}: {up} of {count} went up"
    coins = {name: other[name] / plain[name] > 1 for name in moved if name.startswith("master.")}
    assert len({tuple(coin[:32].tolist()) for coin in coins.values()}) == len(coins), (
        "two parameters have the same coins"
    )
    experts = coins["master.blocks.1.moe.experts.gate_up.weight"].view(4, -1)
    assert len({tuple(row) for row in experts[:, :64].tolist()}) == 4, "two experts have"


def test_weights_and_blocks_are_the_masters_rounded(corpus: list[str]) -> None:
    run = built(configured(corpus, "precision=fp8", "init_perturbation=2e-3"))
    for name, master in masters(run.optimizer).items():
        parameter = run.model.get_parameter(name)
        assert torch.equal(parameter, master.to(parameter.dtype)), name
    quantized = [m for m in run.model.modules() if isinstance(m, QuantizedWeight) and m.recipe.fp8]
    before = [m.blocks.data.view(torch.uint8).clone() for m in quantized]
    run.optimizer.write_parameters()
    assert before and all(
        torch.equal(m.blocks.data.view(torch.uint8), data) for m, data in zip(quantized, before, strict=True)
    )


def test_every_layout_moves_alike_and_a_seed_moves_otherwise(corpus: list[str]) -> None:
    settings = [*corpus, "precision=bf16", "init_perturbation=2e-3"]
    one = joined([stored(built(configured(settings)))])
    four = joined(run_ranks(held, 4, [*settings, *LAYOUT]))
    names = [name for name in one if name.startswith("master.")]
    assert names and differing({n: one[n] for n in names}, {n: four[n] for n in names}) == []
    again = joined([stored(built(configured(settings)))])
    assert differing(one, again) == []
    seeds = [[*corpus, "precision=fp32", "seed=5", *more] for more in ([], ["init_perturbation=2e-3"])]
    plain, other = (joined([stored(built(configured(each)))]) for each in seeds)
    name = "master.norm.weight"  # ones whatever the seed
    assert not torch.equal(other[name] > plain[name], one[name] > 1.0)


def test_weights_from_elsewhere_move_and_a_resumed_run_does_not(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured(corpus, "precision=bf16", f"run_dir={tmp_path}"))
    run.step = 1
    for master in run.optimizer.masters():
        master.add_(1.0)
    path = save_checkpoint(run)
    theirs = joined([stored(run)])
    begun = joined([stored(built(configured(corpus, "precision=bf16", f"init_from={path}", "init_perturbation=0.25")))])
    for name in (name for name in theirs if name.startswith("master.")):
        ratio = begun[name] / theirs[name]
        assert ((ratio - 1).abs() - 0.25).abs().max() < 1e-6, name
    resumed = joined([stored(built(configured(corpus, "precision=bf16", f"resume={path}", "init_perturbation=0.25")))])
    assert differing(resumed, theirs) == []
