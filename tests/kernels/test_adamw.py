"""AdamW against torch's, in FP32 and with BF16 moments."""

import math

import pytest
import torch

from fp8moe.kernels.adamw import adamw_step

SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(70000,), (3, 5, 7), (0,)])
def test_equals_torch_in_fp32(shape: tuple[int, ...]) -> None:
    master = torch.randn(shape)
    oracle = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([oracle], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros(shape), torch.zeros(shape)
    for step in range(1, 6):
        grad = torch.randn(shape) * 10.0**-step
        kept = grad.clone()
        adamw_step(master, grad, exp_avg, exp_avg_sq, step=step, **SETTINGS)
        assert torch.equal(grad, kept)
        oracle.grad = grad
        optimizer.step()
        torch.testing.assert_close(master, oracle.data, rtol=1e-6, atol=1e-7)
    if master.numel():
        torch.testing.assert_close(exp_avg, optimizer.state[oracle]["exp_avg"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(exp_avg_sq, optimizer.state[oracle]["exp_avg_sq"], rtol=1e-6, atol=1e-12)


def test_bf16_moments_are_rounded_after_the_update_used_them() -> None:
    master, grad = torch.zeros(1000), torch.randn(1000)
    exp_avg, exp_avg_sq = torch.randn(1000).bfloat16(), torch.rand(1000).bfloat16()
    m = 0.9 * exp_avg.double() + 0.1 * grad.double()
    v = 0.95 * exp_avg_sq.double() + 0.05 * grad.double() ** 2
    step = 7
    update = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    adamw_step(master, grad, exp_avg, exp_avg_sq, step=step, **SETTINGS)
    torch.testing.assert_close(master, (-3e-3 * update).float(), rtol=1e-5, atol=1e-9)
    assert exp_avg.dtype is exp_avg_sq.dtype is torch.bfloat16
    torch.testing.assert_close(exp_avg.double(), m, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq.double(), v, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
def test_grad_scale_multiplies_the_gradient(scale: float | torch.Tensor) -> None:
    grad = torch.randn(100)
    results = []
    for gradient, grad_scale in ((grad * 0.25, 1.0), (grad, scale)):
        state = [torch.ones(100), torch.zeros(100), torch.zeros(100)]
        adamw_step(state[0], gradient, *state[1:], step=1, grad_scale=grad_scale, **SETTINGS)
        results.append(state)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_decay_is_decoupled() -> None:
    master = torch.full((10,), 2.0)
    adamw_step(master, torch.zeros(10), torch.zeros(10), torch.zeros(10), step=1, **SETTINGS)
    torch.testing.assert_close(master, torch.full((10,), 2.0 * (1 - 3e-3 * 0.1)))


def test_first_step_is_the_sign_of_the_gradient() -> None:
    master, grad = torch.zeros(4), torch.tensor([1e-3, -1e-3, 5.0, -5.0])
    adamw_step(master, grad, torch.zeros(4), torch.zeros(4), step=1, **{**SETTINGS, "weight_decay": 0.0})
    torch.testing.assert_close(master, -3e-3 * grad.sign(), rtol=1e-4, atol=0)
    assert math.isfinite(float(master.sum()))


def test_wrong_arguments() -> None:
    one, half = torch.zeros(4), torch.zeros(4).bfloat16()
    strided = torch.zeros(4, 2)[:, 0]
    cases = (
        ((half, one, one, one), 1, "master and gradient must be FP32, got torch.bfloat16"),
        ((one, half, one, one), 1, "and torch.bfloat16"),
        ((one, one, one.half(), one), 1, "moments must be BF16 or FP32, got torch.float16"),
        ((one, one, torch.zeros(5), one), 1, "of one shape"),
        ((strided, one, one, one), 1, "contiguous"),
        ((one, one, one, one), 0, "step must be at least 1, got 0"),
    )
    for tensors, step, message in cases:
        with pytest.raises(ValueError, match=message):
            adamw_step(*tensors, step=step, **SETTINGS)
