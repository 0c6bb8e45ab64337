"""Routings, and a look-out for waits, that the tests of the permutation share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PARTS = ("source_R", "slot_R", "group_offsets", "tokens_per_expert", "row_of_slot")
# On a GPU these wait for the device: a number read by the host, or a result whose size is data.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")


def random_ids(n: int, topk: int, num_experts: int, absent: float) -> Tensor:
    """Distinct experts a row, the second expert never chosen where others suffice, some copies not here."""
    scores = torch.rand(n, num_experts)
    scores[:, 1:2] = -1
    ids = scores.topk(topk, dim=1).indices
    return ids.masked_fill(torch.rand(n, topk) < absent, -1)


class _Waits(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        if masked or moved or name.startswith(_WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def record_waits() -> Iterator[list[str]]:
    """The ops inside that would make a host wait for its GPU, by name."""
    found: list[str] = []
    with _Waits(found):
        yield found
