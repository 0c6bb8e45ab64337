"""Steps of a run that is measured in epochs: `epochs` passes over the data, known once the data is prepared.

The data is prepared here, by every process for itself, before any process group exists: the first on a machine builds
the cache, which the others wait for by its lock. So `steps` is a number wherever a run reads it, in config.yaml too.
Refused: counting within the run, where a resume, the learning rate and the progress would each have to wait for it.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

from fp8moe.data.build import open_data
from fp8moe.data.check import check_files
from fp8moe.train.batch import steps_for
from fp8moe.train.config import TrainConfig, laid_out


def with_steps(config: TrainConfig, world_size: int) -> tuple[TrainConfig, str | None]:
    """(the configuration with `steps` by its `epochs`, a sentence that says so); as it is where there are no epochs.

    Raises ValueError, ConfigError or DataError.
    """
    if config.epochs is None:
        return config, None
    laid_out(config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))  # cheap, so it is first
    check_files(config.data)
    data = open_data(
        config.data, seq_len=config.seq_len, seed=config.seed, validation_samples=config.validation.samples
    )
    samples = len(data.train)
    steps = steps_for(config.batch, math.ceil(config.epochs * samples))
    sentence = (
        f"epochs={config.epochs:g}: steps={steps} of {config.batch.sequences} samples, of which there are {samples}"
    )
    return replace(config, steps=steps), sentence
