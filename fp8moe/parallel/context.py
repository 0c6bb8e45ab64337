"""Messages of context parallelism: gathers of keys' rows, sums of their gradients, totals of expert loads.

They run on the communication stream, in one queue with the experts' messages: what a phase waits for first stands
first. A gather sends each rank's rows once to every other rank, (cp - 1) t rows in all; FP8 rows with a byte a scale. A
scatter is an all-to-all of shares that are added here: NCCL's reduce-scatter would round every partial sum to BF16.

Bytes a token and layer that a rank receives for DeepSeek-V3 at 131,072 tokens and cp 8, in BF16: gathered latents
1,152 x 7/8, ring attention on keys and values 81,920 x 7/8 (128 heads of 192 + 128 values).

Legend: T tokens of whole sequences, t = T / cp of a rank, n features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.fp8 import E4M3, Fp8Tensor
from fp8moe.kernels.message_layout import scales
from fp8moe.layers.attention.zigzag import joined_parts, parts_of
from fp8moe.layers.dispatch import Handle
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import all_gather, all_reduce_in_message, start_all_to_all
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.dispatch.payload import from_bytes, joined, pack, row_bytes


def gather_bytes(rows: int, row_bytes: int, cp: int) -> int:
    """Bytes that a rank sends, and receives, in a gather of `rows` rows of each rank."""
    return rows * row_bytes * (cp - 1)


class ContextMessages:
    """The exchange (`layers.attention.context.ContextExchange`) over the ranks of `group`."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()

    def gather(self, rows: Sequence[Rows], num_sequences: int) -> Handle[tuple[Rows, ...]]:
        """Rows [t, n] of each -> those of all ranks, [T, n], in the order of the sequences."""
        mine = joined([pack(one) for one in rows], dim=1)
        everyone = mine.new_empty(self.size, *mine.shape)
        everyone[self.rank] = mine
        size = mine.numel()
        parts = [(i * size, (i + 1) * size) for i in range(self.size)]

        def message() -> Tensor:
            all_gather(everyone.view(-1), parts, self._group, "keys")
            return everyone

        def finish(arrived: Tensor) -> tuple[Rows, ...]:
            columns = arrived.split([row_bytes(one) for one in rows], dim=2)
            return tuple(_whole(column, one, num_sequences) for column, one in zip(columns, rows, strict=True))

        return communication_stream(mine.device).start(message, finish, "keys")

    def scatter(self, shares: Sequence[Tensor], num_sequences: int) -> Handle[tuple[Tensor, ...]]:
        """Shares [T, n] of each -> their sums over the ranks for this rank's tokens [t, n], rounded once."""
        parts = parts_of(joined(list(shares), dim=1), num_sequences, self.size)
        each = [parts.shape[1]] * self.size
        features = [share.shape[1] for share in shares]

        def message() -> Tensor:
            return start_all_to_all(parts.flatten(0, 1), each, each, self._group, "keys' gradients").wait()

        def finish(arrived: Tensor) -> tuple[Tensor, ...]:
            by_rank = arrived.unflatten(0, (self.size, -1))
            total = by_rank[0].float()
            for share in by_rank[1:]:
                total += share
            return tuple(part.contiguous() for part in total.to(arrived.dtype).split(features, dim=1))

        return communication_stream(parts.device).start(message, finish, "keys' gradients")

    def total(self, x: Tensor) -> Handle[Tensor]:
        """A copy of x, summed over ranks."""
        summed = x.clone()

        def message() -> Tensor:
            all_reduce_in_message(summed, self._group, "expert loads")
            return summed

        return communication_stream(x.device).start(message, lambda arrived: arrived, "expert loads", takes_sms=False)


def _whole(column: Tensor, like: Rows, num_sequences: int) -> Rows:
    """Bytes [cp, t, n] of rows like `like` -> the rows of all tokens, in contiguous memory as GEMMs read it."""
    if not isinstance(like, Fp8Tensor):
        return from_bytes(joined_parts(column, num_sequences), like.dtype)
    codes, exponents = (joined_parts(part, num_sequences) for part in column.split(like.shape[1], dim=2))
    return Fp8Tensor(codes.view(E4M3), scales(exponents))
