"""NVIDIA's block-scaled FP8 GEMM (cuBLASLt 12.9 or newer, Hopper), as PyTorch exposes it: what the others must beat."""
