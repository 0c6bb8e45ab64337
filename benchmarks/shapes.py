"""The GEMM sizes that benchmarks and the performance model share: those whose figures others have published.

Dense and grouped sizes are DeepGEMM's (github.com/deepseek-ai/DeepGEMM, its README of April 2025, pull requests 74 and
86, and tests), the Linears of DeepSeek-V3. `published` is DeepGEMM's figure on an H800 in TFLOPS, or None: something to
stand beside, not a baseline, for it was measured elsewhere; ratios are only taken inside one run.
"""

from fp8moe.plan.gemm_model import Problem as Problem

DENSE = (
    Problem("gemm", 4096, 7168, 16384, published=1519),
    Problem("gemm", 4096, 4096, 7168, published=1439),
    Problem("gemm", 4096, 24576, 1536, published=1270),
    Problem("gemm", 4096, 7168, 2048, published=1215),
    Problem("gemm", 4096, 32768, 512, published=836),
    Problem("gemm", 4096, 2112, 7168, published=1058),
)
DENSE_WGRAD = (Problem("gemm_columns", 7168, 16384, 4096, "columns", published=994),)
GROUPED = (
    Problem("grouped_gemm", 8192, 4096, 7168, groups=4, published=1381),
    Problem("grouped_gemm", 8192, 7168, 2048, groups=4, published=1262),
)
GROUPED_WGRAD = (
    Problem("grouped_wgrad", 7168, 4096, 4096, "columns", groups=4),
    Problem("grouped_wgrad", 7168, 4096, 8192, "columns", groups=4, published=1044),
    Problem("grouped_wgrad", 2048, 7168, 4096, "columns", groups=8),
    # Both of an expert's weights, 32 experts a rank of 1,024 tokens each: bound by the sums in HBM.
    Problem("grouped_wgrad", 4096, 7168, 1024, "columns", groups=32),
    Problem("grouped_wgrad", 7168, 2048, 1024, "columns", groups=32),
)
# Rows and width of what is cast: a micro-batch's activations, and what eight experts of one rank receive.
CASTS = ((4096, 7168), (16384, 7168), (32768, 4096))
