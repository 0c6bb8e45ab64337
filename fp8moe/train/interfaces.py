"""Network interfaces of this machine: the one that leads to rank 0, and sentences on one that is named wrongly.

gloo connects the ranks through the interface that GLOO_SOCKET_IFNAME names, else by the address of the host's name;
NCCL begins through NCCL_SOCKET_IFNAME's, else one of its own choice. A name that no interface has is an error of gloo's
C++ code, and an interface that other nodes do not reach one of a connection to some address: both say nothing of the
variable. Addresses are read by ioctl, so only IPv4 ones are known; where nothing is found nothing is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping

from fp8moe.parallel.place import this_place

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_CONNECTING = re.compile(r"connectfullmesh failed|unable to find address|connect timeout|so_error", re.IGNORECASE)
_REASON = re.compile(r"SO_ERROR: [A-Za-z ]+, remote=\[[^\]]*\]|Unable to find address for: \S+")


def addresses() -> dict[str, str]:
    """IPv4 address of each interface of this machine that has one."""
    if sys.platform != "linux":
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(query, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_to(address: str, port: int) -> str | None:
    """The interface whose address this machine's messages to `address` carry; None where that is unknown."""
    with contextlib.suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.connect((address, port))  # a datagram socket: nothing is sent
        mine = trial.getsockname()[0]
        return next((name for name, one in addresses().items() if one == mine), None)
    return None


def wrong_interface(address: str, port: int, *, nccl: bool, environ: Mapping[str, str] = os.environ) -> str | None:
    """A sentence on a variable that names no interface of this machine; None where both are right or not set.

    nccl: whether NCCL is used. Its names are beginnings ("=eth0": the whole name; "^docker": all but those).
    """
    there = addresses()
    for variable in (GLOO, *([NCCL] if nccl else [])):
        value = environ.get(variable, "").strip()
        if not value or not there or value.startswith("^"):
            continue
        whole = variable == GLOO or value.startswith("=")
        names = [one.strip() for one in value.removeprefix("=").split(",")]
        if not any(name == one or (not whole and one.startswith(name)) for name in names for one in there):
            listed = ", ".join(there)
            return (
                f"{variable}={value} names no network interface of {this_place(None).host} that has an address (these "
                f"do: {listed}): {_advice(variable, interface_to(address, port), address)}"
            )
    return None


def unreached(error: Exception, address: str, port: int, environ: Mapping[str, str] = os.environ) -> str | None:
    """A sentence on ranks that can't connect, naming the interface that was used; None for any other error."""
    text = " ".join(str(error).split())
    if not _CONNECTING.search(text):
        return None
    used, right = environ.get(GLOO, "").strip(), interface_to(address, port)
    by = f"through {GLOO}={used}" if used else f"by the address of this host's name ({GLOO} is not set)"
    reason = found[0] if (found := _REASON.search(text)) else text[:120]
    advice = _advice(GLOO, None if right == used else right, address)
    return f"the ranks can't connect {by} on {this_place(None).host} ({reason}): {advice}"


def _advice(variable: str, interface: str | None, address: str) -> str:
    if interface is None:
        return f"set {variable} to the interface that leads to the other nodes, and let every port between them pass"
    return f"set {variable}={interface}, which leads to MASTER_ADDR={address}, or unset it under launch/torchrun.sh"
