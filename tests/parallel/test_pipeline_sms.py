"""SMs left to messages by a pipeline's GEMMs: from each message's start to its wait, in pairs and outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.layers.phase import Phase
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.stream import Pending
from fp8moe.schedule.build import build_schedule
from tests.parallel.test_pipeline import Logged, alone


class Sending(Logged):
    """Sends itself a message in each direction: started in one phase, waited for in the next."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        stream, log = communication_stream(torch.device("cpu")), self.log
        (whole,) = self.phases
        started: list[Pending[None, None]] = []

        def free() -> int:
            return backend.allowed_sms(100)

        def start(name: str) -> None:
            started.append(stream.start(lambda: None, lambda _: None))
            log.append(f"{name}{self.name} {free()} started")

        def then(step: Callable[[], None]) -> Callable[[], None]:
            def wait() -> None:
                log.append(f"before {free()}")
                started.pop().wait()
                step()

            return wait

        assert whole.wgrad is not None
        self.phases = (
            Phase("attn", "compute", lambda: None, then(lambda: log.append(f"B{self.name} {free()}")), lambda: None),
            Phase("dispatch", "communication", lambda: start("F"), lambda: start("B"), None),
            Phase("mlp", "compute", then(whole.forward), whole.backward, whole.wgrad),
        )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_the_sm_limit_holds_while_messages_are_in_flight_and_no_longer(schedule: str, overlap: bool) -> None:
    """In pairs and outside; a phase after its message has all SMs again unless the other's is still in flight."""
    log, _ = alone(build_schedule(schedule, 1, 4), overlap=overlap, sms=80, logged=Sending)
    in_flight = 0
    for entry in log:
        if entry.endswith("started"):
            in_flight += 1
            assert entry.split()[1] == "80", entry
        elif entry.startswith("before"):
            assert entry == "before 80"
            in_flight -= 1
        elif entry[0] in "FBW":
            assert entry.split()[1] == ("80" if in_flight else "100"), entry
    assert in_flight == 0 and backend.allowed_sms(100) == 100
    free, _ = alone(build_schedule(schedule, 1, 4), overlap=overlap, logged=Sending)
    assert {entry.split()[1] for entry in free if entry[0] in "FBW"} == {"100"}
