"""The portable back end: every cast and GEMM in plain Triton, for any GPU with FP8 tensor cores.

It is also the check of the Hopper kernels and, under TRITON_INTERPRET=1, runs on a CPU: what tests prove there is the
arithmetic and every index; what only hardware can prove is its speed and the order of its memory operations.
"""
