"""A stage's runs for one micro-batch: what a pipeline calls, made of the part of the model that this rank holds.

The runs form a chain. Each takes its input from the run before it and, going back, its gradient from the run behind
it, when its phase asks; the pipeline stands at both ends of the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from fp8moe.layers.phase import Run
from fp8moe.layers.wgrad import WeightGradStore
from fp8moe.model.block import Block
from fp8moe.model.ends import EmbeddingRun, LossRun, MtpEntranceRun
from fp8moe.model.loss import LossTally, LossWeights
from fp8moe.model.partition import Stage
from fp8moe.model.phases import BalanceLoss, run_block
from fp8moe.model.transformer import Inputs, Transformer, next_ids


class StageRuns:
    """Makes the runs of any stage that `model` holds, for the micro-batches of one step.

    stages: all of the model's, by index. weights: of the losses in the total. tally: where their values are added up.
    """

    def __init__(
        self,
        model: Transformer,
        stages: Sequence[Stage],
        batches: Sequence[Inputs],
        weights: LossWeights,
        tally: LossTally,
    ) -> None:
        self._model, self._stages, self._batches = model, stages, batches
        self._weights, self._tally, self._store = weights, tally, WeightGradStore()
        self._balance = BalanceLoss(weights.balance, tally.add_balance)

    def __call__(self, stage: int, microbatch: int, source: Callable[[], Tensor] | None) -> Sequence[Run]:
        """The chain for micro-batch number `microbatch`; `source` gives the input of every stage but the first."""
        here, batch, model = self._stages[stage], self._batches[microbatch], self._model
        positions = model.positions(batch.positions_BS, batch.documents_BS)
        runs: list[Run] = []

        def key(name: object) -> tuple[int, object]:
            return microbatch, name

        def before() -> Callable[[], Tensor]:
            if runs:
                return _Output(runs[-1])
            assert source is not None
            return source

        def add_block(block: Block, name: object) -> None:
            runs.append(run_block(block, before(), positions, self._balance, store=self._store, key=key(name)))

        if here.embedding:
            assert model.embedding is not None
            ids_T = batch.inputs_BS.flatten()
            runs.append(EmbeddingRun(model.embedding, ids_T, store=self._store, key=key("embedding")))
        for layer in here.layers:
            add_block(model.block(layer), layer)
        if here.head:
            entrance = None
            if model.mtp is not None and model.training:
                assert model.embedding is not None
                entrance = MtpEntranceRun(
                    model.mtp, model.embedding, before(), next_ids(batch), store=self._store, key=key("join")
                )
                runs.append(entrance)
                add_block(model.mtp.block, "mtp")
            runs.append(
                LossRun(model, before(), batch.labels_BS, self._weights, self._tally, entrance=entrance,
                        store=self._store, key=key("loss"))
            )  # fmt: skip
        for run, behind in pairwise(runs):
            run.backward_from(_InputGradient(behind))
        return runs


class _OfRun:
    """Something of a run, given once, after which the run is forgotten.

    A chain that went on knowing both ways would be a circle, whose activations stay in memory until Python happens to
    collect it.
    """

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run

    def _forget(self) -> Run:
        run, self._run = self._run, None
        assert run is not None
        return run


class _Output(_OfRun):
    def __call__(self) -> Tensor:
        return self._forget().output


class _InputGradient(_OfRun):
    def __call__(self) -> Tensor:
        return self._forget().input_gradient
