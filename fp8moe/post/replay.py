"""Rollout routing replay (R3, arXiv 2510.11370): an update sends tokens to the experts that the rollout sent them to.

Two experts of nearly the same score change places with the last bits of the hidden state, so of a model of experts the
generator and training's forward compute different functions of the same weights now and then, and the ratio of an
update to its rollout has outliers that no weight has made. With `grpo.router_replay` the choice is the rollout's in
training's forward that gives the old log-probabilities and in the forwards and backwards of all updates of the batch;
weights of the chosen experts, and so the router's gradient, are of the present logits.

The reference chooses its own experts. The KL is to the policy that it is, with its routing, and what the rollout drew
from is the trained one with its own, so that is the pair to compare; the price is that in FP8 the KL of a policy to
itself is not 0 but about as large as the mismatch without replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from fp8moe.errors import ConfigError
from fp8moe.layers.router import Routing
from fp8moe.parallel.collectives import all_reduce
from fp8moe.train.config import TrainConfig
from fp8moe.train.run import Run


def check_replay(config: TrainConfig) -> None:
    """Raises ConfigError where there is no routing to replay."""
    if config.grpo.router_replay and not config.model.expert_layers:
        raise ConfigError(
            "grpo.router_replay=true replays the choice of experts and the model has 0 layers with experts: use "
            "grpo.router_replay=false"
        )


class RoutingChanges:
    """Counts, while a block runs forwards with given experts, those that a router would not have chosen."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._changed = torch.zeros((), dtype=torch.float64, device=run.device)

    def __enter__(self) -> RoutingChanges:
        self._hooks = [router.register_forward_hook(self._note) for router in self._run.routers().values()]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, router: Any, given: Any, routing: Routing) -> None:
        if routing.own_ids_TK is not None:
            is_own_TK = (routing.topk_ids_TK[:, :, None] == routing.own_ids_TK[:, None, :]).any(-1)
            self._changed += (~is_own_TK).sum()

    def figures(self, routing: Sequence[NDArray[Any]] | None) -> dict[str, float]:
        """The share of a batch's choices, of which all ranks have their parts. Collective over all ranks."""
        if routing is None:
            return {}
        changed = float(all_reduce(self._changed, self._run.mesh.world_group))
        return {"routing_changed": changed / max(sum(one.size for one in routing), 1)}
