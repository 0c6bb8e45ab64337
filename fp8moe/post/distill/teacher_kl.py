"""The loss of a student that has a teacher: cross entropy of the labels and the KL from the teacher's distribution.

    loss_t = (1 - w) CE_t + w tau^2 KL_t                     tau^2 as Hinton et al. (arXiv 1503.02531)
    KL_t   = sum over the k likeliest p_k log(p_k / q_k) + p_r log(p_r / q_r)

p and q are softmaxes of the logits divided by tau, of teacher and student; p_r and q_r what is left of each outside the
teacher's k. So both are distributions over k + 1 outcomes, and their KL is one: at least 0, and 0 only where the
student agrees with the teacher. It is at most the KL of whole distributions, and that itself where k = V.

Refused: the k terms alone. Their least value is where q_k is p_k divided by the sum of the k, so a student becomes more
certain than its teacher (arXiv 2503.16870 proves that bias and measures what it costs). Both made to sum to 1 over the
k: nothing then holds the student's mass outside of them. One outcome for the rest is the "ghost token" that the same
paper compares.

The gradient by a student's logit j is q_j - p_j among the k, and q_j (1 - p_r / q_r) outside, a softmax times one
factor a token. `kernels.cross_entropy_with_gradient` writes softmaxes with a weight a token; the columns of the k ids
and of the label are then written over it, each in FP32 and rounded once. No kernel of its own and no second [C, V];
with tau other than 1 and w below 1 there are two softmaxes, and a second chunk of logits.

Legend: T tokens, C of a chunk, V vocabulary, K the teacher's k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.kernels.cross_entropy import IGNORE, cross_entropy_with_gradient
from fp8moe.model.head_loss import ChunkLoss, of_cross_entropy
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh
from fp8moe.post.distill.teacher_topk import EXCLUDED, TopK, log_sum_exp
from fp8moe.train.distill_config import DistillConfig

# Log of the largest p_r / q_r in a gradient. A student whose rest is less likely than that still gets the gradients of
# the k; those outside go to 0 with q_j, where an infinite ratio times a q_j of 0 would be NaN.
_LARGEST = 60.0


class TeacherLoss(ChunkLoss):
    """The loss of one step's micro-batches, and its KL added up on the way.

    of_microbatches: the teacher's distributions, at distill.temperature, of each micro-batch.
    """

    temperature = 1.0  # cross entropy is of the logits as they are

    def __init__(self, of_microbatches: Sequence[TopK], config: DistillConfig, device: torch.device) -> None:
        self._of_microbatches, self._config = of_microbatches, config
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # KL, tokens

    def of_logits(
        self,
        microbatch: int,
        tokens: slice,
        logits_CV: Tensor,
        labels_C: Tensor,
        weight: Tensor | None,
        losses_C: Tensor,
    ) -> None:
        """Write losses, and with a weight the gradient over the logits."""
        share, tau = self._config.weight, self._config.temperature
        teacher = self._of_microbatches[microbatch].part(tokens)
        if tau == 1:
            nats_C, kl_C = mixed(logits_CV, labels_C, teacher, 1 - share, share, weight)
        elif share == 1:
            nats_C, kl_C = mixed(logits_CV.div_(tau), labels_C, teacher, 0.0, tau, weight)
        else:
            nats_C, divided_CV = torch.empty_like(losses_C), logits_CV / tau
            _, kl_C = mixed(divided_CV, labels_C, teacher, 0.0, share * tau, weight)
            of_cross_entropy(tokens, logits_CV, labels_C, None if weight is None else weight * (1 - share), nats_C)
            if weight is not None:
                logits_CV.add_(divided_CV)
        self._sums += torch.stack([kl_C.sum(dtype=torch.float64), (labels_C != IGNORE).sum().double()])
        losses_C.copy_((1 - share) * nats_C + share * tau**2 * kl_C)

    def mean_kl(self, mesh: Mesh) -> float:
        """KL a predicted token of the whole step, without tau^2. Collective over all ranks; waits for the device."""
        total, tokens = all_reduce(self._sums.clone(), mesh.world_group).tolist()
        return float(total / max(tokens, 1.0))


def mixed(
    logits_CV: Tensor, labels_C: Tensor, teacher: TopK, hard: float, soft: float, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Nats of the labels and the KL, FP32 [C], 0 where nothing is predicted.

    With a weight, an FP32 scalar, logits <- the gradient of hard x nats + soft x KL, times the weight.
    """
    is_predicted, ids_CK = labels_C != IGNORE, teacher.ids.long()
    label_C1 = labels_C.clamp(min=0)[:, None]
    values_CK = logits_CV.gather(1, ids_CK)
    log_sum_C = log_sum_exp(logits_CV, ids_CK[:, 0])  # by the label that the teacher's sum took: the same rounding
    log_q_CK = values_CK.float() - log_sum_C[:, None]
    nats_C = log_sum_C - logits_CV.gather(1, label_C1)[:, 0].float()
    p_CK = teacher.logp.exp()
    kl_C, ratio_C = (p_CK * (teacher.logp - log_q_CK)).sum(1), torch.zeros_like(log_sum_C)
    if ids_CK.shape[1] < logits_CV.shape[1]:
        logits_CV.scatter_(1, ids_CK, EXCLUDED)
        apart_C = teacher.rest - (log_sum_exp(logits_CV, teacher.other.long()) - log_sum_C)
        logits_CV.scatter_(1, ids_CK, values_CK)
        kl_C += teacher.rest.exp() * apart_C
        ratio_C = apart_C.clamp(max=_LARGEST).exp()
    if weight is not None:
        outside_C, q_CK = hard + soft * (1 - ratio_C), log_q_CK.exp()
        at_label_C = outside_C * (-nats_C).exp() - hard
        at_ids_CK = (hard + soft) * q_CK - soft * p_CK - hard * (ids_CK == label_C1)
        cross_entropy_with_gradient(logits_CV, labels_C, weight * outside_C, torch.empty_like(nats_C))
        for ids, gradient in ((label_C1, at_label_C[:, None]), (ids_CK, at_ids_CK)):  # a label among the k comes second
            written = (weight * gradient).masked_fill(~is_predicted[:, None], 0)
            logits_CV.scatter_(1, ids, written.to(logits_CV.dtype))
    return nats_C.masked_fill(~is_predicted, 0), kl_C.masked_fill(~is_predicted, 0)
