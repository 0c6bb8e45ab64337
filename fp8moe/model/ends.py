"""The two ends of the model as runs: the embedding, the MTP module's entrance, and the losses.

A micro-batch's runs on the last stage are its blocks, then, while training with MTP, the module's entrance and its
block, then the losses. The hidden state that leaves the last block goes two ways, into the shared head and into the
MTP module; its gradient is the sum of both, taken at the entrance.

Legend: T tokens, D model, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from fp8moe.layers.embedding import Embedding
from fp8moe.layers.phase import Island, Phase
from fp8moe.layers.wgrad import WeightGradStore
from fp8moe.model.loss import LossTally, LossWeights, cross_entropy_sum, mtp_labels
from fp8moe.model.mtp import Mtp
from fp8moe.model.transformer import Transformer


def _one_phase(
    name: str, forward: Callable[[], None], backward: Callable[[], None], store: WeightGradStore, key: Hashable
) -> tuple[Phase]:
    return (Phase(name, "compute", forward, backward, partial(store.run, key)),)


class EmbeddingRun:
    """ids [T] -> [T, D]; the first run of the first stage."""

    def __init__(self, embedding: Embedding, ids_T: Tensor, *, store: WeightGradStore, key: Hashable) -> None:
        self._embedding, self._ids_T, self._store, self._key = embedding, ids_T, store, key

    @property
    def phases(self) -> tuple[Phase, ...]:
        return _one_phase("embed", self._forward, self._backward, self._store, self._key)

    def _forward(self) -> None:
        self._island = Island(lambda: (self._embedding(self._ids_T),), store=self._store, key=self._key)

    @property
    def output(self) -> Tensor:
        return self._island.take()[0]

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        self._gradient = gradient

    def _backward(self) -> None:
        self._island.backward(self._gradient())

    @property
    def input_gradient(self) -> Tensor:
        raise AssertionError("ids have no gradient")


class MtpEntranceRun:
    """The last block's hidden state and the next token's embedding, joined: what the MTP module's block works on."""

    head_gradient: Tensor  # of the hidden state, from the main head; the losses' backward leaves it here

    def __init__(
        self,
        mtp: Mtp,
        embedding: Embedding,
        source: Callable[[], Tensor],
        next_ids_T: Tensor,
        *,
        store: WeightGradStore,
        key: Hashable,
    ) -> None:
        self._mtp, self._embedding, self._source, self._next_ids_T = mtp, embedding, source, next_ids_T
        self._store, self._key = store, key

    @property
    def phases(self) -> tuple[Phase, ...]:
        return _one_phase("join", self._forward, self._backward, self._store, self._key)

    def _forward(self) -> None:
        def join(hidden_TD: Tensor) -> tuple[Tensor]:
            return (self._mtp.enter(hidden_TD, self._embedding(self._next_ids_T)),)

        self.hidden_TD = self._source()
        self._island = Island(join, self.hidden_TD, store=self._store, key=self._key)

    @property
    def output(self) -> Tensor:
        return self._island.take()[0]

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        self._gradient = gradient

    def _backward(self) -> None:
        (d_hidden_TD,) = self._island.backward(self._gradient())
        assert d_hidden_TD is not None
        self.input_gradient = self.head_gradient + d_hidden_TD


class LossRun:
    """Norm, head and cross entropy, of the main model and of the MTP module behind `entrance` where there is one."""

    def __init__(
        self,
        model: Transformer,
        source: Callable[[], Tensor],
        labels_BS: Tensor,
        weights: LossWeights,
        tally: LossTally,
        *,
        entrance: MtpEntranceRun | None = None,
        store: WeightGradStore,
        key: Hashable,
    ) -> None:
        self._model, self._source, self._labels_BS, self._entrance = model, source, labels_BS, entrance
        self._weights, self._tally, self._store, self._key = weights, tally, store, key

    @property
    def phases(self) -> tuple[Phase, ...]:
        return _one_phase("loss", self._forward, self._backward, self._store, self._key)

    def _losses(self, hidden_TD: Tensor, mtp_TD: Tensor | None = None) -> tuple[Tensor, ...]:
        model = self._model
        assert model.norm is not None and model.head is not None
        main = cross_entropy_sum(model.head(model.norm(hidden_TD)), self._labels_BS.flatten())
        if mtp_TD is None:
            return (main,)
        assert model.mtp is not None
        labels_T = mtp_labels(self._labels_BS).flatten()
        return main, cross_entropy_sum(model.head(model.mtp.leave(mtp_TD)), labels_T)

    def _forward(self) -> None:
        inputs = [self._source()] if self._entrance is None else [self._entrance.hidden_TD, self._source()]
        self._island = Island(self._losses, *inputs, store=self._store, key=self._key)
        self._tally.add_losses(*self._island.values)

    @property
    def output(self) -> Tensor:
        raise AssertionError("nothing comes after the losses")

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        raise AssertionError("nothing comes after the losses")

    def _backward(self) -> None:
        weights = (self._weights.main, self._weights.mtp)
        losses = self._island.values
        grads = self._island.backward(*(torch.full_like(loss, w) for loss, w in zip(losses, weights, strict=False)))
        last = grads[-1]
        assert last is not None
        self.input_gradient = last
        if self._entrance is not None:
            head_gradient = grads[0]
            assert head_gradient is not None
            self._entrance.head_gradient = head_gradient
