"""The portable back end: every cast and GEMM in plain Triton, for any GPU with FP8 tensor cores.

It is also the check of the Hopper kernels and, under TRITON_INTERPRET=1, runs on a CPU: what tests prove there is the
arithmetic and every index; what only hardware can prove is its speed and the order of its memory operations.

Multiply and add stay one instruction (FFMA): promotion is one for each value that a tensor core makes. Triton fuses
by default up to 3.9, which announces that 3.10 will not, so it is asked for here, for both back ends.
"""

import triton

triton.knobs.language.default_fp_fusion = True
