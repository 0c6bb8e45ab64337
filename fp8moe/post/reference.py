"""A forward by the reference policy, whose weights `train.kept_reference` keeps.

It reads the parameters in place, as a validation of averaged weights does, and the trained ones are back afterwards to
the bit. Refused: a second model, which would take the memory of another set of parameters on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from fp8moe.train.kept_reference import KeptReference
from fp8moe.train.optimizer import Optimizer
from fp8moe.train.run import Run


@contextmanager
def reference_weights(run: Run, reference: KeptReference) -> Iterator[None]:
    """While the block runs the model is the reference. Collective where weights are sharded."""
    routers = run.routers()
    assert isinstance(run.optimizer, Optimizer), "refused by KeptReference"
    run.saver.wait_copied()  # a checkpoint's copy is made of the masters, which FP32 parameters share
    own: dict[str, Tensor] = {name: router.bias_E.clone() for name, router in routers.items()}
    with run.preemption.changing(), run.optimizer.reading(reference.masters):
        for name, router in routers.items():
            router.bias_E.copy_(reference.biases[name])
        try:
            yield
        finally:
            for name, router in routers.items():
                router.bias_E.copy_(own[name])
