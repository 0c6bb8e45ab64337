"""Memory of NCCL's communicators on a rank: how many there are, and what each is assumed to take.

`parallel.mesh` makes the groups and `parallel.links` the pairs; they are counted here, not read from a running job.
NCCL allocates outside PyTorch's allocator, when `parallel.mesh.warm_up` and `Links.warm_up` open its connections, and
states no formula. Of its source (src/init.cc, src/transport/net.cc) and of what others measured:

    a connection                       10 MiB where it is received (buffers of three protocols: 0.5, 4.7 and 4 MiB) and
                                       2 MiB where it is sent, 10 over the network; nccl issue 1685 shows both
    a group with neighbours by NVLink  0.4 GiB: pith-train's memory estimator, measured on 32 H100 (0.39 GiB for the
                                       world, 1.00 GiB for two or three more); 0.5 to 0.7 GiB in nccl issue 964 (A100)
    a group of one rank a node         240 MiB: 4 channels (2 a NIC and direction), each with the connections of a ring
                                       and of a tree, sent and received
    an all-to-all                      a connection to each peer on the node and channel: 2 channels a peer where the
                                       group leaves the node, else up to 32; and 64 MiB in all for peers elsewhere,
                                       which share pools of 16 channels x 16 steps x 128 KiB each way
"""

from __future__ import annotations

from fp8moe.parallel.mesh import LAYER_AXES
from fp8moe.train.config import TrainConfig, is_tied

MIB, GIB = 2**20, 2**30
RECEIVED, SENT = 10 * MIB, 2 * MIB  # buffers of a connection within a node
NODE_GROUP = 0.4 * GIB
NETWORK_GROUP = 4 * 3 * 2 * RECEIVED
NETWORK_POOLS = 2 * 16 * 16 * 128 * 1024
CHANNELS, CHANNELS_LEAVING = 32, 2  # for a peer, in a group on one node and in one that leaves it


def group_sizes(config: TrainConfig, pp_rank: int) -> dict[str, int]:
    """Ranks of each group that a rank of this pipeline rank opens, by axis, as `parallel.mesh.axis_ranks` makes them.

    Without groups of one, which are not made, and those that `warm_up` leaves alone.
    """
    parallel, pp, dp, ep = config.parallel, config.parallel.pp, config.dp, config.ep
    copies = 2 if parallel.schedule == "dualpipe" else 1
    sizes = {"ep": ep, "dense": dp * copies, "expert": dp * copies // ep}
    if parallel.dispatcher == "node_limited":
        local = min(ep, parallel.ranks_per_node or ep)
        sizes |= {"rail": ep // local, "node": local}
    sizes |= {"world": pp * dp, "pp": pp} if pp > 1 else {"dp": dp}
    if is_tied(config) and pp_rank in (0, pp - 1):
        sizes["tie"] = 2
    return {axis: size for axis, size in sizes.items() if size > 1}


def on_node(axis: str, size: int, config: TrainConfig, gpus_per_node: int) -> int:
    """Of the ranks of a group, those on one node: neighbours, or ranks that stand a whole axis apart."""
    if axis == "node":
        return size
    apart = {"expert": config.ep, "rail": config.parallel.ranks_per_node or config.ep, "pp": config.dp}
    if axis == "tie":
        return 2 if config.parallel.pp * config.dp <= gpus_per_node else 1
    return min(size, max(1, gpus_per_node // apart.get(axis, 1)))


def pairs(pp: int, pp_rank: int) -> int:
    """Communicators of two ranks that the pipeline's messages open: one a neighbour and direction of travel."""
    return 2 * ((pp_rank > 0) + (pp_rank < pp - 1))


def communicator_bytes(config: TrainConfig, pp_rank: int, gpus_per_node: int) -> float:
    """Bytes of all communicators of a rank."""
    sms = config.parallel.communication_sms
    pair = _exchange_bytes(2, on_node("pp", 2, config, gpus_per_node), CHANNELS)
    total = float(pairs(config.parallel.pp, pp_rank) * pair)
    for axis, size in group_sizes(config, pp_rank).items():
        beside = on_node(axis, size, config, gpus_per_node)
        total += NODE_GROUP if beside > 1 else NETWORK_GROUP
        if axis in LAYER_AXES:
            total += _exchange_bytes(size, beside, min(CHANNELS, sms))
    return total


def _exchange_bytes(size: int, beside: int, channels: int) -> int:
    """Bytes of the connections of an all-to-all of `size` ranks, `beside` of them on this rank's node."""
    leaves = size > beside
    of_peer = (CHANNELS_LEAVING if leaves else channels) * (RECEIVED + SENT)
    return (beside - 1) * of_peer + leaves * NETWORK_POOLS
