"""`python -m tests.ptx.layer_trace FILE`: what the layer of `layer_step` launches on a GPU, without the machine.

The same step on tensors without data that lie on a fake `cuda` (`tests/fake_cuda`): FILE gets, by kind of layer, the
(phase, op, kernel) of every launch of the project's kernels, in order.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.fake_cuda import guard


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.layer_trace", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--guard", type=Path, help="the compiled guard; built beside FILE without it")
    options = parser.parse_args()
    if reason := guard.why_not():
        sys.exit(reason)
    os.environ["TRITON_INTERPRET"] = "0"
    guard.load(options.guard or guard.build(options.file.parent))
    from tests.fake_cuda.launching import on_fake_hopper
    from tests.fake_cuda.recorder import Recorder
    from tests.ptx.layer_step import RECIPES, build, step

    class Phases:
        """Tells the recorder of spans."""

        def __init__(self, recorder: Recorder) -> None:
            self.recorder = recorder

        def began(self, name: str) -> Any:
            phase = self.recorder.in_phase(name)
            phase.__enter__()
            return phase

        def ended(self, name: str, began: Any) -> None:
            began.__exit__(None, None, None)

    traces = {}
    for kind in RECIPES:
        recorder = Recorder()
        with on_fake_hopper(recorder):
            step(build(kind, "cuda"), Phases(recorder))
        launches = recorder.trace.launches
        traces[kind] = [(one.phase, one.op, one.kernel) for one in launches if not one.kernel.startswith("aten::")]
    options.file.write_text(json.dumps(traces))
    os._exit(0)  # what autograd's threads hold of the fake device can't be torn down


main()
