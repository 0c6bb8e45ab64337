"""Messages between neighbouring pipeline ranks: started at once, waited for by the phase that needs them.

A link is an ordered pair of pipeline ranks and has a communicator of its own. On it messages arrive in the order in
which they are sent, which the schedule's checker proves, so they need no tags. One communicator for both directions
was refused: NCCL runs what a rank does on a communicator one after another, and a receive posted early would hold back
the send that its peer waits for.

`send` and `receive` never block. What is sent is kept until it has left; `finish` waits for that at the end of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.parallel import watch
from fp8moe.parallel.collectives import waiting
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.trace import span


@dataclass(frozen=True)
class Link:
    """One direction between two pipeline ranks, for this process: its communicator and the rank at the other end."""

    group: ProcessGroup
    peer: int


class Arrival:
    """A tensor on its way here; `wait` gives it, once."""

    def __init__(self, buffer: Tensor, work: Any, note: watch.Note, timeout: timedelta) -> None:
        self._buffer, self._work, self._note, self._timeout = buffer, work, note, timeout

    def wait(self) -> Tensor:
        """On a GPU the current stream waits, not the host."""
        with span("wait"), waiting(), self._note:
            self._work.wait(self._timeout)
        buffer = self._buffer
        del self._buffer, self._work
        return buffer


class Links:
    """This rank's ends of the pipeline's links: `outgoing` and `incoming` by the pipeline rank at the other end.

    A message that takes longer than `timeout` is a hang.
    """

    def __init__(self, outgoing: Mapping[int, Link], incoming: Mapping[int, Link], timeout: timedelta) -> None:
        self._outgoing, self._incoming, self.timeout = outgoing, incoming, timeout
        self._leaving: list[tuple[Tensor, Any, watch.Note]] = []

    def send(self, tensor: Tensor, to: int, name: str) -> None:
        """Start sending `tensor` to pipeline rank `to`; `name` says what it is, for errors."""
        self._leaving = [left for left in self._leaving if not left[1].is_completed()]
        link, tensor = self._outgoing[to], tensor.contiguous()
        note = watch.collective(link.group, f"send ({name})")
        with note:
            work = dist.isend(tensor, link.peer, group=link.group)
        self._leaving.append((tensor, work, note))

    def receive(self, buffer: Tensor, source: int, name: str) -> Arrival:
        """Start receiving what pipeline rank `source` sends next into `buffer`."""
        link = self._incoming[source]
        note = watch.collective(link.group, f"receive ({name})")
        with note:
            work = dist.irecv(buffer, link.peer, group=link.group)
        return Arrival(buffer, work, note, self.timeout)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for _, work, note in self._leaving:
            with span("wait"), waiting(), note:
                work.wait(self.timeout)
        self._leaving = []


def make_links(mesh: Mesh, timeout: timedelta) -> Links:
    """This rank's ends of the links of `mesh`."""
    me = mesh.pp_rank
    by_peer = {
        (source, target): Link(group, mesh.rank + ((source + target - me) - me) * mesh.dp)
        for (source, target), group in mesh.links.items()
    }
    outgoing = {target: link for (source, target), link in by_peer.items() if source == me}
    incoming = {source: link for (source, target), link in by_peer.items() if target == me}
    return Links(outgoing, incoming, timeout)
