"""Python's garbage collector, which runs between steps and nowhere else.

Left to itself it runs whenever enough objects were made: within a step, on one rank at a time, and every other rank
waits for that one. What start-up made (modules, the model, compiled kernels) is frozen, so that a collection looks
only at what was made since; every EVERY steps all ranks collect at once. Reference counting frees nearly everything by
itself, tensors included: what is left for the collector are cycles, such as an exception and its frames.

Refused: no collection at all, under which a cycle that holds a tensor holds it for the whole run.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator

EVERY = 50  # steps
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def no_collection_within_steps() -> Iterator[None]:
    """While the block runs nothing is collected but by `collect_if_due`."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect_if_due(step: int) -> None:
    """Collect after every EVERY-th step; how long it took is in the log."""
    if step % EVERY:
        return
    start = time.perf_counter()
    found = gc.collect()
    logger.info(
        "garbage collected after step %d: %d objects, %.1f ms", step, found, 1e3 * (time.perf_counter() - start)
    )
