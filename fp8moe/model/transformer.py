"""DeepSeek-V3: embedding, blocks, final norm, head, and the MTP module; or the part of them that one stage holds.

Parameters have one canonical name whatever the layout: blocks are named by their number in the whole model, experts are
stacked along dimension 0 of which a rank holds its share. Weights are drawn per canonical parameter, and per expert,
from a generator seeded by their names, so that every layout starts from the same model.

Legend: B sequences, S tokens of a sequence, T = B x S, D model, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fp8moe.layers.attention import Positions
from fp8moe.layers.attention.context import Context, ContextExchange
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.linear import Embedding, Linear, attach_main_grads, is_expert, quantize_weights
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable
from fp8moe.model.block import Block
from fp8moe.model.config import ModelConfig
from fp8moe.model.head_loss import head_loss_sum
from fp8moe.model.loss import LossSums, mtp_labels


class Whole(Protocol):
    """Of the whole sequences behind a part of each; see `data.whole.WholeSequences`."""

    @property
    def next_ids_BS(self) -> Tensor: ...
    @property
    def mtp_labels_BS(self) -> Tensor: ...
    @property
    def positions_BS(self) -> Tensor: ...


class Inputs(Protocol):
    """What a forward needs of a batch; see `data.packing.Batch`."""

    @property
    def inputs_BS(self) -> Tensor: ...
    @property
    def labels_BS(self) -> Tensor: ...
    @property
    def positions_BS(self) -> Tensor: ...
    @property
    def document_lengths(self) -> tuple[int, ...] | None: ...
    @property
    def whole(self) -> Whole | None: ...
    @property
    def experts_BSLK(self) -> Tensor | None: ...


class Transformer(nn.Module):
    """Blocks `layers` (all by default), with the embedding before and the head after them where asked.

    The MTP module belongs to the part that has both ends. Parameters are uninitialised until `init_weights`; every one
    has a zeroed FP32 `main_grad`, and `main_grads` are the buffers behind them. gradients=False: it has none, for a
    model that is never trained. context: for batches that hold a part of every sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        dispatcher: Dispatcher,
        *,
        layers: Iterable[int] | None = None,
        embedding: bool = True,
        head: bool = True,
        gradients: bool = True,
        context: ContextExchange | None = None,
    ) -> None:
        super().__init__()
        c = self.config = config
        self.context = context
        self.recipe = recipe
        numbers = range(c.num_layers) if layers is None else sorted(layers)
        self.embedding = Embedding(c.vocab_size, c.dim, recipe) if embedding else None
        self.blocks = nn.ModuleDict({str(i): Block(c, i, recipe, dispatcher) for i in numbers})
        self.norm = RMSNorm(c.dim, recipe, eps=c.norm_eps) if head else None
        self.head = Linear(c.dim, c.vocab_size, recipe.unquantized, matrix_rows=()) if head else None
        self.mtp = Mtp(c, recipe, dispatcher) if c.mtp_depth and embedding and head else None
        if gradients:
            self.main_grads = attach_main_grads(self)

    def positions(self, positions_BS: Tensor, document_lengths: tuple[int, ...] | None = None) -> Positions:
        """What attention needs to know of tokens at `positions_BS` [B, S], documents apart if they are given."""
        return self.config.attention.positions(positions_BS, document_lengths)

    def positions_of(self, batch: Inputs) -> Positions:
        """The same of a batch's tokens and, where they are a part of each sequence, of the whole; given experts."""
        positions = self._positions_of(batch)
        if batch.experts_BSLK is None:
            return positions
        given_LTK = batch.experts_BSLK.flatten(0, 1).unbind(1)
        return replace(positions, experts=dict(zip(self.config.expert_layers, given_LTK, strict=True)))

    def _positions_of(self, batch: Inputs) -> Positions:
        if batch.whole is None:
            return self.positions(batch.positions_BS, batch.document_lengths)
        assert self.context is not None, "a model without `context` was given parts of sequences"
        whole = self.positions(batch.whole.positions_BS, batch.document_lengths)
        context = Context(self.context, whole.num_sequences, whole.cos, whole.sin, whole.documents)
        return replace(self.positions(batch.positions_BS), context=context)

    def block(self, layer: int) -> Block:
        """Block number `layer` of the whole model."""
        block = self.blocks[str(layer)]
        assert isinstance(block, Block)
        return block

    def run_blocks(self, x_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """-> hidden [T, D] before the final norm, and the balance loss summed over blocks."""
        balance = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        for block in self.blocks.values():
            x_TD, block_balance = block(x_TD, positions)
            balance = balance + block_balance
        return x_TD, balance

    def forward(self, batch: Inputs) -> LossSums:
        """The loss sums of one micro-batch, under ordinary autograd; needs embedding and head."""
        assert self.embedding is not None and self.norm is not None and self.head is not None
        positions, labels_BS = self.positions_of(batch), batch.labels_BS
        hidden_TD, balance = self.run_blocks(self.embedding(batch.inputs_BS.flatten()), positions)
        normed = self.norm(hidden_TD)
        main = head_loss_sum(self.head, normed, labels_BS.flatten())
        mtp = torch.zeros_like(main)
        if self.mtp is not None and self.training:
            mtp_TD, mtp_balance = self.mtp(normed.tensor, self.embedding(next_ids(batch)), positions)
            mtp = head_loss_sum(self.head, mtp_TD, labels_after_next(batch).flatten())
            balance = balance + mtp_balance
        return LossSums(main, mtp, balance)

    def logits(self, inputs_BS: Tensor) -> Tensor:
        """Next-token logits [B, S, V] of ids [B, S], in the model's unquantized dtype.

        Raises ValueError for a sequence that is too long, and on a CPU for an id outside the vocabulary. On a GPU such
        an id fails as an assertion of the device: the host doesn't wait for the comparison.
        """
        assert self.embedding is not None and self.norm is not None and self.head is not None
        _check_ids(inputs_BS, self.config)
        positions_BS = torch.arange(inputs_BS.shape[1], device=inputs_BS.device).expand_as(inputs_BS)
        hidden_TD, _ = self.run_blocks(self.embedding(inputs_BS.flatten()), self.positions(positions_BS))
        return self.head(self.norm(hidden_TD)).unflatten(0, inputs_BS.shape)


def _check_ids(ids_BS: Tensor, c: ModelConfig) -> None:
    if ids_BS.shape[1] > c.max_seq_len:
        raise ValueError(
            f"a sequence of {ids_BS.shape[1]} tokens is longer than model.max_seq_len={c.max_seq_len}: "
            f"use at most {c.max_seq_len}"
        )
    outside_BS = (ids_BS < 0) | (ids_BS >= c.vocab_size)  # a negative index would count from the end, in silence
    if ids_BS.device.type != "cpu":
        torch._assert_async(~outside_BS.any(), f"a token id is outside model.vocab_size={c.vocab_size}")
    elif outside_BS.any():
        raise ValueError(
            f"token id {int(ids_BS[outside_BS][0])} is outside the vocabulary, model.vocab_size={c.vocab_size}: "
            f"use 0 to {c.vocab_size - 1}"
        )


class Mtp(nn.Module):
    """Multi-token prediction, depth 1 (DeepSeek-V3 report, section 2.2).

    (hidden [T, D], embedding of the next token [T, D]) -> hidden for the shared head [T, D], balance loss.

    At position i the module sees the main model's last hidden state of i, behind its final norm, and the embedding of
    token i+1; it norms both, joins them by one projection, runs one more block, and predicts token i+2 through the
    shared head. Embedding and head are the main model's own. The report joins [hidden, embedding] and does not say
    whether the final norm comes before; the released weights are for [embedding, hidden] behind it, and so is this.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, dispatcher: Dispatcher) -> None:
        super().__init__()
        c = config
        self.hidden_norm = RMSNorm(c.dim, recipe, eps=c.norm_eps)
        self.embedding_norm = RMSNorm(c.dim, recipe, eps=c.norm_eps)
        self.final_norm = RMSNorm(c.dim, recipe, eps=c.norm_eps)
        self.join = Linear(2 * c.dim, c.dim, recipe)
        self.block = Block(c, c.num_layers, recipe, dispatcher)

    def forward(self, hidden_TD: Tensor, next_TD: Tensor, positions: Positions) -> tuple[Recallable, Tensor]:
        x_TD, balance_loss = self.block(self.enter(hidden_TD, next_TD), positions)
        return self.leave(x_TD), balance_loss

    def enter(self, hidden_TD: Tensor, next_TD: Tensor) -> Tensor:
        """What the block works on, of the hidden state behind the main model's final norm."""
        normed = self.embedding_norm(next_TD), self.hidden_norm(hidden_TD)
        recalls = [part.recall for part in normed]
        joined = torch.cat([part.tensor for part in normed], dim=-1)
        return self.join(Recallable(joined, lambda: torch.cat([recall() for recall in recalls], dim=-1)))

    def leave(self, x_TD: Tensor) -> Recallable:
        """The block's output, normed for the head."""
        return self.final_norm(x_TD)


def next_ids(batch: Inputs) -> Tensor:
    """The token after each, [T] int64; behind the last of a sequence its label, or any where that is not predicted."""
    if batch.whole is not None:
        return batch.whole.next_ids_BS.flatten()
    last = batch.labels_BS[:, -1:].clamp(min=0)
    return torch.cat([batch.inputs_BS[:, 1:], last], dim=1).flatten()


def labels_after_next(batch: Inputs) -> Tensor:
    """What the MTP module predicts of each token, [B, S], as `mtp_labels`."""
    return mtp_labels(batch.labels_BS) if batch.whole is None else batch.whole.mtp_labels_BS


def generator_of(*names: object) -> torch.Generator:
    """A generator on the host that is seeded by `names` and nothing else."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


@torch.no_grad()
def init_weights(model: Transformer, seed: int, *, ep_rank: int = 0) -> None:
    """Draw every weight from normal(0, init_std), norms are ones, biases zeros; then quantize.

    The same model on every layout. A parameter that is not drawn has an `initial_value`, or a single dimension, as a
    norm's gain. `ep_rank` says which experts are here: local expert j is number ep_rank * e + j of the model.
    """
    std = model.config.init_std
    for name, parameter in model.named_parameters():
        initial_value = getattr(parameter, "initial_value", 1.0 if parameter.dim() == 1 else None)
        if initial_value is not None:
            parameter.fill_(initial_value)
        elif is_expert(parameter):
            first = ep_rank * len(parameter)
            for expert, weight in enumerate(parameter, start=first):
                weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator_of(seed, name, expert)))
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator_of(seed, name)))
    quantize_weights(model)
