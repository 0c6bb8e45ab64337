"""How well a kernel must use memory, and the reason where one does worse: the bounds of `speed`'s counts.

At least 95 % of what loads and stores move should be useful, access by access, and shared memory should take at most
1.1 wavefronts where one is enough. A kernel that does worse stands in the table with how much worse it may be.
"""

from __future__ import annotations

import re
from typing import Any

LEAST_USEFUL, MOST_WAVEFRONTS = 0.95, 1.1
ACROSS = "maxima along tokens cross warps through shared memory, laid out by Triton with the lanes of a row in one bank"
# (kernels, figure, its limit, reason)
ACCEPTED = (
    (r"^gluon grouped_gemm .* rows_kernel", "loads", 0.12, "only the ends of groups are loaded, a word each"),
    (r"^gluon grouped_wgrad add_(long|fetched) ", "loads", 0.12, "only a group's two offsets are loaded, a word each"),
    (r"^gluon grouped_mm_wgrad add_fetched ", "loads", 0.12, "the same"),
    (r"^gluon gemm_columns bf16 ", "stores", 0.5, "a warp's fragment has 8 values of a row: 16 bytes of BF16"),
    (r" add_long .* columns_kernel", "banks", 1.65, "rows of a fragment, 8 bytes a lane, meet in TMA's swizzle"),
    (r"^triton (gemm|grouped_gemm) ", "loads", 0.23, "a scale of a block is one word of a sector a warp"),
    (r"zero_rows_kernel", "loads", 0.12, "only the end of the last group is loaded, a word"),
    (r"^triton grouped_mm fp32 ", "banks", 7.5, "FP32 experts, tests' choice, read weights across their rows"),
    (r"quantize_(rows|blocks|rows_and_columns) ", "loads", 0.5, "two loads of a lane share a sector, one hits L1"),
    (r"quantize_columns ", "banks", 2.2, ACROSS),
    (r"quantize_rows_and_columns ", "banks", 2.05, ACROSS),
    (r"^triton requantize_columns ", "banks", 2.05, ACROSS),
    (r"^triton requantize_columns ", "loads", 0.94, "scales of 32 rows are loaded once a program"),
    (r"^triton e5m6 (e5m6_columns|unpack)_kernel", "loads", 0.32, "three words of a run, 12 bytes apart: two hit L1"),
    (r"^triton e5m6 e5m6_columns_kernel", "banks", 2.7, ACROSS),
    (r"^triton adamw_step_quantize ", "loads", 0.88, "of the weight read again: two loads of a lane share a sector"),
    (r"^triton squared_norm ", "loads", 0.25, "two partial sums are a quarter of a sector"),
    (r"^triton squared_norm ", "stores", 0.25, "one number a program"),
    (r"^triton swiglu(_backward)? ", "loads", 0.5, "two loads of a lane share a sector, one hits L1"),
    (r"^triton swiglu_columns ", "loads", 0.83, "a scale of a token is one word of a sector a warp"),
    (r"^triton swiglu_(columns|backward) ", "banks", 1.7, ACROSS),
    (r"^triton swiglu_columns clamped bf16 F320 ", "loads", 0.77, "a scale of a token is one word of a sector a warp"),
    (r"^triton (add_expert_bias|expert_bias_wgrad) bf16 ", "loads", 0.92, "weights and ends of groups are a word each"),
    (r"^triton expert_bias_wgrad fp8 ", "loads", 0.85, "a scale of 128 tokens is one word of a sector"),
    (r"^triton expert_bias_dgrad fp8 ", "loads", 0.7, "two loads of a lane share a sector of the bias, one hits L1"),
    (r"permute .*copy_kernel", "loads", 0.8, "the row that a copy comes from is one number for a whole row"),
    (r"cast_kernel", "loads", 0.52, "two loads of a lane share a sector, and places are one number a row"),
    (r"cast_kernel", "stores", 0.93, "a scale goes to each of a row's places alone"),
    (r"sum_kernel", "loads", 0.93, "the place of a copy is one number for a whole row"),
    (r"cross_entropy (bf16|fp32)", "stores", 0.12, "a loss is one word a row"),
    (r"sum_runs_kernel", "loads", 0.65, "an id, a place and the end of a run are one number for a whole row"),
    (r"plan_rows ", "loads", 0.2, "a few counts an expert, and ids of rows in a given order"),
    (r"plan_message ", "loads", 0.25, "a few counts a peer"),
    (r"plan_message ", "stores", 0.25, "a few counts a peer, and a scatter of single numbers"),
    (r"^triton pack_message ", "loads", 0.85, "the place of a row is one number, its scales are far apart"),
    (r"^triton pack_message ", "stores", 0.75, "weights, ids and exponents of a row are no whole sectors"),
    (r"^triton unpack_message ", "loads", 0.6, "as is what a row of 256 values has behind its codes, in two sectors"),
    (r"^triton route .* route_kernel", "loads", 0.82, "logits of the chosen are gathered again, from L1"),
    (r"^triton route .* route_kernel", "stores", 0.8, "a row's few ids and weights are no whole sectors"),
    (r" balance_kernel", "loads", 0.65, "two loads of a lane share a sector, one hits L1"),
    (r" balance_kernel", "stores", 0.9, "a part of the loss is one word"),
    (r" balance_kernel", "banks", 1.6, "sums along parts cross warps, 16 numbers at a time"),
    (r"route_backward_kernel", "loads", 0.8, "a row's ids and gradients of weights are loaded one by one"),
    (r"plan_rows ", "stores", 0.25, "a few counts an expert, and a scatter of single numbers"),
    (r"rms_norm .*norm_kernel", "loads", 0.5, "two loads of a lane share a sector, one hits L1"),
    (r"rms_norm_columns ", "banks", 2.05, ACROSS),
    (r"norm_backward_kernel", "banks", 10.0, "rows of a block are summed across warps, once a program"),
    (r"gain_kernel", "banks", 4.4, "shares are summed across warps, once a program"),
    (r"rope_queries_backward bf16 ", "loads", 0.92, "two loads of a lane share a sector of angles, one hits L1"),
    (r"rope_keys ", "loads", 0.86, "angles and the shared part are loaded once a token, for few heads here"),
    (r" decode_attention_kernel", "loads", 0.84, "a row of queries has a place, 8 bytes of a sector"),
    (r" reduce_splits_kernel", "loads", 0.7, "a split's maximum and total are two words"),
    (r"keys_backward_kernel", "banks", 2.9, "heads are summed across warps, once a token"),
)  # fmt: skip
SUMMED = "sums across warps go through shared memory in a layout of Triton's that 3.8 no longer chooses"
_BEFORE_3_8 = (
    ("bias_rows_kernel", "banks", 4.9, SUMMED),
    (r"^triton rms_norm_backward fp32 D128 ", "banks", 12.9, SUMMED),
)
# What older compilers make of the same kernels, by Triton version.
OLDER = {
    "3.6.0": (
        *_BEFORE_3_8,
        (r"^triton swiglu_backward .*F320 ", "loads", 0.35, "three loads of a lane share a sector, two hit L1"),
        (r"^triton rope_queries bf16 ", "loads", 0.93, "two loads of a lane share a sector of angles, one hits L1"),
    ),
    "3.7.1": _BEFORE_3_8,
}


def beyond(kernel: str, row: dict[str, Any], version: str = "") -> list[str]:
    """Which figures of a kernel are worse than they should be, or than is accepted of it, from this Triton."""
    limits = {"loads": LEAST_USEFUL, "stores": LEAST_USEFUL, "banks": MOST_WAVEFRONTS}
    for pattern, figure, limit, _ in (*ACCEPTED, *OLDER.get(version, ())):
        if re.search(pattern, kernel):
            limits[figure] = (max if figure == "banks" else min)(limit, limits[figure])
    return [
        f"{kernel}: {name} {row[name]}, the limit is {limit}"
        for name, limit in limits.items()
        if name in row and (row[name] > limit if name == "banks" else row[name] < limit)
    ]
