"""Sums of floating point that a compiled Triton kernel makes, before and after layouts are chosen.

Where one tensor is wanted in two layouts, Triton may compute it twice rather than convert it, with all that it is made
of. A maximum is the same both times; a sum of floating point in another layout has another order and other last bits,
so that what is stored of it isn't what is used.
"""

import re

REDUCTION = re.compile(r'"tt\.(?:reduce|scan)"\(.*?\}\) :', re.S)
ROUNDED = re.compile(r"\b(?:arith\.(?:addf|subf|mulf|divf)|math\.fma)\b")
# Sums that TTIR still has though nobody wants them: d weight's, where there are no weights.
UNUSED = {"triton swiglu_backward bf16 plain swiglu_backward_kernel": 1}


def rounded_sums(text: str) -> int:
    """Reductions and scans whose result depends on their order, in a module's text."""
    return sum(bool(ROUNDED.search(found)) for found in REDUCTION.findall(text))


def sums_added_again(name: str, asm: dict[str, str]) -> int:
    """By how many sums a kernel's TTGIR has more than its TTIR (a negative number: fewer)."""
    if "ttir" not in asm:  # Gluon: the source chooses every layout
        return 0
    assert asm["ttir"] and asm["ttgir"], "the cache has kept no text"
    return rounded_sums(asm["ttgir"]) - (rounded_sums(asm["ttir"]) - UNUSED.get(name, 0))
