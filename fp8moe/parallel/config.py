"""Configuration of parallelism: sizes of the mesh, pipeline schedule, dispatcher, time limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8moe.limits import COUNT, Range, check_fields

A_YEAR = 365 * 24 * 3600.0


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh and how ranks communicate. World = pp x dp; ep and cp inside dp."""

    pp: int = 1  # pipeline ranks
    dp: int | None = None  # data-parallel ranks of each pipeline rank; None: processes / pp
    ep: int | None = None  # ranks that share the experts, within dp; None: the most of dp / cp that experts divide over
    cp: int = 1  # ranks within dp that share the tokens of every sequence; dp / cp of them read sequences of their own
    # of the pipeline (`fp8moe.schedule.build`); dualpipev is of use at pp=1 too: it hides experts' messages of
    # one micro-batch under the compute of another
    schedule: Literal["1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    overlap: bool = True  # hide messages under compute; false: one after the other, the same bits
    # on a GPU: SMs that messages beside compute may take (NCCL's max_ctas), and that GEMMs leave free from the start
    # of a layer's message to its wait
    communication_sms: int = 20
    layout: tuple[int, ...] | None = None  # blocks of each pipeline stage; None: cut by cost (`fp8moe.model.partition`)
    # how tokens are sent to experts (`fp8moe.parallel.dispatch`): all_to_all in one hop; node_limited once to a
    # node, then inside it; deep_ep where that package is installed
    dispatcher: Literal["all_to_all", "node_limited", "deep_ep"] = "all_to_all"
    ranks_per_node: int | None = None  # of node_limited; None: the processes of this machine
    chunks: int = 1  # messages a dispatch
    # messages of a fixed size, this multiple of an even share, with no wait for counts; an overflow is an error
    # before the optimizer step; None: exact counts
    capacity_factor: float | None = None
    # rows a rank may receive, as a multiple of an even share, before anything is allocated for them; None: no
    # limit
    max_imbalance: float | None = None
    # on a GPU: a micro-batch's forward, backward and weight gradients as CUDA graphs between the messages
    # (`fp8moe.train.captured`), where the host is slower than the kernels; with ep it needs capacity_factor
    cuda_graphs: bool = False
    timeout: float = 300.0  # seconds that a rank waits for a message
    startup_timeout: float = 900.0  # the same until the first step is done: it compiles kernels and opens connections

    def __post_init__(self) -> None:
        ranks, rows = Range(least=1, most=2**20), Range(least=1, most=1e6)
        seconds = Range(above=0, most=A_YEAR)
        check_fields(
            self,
            "parallel",
            pp=ranks,
            dp=ranks,
            ep=ranks,
            cp=ranks,
            communication_sms=Range(least=1, most=1024),
            layout=COUNT,
            ranks_per_node=ranks,
            chunks=Range(least=1, most=1024),
            capacity_factor=rows,
            max_imbalance=rows,
            timeout=seconds,
            startup_timeout=seconds,
        )
        if self.capacity_factor is not None and self.max_imbalance is not None:
            raise ValueError(
                f"parallel.capacity_factor={self.capacity_factor} already bounds what a rank receives: "
                f"use parallel.max_imbalance=null, not {self.max_imbalance}"
            )
