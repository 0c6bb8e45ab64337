"""Messages between neighbouring pipeline ranks: started at once, waited for by the phase that needs them.

A link is an ordered pair of pipeline ranks. Its messages are received in the order in which they are sent, which the
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


class PendingReceive:
    """A tensor that is being received; `wait` gives it, once."""

    def __init__(
        self, buffer: Tensor, work: Any, pending: hang.PendingCollective, timeout: timedelta, name: str
    ) -> None:
        self._buffer, self._work, self._pending, self._timeout, self._name = buffer, work, pending, timeout, name

    def wait(self) -> Tensor:
        """On a GPU the current stream waits, not the host."""
        with span(f"wait {self._name}"), waiting(), self._pending:
            self._work.wait(self._timeout)
        buffer = self._buffer
        del self._buffer, self._work
        return buffer


class Links:
    """This rank's links to other pipeline ranks. A message that takes longer than `timeout` is an error."""

    def __init__(self, mesh: Mesh, timeout: timedelta) -> None:
        self._mesh, self.timeout = mesh, timeout
        self._sends: list[tuple[Tensor, Any, hang.PendingCollective]] = []

    def send(self, tensor: Tensor, target: int, name: str) -> None:
        """Start sending `tensor`, of any strides, to pipeline rank `target`; `name` says what it is, for errors."""
        self._sends = [send for send in self._sends if not send[1].is_completed()]
        tensor, group = tensor.contiguous(), self._group(self._mesh.pp_rank, target)
        pending = hang.message(group, self._mesh.rank, self._global(target), name)
        with pending:
            work = dist.isend(tensor, self._global(target), group=group)
        self._sends.append((tensor, work, pending))

    def receive(self, buffer: Tensor, source: int, name: str) -> PendingReceive:
        """Start receiving what pipeline rank `source` sends next into `buffer`."""
        group = self._group(source, self._mesh.pp_rank)
        pending = hang.message(group, self._global(source), self._mesh.rank, name)
        with pending:
            work = dist.irecv(buffer, self._global(source), group=group)
        return PendingReceive(buffer, work, pending, self.timeout, name)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for _, work, pending in self._sends:
            with span("wait until all has left"), waiting(), pending:
                work.wait(self.timeout)
        self._sends = []

    def warm_up(self, device: torch.device) -> None:
        """Send one message over each link: NCCL opens a connection with the first, which both ends wait for.

        Even ranks begin with the next rank, odd ranks with the one before, so that no ranks wait in a circle.
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
