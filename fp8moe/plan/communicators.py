"""Memory of NCCL's communicators on a rank: how many there are, and what each is assumed to take.

`parallel.mesh` makes the groups and `parallel.links` the pairs; both are counted here and not read from a running job.
NCCL allocates outside PyTorch's allocator, at start-up (`parallel.mesh.warm_up`, `Links.warm_up`), and states no
formula, so the bytes are figures that others measured:

    COMMUNICATOR   0.4 GiB: pith-train's memory estimator, measured on 32 H100 (0.39 GiB for the world, 1.00 GiB for
                   three more groups); nccl issue 964 reports 0.53 to 0.67 GiB on four A100 and an older NCCL
    CONNECTION     12 MiB a peer of the same node and channel, once an all-to-all has run: nccl issue 1685, 8 H100, a
                   buffer of 10 MiB and one of 2 MiB (with 32 channels 3.28 GB in all)
    NETWORK        0.5 GiB a communicator whose all-to-all leaves the node, the buffer that its network connections
                   share: nccl issue 2363

An all-to-all uses at most `parallel.communication_sms` channels.
"""

from __future__ import annotations

from fp8moe.parallel.mesh import EXPERT_AXES
from fp8moe.train.config import TrainConfig, is_tied

GIB = 2**30
COMMUNICATOR = 0.4 * GIB
CONNECTION = 12 * 2**20
NETWORK = 0.5 * GIB
MOST_CHANNELS = 32  # of a communicator, unless fewer SMs are given


def group_sizes(config: TrainConfig, pp_rank: int) -> dict[str, int]:
    """Ranks of each group that a rank of this pipeline rank belongs to, by axis, as `parallel.mesh.axis_ranks` makes
    them; groups of one are left out, they are never made."""
    parallel, pp, dp, ep = config.parallel, config.parallel.pp, config.dp, config.ep
    copies = 2 if parallel.schedule == "dualpipe" else 1
    sizes = {"dp": dp, "ep": ep, "dense": dp * copies, "expert": dp * copies // ep}
    if parallel.dispatcher == "node_limited":
        local = min(ep, parallel.ranks_per_node or ep)
        sizes |= {"rail": ep // local, "node": local}
    if pp > 1:
        sizes |= {"world": pp * dp, "pp": pp, "up": pp, "down": pp}
    if is_tied(config) and pp_rank in (0, pp - 1):
        sizes["tie"] = 2
    return {axis: size for axis, size in sizes.items() if size > 1}


def pairs(pp: int, pp_rank: int) -> int:
    """Communicators of two ranks that the pipeline's messages open: one a neighbour and direction of travel."""
    return 2 * ((pp_rank > 0) + (pp_rank < pp - 1))


def communicator_bytes(config: TrainConfig, pp_rank: int, gpus_per_node: int) -> float:
    """Bytes of all communicators of a rank."""
    sizes = group_sizes(config, pp_rank)
    total = (len(sizes) + pairs(config.parallel.pp, pp_rank)) * COMMUNICATOR
    channels = min(MOST_CHANNELS, config.parallel.communication_sms)
    for axis in EXPERT_AXES:
        size = sizes.get(axis, 1)
        beside = 1 if axis == "rail" else min(size, gpus_per_node)  # ranks of it on one node
        total += (beside - 1) * channels * CONNECTION + (size > beside) * NETWORK
    return total
