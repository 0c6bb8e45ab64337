"""The objective of GRPO (DeepSeekMath, arXiv 2402.03300; DeepSeek-R1, arXiv 2501.12948) as a loss of each token.

    A_i    = (R_i - mean R) / std R              over the G samples of one prompt; std is the population's
    r_t    = exp(logp_t - old_t)                 old: the policy before the batch's first update
    J      = mean over samples of mean over tokens of  min(r A, clip(r, 1 - low, 1 + high) A) - kl k3_t
    k3_t   = exp(ref_t - logp_t) - (ref_t - logp_t) - 1       unbiased and never negative

The loss is -J. It depends on the model by the log-probabilities of the sampled tokens alone, so it is a `TokenLoss`:
its slope a token is -A r where nothing is clipped, 0 where the clip is in force, plus kl (1 - exp(ref - logp)).

What the generator says a token's probability was differs from what training's forward says of the same weights: other
products, other batches, FP8 casts of other neighbours. The policy's term is multiplied by min(exp(old - rollout), cap),
truncated importance sampling, whose factor has no gradient.

A group whose samples all score alike has advantage 0 everywhere: it counts in the mean and is left out of the passes,
its KL as well. A sample that could not be scored is left out of its group and of the mean.

Switches: Dr. GRPO (arXiv 2503.20783) divides by neither std nor length; DAPO (arXiv 2503.14476) clips higher above than
below and takes the mean over all tokens.

Legend: N samples in groups of G, T tokens of a micro-batch, M micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.model.head_loss import TokenLoss
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.grpo_config import GrpoConfig

SPREAD = 1e-9  # rewards of a group that differ by less are alike


@dataclass(frozen=True)
class Advantages:
    """of_samples: FP64 [N], 0 where there is none. is_scored, is_trained: bool [N], whether a sample has a reward, and
    whether it has an advantage as well. alike: groups whose rewards are all the same."""

    of_samples: Tensor
    is_scored: Tensor
    is_trained: Tensor
    alike: int


def group_advantages(rewards_N: Tensor, group: int, *, normalize_std: bool) -> Advantages:
    """Advantages of rewards FP64 [N], groups side by side; NaN: the sample could not be scored."""
    rewards = rewards_N.view(-1, group)
    is_scored = ~rewards.isnan()
    count = is_scored.sum(1, keepdim=True).clamp(min=1)
    known = rewards.nan_to_num(0.0)
    centred = torch.where(is_scored, known - known.sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    has_spread = deviation > SPREAD
    advantages = centred / deviation.clamp(min=SPREAD) if normalize_std else centred
    is_trained = is_scored & has_spread
    return Advantages(
        torch.where(is_trained, advantages, 0.0).flatten(),
        is_scored.flatten(),
        is_trained.flatten(),
        int((~has_spread & is_scored.any(1, keepdim=True)).sum()),
    )


def token_shares(lengths_N: Tensor, is_scored_N: Tensor, config: GrpoConfig) -> Tensor:
    """FP64 [N]: what a token of each sample counts in the objective's mean; 0 of a sample that is left out."""
    lengths, samples = lengths_N.double(), is_scored_N.double().sum().clamp(min=1)
    if config.average == "sequence":
        shares = 1 / (samples * lengths.clamp(min=1))
    elif config.average == "token":
        shares = torch.ones_like(lengths) / (lengths * is_scored_N).sum().clamp(min=1)
    else:
        shares = torch.ones_like(lengths) / (samples * config.max_tokens)
    return shares * is_scored_N


@dataclass(frozen=True)
class PolicyTokens:
    """What the objective needs of the labels of M micro-batches, FP32 [M, T] each; 0 where nothing is predicted.

    share: of a token in the mean. old, reference, rollout: log-probabilities; without a reference there is no KL.
    """

    advantage: Tensor
    share: Tensor
    old: Tensor
    rollout: Tensor
    reference: Tensor | None = None

    def to(self, device: torch.device) -> PolicyTokens:
        """The same on a device."""
        reference = None if self.reference is None else self.reference.to(device)
        return PolicyTokens(
            self.advantage.to(device), self.share.to(device), self.old.to(device), self.rollout.to(device), reference
        )


@dataclass(frozen=True)
class PolicyFigures:
    """Of an update's tokens, means: share that is clipped, k3 to the reference, mean of r - 1's size, the k3 of old."""

    clip_share: float
    kl: float | None
    ratio_deviation: float
    old_kl: float


class PolicyLoss(TokenLoss):
    """The objective's negative as a `TokenLoss`, and what is measured on the way.

    scale: the loss's weight divided out again: training multiplies every token loss by 1 / predicted tokens.
    """

    def __init__(self, tokens: PolicyTokens, config: GrpoConfig, scale: float) -> None:
        self.temperature = config.temperature
        self._tokens, self._config, self._scale = tokens, config, scale
        self._sums = torch.zeros(5, dtype=torch.float64, device=tokens.old.device)  # tokens, clipped, k3, |r - 1|, k3

    def __call__(self, microbatch: int, tokens: slice, logp_C: Tensor) -> tuple[Tensor, Tensor]:
        of, config = self._tokens, self._config
        advantage, share, old, rollout = (
            one[microbatch, tokens] for one in (of.advantage, of.share, of.old, of.rollout)
        )
        ratio = (logp_C - old).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        is_clipped = ratio * advantage > clipped * advantage
        factor = torch.ones_like(ratio)
        if config.importance_cap is not None:
            factor = (old - rollout).exp().clamp(max=config.importance_cap)
        losses = -factor * torch.minimum(ratio * advantage, clipped * advantage)
        slopes = -factor * advantage * ratio * ~is_clipped
        k3 = torch.zeros_like(ratio)
        if of.reference is not None:
            k3, slope = unbiased_kl(logp_C, of.reference[microbatch, tokens])
            losses, slopes = losses + config.kl * k3, slopes + config.kl * slope
        counts = share > 0
        to_old, _ = unbiased_kl(logp_C, old)
        measured = (torch.ones_like(ratio), is_clipped, k3, (ratio - 1).abs(), to_old)
        self._sums += torch.stack([(one * counts).sum(dtype=torch.float64) for one in measured])
        weights = share * self._scale
        return losses * weights, slopes * weights

    def figures(self, mesh: Mesh) -> PolicyFigures:
        """Means over all tokens of the update. Collective over all ranks; waits for the device."""
        tokens, clipped, k3, deviation, to_old = all_reduce(self._sums.clone(), mesh.world_group).tolist()
        count = max(tokens, 1.0)
        kl = None if self._tokens.reference is None else k3 / count
        return PolicyFigures(clipped / count, kl, deviation / count, to_old / count)


def unbiased_kl(logp: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """k3 of KL(policy || reference) at tokens sampled from the policy, and its derivative by `logp`."""
    apart = reference - logp
    return apart.exp() - apart - 1, 1 - apart.exp()


@dataclass(frozen=True)
class Mismatch:
    """Rollout against training on the same tokens: mean k3, the largest difference of log-probabilities, and the share
    of tokens whose factor is cut off at the cap."""

    kl: float
    largest: float
    capped: float


def mismatch(old: Tensor, rollout: Tensor, cap: float | None) -> Mismatch:
    """Of log-probabilities [tokens] by training's forward (`old`) and by the generator."""
    if not old.numel():
        return Mismatch(0.0, 0.0, 0.0)
    k3, _ = unbiased_kl(rollout.double(), old.double())
    apart = (old - rollout).double()
    capped = 0.0 if cap is None else float((apart.exp() > cap).double().mean())
    return Mismatch(float(k3.mean()), float(apart.abs().max()), capped)
