"""DeepGEMM as a back end, where the package `deep_gemm` is installed: rows by blocks in BF16, dense and grouped.

A baseline and a second opinion, never a default: it compiles its kernels with its own toolchain on first use.
"""
