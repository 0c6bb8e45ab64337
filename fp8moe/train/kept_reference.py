"""The reference of a run of GRPO: earlier weights of the policy, kept on the host beside those that are trained.

    step 0                             the weights that the run begins with
    every grpo.reference_every steps   the weights after them; 0: the first ones stay

Log-probabilities of a batch of rollouts by the reference are taken once, before its updates, so the reference is
replaced where a batch is used up, and grpo.reference_every is a multiple of a batch's updates. Which batch that is
follows from samples consumed alone, as all of a batch does. A run that goes back behind a replacement
(`train.rollback`) has the earlier reference again, and replaces it when a batch is next used up. The replacement is
part of the step's change of state (`train.step.end_step`): ranks that save the same step have the same reference.

Kept are the FP32 masters that this rank holds and its router biases. Where they may be replaced they are part of every
checkpoint, `reference.NAME`, 4 bytes a parameter more, so that a checkpoint is enough to go on from: copied elsewhere,
behind a URL, on another layout, without `init_from`. Refused: the checkpoint of the step of a replacement as the
reference. No byte would be stored twice, but that one would have to be written whatever checkpoint.every, spared by
checkpoint.keep and carried along with each later one, and a single damaged file would end the run. The first weights,
where they stay, are read from `init_from` instead. Refused as well: a second model on the device (`post.reference`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fp8moe.errors import ConfigError
from fp8moe.layers.router import Router
from fp8moe.parallel.mesh import Mesh
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig, foreign_weights
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer
from fp8moe.train.optimizer.state import Held

AT = "reference_at"  # in checkpoints: the step of the reference, and the samples consumed by then
logger = logging.getLogger(__name__)


class KeptReference:
    """This rank's part of a reference.

    masters: FP32 [n] a shard, on the host. biases: of routers, by name. is_saved: it is part of the run's checkpoints.
    foreign: opens weights of `init_from` that are no checkpoint's.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        optimizer: Optimizer | DeepSpeedAdamW,
        routers: Mapping[str, Router],
        foreign: checkpoint.OpenForeign = checkpoint.no_foreign,
    ) -> None:
        """Raises ConfigError. It is nothing yet: `take` or `restore` follows."""
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                "a reference is kept beside our own optimizer: use another optimizer.sharding, or grpo.kl=0"
            )
        self._config, self._mesh, self._foreign = config, mesh, foreign
        self._optimizer, self._routers = optimizer, routers
        self.masters = [torch.empty_like(master, device="cpu") for master in optimizer.masters()]
        self.biases = {name: torch.empty_like(router.bias_E) for name, router in routers.items()}
        self._at = torch.tensor([-1, -1])
        self.is_saved = config.grpo.reference_every > 0

    @property
    def step(self) -> int:
        """The step after which the weights were these."""
        return int(self._at[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of the masters on this rank."""
        return sum(master.nbytes for master in self.masters)

    @torch.no_grad()
    def take(self, step: int, consumed: int) -> None:
        """Become the present weights, those after `step` steps and `consumed` samples. Waits for the device.

        No checkpoint may be being copied.
        """
        for kept, master in zip(self.masters, self._optimizer.masters(), strict=True):
            kept.copy_(master)
        for name, router in self._routers.items():
            self.biases[name].copy_(router.bias_E)
        self._at.copy_(torch.tensor([step, consumed]))

    def replace_if_due(self, step: int, consumed: int) -> None:
        """Become the present weights where that is due after this step."""
        if self._config.grpo.reference_is_due(int(self._at[1]), consumed):
            self.take(step, consumed)

    def held(self) -> dict[str, list[Held]]:
        """Its masters by name of the parameter."""
        return self._optimizer.named("reference", self.masters)

    def tensors(
        self, take: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> dict[str, Tensor | checkpoint.Pieces]:
        """What a checkpoint holds of it, by name; of each tensor, what `take` makes."""
        biases = {f"reference_bias.{name}": take(bias) for name, bias in self.biases.items()}
        return checkpoint.run_tensors(self.held(), {}, {}, self._mesh, take) | biases | {AT: take(self._at)}

    def restore(self, path: checkpoint.Location, stored: set[str]) -> None:
        """Become the reference that the checkpoint at `path` holds; where it holds none, the run's first weights.

        stored: names of its tensors. Raises ConfigError and DataError. Collective over all ranks.
        """
        if AT in stored:
            checkpoint.load(path, self.tensors(), self._mesh.world_group)
            self.is_saved = True  # also where it is replaced no more: init_from has other weights
            logger.info("the reference is the policy after step %d", self.step)
        elif self.step != 0:
            self._load_first()
            self._at.zero_()

    @torch.no_grad()
    def _load_first(self) -> None:
        """Read the weights that the run began from, since its own have gone on."""
        config, mesh = self._config, self._mesh
        if config.init_from is None:
            raise ConfigError("grpo.kl needs the weights that the run began from and init_from is null: name them")
        kind = "ema." if config.init_from_ema else "master."
        taken = checkpoint.run_tensors(self._optimizer.named("master", self.masters), self.biases, {}, mesh)
        named = {name.replace("master.", kind, 1): tensor for name, tensor in taken.items()}
        found = foreign_weights(config, self._foreign)
        if found is not None:
            found.load(named)
            return
        path = checkpoint.choose_weights(config.init_from, config.model, mesh, averaged=config.init_from_ema)
        checkpoint.load(path, named, mesh.world_group)
