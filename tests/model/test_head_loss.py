"""Head and cross entropy in chunks: values and gradients by FP64, bits by one product, bytes, launches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.live_memory import TrackPeak
from fp8moe.kernels.reference import cross_entropy as reference
from fp8moe.layers.linear import Linear, attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.recompute import Recallable, kept
from fp8moe.model import head_loss as module
from fp8moe.model.head_loss import CHUNK_BYTES, chunk_tokens, head_loss, head_loss_sum, of_labels
from fp8moe.model.loss import IGNORE

T, D, V = 300, 48, 1000
DTYPES = {Precision.FP32: 2.0**-22, Precision.BF16: 2.0**-7}


def built(precision: Precision, vocab_size: int = V, dim: int = D) -> Linear:
    model = nn.Module()
    model.head = Linear(dim, vocab_size, Recipe(precision))
    nn.init.normal_(model.head.weight, 0, 0.3)
    attach_main_grads(model)
    return model.head


def problem(precision: Precision, tokens: int = T) -> tuple[Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = built(precision)
    labels = torch.randint(V, (tokens,))
    labels[::5] = IGNORE
    return head, torch.randn(tokens, D).to(precision.dtype), labels


def plain(head: Linear, x: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole logits under ordinary autograd -> the loss and the gradient of x; dW is added."""
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(head(x).float(), labels, ignore_index=IGNORE, reduction="sum")
    loss.backward(weight)
    assert x.grad is not None
    return loss.detach(), x.grad


def main_grad(head: Linear) -> Tensor:
    grad: Tensor = head.weight.main_grad  # type: ignore[attr-defined]
    return grad


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens a chunk: 300 tokens make two of 128 and one of 44."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("weight", [1.0, 1e-8])
@pytest.mark.parametrize("precision", list(DTYPES))
def test_it_is_its_definition(precision: Precision, weight: float, small_chunks: None) -> None:
    head, x, labels = problem(precision)
    main_grad(head).fill_(0.5 * weight)
    loss, dx = head_loss(head, x, labels, torch.tensor(weight))
    wide, matrix = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    exact = nn.functional.cross_entropy(wide @ matrix.T, labels, ignore_index=IGNORE, reduction="sum")
    exact.backward()
    assert dx is not None and wide.grad is not None and matrix.grad is not None
    assert loss.dtype is torch.float32 and dx.dtype is x.dtype
    bound = DTYPES[precision]
    assert abs(loss.item() / exact.item() - 1) < bound
    for name, got, expected in (
        ("dx", dx.double() / weight, wide.grad),
        ("dW", main_grad(head).double() / weight - 0.5, matrix.grad),
    ):
        assert (got - expected).norm() < 2 * bound * expected.norm(), name


@pytest.mark.parametrize("precision", list(DTYPES))
def test_bits_are_those_of_one_product_of_all_tokens(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, labels = problem(precision)
    weight = torch.tensor(1 / 77)
    expected_loss, expected_dx = plain(head, x, labels, weight)
    expected_dw = main_grad(head).clone()
    sizes = torch.zeros_like(expected_dw).addmm_(torch.ones(V, T), x.float().abs()) * weight
    for chunk_bytes in (CHUNK_BYTES, 1):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        main_grad(head).zero_()
        loss, dx = head_loss(head, x, labels, weight)
        assert dx is not None and torch.equal(dx, expected_dx)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=2.0**-22)
        if chunk_bytes == CHUNK_BYTES:
            assert torch.equal(main_grad(head), expected_dw)
        assert bool(((main_grad(head) - expected_dw).abs() <= 2.0**-22 * sizes).all()), "association of FP32 sums alone"


@pytest.mark.parametrize("precision", list(DTYPES))
def test_autograd_brings_its_own_weight(precision: Precision, small_chunks: None) -> None:
    head, x, labels = problem(precision)
    weight = torch.tensor(1 / 77)
    loss, dx = head_loss(head, x, labels, weight)
    expected = main_grad(head).clone()
    main_grad(head).zero_()
    leaf = x.clone().requires_grad_()
    recalled: list[Tensor] = []

    def recall() -> Tensor:
        recalled.append(x)
        return x

    value = head_loss_sum(head, Recallable(leaf, recall), labels)
    assert torch.equal(value.detach(), loss) and not bool(main_grad(head).any()) and not recalled
    (value * weight).backward()
    assert dx is not None and leaf.grad is not None
    assert torch.equal(leaf.grad, dx) and torch.equal(main_grad(head), expected)
    assert len(recalled) == 1 and head.weight.grad is None


def test_evaluation_computes_values_alone(small_chunks: None) -> None:
    head, x, labels = problem(Precision.BF16)
    with torch.no_grad():
        value = head_loss_sum(head, kept(x), labels)
    loss, dx = head_loss(head, x, labels, None)
    assert torch.equal(value, loss) and dx is None and not value.requires_grad
    assert not bool(main_grad(head).any())


def test_a_loss_of_its_own_is_autograd_of_it(small_chunks: None) -> None:
    head, x, labels = problem(Precision.FP32)
    targets, weight = torch.randn(T), torch.tensor(1 / 77)
    seen: list[slice] = []

    def squared(tokens: slice, logp_C: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tokens)
        off_C = (logp_C - targets[tokens]) * (labels[tokens] != IGNORE)
        return off_C**2, 2 * off_C

    loss, dx = head_loss(head, x, labels, weight, partial(of_labels, squared))
    wide, matrix = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    nats = nn.functional.cross_entropy(wide @ matrix.T, labels, ignore_index=IGNORE, reduction="none")
    exact = ((-nats - targets) ** 2 * (labels != IGNORE)).sum()
    (exact * weight).backward()
    assert dx is not None and wide.grad is not None and matrix.grad is not None
    assert seen == [slice(0, 128), slice(128, 256), slice(256, 300)]
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    assert (dx - wide.grad).norm() < 2e-6 * wide.grad.norm()
    assert (main_grad(head) - matrix.grad).norm() < 2e-6 * matrix.grad.norm()
    value, none = head_loss(head, x, labels, None, partial(of_labels, squared))
    assert torch.equal(value, loss) and none is None


@pytest.mark.parametrize("precision", list(DTYPES))
def test_cross_entropy_as_a_loss_of_its_own_is_the_same_bits(precision: Precision, small_chunks: None) -> None:
    head, x, labels = problem(precision)
    weight = torch.tensor(1 / 77)
    expected, expected_dx = head_loss(head, x, labels, weight)
    expected_dw = main_grad(head).clone()
    main_grad(head).zero_()

    def minus(tokens: slice, logp_C: Tensor) -> tuple[Tensor, Tensor]:
        return -logp_C, torch.full_like(logp_C, -1.0)

    loss, dx = head_loss(head, x, labels, weight, partial(of_labels, minus))
    assert dx is not None and expected_dx is not None
    assert torch.equal(loss, expected) and torch.equal(dx, expected_dx) and torch.equal(main_grad(head), expected_dw)


def test_no_token_and_nothing_to_predict(small_chunks: None) -> None:
    head, x, labels = problem(Precision.BF16)
    loss, dx = head_loss(head, x[:0], labels[:0], torch.tensor(1.0))
    assert loss == 0 and dx is not None and dx.shape == (0, D)
    loss, dx = head_loss(head, x, torch.full_like(labels, IGNORE), torch.tensor(1.0))
    assert loss == 0 and dx is not None and not bool(dx.any()) and not bool(main_grad(head).any())


def test_chunks_are_chosen_by_bytes_and_evened_out() -> None:
    cuda, cpu, bf16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    assert [chunk_tokens(t, 129_280, bf16, cuda) for t in (1, 2048, 2049, 4096, 16384)] == [128, 2048, 1152, 2048, 2048]
    assert chunk_tokens(16384, 129_280, torch.float32, cuda) == 1024
    assert chunk_tokens(16384, 129_280, bf16, cpu) == 640  # 6 bytes a logit: 26 chunks
    assert [chunk_tokens(t, 4096, bf16, cpu) for t in (1000, 4096, 4097)] == [1024, 1024, 896], "what a cache holds"
    assert chunk_tokens(5000, 1 << 40, bf16, cuda) == 128


@pytest.fixture
def no_data() -> Iterator[None]:
    """Tensors of any size without data: nothing is computed, and a look at a value raises: a GPU would wait."""
    with torch.device("meta"):
        yield


def walked(tokens: int, vocab_size: int, dim: int, *, training: bool = True) -> TrackPeak:
    head = built(Precision.BF16, vocab_size, dim)
    x, labels = torch.empty(tokens, dim, dtype=torch.bfloat16), torch.empty(tokens, dtype=torch.int64)
    weight = torch.empty((), dtype=torch.float32) if training else None
    with TrackPeak() as peak:
        head_loss(head, x, labels, weight)
    return peak


def test_a_gigabyte_holds_the_loss_of_production(no_data: None) -> None:
    """The peak beside `main_grad`, the gradient of x counted, is the formula's; launches go by chunks alone."""
    vocab_size, dim, chunk = 129_280, 7168, 2048
    operations = {}
    for tokens in (4096, 16384):
        peak = walked(tokens, vocab_size, dim)
        expected = chunk * vocab_size * 2 + tokens * dim * 2 + chunk * dim * 2 + tokens * 4
        assert peak.most == expected and expected <= 10**9
        operations[tokens] = peak.operations
        assert walked(tokens, vocab_size, dim, training=False).most == chunk * vocab_size * 2 + tokens * 4
    first, each = walked(128, vocab_size, dim).operations, (operations[16384] - operations[4096]) / (8 - 2)
    assert operations[4096] == first + each and each == int(each)
    assert walked(2048, vocab_size, dim).operations == first


def test_an_eighth_of_whole_logits(no_data: None) -> None:
    """4,096 tokens of DeepSeek-V3's vocabulary beside whole logits under autograd: 14 bytes a logit at their peak."""
    tokens, vocab_size, dim = 4096, 129_280, 64
    head, x = built(Precision.BF16, vocab_size, dim), torch.empty(tokens, dim, dtype=torch.bfloat16)
    with TrackPeak() as whole:
        plain(head, x, torch.empty(tokens, dtype=torch.int64), torch.empty(()))
    assert whole.most >= 12 * tokens * vocab_size, whole.most / tokens / vocab_size
    assert 8 * walked(tokens, vocab_size, dim).most <= whole.most


def test_on_a_cpu_the_peak_grows_with_the_hidden_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16, whose weight gradient copies a chunk's logits to FP32."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 128 * V * 6)
    monkeypatch.setattr(reference, "_BLOCK", 8 * V)
    most = {}
    for tokens in (256, 512):
        head, x, labels = problem(Precision.BF16, tokens)
        with TrackPeak() as peak:
            head_loss(head, x, labels, torch.tensor(1.0))
        most[tokens] = peak.most
        expected = 128 * (V * 6 + D * 4) + tokens * (D * 2 + 4)
        assert expected <= peak.most <= expected + 8 * 128
    assert most[512] - most[256] == (512 - 256) * (2 * D + 4)
