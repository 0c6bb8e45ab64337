"""The network interface that leads to rank 0, and sentences on a wrong one; two namespaces where this is root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fp8moe.train import interfaces, rendezvous
from fp8moe.train.interfaces import GLOO, NCCL, addresses, interface_to, unreached, wrong_interface
from fp8moe.train.rendezvous import Place, RendezvousError, connecting

ROOT = Path(__file__).resolve().parent.parent.parent
THERE = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
HERE = Place(1, 2, "127.0.0.1", 29500)


def test_the_interface_of_a_route() -> None:
    assert addresses()["lo"] == "127.0.0.1" and interface_to("127.0.0.1", 1) == "lo"
    assert interface_to("nohost.invalid", 1) is None


@pytest.mark.parametrize(
    ("environ", "nccl", "says"),
    [
        ({}, True, None),
        ({GLOO: "eth0"}, False, None),
        ({GLOO: "eth7, ib0"}, False, None),
        ({GLOO: "eth"}, False, f"{GLOO}=eth names no network interface of"),
        ({GLOO: "eth7"}, False, "(these do: lo, eth0, ib0): set GLOO_SOCKET_IFNAME=ib0, which leads to MASTER_ADDR=m"),
        ({NCCL: "eth7"}, False, None),
        ({NCCL: "eth7"}, True, f"{NCCL}=eth7 names no"),
        ({NCCL: "eth"}, True, None),
        ({NCCL: "=eth"}, True, f"{NCCL}==eth names no"),
        ({NCCL: "^docker,lo"}, True, None),
    ],
)
def test_a_name_that_no_interface_has(
    environ: dict[str, str], nccl: bool, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interfaces, "addresses", lambda: THERE)
    monkeypatch.setattr(interfaces, "interface_to", lambda address, port: "ib0")
    said = wrong_interface("m", 1, nccl=nccl, environ=environ)
    assert said is None if says is None else said is not None and says in said
    monkeypatch.setattr(interfaces, "addresses", dict)  # nothing is known: nothing is refused
    assert wrong_interface("m", 1, nccl=nccl, environ=environ) is None


def test_a_failed_connection_names_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "interface_to", lambda address, port: "eth0")
    refused = RuntimeError("Gloo connectFullMesh failed with [x.cc:1] timed out: SO_ERROR: Connection refused, "
                           "remote=[127.0.0.1]:33668$0")  # fmt: skip
    through_lo = unreached(refused, "m", 1, {GLOO: "lo"})
    assert through_lo is not None and "through GLOO_SOCKET_IFNAME=lo on " in through_lo
    assert "(SO_ERROR: Connection refused, remote=[127.0.0.1]): set GLOO_SOCKET_IFNAME=eth0, which" in through_lo
    assert "by the address of this host's name" in str(unreached(refused, "m", 1, {}))
    assert "let every port between them pass" in str(unreached(refused, "m", 1, {GLOO: "eth0"}))
    assert unreached(RuntimeError("something else"), "m", 1, {}) is None


def test_real_gloo_with_a_name_that_no_interface_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO, "nope0")
    no_interface = pytest.raises(RendezvousError, match="GLOO_SOCKET_IFNAME=nope0 names no network interface")
    with no_interface, connecting(HERE, nccl=False):
        raise AssertionError("gloo is not asked")
    monkeypatch.setattr(rendezvous, "wrong_interface", lambda *place, nccl: None)
    refused = pytest.raises(RendezvousError, match=r"GLOO_SOCKET_IFNAME=nope0 on .*Unable to find address for: nope0")
    with refused, connecting(HERE, nccl=False):
        store, limit = dist.HashStore(), timedelta(seconds=5)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
        dist.new_group([0])


@pytest.fixture
def other_server() -> Iterator[int]:
    """The port of a server that answers anything in its own words."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = server.accept()[0]
                with connection:
                    if connection.recv(100):
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_another_kind_of_server_is_one_sentence_without_torchs_lines(
    other_server: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(other_server))
    with pytest.raises(RendezvousError, match="what listens there is no rank 0"):
        rendezvous.meet(timedelta(seconds=2))
    assert capfd.readouterr().err == ""
    with rendezvous._without_torchs_lines():
        os.write(2, b"of C++\n")
        print("of Python", file=sys.stderr)
        assert "of Python" in capfd.readouterr().err  # at once
    assert capfd.readouterr().err == "of C++\n"


FAKES = {
    "ip": """
case "$*" in
  "-o route get 10.0.0.1") echo "10.0.0.1 via 10.0.0.9 dev ${ROUTE:-eth9} src 10.0.0.2 uid 0 \\    cache" ;;
  "-o addr show to 10.0.0.1") echo "3: bond0    inet 10.0.0.1/24 brd 10.0.0.255 scope global bond0" ;;
  *) exit 2 ;;
esac
""",
    "getent": '[ "$2" = n0 ] && echo "10.0.0.1 STREAM n0"',
    "python": 'echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME ${@: -2}"',
}


def test_the_launcher_takes_the_interface_that_leads_to_node_0(tmp_path: Path) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}

    def chosen(**environ: str) -> str:
        command = [str(ROOT / "launch" / "torchrun.sh")]
        done = subprocess.run(command, env=path | environ, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        *interfaces, package, command_name = done.stdout.split()
        assert (package, command_name) == ("fp8moe", environ.get("COMMAND", "train"))
        return " ".join(interfaces)

    many = {"NNODES": "2", "MASTER_ADDR": "n0"}
    assert chosen(**many) == chosen(**many, COMMAND="doctor") == "eth9 =eth9"
    assert chosen(**many, ROUTE="lo") == "bond0 =bond0"  # node 0 itself
    assert chosen(**many, GLOO_SOCKET_IFNAME="mine") == "mine =eth9"
    assert chosen(**many, NCCL_SOCKET_IFNAME="mine") == "eth9 mine"
    assert chosen(NNODES="2", MASTER_ADDR="unknown") == chosen(NNODES="1") == ""


def namespaces() -> bool:
    made = shutil.which("ip") and os.getuid() == 0
    return bool(made) and subprocess.run(["ip", "netns", "add", "fp8moe-try"], capture_output=True).returncode == 0 \
        and subprocess.run(["ip", "netns", "del", "fp8moe-try"], capture_output=True).returncode == 0  # fmt: skip


@pytest.fixture
def two_nodes() -> Iterator[list[list[str]]]:
    """Two network namespaces, joined by one link, 10.83.9.1 and .2: how to run a command in each."""
    if not namespaces():
        pytest.skip("needs root and `ip netns`")
    names = [f"fp8moe-{os.getpid()}-{one}" for one in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "linka", "netns", names[0], "type", "veth", "peer", "name", "linkb", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.83.9.{i + 1}/30", "dev", f"link{'ab'[i]}")
            ip("-n", name, "link", "set", f"link{'ab'[i]}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


MEETING = """
import datetime, torch, torch.distributed as dist
from fp8moe.train.rendezvous import connecting, meet
limit = datetime.timedelta(seconds=20)
store, here = meet(limit)
try:
    with connecting(here, nccl=False):
        dist.init_process_group("gloo", store=store, rank=here.rank, world_size=2, timeout=limit)
    one = torch.ones(1)
    dist.all_reduce(one)
    print("sum", int(one))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_two_nodes_by_the_launchers_interface_and_by_a_wrong_one(two_nodes: list[list[str]], tmp_path: Path) -> None:
    python = tmp_path / "python"  # in place of torchrun: one rank with what the launcher set
    python.write_text(f"#!/usr/bin/env bash\nset -- $*\nexec {sys.executable} {tmp_path / 'meeting.py'}\n")
    python.chmod(0o755)
    (tmp_path / "meeting.py").write_text(textwrap.dedent(MEETING))

    def meet_on_both(**more: str) -> list[str]:
        with socket.socket() as trial:
            trial.bind(("", 0))
            port = str(trial.getsockname()[1])
        started: list[Any] = []
        for rank, node in enumerate(two_nodes):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "NNODES": "2", "MASTER_ADDR": "10.83.9.1"}
            environ = {**os.environ, **place, "MASTER_PORT": port, "PYTHON": str(python), "PYTHONPATH": str(ROOT)}
            for name in (GLOO, NCCL):
                environ.pop(name, None)
            words = [*node, str(ROOT / "launch" / "torchrun.sh")]
            started.append(subprocess.Popen(words, env=environ | more, stdout=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and all(process.poll() is None for process in started):
            time.sleep(0.1)
        time.sleep(2.0)  # a rank that failed leaves the other one waiting
        for process in started:
            process.kill()
        return [process.communicate()[0].strip() for process in started]

    assert meet_on_both() == ["sum 2", "sum 2"]
    through_lo = meet_on_both(GLOO_SOCKET_IFNAME="lo")
    assert any("can't connect through GLOO_SOCKET_IFNAME=lo" in one for one in through_lo), through_lo
    assert any("set GLOO_SOCKET_IFNAME=link" in one for one in through_lo)
