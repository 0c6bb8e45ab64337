"""Settings near those of a plan that are predicted to be faster: what `fp8moe plan` ends with.

They are layouts of the search (`plan.layouts`, `plan.fitting`) with the pp, ep and cp of the settings, or with experts
within a node: other schedules, micro-batches, what is computed again, CUDA graphs. A search ranks every layout that
fits with balanced routing; here a layout fits where it does with uneven routing and ROOM besides, and few lines say
which key brings how much: a layout with more changed keys is shown where it is GAIN faster than all with fewer. Fixed
messages, which CUDA graphs between ranks need, make uneven routing an error; a search leaves them as they are set, and
here they come last, named.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fp8moe.plan.cluster import Cluster
from fp8moe.plan.fitting import legal_layouts
from fp8moe.plan.layouts import changed
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.micro_batch import IMBALANCE
from fp8moe.plan.plan_text import GB
from fp8moe.plan.prediction import Prediction, imbalance_of, layout_json, memory_of
from fp8moe.plan.schedule_tables import table
from fp8moe.plan.step_time import StepTime, least_seconds, step_time
from fp8moe.train.config import TrainConfig

GAIN = 0.03  # of the time, that a change must bring
ROOM = 0.02  # of the memory that stays free: as far as activations by formula were from those of training steps
FEW = 4
# Parts of a step that other settings can make smaller.
REMOVABLE = (
    "waits for the host",
    "waits for messages",
    "waits for messages of keys",
    "fewer SMs beside messages",
    "bubble",
)


@dataclass(frozen=True)
class Faster:
    """A layout that is faster: resolved, the settings that make it, its step, bytes of its worst rank with balanced
    routing and where a rank's experts get `imbalance` times the even share."""

    config: TrainConfig
    settings: tuple[str, ...]
    time: StepTime
    bytes: float
    uneven_bytes: float
    imbalance: float


@dataclass(frozen=True)
class _Tried:
    config: TrainConfig
    settings: tuple[str, ...]
    time: StepTime
    uneven_bytes: float


def faster(found: Prediction) -> tuple[Faster, ...]:
    """The changes of a plan's settings that bring most, fewest keys first; none where it does not fit."""
    if not found.fits:
        return ()
    config, cluster = found.config, found.cluster
    shown: list[_Tried] = []
    least = found.time.seconds
    for base in (config, with_fixed_messages(config)):
        if base is None:
            continue
        tried = sorted(
            _tried(config, base, cluster, least),
            key=lambda one: (len(one.settings), one.time.seconds, one.uneven_bytes),
        )
        for one in tried:
            if one.time.seconds * (1 + GAIN) <= least:
                shown.append(one)
                least = one.time.seconds
    return tuple(_faster(one, cluster) for one in shown[-FEW:])


def with_fixed_messages(config: TrainConfig) -> TrainConfig | None:
    """A resolved configuration with messages of a fixed size, which graphs between ranks need; None: not needed."""
    parallel = config.parallel
    if config.ep == 1 or parallel.capacity_factor is not None or parallel.pp * parallel.cp > 1:
        return None
    factor = parallel.max_imbalance or IMBALANCE
    return replace(config, parallel=replace(parallel, capacity_factor=factor, max_imbalance=None, cuda_graphs=True))


def _tried(config: TrainConfig, base: TrainConfig, cluster: Cluster, least: float) -> Iterator[_Tried]:
    """Layouts near `base` that fit with room and may take GAIN less than `least` seconds."""
    near = legal_layouts(base, cluster.gpus, cluster.gpus_per_node, near=True, imbalance=_imbalance(base))
    for alike in near.fitting(memory_of(cluster) * (1 - ROOM)):
        for one in alike:
            if least_seconds(one, cluster) * (1 + GAIN) > least:
                continue
            time = step_time(one, cluster)
            yield _Tried(one, tuple(changed(config, one)), time, near.bytes(one))


def _imbalance(config: TrainConfig) -> float:
    return imbalance_of(config) or IMBALANCE


def _faster(one: _Tried, cluster: Cluster) -> Faster:
    balanced = worst_rank(rank_memory(one.config, gpus_per_node=cluster.gpus_per_node)).total
    return Faster(one.config, one.settings, one.time, balanced, one.uneven_bytes, _imbalance(one.config))


def removable(time: StepTime) -> list[tuple[str, float]]:
    """(name, share of the step) of the parts of REMOVABLE that take GAIN of it or more, the largest first."""
    shares = [(part.name, part.seconds / time.seconds) for part in time.parts if part.name in REMOVABLE]
    return sorted((one for one in shares if one[1] >= GAIN), key=lambda one: -one[1])


def faster_text(now: StepTime, found: tuple[Faster, ...], cluster: Cluster) -> str:
    """A table of the settings to change, and what of the step they can shorten; nothing where none was found."""
    if not found:
        return ""
    rows = []
    for one in found:
        speed, times = one.time.tokens_per_second_per_gpu, now.seconds / one.time.seconds
        sizes = (f"{one.bytes / GB:.1f}", f"{one.uneven_bytes / GB:.1f} at {one.imbalance:g} times")
        rows.append((shlex.join(one.settings), f"{speed:,.0f}", f"{times:.2f}x", *sizes))
    shares = ", ".join(f"{name} {share:.1%}" for name, share in removable(now))
    header = ("change", "tokens/s/GPU", "of now's", f"GB of {cluster.memory_gb:g}", "uneven routing")
    lines = [f"faster by prediction{f' (of the step now: {shares})' if shares else ''}:", table(header, rows)]
    fixed = [one for one in found if any(key.startswith("parallel.capacity_factor=") for key in one.settings)]
    if fixed:
        lines.append(
            f"parallel.capacity_factor={fixed[0].imbalance:g} makes it an error if a message has more than "
            f"{fixed[0].imbalance:g} times an even share of rows; routing is least even at the start of a run"
        )
    return "\n".join(lines)


def faster_json(found: tuple[Faster, ...]) -> list[dict[str, Any]]:
    """Every figure by its name."""
    return [
        {
            "settings": list(one.settings),
            "layout": layout_json(one.config),
            "tokens_per_second_per_gpu": one.time.tokens_per_second_per_gpu,
            "bytes": one.bytes,
            "imbalance": one.imbalance,
            "imbalanced_bytes": one.uneven_bytes,
        }
        for one in found
    ]
