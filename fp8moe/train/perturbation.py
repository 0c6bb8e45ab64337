"""A small change of the weights that a run begins from, by which `fp8moe numerics` finds how far runs part by chaos.

Each weight is multiplied by 1 + size or 1 - size, by a coin that depends on the seed, the name of the parameter and the
number of the expert alone: the same on every layout. It is the masters that change, and the weights are those rounded:
a change of 2e-3 is a quarter to a half of what BF16 resolves, so it would be lost or doubled in a BF16 weight. Refused:
another seed, which is another start, and parts runs from their first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.layers.linear import is_expert
from fp8moe.model.transformer import generator_of
from fp8moe.train.optimizer.state import Held


def perturb(held: Mapping[str, Iterable[Held]], size: float, *, seed: int, ep_rank: int) -> None:
    """Change the masters in `held`, by name of their parameters; `ep_rank` says which experts are here."""
    for name, ranges in held.items():
        signs: Tensor | None = None
        for one in ranges:
            if signs is None:
                signs = _signs(one.parameter, name, seed, ep_rank)
            master = one.tensors["master"]
            master.mul_(1.0 + size * signs[one.first : one.first + len(master)].to(master.device))


def _signs(parameter: Parameter, name: str, seed: int, ep_rank: int) -> Tensor:
    """1 and -1 in FP32 for each value of this rank's part of a parameter, flattened."""
    if not is_expert(parameter):
        return _coins(parameter.numel(), seed, name)
    first = ep_rank * len(parameter)
    experts = range(first, first + len(parameter))
    return torch.cat([_coins(parameter[0].numel(), seed, name, expert) for expert in experts])


def _coins(count: int, *names: object) -> Tensor:
    return torch.empty(count).bernoulli_(0.5, generator=generator_of("perturbation", *names)).mul_(2).sub_(1)
