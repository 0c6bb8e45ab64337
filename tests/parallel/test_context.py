"""Messages of context parallelism over real processes: what arrives, in what order, and how many bytes it took."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.attention.zigzag import joined_parts, part_of
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import sent_bytes
from fp8moe.parallel.context import ContextMessages, gather_bytes
from fp8moe.parallel.dispatch.payload import row_bytes
from fp8moe.parallel.mesh import build_mesh
from tests.parallel.ranks import TIMEOUT, run_ranks

SEQUENCES, SEQ_LEN, LATENT, ROPE = 2, 16, 256, 10
T = SEQUENCES * SEQ_LEN


def drawn(dtype: torch.dtype, features: int, seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, T, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mine(x_Tn: Tensor, rank: int, cp: int) -> Tensor:
    return part_of(x_Tn.unflatten(0, (SEQUENCES, -1)), rank, cp).flatten(0, 1)


def messages(dtype: torch.dtype, fp8: bool, cp: int) -> dict[str, Any]:
    mesh = build_mesh(1, cp, 1, timeout=TIMEOUT, cp=cp)
    assert mesh.cp_group is not None
    exchange = ContextMessages(mesh.cp_group)
    rank = exchange.rank
    latent, rope = mine(drawn(dtype, LATENT, 1), rank, cp), mine(drawn(dtype, ROPE, 2), rank, cp)
    rows: Rows = quantize_rows(latent, power_of_two=True) if fp8 else latent
    sent_bytes()
    message = exchange.gather((rows, rope), SEQUENCES)
    arrived = message.wait()
    assert all((one.data if isinstance(one, Fp8Tensor) else one).is_contiguous() for one in arrived)
    whole = [one.dequantize() if isinstance(one, Fp8Tensor) else one for one in arrived]
    sent = sum(sent_bytes().values())
    shares = drawn(dtype, LATENT, 3, cp)[rank], drawn(dtype, ROPE, 4, cp)[rank]
    sums = exchange.scatter(shares, SEQUENCES).wait()
    scattered = sum(sent_bytes().values())
    own = torch.full((3,), float(rank + 1))
    total = exchange.total(own).wait()
    assert own.tolist() == [rank + 1] * 3, "the given tensor stays as it is"
    formula = gather_bytes(T // cp, row_bytes(rows) + row_bytes(rope), cp)
    return {"whole": whole, "sent": sent, "formula": formula, "scattered": scattered, "sums": sums, "total": total}


@pytest.mark.parametrize("dtype, fp8", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_has_the_rows_of_all_and_the_sums_of_its_own(dtype: torch.dtype, fp8: bool, cp: int) -> None:
    latent, rope = drawn(dtype, LATENT, 1), drawn(dtype, ROPE, 2)
    expected = [quantize_rows(latent, power_of_two=True).dequantize() if fp8 else latent, rope]
    sums = [drawn(dtype, n, seed, cp).float().sum(0).to(dtype) for n, seed in ((LATENT, 3), (ROPE, 4))]
    width = (LATENT + LATENT // 128 if fp8 else LATENT * dtype.itemsize) + ROPE * dtype.itemsize
    answers = run_ranks(messages, cp, dtype, fp8, cp)
    for rank, answer in enumerate(answers):
        assert all(torch.equal(*pair) for pair in zip(answer["whole"], expected, strict=True))
        assert answer["sent"] == answer["formula"] == T // cp * width * (cp - 1)
        assert answer["scattered"] == T // cp * (LATENT + ROPE) * dtype.itemsize * (cp - 1)
        for got, whole in zip(answer["sums"], sums, strict=True):
            torch.testing.assert_close(
                got, mine(whole, rank, cp), rtol=1e-6 if dtype is torch.float32 else 0, atol=1e-6
            )
        assert answer["total"].tolist() == [cp * (cp + 1) / 2] * 3
    assert torch.equal(joined_parts(torch.stack([mine(latent, r, cp) for r in range(cp)]), SEQUENCES), latent)
