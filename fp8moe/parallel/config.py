"""Configuration of parallelism: sizes of the mesh, pipeline schedule, dispatcher, time limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """World = pp x dp, ep inside dp. dp: None is processes / pp; ep: None is the most ranks that experts spread over.

    schedule: of the pipeline's pp ranks (`fp8moe.schedule.build`); dualpipev has a use at pp=1 too, it hides the
    experts' messages of one micro-batch under the compute of another. overlap: whether messages are hidden under
    compute (False: one after the other, the same bits). communication_sms: on a GPU, the SMs that messages of experts
    may take (NCCL's max_ctas), and that GEMMs of an overlapped pair leave to them.
    layout: blocks of each pipeline stage, given by hand; None cuts the model by cost (`fp8moe.model.partition`).
    dispatcher: how tokens travel (`fp8moe.parallel`): all_to_all in one hop; node_limited once to each node of
    ranks_per_node (None: the processes of this machine), then inside it; deep_ep where that package is installed.
    chunks: messages a dispatch. capacity_factor: messages of a fixed size, this multiple of an even share, with no wait
    for counts; an overflow is an error before the step (None: exact counts). max_imbalance: rows a rank may receive, as
    a multiple of an even share, before anything is allocated for them (None: whatever comes).
    timeout, startup_timeout: seconds a rank waits for a message, afterwards and until the first step is done (the first
    step compiles kernels and opens connections).
    """

    pp: int = 1
    dp: int | None = None
    ep: int | None = None
    schedule: Literal["1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    overlap: bool = True
    communication_sms: int = 20
    layout: tuple[int, ...] | None = None
    dispatcher: Literal["all_to_all", "node_limited", "deep_ep"] = "all_to_all"
    ranks_per_node: int | None = None
    chunks: int = 1
    capacity_factor: float | None = None
    max_imbalance: float | None = None
    timeout: float = 300.0
    startup_timeout: float = 900.0

    def __post_init__(self) -> None:
        for name in ("timeout", "startup_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"parallel.{name}={getattr(self, name)} seconds must be above 0")
        for name in ("communication_sms", "chunks", "ranks_per_node", "capacity_factor", "max_imbalance"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{name}={value} must be at least 1")
        if self.capacity_factor is not None and self.max_imbalance is not None:
            raise ValueError(
                f"parallel.capacity_factor={self.capacity_factor} bounds what a rank receives already: "
                f"use parallel.max_imbalance=null, not {self.max_imbalance}"
            )
