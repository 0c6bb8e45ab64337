"""E5M6 in Triton, bit for bit against the specification."""

import pytest
import torch

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import E5m6Tensor
from fp8moe.kernels.reference import e5m6 as twin
from tests.kernels.device_cases import KINDS, assert_same, data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_is_the_specification(triton_device, kind, dtype):
    x = data(kind, 2, 40, 272, device=triton_device, dtype=dtype)
    x[0, :, 100:] *= 2.0**-18  # down among the subnormals
    x[1, 1], x[0, 0, 0] = 0, -0.0
    packed, expected = pack_e5m6(x), twin.pack_e5m6(x)
    assert torch.equal(packed.data, expected.data) and torch.equal(packed.scale, expected.scale)
    assert packed.scale.stride(-2) == 1
    for out in (torch.bfloat16, torch.float32):
        assert torch.equal(unpack_e5m6(packed, dtype=out), twin.unpack_e5m6(expected, dtype=out))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_the_specification(triton_device, kind):
    packed = pack_e5m6(data(kind, 144, 272, device=triton_device))
    expected = twin.e5m6_to_columns(packed)
    columns = e5m6_to_columns(packed)
    assert_same(columns, expected)
    assert columns.data.is_contiguous()
    wide = torch.stack([packed.data, packed.data], 1)[:, 0]
    for source in (
        E5m6Tensor(wide, packed.scale.contiguous()),
        E5m6Tensor(packed.data.t().contiguous().t(), packed.scale),
    ):
        assert_same(e5m6_to_columns(source), expected)
        assert torch.equal(unpack_e5m6(source), unpack_e5m6(packed))


def test_every_rounding(triton_device):
    values = torch.arange(31 * 64, dtype=torch.int32).to(torch.int16).bitwise_left_shift(4).view(torch.float16).float()
    centres = torch.cat([values, (values[1:] + values[:-1]) / 2])
    tries = torch.cat([centres, *(centres.nextafter(torch.tensor(limit)) for limit in (0.0, 1e9))]).clamp(max=65024)
    tries = torch.cat([tries, -tries])
    run = torch.nn.functional.pad(tries, (0, -len(tries) % 127)).view(-1, 127)
    x = torch.cat([run, torch.full((len(run), 1), 65024.0)], dim=1).to(triton_device)
    assert torch.equal(pack_e5m6(x).data, twin.pack_e5m6(x).data)


def test_numbers_as_small_and_as_large_as_the_least_floor_and_fp32_allow(triton_device):
    x = data("normal", 32, 128, device=triton_device)
    x[0::2] *= 1e-29
    x[1::2] *= 2e37
    packed, expected = pack_e5m6(x, amax_floor=1e-29), twin.pack_e5m6(x, amax_floor=1e-29)
    assert torch.equal(packed.data, expected.data) and torch.equal(packed.scale, expected.scale)
    assert bool((packed.data[0] != 0).any())


def test_nothing_to_pack(triton_device):
    packed = pack_e5m6(torch.empty(0, 48, device=triton_device))
    assert unpack_e5m6(packed).shape == (0, 48) and e5m6_to_columns(packed).shape == (48, 0)
