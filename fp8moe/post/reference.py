"""The reference policy: the weights that a run began from, kept beside those that are trained.

Kept are this rank's part of the FP32 masters and the router biases, on the host of a GPU; a forward by them reads the
parameters in place, as a validation of averaged weights does, and the trained ones are back afterwards to the bit.
Refused: a second model, which would take the memory of another set of parameters on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8moe.errors import ConfigError
from fp8moe.train import checkpoint
from fp8moe.train.config import foreign_weights
from fp8moe.train.optimizer import Optimizer
from fp8moe.train.run import Run


class Reference:
    """The weights of a run's `init_from`; of the run itself where it stands at step 0 and began from those."""

    def __init__(self, run: Run, foreign: checkpoint.OpenForeign = checkpoint.no_foreign) -> None:
        """Raises ConfigError. Collective over all ranks."""
        if not isinstance(run.optimizer, Optimizer):
            raise ConfigError(
                "a reference is kept beside our own optimizer: use another optimizer.sharding, or grpo.kl=0"
            )
        self._run, self._optimizer = run, run.optimizer
        self._masters = [master.to("cpu", copy=True) for master in run.optimizer.masters()]
        self._biases = {name: router.bias_E.clone() for name, router in run.routers().items()}
        if run.step:
            self._load(foreign)

    @torch.no_grad()
    def _load(self, foreign: checkpoint.OpenForeign) -> None:
        """The weights that the run began from, since its own have gone on."""
        run, config = self._run, self._run.config
        if config.init_from is None:
            raise ConfigError("grpo.kl needs the weights that the run began from and init_from is null: name them")
        kind = "ema." if config.init_from_ema else "master."
        held = self._optimizer.named("master", self._masters)
        taken = checkpoint.run_tensors(held, self._biases, {}, run.mesh)
        stored = {name.replace("master.", kind, 1): tensor for name, tensor in taken.items()}
        found = foreign_weights(config, foreign)
        if found is not None:
            found.load(stored)
            return
        path = checkpoint.choose_weights(config.init_from, config.model, run.mesh, averaged=config.init_from_ema)
        checkpoint.load(path, stored, run.mesh.world_group)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """While the block runs the model is the reference. Collective where weights are sharded."""
        run, routers = self._run, self._run.routers()
        run.saver.wait_copied()  # a checkpoint's copy is made of the masters, which FP32 parameters share
        own: dict[str, Tensor] = {name: router.bias_E.clone() for name, router in routers.items()}
        with run.preemption.changing(), self._optimizer.reading(self._masters):
            for name, router in routers.items():
                router.bias_E.copy_(self._biases[name])
            try:
                yield
            finally:
                for name, router in routers.items():
                    router.bias_E.copy_(own[name])
