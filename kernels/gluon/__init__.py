"""Hopper back end in Gluon: persistent, warp-specialised FP8 GEMMs. `pipeline` holds the skeleton and its protocol."""

import fp8moe.kernels.triton  # noqa: F401  asks the compiler for fused multiply-adds
