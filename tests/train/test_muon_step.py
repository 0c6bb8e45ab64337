"""One update against torch's Muon, to the bit: shapes, batches, decay, clipping, momentum in BF16, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from fp8moe.layers.linear import Matrix
from fp8moe.train.optimizer.muon_step import COEFFICIENTS, EPS, muon_step, newton_schulz
from tests.train.muon_oracle import oracle, random, take_step

NAN = float("nan")
SHAPES = [(8, 17), (17, 8), (8, 17), (1, 5), (6, 6), (8, 17)]  # wide, tall, a row, square; three of one shape


def placed(shapes: Sequence[tuple[int, int]]) -> tuple[list[Matrix], int]:
    """Matrices of these shapes in a flat buffer, values of others before, between some of them and after."""
    found, start = [], 3
    for i, (n, k) in enumerate(shapes):
        found.append(Matrix(start, start + n * k, n, k))
        start += n * k + (2 if i % 2 else 0)
    return found, start + 1


def flat(found: list[Matrix], size: int, values: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of the matrices in a buffer that is NaN elsewhere."""
    buffer = torch.full((size,), NAN, dtype=dtype)
    for matrix, value in zip(found, values, strict=True):
        buffer[matrix.start : matrix.stop] = value.flatten()
    return buffer


@pytest.mark.parametrize("shape", [(3, 8, 17), (2, 40, 24), (4, 1, 7), (2, 96, 96), (1, 33, 65)])
def test_newton_schulz_of_each_is_torchs(shape: tuple[int, int, int]) -> None:
    x = random(*shape, seed=0) * torch.tensor([1e-3, 1.0, 50.0, 2.0])[: shape[0], None, None]
    found = newton_schulz(x, 5)
    assert found.dtype is torch.bfloat16 and not x.isnan().any()
    for one, matrix in zip(found, x, strict=True):
        assert torch.equal(one, torch_newton_schulz(matrix, COEFFICIENTS, 5, EPS))
        # Independently of it: the singular vectors stay, the singular values come near 1.
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        inside = u.mT @ one.double() @ vh.mT
        values = inside.diagonal()[s > 0.1 * s[0]]
        assert values.min() > 0.6 and values.max() < 1.3
        assert (inside - inside.diagonal().diag()).abs().max() < 0.1


def test_a_matrix_of_zeros_stays_zero() -> None:
    found = newton_schulz(torch.stack([torch.zeros(4, 6), random(4, 6, seed=0)]), 5)
    assert not found[0].any() and found[1].any()


def test_on_a_cpu_without_bf16_products_operands_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(3, 24, 40, seed=0)
    expected = newton_schulz(x, 5)
    monkeypatch.setattr("fp8moe.layers.linear._CPU_MULTIPLIES_BF16", False)
    monkeypatch.setattr(torch, "baddbmm", only_fp32(torch.baddbmm))
    found = newton_schulz(x, 5)
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected.float()).abs().max() < 0.02, "sums associate otherwise"


def only_fp32(op: Any) -> Any:
    def checked(*operands: Tensor, **options: Any) -> Tensor:
        assert {t.dtype for t in operands} == {torch.float32}
        return op(*operands, **options)

    return checked


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(
    ("nesterov", "batch_values"), [(True, 1 << 24), (False, 1 << 24), (True, 2 * 8 * 17), (True, 1)]
)
def test_steps_equal_torchs_to_the_bit(
    adjust: Any, nesterov: bool, batch_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8moe.train.optimizer.muon_step.batch_values", lambda device: batch_values)
    found, size = placed(SHAPES)
    weights = [random(n, k, seed=i) for i, (n, k) in enumerate(SHAPES)]
    settings: dict[str, Any] = dict(lr=0.03, weight_decay=0.2, nesterov=nesterov, ns_steps=4)
    parameters, optimizer = oracle(weights, momentum=0.9, adjust_lr_fn=adjust, **settings)
    master, momentum = flat(found, size, weights), flat(found, size, [torch.zeros_like(w) for w in weights])
    for step in range(4):
        grads = [random(n, k, seed=100 * step + i) for i, (n, k) in enumerate(SHAPES)]
        grad = flat(found, size, grads)
        before = grad.clone()
        muon_step(master, grad, momentum, None, found, momentum_beta=0.9, adjust=adjust, **settings)
        take_step(parameters, optimizer, grads)
        assert torch.equal(grad.nan_to_num(9.0), before.nan_to_num(9.0)), "only read"
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    for ours, theirs in ((master, flat(found, size, parameters)), (momentum, flat(found, size, buffers))):
        assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0)), "and nothing between the matrices changed"


def test_clipping_multiplies_the_gradient() -> None:
    found, size = placed(SHAPES)
    weights, grads = ([random(n, k, seed=s + i) for i, (n, k) in enumerate(SHAPES)] for s in (0, 50))
    parameters, optimizer = oracle(weights, lr=0.03, adjust_lr_fn="match_rms_adamw")
    master, momentum = flat(found, size, weights), flat(found, size, [torch.zeros_like(w) for w in weights])
    for scale in (0.25, 0.6):  # one alone would be lost in the normalisation
        grad = flat(found, size, grads)
        muon_step(master, grad, momentum, None, found, lr=0.03, grad_scale=torch.tensor(scale))
        take_step(parameters, optimizer, [one * torch.tensor(scale) for one in grads])
        assert torch.equal(grad.nan_to_num(9.0), flat(found, size, grads).nan_to_num(9.0)), "only read"
    assert torch.equal(master.nan_to_num(9.0), flat(found, size, parameters).nan_to_num(9.0))


def test_bf16_momentum_is_rounded_after_the_update_and_weights_with_it() -> None:
    found, size = placed([(8, 17), (12, 5)])
    weights = [random(m.n, m.k, seed=m.n) for m in found]
    master, weight = flat(found, size, weights), torch.full((size,), 5.0, dtype=torch.bfloat16)
    momentum = flat(found, size, [torch.zeros_like(w) for w in weights], torch.bfloat16)
    kept = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        grads = [random(m.n, m.k, seed=step) for m in found]
        muon_step(master, flat(found, size, grads), momentum, weight, found, lr=0.03, weight_decay=0.0)
        for i, (matrix, grad) in enumerate(zip(found, grads, strict=True)):
            average = kept[i] + 0.05 * (grad - kept[i])
            direction = torch_newton_schulz(0.05 * grad + 0.95 * average, COEFFICIENTS, 5, EPS)
            weights[i] = weights[i] - 0.03 * 0.2 * max(matrix.n, matrix.k) ** 0.5 * direction
            kept[i] = average.bfloat16().float()
    # An association of sums can move a value over a rounding of BF16 and one step of the iteration with it.
    assert (master - flat(found, size, weights)).abs().nan_to_num().max() < 1e-3
    assert (momentum.float() - flat(found, size, kept)).abs().nan_to_num().max() < 2**-8
    assert torch.equal(weight, master.bfloat16().nan_to_num(5.0)), "and nothing between the matrices changed"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"master": torch.zeros(12).double()}, r"must be FP32, got torch.float64 and torch.float32: keep"),
        ({"momentum": torch.zeros(12).half()}, "momentum must be BF16 or FP32, got torch.float16: cast it"),
        ({"weight": torch.zeros(12)}, "weight must be BF16, got torch.float32: an FP32 weight is its own master"),
        ({"grad": torch.zeros(3, 4)}, r"must be contiguous \[n\], got \[\[12\], \[3, 4\], \[12\]\]: flatten"),
        ({"matrices": [Matrix(4, 16, 3, 4)]}, r"\[3, 4\] has 12 values .* within the 12 of the buffer, got \[4, 16\)"),
        ({"matrices": [Matrix(0, 10, 3, 4)]}, r"\[3, 4\] has 12 values .* got \[0, 10\)"),
    ],
)
def test_what_can_not_be_updated(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(12) for name in ("master", "grad", "momentum")}
    given |= {"weight": None, "matrices": [Matrix(0, 12, 3, 4)]}
    with pytest.raises(ValueError, match=says):
        muon_step(**{**given, **change}, lr=1.0)
