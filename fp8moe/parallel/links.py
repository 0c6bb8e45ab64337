"""Messages between neighbouring pipeline ranks: started at once, waited for by the phase that needs them.

A link is an ordered pair of pipeline ranks. On it messages arrive in the order in which they are sent, which the
schedule's checker proves, so they need no tags. Each direction of the pipeline has its own communicator (NCCL makes one
of it for each pair of ranks): on one for both, a receive posted early would hold back the send that its peer waits for.

`send` and `receive` never block. What is sent is kept until it has left; `finish` waits for that at the end of a step.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.parallel import hang
from fp8moe.parallel.mesh import Mesh
from fp8moe.profile.spans import span, waiting


class Arrival:
    """A tensor on its way here; `wait` gives it, once."""

    def __init__(self, buffer: Tensor, work: Any, note: hang.Note, timeout: timedelta, name: str) -> None:
        self._buffer, self._work, self._note, self._timeout, self._name = buffer, work, note, timeout, name

    def wait(self) -> Tensor:
        """On a GPU the current stream waits, not the host."""
        with span(f"wait {self._name}"), waiting(), self._note:
            self._work.wait(self._timeout)
        buffer = self._buffer
        del self._buffer, self._work
        return buffer


class Links:
    """This rank's links; others are named by their pipeline rank. A message that takes longer than `timeout` hangs."""

    def __init__(self, mesh: Mesh, timeout: timedelta) -> None:
        self._mesh, self.timeout = mesh, timeout
        self._leaving: list[tuple[Tensor, Any, hang.Note]] = []

    def send(self, tensor: Tensor, target: int, name: str) -> None:
        """Start sending `tensor` to rank `target` of the pipeline; `name` says what it is, for errors."""
        self._leaving = [left for left in self._leaving if not left[1].is_completed()]
        tensor, group = tensor.contiguous(), self._group(self._mesh.pp_rank, target)
        note = hang.message(group, self._mesh.rank, self._global(target), name)
        with note:
            work = dist.isend(tensor, self._global(target), group=group)
        self._leaving.append((tensor, work, note))

    def receive(self, buffer: Tensor, source: int, name: str) -> Arrival:
        """Start receiving what rank `source` of the pipeline sends next into `buffer`."""
        group = self._group(source, self._mesh.pp_rank)
        note = hang.message(group, self._global(source), self._mesh.rank, name)
        with note:
            work = dist.irecv(buffer, self._global(source), group=group)
        return Arrival(buffer, work, note, self.timeout, name)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for _, work, note in self._leaving:
            with span("wait until all has left"), waiting(), note:
                work.wait(self.timeout)
        self._leaving = []

    def warm_up(self, device: torch.device) -> None:
        """One message each way over each link: NCCL opens a connection with the first, which both ends wait for.

        Even ranks meet the rank behind them first, odd ranks the one before: nobody waits in a circle.
        """
        me = self._mesh.pp_rank
        for low in (me - 1, me) if me % 2 else (me, me - 1):
            if not (low >= 0 and low + 1 < self._mesh.pp):
                continue
            for source, target in ((low, low + 1), (low + 1, low)):
                if source == me:
                    self.send(torch.zeros(1, device=device), target, "warm-up")
                    self.finish()
                else:
                    self.receive(torch.zeros(1, device=device), source, "warm-up").wait()

    def _group(self, source: int, target: int) -> ProcessGroup:
        group = self._mesh.up_group if source < target else self._mesh.down_group
        assert group is not None, "a pipeline of one rank has no links"
        return group

    def _global(self, pp_rank: int) -> int:
        return pp_rank * self._mesh.dp + self._mesh.dp_rank
