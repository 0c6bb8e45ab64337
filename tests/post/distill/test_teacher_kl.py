"""The loss of a student with a teacher: values and gradients by FP64 on whole logits, chunks, extremes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.live_memory import TrackPeak
from fp8moe.layers.linear import Linear, attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model import head_loss as module
from fp8moe.model.head_loss import head_loss
from fp8moe.model.loss import IGNORE
from fp8moe.post.distill.teacher_kl import TeacherLoss
from fp8moe.post.distill.teacher_topk import TopK, _fill
from fp8moe.train.distill_config import DistillConfig

T, D, V = 300, 48, 200
CPU = torch.device("cpu")
WEIGHT = torch.tensor(1 / 77)


def built(precision: Precision, seed: int, dim: int = D) -> Linear:
    torch.manual_seed(seed)
    model = nn.Module()
    model.head = Linear(dim, V, Recipe(precision))
    nn.init.normal_(model.head.weight, 0, 0.3)
    attach_main_grads(model)
    return model.head


def problem(precision: Precision = Precision.FP32) -> tuple[Linear, Tensor, Linear, Tensor, Tensor]:
    """Head and hidden states of the student, of a teacher of another width, labels."""
    head, teacher = built(precision, 0), built(Precision.FP32, 1, D + 16)
    x, theirs = torch.randn(T, D).to(precision.dtype), torch.randn(T, D + 16)
    labels = torch.randint(V, (T,))
    labels[::5] = IGNORE
    return head, x, teacher, theirs, labels


def topk_of(teacher: Linear, x: Tensor, topk: int, temperature: float = 1.0) -> TopK:
    """Of all tokens at once, into memory that was NaN and ids that do not exist."""
    found = TopK(
        torch.full((len(x), topk), -7, dtype=torch.int32),
        torch.full((len(x), topk), torch.nan),
        torch.full((len(x),), -7, dtype=torch.int32),
        torch.full((len(x),), -torch.inf),
    )
    with torch.no_grad():
        _fill(teacher, x, temperature, found)
    return found


def exact(logits: Tensor, theirs: Tensor, labels: Tensor, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """(the loss, the KL), summed over tokens, by FP64 softmaxes of whole logits and a mask of the teacher's top k."""
    tau, counts = config.temperature, (labels != IGNORE).double()
    p = (theirs / tau).softmax(1)
    q = (logits / tau).softmax(1)
    kept = torch.zeros_like(p).scatter(1, theirs.topk(config.topk, 1).indices, 1.0).bool()
    kl = torch.where(kept, p * (p.log() - q.log()), 0).sum(1)
    if config.topk < V:
        p_rest, q_rest = torch.where(kept, 0, p).sum(1), torch.where(kept, 0, q).sum(1)
        kl = kl + p_rest * (p_rest / q_rest).log()
    nats = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    loss = (1 - config.weight) * nats + config.weight * tau**2 * kl
    return (loss * counts).sum(), (kl * counts).sum()


CASES = [
    DistillConfig(topk=1, weight=0.5),
    DistillConfig(topk=8, weight=0.3),
    DistillConfig(topk=V - 1, weight=0.7),
    DistillConfig(topk=V, weight=0.5),
    DistillConfig(topk=V, weight=1.0),
    DistillConfig(topk=8, weight=1.0, temperature=2.0),
    DistillConfig(topk=8, weight=0.4, temperature=2.0),
    DistillConfig(topk=V, weight=0.4, temperature=0.5),
]


@pytest.mark.parametrize("config", CASES, ids=lambda one: f"{one.topk}-{one.weight}-{one.temperature}")
@pytest.mark.parametrize(("precision", "bound"), [(Precision.FP32, 3e-6), (Precision.BF16, 2.0**-7)])
def test_value_and_gradients_are_those_of_whole_logits(
    precision: Precision, bound: float, config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    head, x, teacher, theirs, labels = problem(precision)
    loss = TeacherLoss([topk_of(teacher, theirs, config.topk, config.temperature)], config, CPU)
    value, dx = head_loss(head, x, labels, WEIGHT, partial(loss.of_logits, 0))
    wide, matrix = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    whole = theirs.double() @ teacher.weight.detach().double().T
    expected, kl = exact(wide @ matrix.T, whole, labels, config)
    (expected * WEIGHT).backward()
    assert dx is not None and wide.grad is not None and matrix.grad is not None
    assert abs(value.item() / expected.item() - 1) < bound
    predicted = int((labels != IGNORE).sum())
    assert loss._sums[1] == predicted and abs(loss._sums[0].item() / kl.item() - 1) < bound
    main_grad: Tensor = head.weight.main_grad  # type: ignore[attr-defined]
    for name, got, right in (("dx", dx, wide.grad), ("dW", main_grad, matrix.grad)):
        assert (got.double() - right).norm() < 2 * bound * right.norm(), name
    assert not bool(dx[labels == IGNORE].any())
    alone = TeacherLoss(loss._of_microbatches, config, CPU)
    assert torch.equal(head_loss(head, x, labels, None, partial(alone.of_logits, 0))[0], value)


@pytest.mark.parametrize("topk", [1, 8, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_a_student_that_is_its_teacher_nothing_is_left(topk: int, temperature: float) -> None:
    head, x, _, _, labels = problem()
    config = DistillConfig(topk=topk, weight=1.0, temperature=temperature)
    loss = TeacherLoss([topk_of(head, x, topk, temperature)], config, CPU)
    value, dx = head_loss(head, x, labels, torch.tensor(1.0), partial(loss.of_logits, 0))
    assert dx is not None and abs(value.item()) < 1e-6 * T
    assert dx.norm() < 1e-5 * head.weight.norm()


def test_the_kl_is_at_most_that_of_whole_distributions_and_grows_with_k() -> None:
    head, x, teacher, theirs, labels = problem()
    found = []
    for topk in (1, 8, 64, V):
        loss = TeacherLoss([topk_of(teacher, theirs, topk)], DistillConfig(topk=topk), CPU)
        head_loss(head, x, labels, None, partial(loss.of_logits, 0))
        found.append(loss._sums[0].item())
    assert 0 < found[0] < found[1] < found[2] < found[3]


@pytest.mark.parametrize("topk", [8, V])
def test_chunks_change_no_bit_of_losses_and_hidden_gradients(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, teacher, theirs, labels = problem()
    found = {}
    for size in (1 << 30, 1):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        loss = TeacherLoss([topk_of(teacher, theirs, topk)], DistillConfig(topk=topk), CPU)
        found[size] = head_loss(head, x, labels, WEIGHT, partial(loss.of_logits, 0))
    (value, dx), (other, other_dx) = found.values()
    assert torch.equal(value, other) and dx is not None and other_dx is not None and torch.equal(dx, other_dx)


def test_probabilities_that_vanish_give_finite_gradients() -> None:
    """A student that is certain of a token which the teacher hardly knows, and the other way round."""
    config = DistillConfig(topk=2, weight=1.0)
    logits = torch.full((2, V), -400.0)
    logits[0, 5] = logits[1, 9] = 400.0
    theirs = torch.zeros(2, V)
    theirs[1, 7] = 300.0
    labels = torch.tensor([5, 9])

    head = built(Precision.FP32, 0, V)
    with torch.no_grad():
        head.weight.copy_(torch.eye(V))
    loss = TeacherLoss([topk_of(head, theirs, 2)], config, CPU)
    losses, gradient = torch.full((2,), torch.nan), logits.clone()
    loss.of_logits(0, slice(0, 2), gradient, labels, torch.tensor(1.0), losses)
    wide = logits.double().requires_grad_()
    log_q = wide.log_softmax(1)
    kept = theirs.topk(2, 1).indices
    p = theirs.double().softmax(1)
    rest = log_q.scatter(1, kept, -torch.inf).logsumexp(1)
    p_kept, p_rest = p.gather(1, kept), 1 - p.gather(1, kept).sum(1)
    entropy = (p_kept * p_kept.clamp(min=1e-300).log()).sum(1) + p_rest * p_rest.clamp(min=1e-300).log()
    exact_losses = entropy - (p_kept * log_q.gather(1, kept)).sum(1) - p_rest * rest
    exact_losses.sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(losses.double(), exact_losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "chunks"), [(DistillConfig(), 1), (DistillConfig(temperature=2.0), 2)])
def test_of_production_a_chunk_of_logits_is_held_and_nothing_waits_for_the_device(
    config: DistillConfig, chunks: int
) -> None:
    """Tensors without data: a look at a value raises. The peak beside `main_grad` and dx is that of the chunks of
    logits, their hidden gradient, and 60 bytes at most for each of the k."""
    tokens, vocab_size, dim, chunk = 4096, 129_280, 7168, 2048
    with torch.device("meta"):
        model = nn.Module()
        model.head = Linear(dim, vocab_size, Recipe(Precision.BF16))
        attach_main_grads(model)
        x, labels = torch.empty(tokens, dim, dtype=torch.bfloat16), torch.empty(tokens, dtype=torch.int64)
        found = TopK(
            torch.empty(tokens, config.topk, dtype=torch.int32),
            torch.empty(tokens, config.topk),
            torch.empty(tokens, dtype=torch.int32),
            torch.empty(tokens),
        )
        weight = torch.empty(())
        loss = TeacherLoss([found], config, torch.device("meta"))
        with TrackPeak() as peak:
            head_loss(model.head, x, labels, weight, partial(loss.of_logits, 0))
    logits = chunks * chunk * vocab_size * 2
    beside = tokens * dim * 2 + tokens * 4 + max(chunk * dim * 2, chunk * (config.topk + 2) * 60)
    assert logits < peak.most <= logits + beside


def test_a_student_for_which_the_rest_is_impossible_has_finite_losses_and_gradients() -> None:
    """The rest has 198/200 by the teacher and exp(-800) by the student."""
    teacher, logits = torch.zeros(1, V), torch.full((1, V), -400.0)
    head = built(Precision.FP32, 0, V)
    with torch.no_grad():
        head.weight.copy_(torch.eye(V))
    found = topk_of(head, teacher, 2)
    kept = found.ids[0].long()
    logits[0, kept[0]] = 400.0
    losses = torch.full((1,), torch.nan)
    TeacherLoss([found], DistillConfig(topk=2, weight=1.0), CPU).of_logits(
        0, slice(0, 1), logits, kept[:1], torch.tensor(1.0), losses
    )
    assert losses.item() == pytest.approx(198 / 200 * 800 + 800 / 200, rel=0.01)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0, kept], torch.tensor([1 - 1 / 200, -1 / 200]))


def test_labels_that_are_not_predicted_may_have_logits_that_are_not_finite() -> None:
    head, x, teacher, theirs, labels = problem()
    loss = TeacherLoss([topk_of(teacher, theirs, 8)], DistillConfig(topk=8), CPU)
    expected, expected_dx = head_loss(head, x, labels, WEIGHT, partial(loss.of_logits, 0))
    logits, losses = head.fprop(x), torch.empty(T)
    logits[labels == IGNORE] = torch.nan
    loss.of_logits(0, slice(0, T), logits, labels, WEIGHT, losses)
    assert not bool(logits[labels == IGNORE].any()) and not bool(losses[labels == IGNORE].any())
    assert losses.double().sum().float() == expected and expected_dx is not None
    assert torch.equal(head.dgrad(logits), expected_dx)
