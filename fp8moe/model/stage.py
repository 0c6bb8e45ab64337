"""A stage's passes for one micro-batch: what a pipeline calls, made of the part of the model that this rank holds.

The passes form a chain. Each takes its input from the pass before it and, going back, its gradient from the pass
behind it, when its phase asks; the pipeline stands at both ends of the chain. On the last stage the chain is: its
blocks, then, while training with MTP, the module's entrance and its block, then the losses. The final norm of the last
block's hidden state goes two ways, into the shared head and into the MTP module, so the entrance makes it; its gradient
is the sum of both.

Legend: T tokens, D model, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.layers.linear import Embedding
from fp8moe.layers.phase import DeferredWgrads, DetachedGraph, Pass, Phase, run_detached
from fp8moe.model.block import Block
from fp8moe.model.head_loss import ChunkLoss, ChunkLossHere, head_loss, of_cross_entropy
from fp8moe.model.loss import LossTally, LossWeights, weight_on
from fp8moe.model.partition import Stage
from fp8moe.model.phases import BalanceLoss, pass_through
from fp8moe.model.transformer import Inputs, Mtp, Transformer, labels_after_next, next_ids


class StagePasses:
    """Makes the passes of any stage that `model` holds, for the micro-batches of one step.

    stages: all of the model's, by index. weights: of the losses in the total. tally: where their values are added up.
    token_loss: of the main model's tokens; cross entropy without one.
    """

    def __init__(
        self,
        model: Transformer,
        stages: Sequence[Stage],
        batches: Sequence[Inputs],
        weights: LossWeights,
        tally: LossTally,
        token_loss: ChunkLoss | None = None,
    ) -> None:
        self._model, self._stages, self._batches = model, stages, batches
        self._token_loss = token_loss
        self._weights, self._tally = weights, tally
        self._balance = BalanceLoss(weights.balance, tally.add_balance)

    def __call__(self, stage: int, microbatch: int, source: Callable[[], Tensor] | None) -> Sequence[Pass]:
        """The chain for micro-batch number `microbatch`; `source` gives the input of every stage but the first."""
        here, batch, model = self._stages[stage], self._batches[microbatch], self._model
        positions = model.positions_of(batch)
        passes: list[Pass] = []

        def before() -> Callable[[], Tensor]:
            if passes:
                return _Output(passes[-1])
            assert source is not None
            return source

        def add_block(block: Block) -> None:
            passes.append(pass_through(block, before(), positions, self._balance))

        if here.embedding:
            assert model.embedding is not None
            passes.append(EmbeddingPass(model.embedding, batch.inputs_BS.flatten()))
        for layer in here.layers:
            add_block(model.block(layer))
        if here.head:
            entrance = None
            if model.mtp is not None and model.training:
                entrance = MtpEntrancePass(model, before(), next_ids(batch))
                passes.append(entrance)
                add_block(model.mtp.block)
            loss = LossPass(model, before(), batch, self._weights, self._tally, entrance=entrance)
            if self._token_loss is not None:
                loss.main_loss = partial(self._token_loss.of_logits, microbatch)
                loss.temperature = self._token_loss.temperature
            passes.append(loss)
        for one, behind in pairwise(passes):
            one.backward_from(_InputGradient(behind))
        return passes


def pass_parameters(model: Transformer, stage: Stage) -> list[tuple[Parameter, ...]]:
    """The parameters that each training pass of `stage` reads and gives gradients, in the order of `StagePasses`."""
    passes: list[tuple[Parameter, ...]] = []
    embedding = () if model.embedding is None else tuple(model.embedding.parameters())
    if stage.embedding:
        passes.append(embedding)
    passes += [tuple(model.block(layer).parameters()) for layer in stage.layers]
    if stage.head:
        assert model.norm is not None and model.head is not None
        norm, head = tuple(model.norm.parameters()), tuple(model.head.parameters())
        if model.mtp is None:
            passes.append((*norm, *head))
        else:
            mtp = model.mtp
            entrance = [p for part in (mtp.embedding_norm, mtp.hidden_norm, mtp.join) for p in part.parameters()]
            passes += [(*norm, *entrance, *embedding), tuple(mtp.block.parameters())]
            passes.append((*head, *mtp.final_norm.parameters()))
    return passes


class _OfPass:
    """Something of a pass, given once, after which the pass is forgotten.

    A chain that went on knowing both neighbours would be a circle, whose activations stay in memory until Python
    happens to collect it.
    """

    def __init__(self, one: Pass) -> None:
        self._pass: Pass | None = one

    def _forget(self) -> Pass:
        one, self._pass = self._pass, None
        assert one is not None
        return one


class _Output(_OfPass):
    def __call__(self) -> Tensor:
        return self._forget().output


class _InputGradient(_OfPass):
    def __call__(self) -> Tensor:
        return self._forget().input_gradient


class _OnePhase:
    """A pass of a single compute phase: its name, graph and weight gradients."""

    name: str
    _graph: DetachedGraph

    def __init__(self) -> None:
        self._wgrads = DeferredWgrads()

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.name, "compute", self._forward, self._backward, self._wgrads.run),)

    @property
    def output(self) -> Tensor:
        return self._graph.take()[0]

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        """Where the gradient of the output will come from."""
        self._gradient = gradient

    def _forward(self) -> None:
        raise AssertionError("each pass has its own")

    def _backward(self) -> None:
        raise AssertionError("each pass has its own")


class EmbeddingPass(_OnePhase):
    """ids [T] -> [T, D]; the first pass of the first stage."""

    name = "embed"

    def __init__(self, embedding: Embedding, ids_T: Tensor) -> None:
        super().__init__()
        self._embedding, self._ids_T = embedding, ids_T

    def _forward(self) -> None:
        self._graph, _ = run_detached(lambda: ((self._embedding(self._ids_T),), None), wgrads=self._wgrads)

    def _backward(self) -> None:
        self._graph.backward(self._gradient())

    @property
    def input_gradient(self) -> Tensor:
        raise AssertionError("ids have no gradient")


class MtpEntrancePass(_OnePhase):
    """The last hidden state behind the final norm, for the head, and joined with the next token's embedding, for the
    MTP module's block."""

    name = "join"
    input_gradient: Tensor
    normed_TD: Tensor  # for the main head; the losses' forward takes it
    normed_gradient: Tensor | None  # from the main head; the losses' backward leaves it here

    def __init__(self, model: Transformer, source: Callable[[], Tensor], next_ids_T: Tensor) -> None:
        super().__init__()
        self._model, self._source, self._next_ids_T = model, source, next_ids_T

    def _forward(self) -> None:
        model = self._model
        assert model.norm is not None and model.mtp is not None and model.embedding is not None
        norm, mtp, embedding = model.norm, model.mtp, model.embedding

        def join(hidden_TD: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
            normed_TD = norm(hidden_TD).tensor
            return (normed_TD, mtp.enter(normed_TD, embedding(self._next_ids_T))), None

        self._graph, _ = run_detached(join, self._source(), wgrads=self._wgrads)
        self.normed_TD, self._joined_TD = self._graph.take()

    @property
    def output(self) -> Tensor:
        joined_TD = self._joined_TD
        del self._joined_TD
        return joined_TD

    def _backward(self) -> None:
        (d_hidden_TD,) = self._graph.backward(self.normed_gradient, self._gradient())
        assert d_hidden_TD is not None
        self.input_gradient = d_hidden_TD


class LossPass(_OnePhase):
    """Norm, head and cross entropy, of the main model and of the MTP module behind `entrance` where there is one.

    main_loss: the main model's, of logits divided by `temperature`.

    The forward computes the gradients of head and cross entropy with their values, as `model.head_loss` says, and keeps
    those of the norms' outputs until the backward. Under `torch.no_grad` it computes values alone.
    """

    name = "loss"
    input_gradient: Tensor
    _gradient_here: Tensor | None  # of the output of the norm that this pass computes

    def __init__(
        self,
        model: Transformer,
        source: Callable[[], Tensor],
        batch: Inputs,
        weights: LossWeights,
        tally: LossTally,
        *,
        entrance: MtpEntrancePass | None = None,
    ) -> None:
        super().__init__()
        self._model, self._source, self._batch, self._entrance = model, source, batch, entrance
        self._weights, self._tally = weights, tally
        self.main_loss: ChunkLossHere = of_cross_entropy
        self.temperature = 1.0

    def _norm(self, hidden_TD: Tensor) -> tuple[tuple[Tensor], None]:
        """The norm before the shared head: the MTP module's where there is one, which needs the main model's before."""
        norm = self._model.norm if self._entrance is None else self._mtp.leave
        assert norm is not None
        return (norm(hidden_TD).tensor,), None

    @property
    def _mtp(self) -> Mtp:
        assert self._model.mtp is not None
        return self._model.mtp

    def _forward(self) -> None:
        self._graph, _ = run_detached(self._norm, self._source(), wgrads=self._wgrads)
        main = self._batch.labels_BS, self._weights.main, self.main_loss, self.temperature
        mtp = labels_after_next(self._batch), self._weights.mtp
        (normed_TD,) = self._graph.take()
        if self._entrance is None:
            loss, self._gradient_here = self._head_loss(normed_TD, *main)
            self._tally.add_losses(loss)
            return
        # The module's first, whose gradients come first under autograd.
        mtp_loss, self._gradient_here = self._head_loss(normed_TD, *mtp)
        del normed_TD
        loss, self._entrance.normed_gradient = self._head_loss(self._entrance.normed_TD, *main)
        del self._entrance.normed_TD
        self._tally.add_losses(loss, mtp_loss)

    def _head_loss(
        self,
        normed_TD: Tensor,
        labels_BS: Tensor,
        weight: float | Tensor,
        loss: ChunkLossHere = of_cross_entropy,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        head = self._model.head
        assert head is not None
        training = torch.is_grad_enabled()
        on_device = weight_on(normed_TD.device, weight) if training else None
        if temperature == 1:
            return head_loss(head, normed_TD, labels_BS.flatten(), on_device, loss)
        value, dx_TD = head_loss(head, normed_TD / temperature, labels_BS.flatten(), on_device, loss)
        return value, None if dx_TD is None else dx_TD / temperature

    @property
    def output(self) -> Tensor:
        raise AssertionError("nothing comes after the losses")

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        raise AssertionError("nothing comes after the losses")

    def _backward(self) -> None:
        gradient, self._gradient_here = self._gradient_here, None
        (d_hidden_TD,) = self._graph.backward(gradient)
        assert d_hidden_TD is not None
        self.input_gradient = d_hidden_TD
