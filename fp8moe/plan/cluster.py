"""The machines that a run is planned for: GPUs, their memory and rates, the network between nodes, the price an hour.

Rates are those that programs reach, not those of data sheets, except the two peaks, which MFU is stated against.
`configs/cluster` has the values and where each comes from; the group is chosen as cluster=h800_2048, a key as
cluster.nodes=4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8moe.limits import POSITIVE, Range, check_fields

RATE = Range(above=0, use="configs/cluster has examples")


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs. GB = 1e9 bytes; bandwidths are those of one GPU in one direction."""

    name: str
    gpu: Literal["H100", "H200", "H800"]  # names the records of `benchmarks/results` that apply
    nodes: int
    gpus_per_node: int
    memory_gb: float  # of a GPU, what torch reports as its total
    bf16_tflops: float  # dense peak
    fp8_tflops: float
    hbm_gb_per_second: float  # that a copy reaches, reads and writes added
    nvlink_gb_per_second: float  # that an all-to-all within a node reaches
    network_gb_per_second: float  # that an all-to-all between nodes reaches
    nvlink_microseconds: float  # from the start of a message to its first byte
    network_microseconds: float
    price_per_gpu_hour: float  # US dollars

    def __post_init__(self) -> None:
        check_fields(
            self,
            "cluster",
            nodes=POSITIVE,
            gpus_per_node=POSITIVE,
            memory_gb=RATE,
            bf16_tflops=RATE,
            fp8_tflops=RATE,
            hbm_gb_per_second=RATE,
            nvlink_gb_per_second=RATE,
            network_gb_per_second=RATE,
            nvlink_microseconds=Range(least=0),
            network_microseconds=Range(least=0),
            price_per_gpu_hour=Range(least=0),
        )

    @property
    def gpus(self) -> int:
        """GPUs of the whole cluster."""
        return self.nodes * self.gpus_per_node
