"""Which tensors of an FP8 export are FP8, by the rules of the reader it is for; the others stay BF16 and are listed.

vllm (and SGLang)   both multiply activations in tiles of 128, so K must be a multiple of 128. Layers that they merge
                    (q_a with kv_a, gate with up, q with k and v) agree, and all but the last of a merged layer are
                    multiples of 128 rows. The experts of a layer are one module: all or none, of a multiple of 128
                    hidden features.
transformers        finds the size of a block from the grid of scales, so both widths must be multiples of 128

Embedding, head, gate, norms and MTP's `eh_proj` are never FP8. A tensor is quantized by itself; its blocks are those of
the joined weight that training multiplies where it starts and ends at multiples of 128 rows of it, and where a reader's
order of rows keeps each row in its block, as it does for heads of 128 or 64. Where not, `reblocked` names it: its codes
differ from those of the training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from fp8moe.interop.hf_dir import BLOCK
from fp8moe.interop.names import Parameter, Source

Target = Literal["vllm", "transformers"]
MERGED = (("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))


@dataclass(frozen=True)
class Fp8Plan:
    """fp8: names of weights in FP8. kept: modules that stay BF16, by the reason. reblocked: names of weights in FP8
    whose blocks are not those of the training."""

    fp8: frozenset[str]
    kept: dict[str, str]
    reblocked: tuple[str, ...]

    @property
    def modules_to_not_convert(self) -> list[str]:
        """The modules that readers must leave alone, by full path."""
        return sorted(self.kept)


def plan_fp8(parameters: Iterable[Parameter], target: Target) -> Fp8Plan:
    """The plan of a model's weights for `target`."""
    found = list(parameters)
    linear = {s.name: (p, s) for p in found for s in p.sources if p.linear and not _is_joint(s.name)}
    kept: dict[str, str] = {
        _module(s.name): "never FP8"
        for p in found
        for s in p.sources
        if len(p.shape) == 2 and s.name.endswith("weight") and s.name not in linear and p.name != "embedding.weight"
    }
    reasons = {name: _reason(source, parameter, target) for name, (parameter, source) in linear.items()}
    groups: dict[str, list[str]] = {}
    for name in linear:
        groups.setdefault(_layer(name), []).append(name)
    for group in groups.values():
        if target == "vllm" and _experts(group[0]) is None:
            reasons |= {name: reasons[name] or _too_narrow(group, linear) for name in group}
        if any(reasons[name] for name in group):
            reasons |= {name: reasons[name] or "it goes with one that stays BF16" for name in group}
    for name, reason in reasons.items():
        if reason is not None:
            kept[_module(name)] = reason
            if (whole := _experts(name)) is not None:
                kept[whole] = reason
    fp8 = frozenset(name for name, reason in reasons.items() if reason is None)
    reblocked = tuple(name for p in found for name in _reblocked(p) if name in fp8)
    return Fp8Plan(fp8, kept, reblocked)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_joint(name: str) -> bool:
    return name.endswith(".eh_proj.weight")


def _experts(name: str) -> str | None:
    """The module of all experts of a layer that a weight belongs to."""
    head, found, _ = name.partition(".mlp.experts.")
    return f"{head}.mlp.experts" if found else None


def _reason(source: Source, parameter: Parameter, target: Target) -> str | None:
    if parameter.columns % BLOCK:
        return f"its {parameter.columns} inputs are no multiple of {BLOCK}"
    if source.rows % BLOCK and target == "transformers":
        return f"its {source.rows} rows are no multiple of {BLOCK}, which transformers reads wrongly"
    if source.rows % BLOCK and _experts(source.name) and "down_proj" not in source.name:
        return f"its {source.rows} hidden features are no multiple of {BLOCK}"
    return None


def _layer(name: str) -> str:
    """The layer of the readers that a weight belongs to: one name for all that they merge, or hold together."""
    if (whole := _experts(name)) is not None:
        return whole
    head, _, last = _module(name).rpartition(".")
    return next((f"{head}.{group}" for group in MERGED if last in group), name)


def _too_narrow(group: list[str], linear: dict[str, tuple[Parameter, Source]]) -> str | None:
    """Why a merged layer can't be FP8: one of its weights but the last ends within a block."""
    order = [last for one in MERGED for last in one]
    for name in sorted(group, key=lambda name: order.index(_last(name)))[:-1] if len(group) > 1 else []:
        rows = linear[name][1].rows
        if rows % BLOCK:
            return f"{_last(name)} in its merged layer has {rows} rows, no multiple of {BLOCK}"
    return None


def _last(name: str) -> str:
    return _module(name).rpartition(".")[2]


def _reblocked(parameter: Parameter) -> list[str]:
    rows, start, names = parameter.shape[-2] if len(parameter.shape) > 1 else 0, 0, []
    for source in parameter.sources:
        stop = start + source.rows
        is_cut = start % BLOCK or (stop % BLOCK and stop != rows)
        if parameter.linear and (is_cut or _leaves_blocks(source)):
            names.append(source.name)
        start = 0 if stop == rows else stop
    return names


def _leaves_blocks(source: Source) -> bool:
    """Whether the rows that a block of 128 has here are of several blocks there."""
    if source.order is None:
        return False
    index = source.order.index(source.rows)
    return bool((index // BLOCK != torch.arange(source.rows) // BLOCK).any())
