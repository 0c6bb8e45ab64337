"""What the device keeps apart as a GPU does, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
from pathlib import Path
from tests.fake_cuda import guard
guard.load(Path(sys.argv[1]))
import torch
from tests.host_gpu import hopper
from tests.host_gpu.graphs import HostGpuGraph
hopper.install()
"""


def run(library: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + program, str(library)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def semantics(library: Path) -> str:
    done = run(
        library,
        """
x = torch.empty(3, 4, device="cuda")
print("new memory is NaN", bool(x.cpu().isnan().all()))
x = torch.arange(12.0, device="cuda").view(3, 4)
x[1:].add_(100)
print("views share memory", x.sum().item() == 66 + 800)
weight = torch.nn.Parameter(torch.ones(4, 4, device="cuda"))
(x @ weight).square().sum().backward()
expected = torch.ones(4, 4, requires_grad=True)
(x.cpu() @ expected).square().sum().backward()
print("autograd is the host's", torch.equal(weight.grad.cpu(), expected.grad), weight.grad.device)
for name, call in (("add", lambda: x + torch.ones(4)), ("cat", lambda: torch.cat([x, torch.ones(1, 4)]))):
    try:
        call()
    except RuntimeError as error:
        print(name, "refuses a tensor of the host", "same device" in str(error))
print("scalars of the host may come", (x * torch.tensor(2.0)).device)
resized = torch.empty(0, device="cuda")
torch.add(x, 1, out=resized)
print("results are resized", resized.shape == x.shape, resized.device)
event, host = torch.cuda.Event(), torch.zeros(3, 4)
host.copy_(x, non_blocking=True)
before = bool(host.isnan().all())
event.record()
x.zero_()
event.synchronize()
print("a copy has arrived when it was waited for", before, host.sum().item() == 866)
with torch.cuda.stream(torch.cuda.Stream()):
    print("streams are told apart", torch.cuda.current_stream().stream_id != 0)
total = torch.zeros((), device="cuda")
graph = HostGpuGraph(None, None)
with graph.capturing():
    total += x.sum()
for value in (1.0, 2.0):
    x.fill_(value)
    graph.replay()
print("a graph does again what was captured", total.item() == 12 + 24)
def refused(call):
    try:
        with HostGpuGraph(None, None).capturing():
            call()
    except (RuntimeError, AssertionError) as error:
        return "while a graph is captured" in str(error)
    return False
calls = (
    lambda: torch.tensor([1.0], device="cuda"), lambda: torch.zeros(2).to("cuda", non_blocking=True), lambda: x.cpu(),
    lambda: x[x > 0], lambda: x.sum().item(), lambda: event.synchronize(), lambda: event.query(),
)
print("a capture has no part of the host", [refused(call) for call in calls] == [True] * len(calls))
print("and has ended", not refused(lambda: None) and x.cpu().shape == (3, 4))
kept = torch.cuda.memory_allocated()
y = torch.empty(1000, device="cuda")
print("memory is counted", torch.cuda.memory_allocated() - kept == 4000)
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "new memory is NaN True",
        "views share memory True",
        "autograd is the host's True cuda:0",
        "add refuses a tensor of the host True",
        "cat refuses a tensor of the host True",
        "scalars of the host may come cuda:0",
        "results are resized True cuda:0",
        "a copy has arrived when it was waited for True True",
        "streams are told apart True",
        "memory is counted True",
        "a graph does again what was captured True",
        "a capture has no part of the host True",
        "and has ended True",
    ],
)
def test_it_is_a_device(semantics: str, line: str) -> None:
    assert line in semantics.splitlines()


def test_ops_of_the_project_refuse_tensors_of_two_devices(library: Path) -> None:
    program = """
from fp8moe.kernels.silu_mul import silu_mul
h = torch.randn(4, 32).bfloat16()
assert torch.equal(silu_mul(h.cuda()).cpu(), silu_mul(h))
from fp8moe.kernels.gemm import wgrad
wgrad(torch.ones(4, 16, device="cuda"), torch.ones(4, 16), torch.zeros(16, 16, device="cuda"))
"""
    done = run(library, program)
    assert done.returncode != 0 and "wgrad was given tensors on ['cpu', 'cuda:0']" in done.stderr, done.stderr[-2000:]
