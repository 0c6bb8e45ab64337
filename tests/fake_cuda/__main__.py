"""`python -m tests.fake_cuda FOLDER`: trace a training step and the dispatches between ranks, print and save them.

A trace is FOLDER/PRECISION-TOKENS.json, with -grouped for a model of grouped-query attention and -gpt_oss for one with
biases of experts, or FOLDER/PRECISION-ROUTE-COUNTS.json for a dispatch. --docs also rewrites the tables of
docs/layer.md.
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
    parser.add_argument("--guard", type=Path, help="the compiled guard; built in FOLDER without it")
    parser.add_argument("--docs", action="store_true", help="rewrite the tables of docs/layer.md")
    options = parser.parse_args()
    if reason := guard.why_not():
        sys.exit(reason)
    os.environ["TRITON_INTERPRET"] = "0"  # kernels are the compiler's, whose launches are counted
    guard.load(options.guard or guard.build(options.folder))
    from tests.fake_cuda import layer_page
    from tests.fake_cuda.messages import one_hop, trace_dispatch, two_hops
    from tests.fake_cuda.report import describe
    from tests.fake_cuda.step import GPT_OSS_SHARE, GROUPED_SHARE, TOKENS, trace_step

    traces = {}
    for precision in ("fp8", "bf16"):
        for tokens in TOKENS:
            traces[f"{precision}-{tokens}"] = trace_step(precision, tokens)
        traces[f"{precision}-{TOKENS[0]}-grouped"] = trace_step(precision, TOKENS[0], GROUPED_SHARE)
        traces[f"{precision}-{TOKENS[0]}-gpt_oss"] = trace_step(precision, TOKENS[0], GPT_OSS_SHARE)
        for route in (one_hop, two_hops):
            for name, factor in (("fixed", 1.5), ("exact", None)):
                traces[f"{precision}-{route.__name__}-{name}"] = trace_dispatch(route, precision, TOKENS[0], factor)
    for name, trace in traces.items():
        trace.save(options.folder / f"{name}.json")
        print(f"== {name}\n{describe(trace)}\n")
    if options.docs:
        layer_page.rewrite(traces)
    sys.stdout.flush()
    os._exit(0)  # what autograd's threads hold of the fake device can't be torn down


main()
