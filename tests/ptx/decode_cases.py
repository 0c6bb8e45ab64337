"""Attention to a cache on the machine: every production tile beside FP64, sequences in one split and in many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from tests.distance import calc_diff
from tests.kernels.caches import Sizes, by_hand, filled
from tests.kernels.sm90_fused_cases import DECODED
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import Case, ops

MOST = 2e-5  # of `calc_diff`: probabilities and the output are rounded to BF16
SCHEDULES = 2


def attend(machine: Machine, of: Sizes, programs: int) -> None:
    cache, launcher = filled(of, torch.bfloat16), ops("triton", "decode_attention")
    with patch.object(launcher, "PROGRAMS", programs), patch.object(launcher, "LEAST_STEPS", 1), on_machine(machine):
        found = launcher.decode_attention(
            cache.q, cache.keys, cache.values, cache.positions, cache.rows, cache.sinks, length=cache.length,
            scale=of.d**-0.5, window=cache.window,
        )  # fmt: skip
    error = calc_diff(found, by_hand(cache, of.d**-0.5))
    assert error < MOST, f"{error} from FP64"


def attend_by(machine: Machine, name: str, seed: int | None) -> None:
    """One sequence of a model's in one split, by one schedule."""
    machine.seed, of = seed, DECODED[name]
    attend(machine, replace(of, b=1, length=100 + of.s), 1)


def case(machine: Machine, name: str) -> None:
    """The sizes of a model, of few sequences; steps come round a ring, some splits have no entry."""
    of = DECODED[name]
    if machine.count:
        attend(machine, replace(of, b=1, length=256), 1)
        return
    for programs in (1, 12):
        attend(machine, replace(of, b=2, length=130 + of.s), programs)
    for seed in range(SCHEDULES):
        attend_by(machine, name, seed)
    machine.seed = None


def cases() -> Iterator[Case]:
    for name in DECODED:
        yield f"triton decode_attention {name}", partial(case, name=name)
