"""A micro-batch as CUDA graphs (`parallel.cuda_graphs`): forward, backward and weight gradients without their launches.

What it is for: Python, autograd and Triton take the host 45 to 130 microseconds a launch. A layer of 100 launches whose
kernels take less than that together waits for its host (`docs/layer.md`, CUDA graphs). A replay takes about 10
microseconds, and the copies of the micro-batch's inputs are a few hundred kilobytes.

A capture holds a whole micro-batch through all layers: one graph, or, where ranks share experts, one between each
message's start or wait and the next (`parallel.dispatch.captured`). The micro-batches of a step replay it one after
another, as 1F1B does on one pipeline rank; every sum, in `main_grad`, of losses, of loads, has the order that it has
without graphs, and the same bits. A capture of a whole step was refused: it grows with the number of micro-batches, and
a batch that grows would need one for each size. So was a graph a phase with a Python object around it for every
micro-batch in flight: what phases hand each other would have to be taken apart and put together at each.

    lies still, outside   weights, their FP8 blocks, `main_grad`, router biases and loads, all updated in place; here:
                          inputs, the weights of the losses, the losses' sums
    of the graphs' pool   everything else: activations, workspace; nothing of it is read after the last replay

ZeRO-1's messages have no place within: weights are waited for before the first replay, gradients are summed behind the
last. So they are hidden no more: 6 bytes of each parameter that has replicas, once a step.

The first step runs as always: it compiles kernels, and libraries allocate. The next one captures. Before each step the
addresses of all that lies outside are compared with those of the capture; where they differ, it is captured again. A
step that a graph can't do (its casts are counted, a method brings a loss of its own) runs as always, and lets the
graphs go before, so that activations never take memory twice.

The pool keeps a micro-batch's activations and workspace from step to step; validation and the optimizer can't use that
memory. There are no phases to listen to in a replay: its time counts as the backward's.

`check_captured` refuses what puts other messages, other launches or Python into a micro-batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8moe.data.packing import Batch
from fp8moe.data.sources import DataConfig
from fp8moe.kernels.quantize import observers
from fp8moe.layers.cuda_graph import Captured, Graph, cuda_graphs
from fp8moe.layers.linear import QuantizedWeight
from fp8moe.model.head_loss import ChunkLoss
from fp8moe.model.loss import LossTally, LossWeights
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.config import ParallelConfig
from fp8moe.parallel.sharding.zero import Zero1
from fp8moe.profile.spans import CAPTURED, span, unheard
from fp8moe.train.batch import pinned


class RunOne(Protocol):
    """Runs micro-batches that are on the device, and adds up their losses."""

    def __call__(self, batches: Sequence[Batch], weights: LossWeights, tally: LossTally) -> None: ...


@dataclass
class _Still:
    """What lies still beside the model, which lay at `addresses`: inputs, the losses' weights and sums; the graphs."""

    batch: Batch
    weights_3: Tensor
    tally: LossTally
    addresses: tuple[int, ...]
    captured: Captured | None = None


class CapturedMicroBatch:
    """Runs a step's micro-batches by the graphs of one, made when it is first wanted. All have the same shape.

    make_graphs: gives what makes the graphs of one capture.
    """

    def __init__(
        self,
        model: Transformer,
        device: torch.device,
        zero: Zero1 | None = None,
        make_graphs: Callable[[], Callable[[], Graph]] = cuda_graphs,
    ) -> None:
        self._model, self._device, self._zero, self._make_graphs = model, device, zero, make_graphs
        for module in model.modules():
            if isinstance(module, QuantizedWeight):
                module.blocks_lie_still = True
        self._warm = False
        self._still: _Still | None = None

    def takes(self, token_loss: ChunkLoss | None) -> bool:
        """Whether the step that follows can be replayed; if not, its memory is free for the step."""
        taken = self._warm and token_loss is None and not observers
        self._warm = True
        if not taken:
            self._still = None
        return taken

    def run(self, run_one: RunOne, batches: Sequence[Batch], weights: LossWeights) -> Tensor:
        """Forward and backward of `batches`, on the host: gradients are added into `main_grad`.

        -> FP64 [3], the sums of the losses, as of `train.step.train_passes`. Collective over the ranks that share
        experts or the optimizer's state.
        """
        if self._zero is not None:
            self._zero.wait_weights()
        still = self._laid_out(batches[0])
        still.tally.sums.zero_()
        of_losses = torch.tensor([weights.main, weights.mtp, weights.balance])
        still.weights_3.copy_(self._pinned(of_losses), non_blocking=True)
        for batch in batches:
            for there, given in zip(_tensors(still.batch), _tensors(pinned(batch, self._device)), strict=True):
                there.copy_(given, non_blocking=True)
            with span(CAPTURED):
                if still.captured is None:
                    still.captured = self._capture(run_one, still)
                else:
                    still.captured.replay()
        if self._zero is not None:
            self._zero.after_all_wgrads()
        return still.tally.sums.clone()

    def _laid_out(self, like: Batch) -> _Still:
        """What lies still, made anew where the model no longer lies where it lay."""
        addresses = addresses_of(self._model)
        if self._still is None or self._still.addresses != addresses:
            assert like.document_lengths is None and like.whole is None and like.experts_BSLK is None, "check_captured"
            self._still = None  # with the graphs' memory, before the next ones'
            ids_BS, labels_BS, positions_BS = (torch.zeros_like(x, device=self._device) for x in _tensors(like))
            batch = Batch(ids_BS, labels_BS, positions_BS, None)
            self._still = _Still(batch, torch.zeros(3, device=self._device), LossTally(self._device), addresses)
        return self._still

    def _capture(self, run_one: RunOne, still: _Still) -> Captured:
        gc.collect()  # an autograd graph of the step before would bring its stream into the capture
        main, mtp, balance = still.weights_3.unbind()
        weights = LossWeights(main, mtp, balance)
        with unheard():
            return Captured(lambda: run_one([still.batch], weights, still.tally), self._make_graphs())

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.inputs_BS, batch.labels_BS, batch.positions_BS


def addresses_of(model: Transformer) -> tuple[int, ...]:
    """Where everything of `model` lies that a micro-batch reads or adds to."""
    tensors = [*model.parameters(), *model.buffers(), model.main_grads.dense, model.main_grads.expert]
    for module in model.modules():
        if isinstance(module, QuantizedWeight) and module.recipe.fp8:
            for blocks in (module.blocks, module.transposed_blocks):
                tensors += [blocks.data, blocks.scale]
    return tuple(tensor.data_ptr() for tensor in tensors)


def make_captured(
    parallel: ParallelConfig, model: Transformer, device: torch.device, zero: Zero1 | None
) -> CapturedMicroBatch | None:
    """What captures the micro-batches of a run; None where it is not asked for. ValueError without a GPU."""
    if not parallel.cuda_graphs:
        return None
    if device.type != "cuda":
        raise ValueError(
            f"parallel.cuda_graphs=true needs a GPU and the model is on the {device.type}: use "
            "parallel.cuda_graphs=false"
        )
    return CapturedMicroBatch(model, device, zero)


def check_captured(
    parallel: ParallelConfig, *, sharding: str, data: DataConfig, teacher: str | None, profile: bool
) -> None:
    """Raise ValueError where a micro-batch is to be captured and can't be; ep is filled in."""
    if not parallel.cuda_graphs:
        return
    assert parallel.ep is not None
    for name, size in (("pp", parallel.pp), ("cp", parallel.cp)):
        if size > 1:
            _refuse(f"parallel.{name}={size}", "sends other messages within it", f"parallel.{name}=1")
    if parallel.ep > 1 and parallel.capacity_factor is None:
        _refuse("parallel.capacity_factor=null", "gives each other numbers of rows", "parallel.capacity_factor=1.5")
    if parallel.ep > 1 and parallel.dispatcher == "deep_ep":
        _refuse("parallel.dispatcher=deep_ep", "counts its rows", "parallel.dispatcher=all_to_all")
    if sharding == "deepspeed":
        _refuse("optimizer.sharding=deepspeed", "keeps gradients of its own", "optimizer.sharding=zero1")
    if parallel.schedule != "1f1b":
        _refuse(f"parallel.schedule={parallel.schedule}", "mixes several", "parallel.schedule=1f1b")
    if data.document_mask:
        _refuse("data.document_mask=true", "gives each other launches", "data.document_mask=false")
    if data.source == "problems" or teacher is not None:
        given = "data.source=problems" if teacher is None else "distill.teacher"
        _refuse(given, "brings each a loss that Python computes", "fp8moe train on token files")
    if profile:
        _refuse("profile=true", "shows the phases within it", "profile=false")


def _refuse(setting: str, reason: str, instead: str) -> None:
    raise ValueError(
        f"parallel.cuda_graphs=true replays one captured micro-batch for all and {setting} {reason}: use {instead}, or "
        "parallel.cuda_graphs=false"
    )
