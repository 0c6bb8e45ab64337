"""RoPE in Triton, bit for bit against the specification, but for the sum over heads."""

import pytest
import torch

from fp8moe.kernels.reference import rope as twin
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward

SIZES = [
    (6, 5, 32, 16, 48),
    (3, 40, 16, 6, 16),
    (2, 128, 128, 64, 128),
    (1, 1, 1, 2, 1),
    (3, 6, 0, 8, 16),
]  # T, H, nope, rope, v


def check(device, t, h, nope, rope, v, dtype):
    """Both ways, from contiguous tensors and from tensors whose heads lie apart."""
    angles = torch.randn(t, rope // 2, device=device) * 10
    cos, sin = angles.cos(), angles.sin()
    q, kv = (torch.randn(t, h, nope + width, device=device).to(dtype) for width in (rope, v))
    k_rope = torch.randn(t, rope + 16, device=device).to(dtype)[:, 16:]
    for ours, source in ((q, q), (q.transpose(0, 1).contiguous().transpose(0, 1), q)):
        assert torch.equal(rope_queries(ours, cos, sin), twin.rope_queries(source, cos, sin))
        assert torch.equal(rope_queries_backward(ours, cos, sin), twin.rope_queries_backward(source, cos, sin))
    keys = twin.rope_keys(kv, k_rope, cos, sin, nope_dim=nope)
    assert torch.equal(rope_keys(kv, k_rope, cos, sin, nope_dim=nope), keys)
    d_kv, d_rope = rope_keys_backward(q, kv[..., nope:], cos, sin)
    expected_kv, expected_rope = twin.rope_keys_backward(q, kv[..., nope:], cos, sin)
    assert torch.equal(d_kv, expected_kv)
    bound = {"rtol": 2.0**-7, "atol": 2e-3} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(d_rope, expected_rope, **bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", SIZES)
def test_heads_anyhow_are_the_specification(triton_device, sizes, dtype):
    check(triton_device, *sizes, dtype)


def test_nothing_to_rotate(triton_device):
    q, angles = torch.empty(0, 3, 32, device=triton_device), torch.empty(0, 8, device=triton_device)
    assert rope_queries(q, angles, angles).shape == (0, 3, 32)
    assert rope_keys(q, q[:, 0, :16], angles, angles, nope_dim=16).shape == (0, 3, 32)
    assert rope_keys_backward(q, q, angles, angles)[0].shape == (0, 3, 48)
