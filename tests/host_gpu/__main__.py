"""`python -m tests.host_gpu LIBRARY COMMAND ...`: a command of `fp8moe` on the GPU of this folder, under torchrun too.

It ends with the command's code, or, where that is 0, with 9 if two streams touched memory that nothing orders. With
HOST_GPU_REPORT=FOLDER each rank writes there, as JSON, what it found, and what it would find if no stream waited for an
event, or nobody said that memory is used elsewhere: a command that finds nothing then either proves nothing. What may
run under its messages stands there too.
"""

import json
import os
import sys
from pathlib import Path

from tests.fake_cuda import guard

RACES = 9

if __name__ == "__main__":
    guard.load(Path(sys.argv[1]))
    import torch

    from tests.host_gpu import hopper, overlap, races

    hopper.install()
    torch.ops.host_gpu.log(True)
    from fp8moe.__main__ import main

    code = main(sys.argv[2:])
    log = list(races.lines(*torch.ops.host_gpu.lines()))
    found = races.races(log)
    for one in found:
        print(f"rank {hopper.LOCAL_RANK}: {one}", file=sys.stderr)
    if folder := os.environ.get("HOST_GPU_REPORT"):
        without = {
            name: races.races(line for line in log if line[0] != kind)
            for name, kind in (("wait", races.WAIT), ("record_stream", races.RECORD_STREAM))
        }
        report = {"found": found, "without": without, "under_messages": overlap.products_under_messages(log)}
        Path(folder, f"{hopper.LOCAL_RANK}.json").write_text(json.dumps(report))
    sys.exit(code or (RACES if found else 0))
