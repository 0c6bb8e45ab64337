"""Benchmarks, one `bench_<what>.py` each; run from the repository root as `python -m benchmarks.bench_<what>`.

CUDA's environment is that of every command of `fp8moe`.
"""

import os

from fp8moe.cuda_environment import prepare

prepare(os.environ)
