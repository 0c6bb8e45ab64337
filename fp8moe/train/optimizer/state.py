"""What an optimizer keeps for the values that this rank updates: flat buffers, whole or in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.layers.linear import main_grad_of
from fp8moe.parallel.sharding.buckets import Span


@dataclass(frozen=True)
class Moment:
    """When an update happens: its learning rate, its number from 1, FP32 [] that gradients are multiplied by."""

    lr: float
    update: int
    grad_scale: Tensor


@dataclass(frozen=True)
class Held:
    """Values [first, first + n) of a parameter, flattened, and what the optimizer keeps for them.

    tensors: [n] each, views of the flat buffers, by kind: "master" in FP32, and the optimizer's own.
    """

    parameter: Parameter
    first: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """A contiguous range of a flat gradient buffer, and the masters and weights of its values; all [n].

    weight: BF16, the masters rounded; None where the parameters are FP32 and master is a range of them.
    """

    spans: tuple[Span, ...]
    start: int
    grad: Tensor
    master: Tensor
    weight: Tensor | None

    def held(self, kinds: Mapping[str, Tensor]) -> Iterable[Held]:
        """Each parameter's values, with the parts of `kinds` that are theirs."""
        for span in self.spans:
            values = slice(span.start - self.start, span.stop - self.start)
            yield Held(span.parameter, span.first, {kind: flat[values] for kind, flat in kinds.items()})

    def runs(self, key: Callable[[Parameter], bool]) -> Iterator[tuple[Shard, bool]]:
        """The shard cut where `key` of neighbouring parameters differs, with its value."""
        for value, spans in groupby(self.spans, lambda span: key(span.parameter)):
            run = tuple(spans)
            here = slice(run[0].start - self.start, run[-1].stop - self.start)
            weight = None if self.weight is None else self.weight[here]
            yield Shard(run, run[0].start, self.grad[here], self.master[here], weight), value

    def own_masters(self) -> Tensor | None:
        """A copy of the masters where parameters are views of them, which `write` would change; None elsewhere."""
        return self.master.clone() if any(s.parameter.dtype is torch.float32 for s in self.spans) else None

    def write(self, masters: Tensor) -> None:
        """Round `masters` [n] into the weights; into the masters themselves where FP32 parameters are views of them."""
        for span in self.spans:
            values = slice(span.start - self.start, span.stop - self.start)
            target = self.master if span.parameter.dtype is torch.float32 else self.weight
            assert target is not None
            if target is not masters:
                target[values].copy_(masters[values])

    def of(self, parameter: Parameter, flat: Tensor) -> Tensor:
        """The values of a whole `parameter` in a flat buffer of this shard, in its shape."""
        span = next(span for span in self.spans if span.parameter is parameter)
        return flat[span.start - self.start : span.stop - self.start].view(parameter.shape)


def whole(parameters: Sequence[Parameter], grad: Tensor) -> Shard:
    """All `parameters`, whose `main_grad` are views of grad [n] in this order; they become views of one buffer.

    FP32 ones among BF16 ones become views of the masters, which they are.
    """
    spans = _spans(parameters, grad)
    master = torch.empty_like(grad)
    is_rounded = any(p.dtype is torch.bfloat16 for p in parameters)
    weight = torch.empty_like(grad, dtype=torch.bfloat16) if is_rounded else None
    for span in spans:
        values = slice(span.start, span.stop)
        master[values].copy_(span.parameter.detach().flatten())
        if span.parameter.dtype is torch.float32:
            _move(span, master)
        else:
            assert weight is not None
            weight[values].copy_(span.parameter.detach().flatten())
            _move(span, weight)
    return Shard(spans, 0, grad, master, weight)


def flat_weights(parameters: Sequence[Parameter], grad: Tensor) -> Tensor:
    """The buffer [n] that `parameters`, all of one dtype, become views of; of the layout of grad."""
    spans = _spans(parameters, grad)
    (dtype,) = {p.dtype for p in parameters}
    weights = torch.empty_like(grad, dtype=dtype)
    for span in spans:
        weights[span.start : span.stop].copy_(span.parameter.detach().flatten())
        _move(span, weights)
    return weights


def part(spans: Sequence[Span], bounds: tuple[int, int], grad: Tensor, weights: Tensor) -> Shard:
    """The range `bounds` of a buffer, whose spans are given: masters of its own only where the weights are not FP32."""
    values = slice(*bounds)
    is_rounded = weights.dtype is not torch.float32
    master = weights[values].float() if is_rounded else weights[values]
    return Shard(tuple(spans), bounds[0], grad[values], master, weights[values] if is_rounded else None)


def _spans(parameters: Sequence[Parameter], grad: Tensor) -> tuple[Span, ...]:
    assert sum(p.numel() for p in parameters) == grad.numel(), "main_grads are of another model"
    spans, start = [], 0
    for p in parameters:
        assert main_grad_of(p).storage_offset() - grad.storage_offset() == start, "main_grads are in another order"
        spans.append(Span(p, 0, start, start + p.numel()))
        start += p.numel()
    return tuple(spans)


def _move(span: Span, buffer: Tensor) -> None:
    span.parameter.data = buffer[span.start : span.stop].view(span.parameter.shape)
