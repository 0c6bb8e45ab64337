"""GPUs of this machine as nvidia-smi and torch see them: driver, FP8, memory in use, clocks as found, errors.

nvidia-smi is asked once, read only: no clock, mode or limit is ever changed. NVML's Python package was refused: it is
one dependency more for what one call of a tool says that comes with the driver.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

import torch

from fp8moe.doctor.finding import Finding, Level

PART = "gpu"
QUERY = (
    "index", "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm",
    "clocks.applications.graphics", "temperature.gpu", "ecc.errors.uncorrected.volatile.total", "mig.mode.current",
)  # fmt: skip
QUERY_SECONDS = 30.0
USED_MIB = 2048.0  # of a GPU before this process, from which on others use it
CLOCK_SHARE = 0.9  # of the greatest SM clock, below which an application clock limits
HOT = 85.0  # degrees C


def check_gpus(seen: int) -> list[Finding]:
    """Lines on the GPUs. seen: how many torch sees."""
    if shutil.which("nvidia-smi") is None:
        if seen:
            return [Finding(PART, f"{seen} GPUs; nvidia-smi is not in PATH, so clocks and errors are not known")]
        return [Finding(PART, "no GPU: runs go on the CPU, by the reference kernels")]
    try:
        rows = _asked()
    except (OSError, subprocess.SubprocessError) as error:
        fix = "see `nvidia-smi` and `dmesg`: the driver is not loaded, or a GPU has fallen off the bus"
        level = Level.ADVICE if seen else Level.STOP
        return [Finding(PART, f"nvidia-smi fails: {_reason(error)}", level, fix)]
    drivers = ", ".join(sorted({row["driver_version"] for row in rows}))
    names = ", ".join(
        f"{sum(r['name'] == name for r in rows)} x {name}" for name in dict.fromkeys(r["name"] for r in rows)
    )
    lines = [Finding(PART, f"{names}; driver {drivers}")]
    if not seen:
        return [*lines, _unseen(len(rows), drivers)]
    return [*lines, *(finding for row in rows for finding in _check(row))]


def check_fp8(capability: tuple[int, int] | None) -> list[Finding]:
    """Whether the GPU of this process computes in FP8. capability: its compute capability, None without a GPU."""
    if capability is None:
        return []
    text = f"compute capability {capability[0]}.{capability[1]}"
    if capability == (9, 0):
        return [Finding(PART, f"{text}: FP8 tensor cores, all back ends")]
    if capability >= (8, 9):
        fix = "use FP8MOE_BACKEND=triton, the only back end that this GPU runs"
        return [Finding(PART, f"{text}: FP8 tensor cores, but the tuned kernels are for 9.0", Level.ADVICE, fix)]
    fix = "train with precision=bf16 here, or in FP8 on a Hopper GPU (compute capability 9.0)"
    return [Finding(PART, f"{text}: no FP8 tensor cores", Level.STOP, fix)]


def _asked() -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
    values = [[one.strip() for one in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if not values or any(len(row) != len(QUERY) for row in values):
        raise subprocess.SubprocessError(f"it answers {done.stdout[:80]!r}")
    return [dict(zip(QUERY, row, strict=True)) for row in values]


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {QUERY_SECONDS:g} s"
    said = getattr(error, "stdout", None) or getattr(error, "stderr", None) or str(error)
    return " ".join(str(said).split())[:160]


def _unseen(count: int, driver: str) -> Finding:
    text = f"nvidia-smi shows {count} GPUs and torch sees none"
    if torch.version.cuda is None:
        fix = f"install torch's CUDA build: this one, {torch.__version__}, has none (make install on the GPU machine)"
    else:
        fix = (
            f"check CUDA_VISIBLE_DEVICES, and that driver {driver} is new enough for torch's CUDA {torch.version.cuda} "
            "(`python -c 'import torch; torch.cuda.init()'` says why)"
        )
    return Finding(PART, text, Level.STOP, fix)


def _check(row: dict[str, str]) -> Sequence[Finding]:
    """Lines on one GPU: its figures, and what is wrong with it."""
    name = f"gpu {row['index']}"
    used, total = _number(row["memory.used"]), _number(row["memory.total"])
    clock, most, limit = (_number(row[key]) for key in ("clocks.sm", "clocks.max.sm", "clocks.applications.graphics"))
    heat, errors = _number(row["temperature.gpu"]), _number(row["ecc.errors.uncorrected.volatile.total"])
    text = f"{name}: {used or 0:.0f} of {total or 0:.0f} MiB in use, SM clock {clock or 0:.0f} of {most or 0:.0f} MHz"
    lines = [Finding(PART, f"{text}, {heat or 0:.0f} C")]
    if used is not None and used > USED_MIB:
        fix = f"end them, or leave {name} out (`nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv`)"
        lines.append(Finding(PART, f"{name}: other processes hold {used:.0f} MiB", Level.ADVICE, fix))
    if limit is not None and most is not None and limit < CLOCK_SHARE * most:
        fix = f"have the administrator reset {name}'s application clock (`nvidia-smi -i {row['index']} -rac`)"
        lines.append(Finding(PART, f"{name}: its clock is limited to {limit:.0f} of {most:.0f} MHz", Level.ADVICE, fix))
    if heat is not None and heat > HOT:
        fix = f"have {name}'s cooling looked at: it lowers its clock (`nvidia-smi -i {row['index']} -q -d PERFORMANCE`)"
        lines.append(Finding(PART, f"{name}: {heat:.0f} C", Level.ADVICE, fix))
    if errors:
        fix = f"have {name} reset or replaced: such errors end runs (`nvidia-smi -i {row['index']} -q -d ECC`)"
        lines.append(Finding(PART, f"{name}: {errors:.0f} uncorrected memory errors", Level.STOP, fix))
    if row["mig.mode.current"] == "Enabled":
        fix = f"have MIG switched off on {name} for training on many GPUs: NCCL does not join its slices"
        lines.append(Finding(PART, f"{name}: MIG is on", Level.ADVICE, fix))
    return lines


def _number(text: str) -> float | None:
    """The number; None for "[N/A]" and other words."""
    try:
        return float(text)
    except ValueError:
        return None
