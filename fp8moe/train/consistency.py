"""Consistency check: ranks that hold the same numbers hold the same bits, and a forward done twice gives the same bits.

Compared are what forwards and backwards read, parameters, FP8 blocks in both orientations with their scales, and router
biases; without ZeRO-1 also what the optimizer keeps, of which every replica then has all. Under ZeRO-1 a master exists
once, and what is gathered from it is compared. A difference is a fault of memory, a device or a message, which no
number that training looks at shows: the ranks that differ from the majority are named, of two both, and the run ends.

A tensor is reduced to 64 bits: on a CPU XXH3, on a GPU the sum of its words as integers, modulo 2^64, so that no weight
travels to the host. Any one flipped bit changes either; two may cancel in the sum.

Then each rank does one forward of the same validation samples twice and compares the losses bit by bit. It names the
ranks that take the loss; the device at fault may be another of their pipeline or of their experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.data.sampler import rank_slice
from fp8moe.errors import ReplicaError
from fp8moe.layers.linear import QuantizedWeight, is_expert
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.place import listed_ranks
from fp8moe.train.batch import microbatches_of, share_of
from fp8moe.train.optimizer import Optimizer
from fp8moe.train.run import Run
from fp8moe.train.step import forward_passes

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Difference:
    """A tensor whose bits differ among its replicas: the ranks at fault, or all where there is no majority."""

    name: str
    ranks: tuple[int, ...]
    others: int

    def __str__(self) -> str:
        listed = listed_ranks(self.ranks)
        if not self.others:
            return f"{self.name} differs between the ranks {listed}, which should hold the same bits"
        whose = f"rank {listed}" if len(self.ranks) == 1 else f"the ranks {listed}"
        return f"{self.name} of {whose} differs from that of {self.others} other replicas"


def check_consistency(run: Run) -> None:
    """Raise ReplicaError, on every rank, where bits differ that should be equal. Collective over all ranks."""
    mesh = run.mesh
    if run.zero is not None:
        run.zero.wait_weights()
    dense, expert = replicated(run)
    mine = [*compare(dense, mesh.dense_group, mesh.rank), *compare(expert, mesh.expert_group, mesh.rank)]
    found = dict.fromkeys(str(one) for ranks in gather(mine, mesh.world_group) for one in ranks)
    if not found:
        repeats = gather(_repeats(run), mesh.world_group)
        ranks = listed_ranks([rank for rank, same in enumerate(repeats) if not same])
        found = dict.fromkeys([f"one forward done twice gave two losses on rank {ranks}"] if ranks else [])
    if found:
        before = run.step - run.config.guard.consistency_every
        more = f" (and {len(found) - 1} more such tensors)" if len(found) > 1 else ""
        instead = "start anew"
        if before > 0:
            instead = f"resume from a checkpoint of step {before}, where nothing differed, or before"
        raise ReplicaError(f"{next(iter(found))}{more} after step {run.step}: replace the device and {instead}")


def replicated(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of this rank, by name, that every rank of its dense group, and of its expert group, holds the same."""
    dense: dict[str, Tensor] = {f"bias.{name}": router.bias_E for name, router in run.routers().items()}
    expert: dict[str, Tensor] = {}
    for name, parameter in run.model.named_parameters():
        of_kind = expert if is_expert(parameter) else dense
        of_kind[name] = parameter.detach()
        if run.zero is None and isinstance(run.optimizer, Optimizer):
            for one in run.optimizer.held[name]:
                of_kind |= {f"{kind}.{name}": tensor for kind, tensor in one.tensors.items()}
    for name, module in run.model.named_modules():
        if isinstance(module, QuantizedWeight) and module.recipe.fp8:
            of_kind = expert if is_expert(module.weight) else dense
            for what, blocks in (("FP8 blocks", module.blocks), ("transposed FP8 blocks", module.transposed_blocks)):
                of_kind[f"{what} of {name}.weight"] = blocks.data
                of_kind[f"scales of the {what} of {name}.weight"] = blocks.scale
    return dense, expert


def compare(tensors: Mapping[str, Tensor], group: ProcessGroup | None, rank: int) -> list[Difference]:
    """What differs over `group`, the same on all of its ranks; `rank` is this one's number in the world. Collective."""
    if group is None:
        return []
    of_ranks = gather((rank, fingerprints(tensors)), group)
    found = []
    for name in tensors:
        values = {number: of_rank[name] for number, of_rank in of_ranks}
        common, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            continue
        is_majority = 2 * count > len(values)
        at_fault = tuple(number for number, value in values.items() if not is_majority or value != common)
        found.append(Difference(name, at_fault, count if is_majority else 0))
    return found


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """64 bits of each tensor, of any dtype and strides. Waits for a GPU once."""
    found = {
        name: xxhash.xxh3_64_intdigest(_bytes(one).numpy().data) for name, one in tensors.items() if not one.is_cuda
    }
    on_gpu = [name for name, one in tensors.items() if one.is_cuda]
    if on_gpu:
        sums = torch.stack([word_sum(tensors[name]) for name in on_gpu]).tolist()
        found |= dict(zip(on_gpu, sums, strict=True))
    return found


def word_sum(tensor: Tensor) -> Tensor:
    """INT64 [] on the tensor's device: the sum of its elements' bits as integers, modulo 2^64."""
    return tensor.contiguous().view(-1).view(WORDS[tensor.element_size()]).sum(dtype=torch.int64)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _repeats(run: Run) -> bool:
    """Whether a forward done twice gives the same losses; in a mirrored pipeline one in each direction. Collective."""
    mesh, size = run.mesh, run.config.micro_batch
    directions = 2 if mesh.mirrored else 1
    ids = rank_slice(list(range(mesh.data_ranks * directions * size)), mesh.data_rank, mesh.data_ranks)
    whole = [run.data.validation.batch(part) for part in microbatches_of(ids, size)]
    batches = [share_of(batch, mesh.cp_rank, mesh.cp) for batch in whole]
    one, other = (forward_passes(run, batches).view(torch.int64) for _ in range(2))
    run.dispatcher.verify()
    return torch.equal(one, other)
