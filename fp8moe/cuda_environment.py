"""What CUDA's driver and PyTorch's allocator read of the environment, once, at their first call.

Streams share CUDA_DEVICE_MAX_CONNECTIONS queues on their way to the device, 8 unless it says another number up to 32
(CUDA programming guide, environment variables), and a queue holds up what stands behind a kernel that can't start yet.
A rank has about a dozen streams: compute, messages to experts, gradients, copies, and one of NCCL's a communicator. Two
in one queue lose their overlap. Other trainers ask for 1, which orders messages ahead of compute by giving that up:
whoever comes from there has it in a script.

Groups of rows change their size every step. Segments of the allocator that grow keep them from fragmenting memory.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

QUEUES, MOST_QUEUES, DEFAULT_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", 32, 8
ALLOCATOR, ALLOCATOR_BEFORE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # the older name still works


def prepare(environ: MutableMapping[str, str]) -> None:
    """Set what the user has not set; before torch is imported."""
    environ.setdefault(QUEUES, str(MOST_QUEUES))
    if ALLOCATOR_BEFORE not in environ:
        environ.setdefault(ALLOCATOR, "expandable_segments:True")


def few_queues(environ: Mapping[str, str]) -> str | None:
    """What is wrong with the user's number of queues; None where it leaves messages room beside compute."""
    given = environ.get(QUEUES, str(MOST_QUEUES))
    if given.isdigit() and int(given) >= DEFAULT_QUEUES:
        return None
    return f"{QUEUES}={given} has compute and messages between ranks wait for each other"
