"""DeepEP dispatcher: an adapter to the `deep_ep` package, where it is installed.

DeepEP moves rows by NVLink and RDMA kernels of its own; it needs Hopper GPUs, NVSHMEM for more than one node, BF16 or
FP8 rows, and its own build. Its scales travel in FP32. Everything around the messages (the fan-out to experts, their
sums) is this project's, so that a run may change dispatchers and nothing else. Its verbs are started on DeepEP's
communication stream and return at once with its events.

Written against the interface of DeepEP 1.x (`Buffer.get_dispatch_layout`, `dispatch`, `combine`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.fp8 import TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.permute import permute, plan_rows, unpermute
from fp8moe.layers.dispatch import Announced, Dispatched, Handle, gradient_rows, return_weights, select_weights
from fp8moe.layers.operand import Rows
from fp8moe.layers.recipe import Precision
from fp8moe.parallel.dispatch.hops import DispatchState
from fp8moe.profile.spans import waiting

NVLINK_BYTES, RDMA_BYTES = 2**30, 2**30  # of DeepEP's buffers, enough for 4096 tokens of hidden 7168
RANKS_PER_NODE = 8


def check_deep_ep(precision: Precision) -> None:
    """Raise ValueError unless parallel.dispatcher=deep_ep can work here."""
    if importlib.util.find_spec("deep_ep") is None:
        raise ValueError(
            "parallel.dispatcher=deep_ep needs the package deep_ep, which is not installed: use "
            "parallel.dispatcher=all_to_all, the default, or node_limited"
        )
    if precision is Precision.FP32:
        raise ValueError("parallel.dispatcher=deep_ep moves BF16 and FP8, not precision=fp32: use all_to_all")


@dataclass(frozen=True)
class _Started:
    """A message of DeepEP's: `finish` makes the result once its event is done."""

    event: Any
    finish: Any

    def wait(self) -> Any:
        with waiting():
            self.event.current_stream_wait()
        return self.finish()


class DeepEPDispatcher:
    """Experts spread evenly over the ranks of `group`, all on GPUs."""

    def __init__(self, group: ProcessGroup, num_experts: int) -> None:
        import deep_ep

        self.num_experts, self.num_local_experts = num_experts, num_experts // group.size()
        self._buffer = deep_ep.Buffer(group, NVLINK_BYTES, RDMA_BYTES if group.size() > RANKS_PER_NODE else 0)

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        """See `Dispatcher`; DeepEP counts here, and exchanges the counts itself when it dispatches."""
        sizes = self._buffer.get_dispatch_layout(topk_ids_TK, self.num_experts, **self._options())
        return Announced(topk_ids_TK, sizes)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]:
        """See `Dispatcher`."""
        ranks, rdma_ranks, experts, in_rank, counted = announced.sizes
        counted.current_stream_wait()
        got, ids_NK, weights_NK, tokens_e, handle, event = self._buffer.dispatch(
            _given(rows_TD),
            topk_idx=announced.topk_ids_TK,
            topk_weights=topk_weights_TK,
            num_tokens_per_rank=ranks,
            num_tokens_per_rdma_rank=rdma_ranks,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=experts,
            **self._options(),
        )

        def finish() -> Dispatched:
            room = sum(ceil_div(tokens, TILE) * TILE for tokens in tokens_e)  # DeepEP has waited for these numbers
            row_map = plan_rows(ids_NK.long(), self.num_local_experts, room=room)
            weights_R = select_weights(weights_NK, row_map)
            rows_RD = permute(_taken(got), row_map)
            return Dispatched(rows_RD, weights_R, row_map.group_offsets, DispatchState(handle, row_map))

        return _Started(event, finish)

    def combine(self, y_RD: Tensor, state: DispatchState[Any]) -> Handle[Tensor]:
        """See `Dispatcher`."""
        total, _, event = self._buffer.combine(unpermute(y_RD, state.row_map), state.route, **self._options())
        return _Started(event, lambda: total)

    def dispatch_backward(
        self, dx_RD: Tensor, dweights_R: Tensor, state: DispatchState[Any]
    ) -> Handle[tuple[Tensor, Tensor]]:
        """See `Dispatcher`; DeepEP's combine carries the weights' gradients."""
        dx_ND, dweights_NK = unpermute(dx_RD, state.row_map), return_weights(dweights_R, state.row_map)
        total, weights, event = self._buffer.combine(
            dx_ND, state.route, topk_weights=dweights_NK.float(), **self._options()
        )
        return _Started(event, lambda: (total, weights))

    def combine_backward(self, dy_TD: Tensor, state: DispatchState[Any], *, fp8: bool = False) -> Handle[Rows]:
        """See `Dispatcher`."""
        rows_TD = gradient_rows(dy_TD, fp8=fp8)
        got, *_, event = self._buffer.dispatch(_given(rows_TD), handle=state.route, **self._options())
        return _Started(event, lambda: permute(_taken(got), state.row_map))

    def verify(self) -> None:
        """Counts are exact: there is nothing that may not fit."""

    def _options(self) -> dict[str, Any]:
        return {"previous_event": self._buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}


def _given(rows: Rows) -> Any:
    return (rows.data, rows.scale.contiguous()) if isinstance(rows, Fp8Tensor) else rows


def _taken(rows: tuple[Tensor, Tensor] | Tensor) -> Any:
    return Fp8Tensor(*rows) if isinstance(rows, tuple) else rows
