"""`python -m tests.host_gpu LIBRARY COMMAND ...`: a command of `fp8moe` on the GPU of this folder.

It ends with the command's code, or, where that is 0, with 9 if two streams touched memory in no order.
"""

import sys
from pathlib import Path

from tests.fake_cuda import guard

RACES = 9

if __name__ == "__main__":
    guard.load(Path(sys.argv[1]))
    import torch

    from tests.host_gpu import hopper, races

    hopper.install()
    torch.ops.host_gpu.log(True)
    from fp8moe.__main__ import main

    code = main(sys.argv[2:])
    found = races.races(races.lines(*torch.ops.host_gpu.lines()))
    if "HOST_GPU_COUNT" in __import__("os").environ:
        from collections import Counter
        n, w = torch.ops.host_gpu.lines()
        print(Counter((n[i], n[i + 1]) for i in range(0, len(n), 5)), file=sys.stderr)
    for one in found:
        print(f"rank {hopper.LOCAL_RANK}: {one}", file=sys.stderr)
    sys.exit(code or (RACES if found else 0))
