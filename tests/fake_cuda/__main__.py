"""`python -m tests.fake_cuda FOLDER [--precision fp8 bf16] [--tokens 4096 16384]`: trace a training step, print it.

Each trace is saved as FOLDER/PRECISION-TOKENS.json; the compiled guard is kept in FOLDER as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.fake_cuda import guard


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fake_cuda", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    options = parser.parse_args()
    if reason := guard.why_not():
        sys.exit(reason)
    os.environ["TRITON_INTERPRET"] = "0"  # kernels are the compiler's, whose launches are counted
    guard.load(guard.build(options.folder))
    from tests.fake_cuda.report import describe
    from tests.fake_cuda.step import trace_step

    for precision in options.precision:
        for tokens in options.tokens:
            trace = trace_step(precision, tokens)
            trace.save(options.folder / f"{precision}-{tokens}.json")
            print(f"{precision}, {tokens} tokens\n{describe(trace)}\n")
    sys.stdout.flush()
    os._exit(0)  # what autograd's threads hold of the fake device can't be torn down


main()
