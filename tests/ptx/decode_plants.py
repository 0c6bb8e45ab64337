"""Faults planted in attention to a cache: barriers of the kernel that attends, and what its products read."""

from __future__ import annotations

from tests.ptx.plants import Edit, Plant, change, drop, flip_parity, matches

LATENTS = "triton decode_attention latents H16"
PRODUCT = r"mma\.sync"
# Of a barrier: a store of maxima, of weights behind it, of entries by TMA; nothing of the kind stands between the two.
STORED, CUT, COPIED = r"st\.shared", r"stmatrix", r"cp\.async\.bulk"


def attending(edit: Edit) -> Edit:
    """The edit of the kernel with products; the one that reduces its splits stays."""
    return lambda text: edit(text) if "mma." in text else text


def barrier(ahead: str, behind: str) -> Edit:
    """Without the first barrier of a loop's body between a statement and another."""

    def edit(text: str) -> str:
        inside = matches(text, PRODUCT)[0].start()
        pattern = rf"({ahead}[^;]*;(?:(?!{STORED}|{CUT}|{COPIED}|bar\.sync)[\s\S])*?)bar\.sync[^;]*;"
        pattern += rf"(?=(?:(?!bar\.sync)[\s\S])*?{behind})"
        return text[:inside] + change(pattern, lambda match: match[1])(text[inside:])

    return edit


DECODE_PLANTS = (
    Plant("entries are multiplied before they have arrived", LATENTS,
          attending(flip_parity(0))),
    Plant("half of the entries are expected", LATENTS,
          attending(change(r"expect_tx\S* _, \[%r\d+\], (\d+);", lambda match: match[0].replace(
              f" {match[1]};", f" {int(match[1]) // 2};")))),
    Plant("a warp does not wait for the maxima of the others", LATENTS, attending(barrier(STORED, r"ld\.shared"))),
    Plant("a warp does not wait for the weights of the others", LATENTS, attending(barrier(CUT, r"ldmatrix"))),
    Plant("entries are loaded over those that are still read", LATENTS, attending(drop(r"fence\.proxy\.async", None))),
    Plant("a weight's halves are swapped", LATENTS,
          attending(change(r"(cvt\.rn\.bf16x2\.f32\s+%r\d+, )(%r\d+), (%r\d+)",
                           lambda match: f"{match[1]}{match[3]}, {match[2]}", None))),
    Plant("sums are not scaled to a new maximum", LATENTS,
          attending(change(r"(ex2\.approx\S*\s+(%r\d+), )%r\d+;",
                           lambda match: f"mov.b32 {match[2]}, 0f3F800000;", -1))),
)  # fmt: skip
