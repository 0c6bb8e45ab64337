"""The launcher's rendezvous: a store of torch that listens on this machine alone.

torch's own rendezvous binds its store to every interface, whatever address it is given, and the store holds pickles of
the workers' first messages. Here the launcher listens on 127.0.0.1 and hands the socket to the store; the workers find
it by MASTER_ADDR and MASTER_PORT and start none.
"""

from __future__ import annotations

import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

NAME = "fp8moe-loopback"
ADDRESS = "127.0.0.1"


def register() -> None:
    """Make the rendezvous known to torch by NAME; again, it does nothing."""
    if NAME not in rendezvous_handler_registry._registry:
        rendezvous_handler_registry.register(NAME, LoopbackRendezvous)


class LoopbackRendezvous(RendezvousHandler):
    """One agent, which keeps the store of its workers."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id, self._round, self._is_closed = parameters.run_id, 0, False
        with socket.create_server((ADDRESS, 0), backlog=4096) as server:
            self._port = server.getsockname()[1]
            self._store = TCPStore(
                ADDRESS, self._port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
            )

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return NAME

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """The store, as the only agent's."""
        self._round += 1
        store = PrefixStore(f"rendezvous {self._round}", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return self._is_closed

    def set_closed(self) -> None:
        self._is_closed = True

    def shutdown(self) -> bool:
        """The store stays until the launcher has ended its workers."""
        self._is_closed = True
        return True
