"""Runs each planted fault: the machine must report a fault, or the result must be wrong.

The edited kernel is compiled once and runs on the small problem of its case, by the schedule that is not random and
then by a few that are, until one shows the fault. Before that the unedited kernel has run right on the same operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton

from fp8moe.kernels.backend import release_of
from fp8moe.kernels.tiles import CONSUMERS, UNQUANTIZED
from tests.kernels.sm90_cases import PAIRS_SINCE, legal_tiles, tile_name
from tests.ptx import token_cases
from tests.ptx.decode_cases import attend_by
from tests.ptx.decode_plants import DECODE_PLANTS
from tests.ptx.launching import Machine
from tests.ptx.moving_cases import both, values
from tests.ptx.order_plants import ORDER_PLANTS
from tests.ptx.pair_plants import PAIR_PLANTS
from tests.ptx.parser import Unsupported
from tests.ptx.plants import PLANTS, Plant
from tests.ptx.product_cases import compare, wgrad
from tests.ptx.registers import Fault
from tests.ptx.token_plants import TOKEN_PLANTS
from tests.ptx.update_cases import weight_with_blocks

SCHEDULES = (None, 0, 1, 2, 3)
PLANTED = (
    *PLANTS,
    *ORDER_PLANTS,
    *TOKEN_PLANTS,
    *DECODE_PLANTS,
    *(PAIR_PLANTS if release_of(triton.__version__) >= PAIRS_SINCE else ()),
)


def problem(case: str, seed: int | None) -> Callable[[Machine], None]:
    """The small problem of a case, by one schedule: raises where the machine or the result is wrong."""
    backend, op, kind, *rest = case.split()
    if op.startswith("quantize"):
        return partial(_cast, name=op, seed=seed)
    if op == "adamw_step_quantize":
        return partial(weight_with_blocks, moments=torch.bfloat16, shape=(144, 208), seeds=(seed,))
    if op == "decode_attention":
        return partial(attend_by, name=case.split(maxsplit=2)[2], seed=seed)
    pair, order = "multicast" in rest, next((one for one in rest if one in CONSUMERS), "free")
    at = [tile for tile in legal_tiles(backend, op, kind) if tile_name(tile).split()[0] in rest or not rest]
    of_pair = [tile for tile in at if tile.multicast == pair]
    ordered = [tile for tile in of_pair if tile.consumers == order]
    tile = ordered[0] if ordered else replace(of_pair[0], consumers=order)  # such as free ones, where turns are faster
    if backend == "gluon" and op in UNQUANTIZED:
        return partial(token_cases.compare, op=op, kind=kind, tile=tile, size="small", seeds=(seed,))
    if op == "wgrad":
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        return partial(wgrad, dtype=dtype, tile=tile, sizes=((200, 144, 128, seed),))
    size = "ragged" if backend != "gluon" else "pair" if pair else "small"
    return partial(compare, backend=backend, op=op, kind=kind, tile=tile, size=size, seeds=(seed,))


def _cast(machine: Machine, name: str, seed: int | None) -> None:
    machine.seed = seed
    both(machine, "quantize", name, values(144, 208, torch.bfloat16), power_of_two=True)


def run_plant(plant: Plant, machine: Machine) -> str:
    """What the machine found, or an empty text."""
    for seed in SCHEDULES:
        torch.manual_seed(1)
        machine.edit = plant.edit
        try:
            problem(plant.case, seed)(machine)
        except (Fault, AssertionError) as found:
            return f"schedule {seed}: {type(found).__name__}: {found}"
        except (Unsupported, LookupError) as broken:
            raise LookupError(f"{plant.name}: {broken}") from broken
        finally:
            machine.edit = None
    return ""


def unclean(machine: Machine, case: str) -> str:
    """What is wrong of a case's kernel without a plant: nothing may be, but where a compiler is."""
    torch.manual_seed(1)
    try:
        problem(case, None)(machine)
    except (Fault, AssertionError) as wrong:
        return str(wrong)
    return ""
