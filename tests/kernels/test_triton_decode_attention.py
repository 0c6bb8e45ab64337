"""Attention to a cache in Triton beside FP64, of every kind of cache, in one split and in many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8moe.kernels.decode_attention import decode_attention
from tests.distance import calc_diff
from tests.kernels.caches import CACHES, Cache, Sizes, by_hand, filled

MOST = 2e-5  # of `calc_diff`: probabilities and the output are rounded to BF16
PRODUCTION = {
    "DeepSeek-V2-Lite, Moonlight": Sizes(64, 1, 16, 1, 576, 512, 4321, rows=True),
    "two tokens of them": Sizes(5, 2, 16, 1, 576, 512, 20_000),
    "DeepSeek-V3": Sizes(4, 1, 128, 1, 576, 512, 3000),
    "Qwen3-30B": Sizes(32, 1, 32, 4, 128, 128, 5000),
    "GPT-OSS": Sizes(16, 1, 64, 8, 64, 64, 2000, window=128, sinks=True),
    "many tokens": Sizes(2, 300, 32, 4, 128, 128, 900, rows=True),
}


@pytest.fixture(params=[2, 528], ids=lambda splits: f"{splits} splits")
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Two of several steps each, or one of each step."""
    from fp8moe.kernels.triton import decode_attention as launcher

    monkeypatch.setattr(launcher, "num_splits", lambda blocks, steps: min(request.param, steps))
    return int(request.param)


def attend(cache: Cache, scale: float) -> torch.Tensor:
    return decode_attention(
        cache.q, cache.keys, cache.values, cache.positions, cache.rows, cache.sinks, length=cache.length, scale=scale,
        window=cache.window,
    )  # fmt: skip


def check(device: str, of: Sizes, repeats: int) -> None:
    cache, scale = filled(of, torch.bfloat16, device), of.d**-0.5
    found = attend(cache, scale)
    assert calc_diff(found, by_hand(cache, scale)) < MOST
    for _ in range(repeats):
        assert torch.equal(attend(cache, scale), found)


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_beside_fp64(triton_device: str, splits: int, name: str) -> None:
    cache = filled(name, torch.bfloat16, triton_device)
    found = attend(cache, 0.3)
    torch.testing.assert_close(found.double(), by_hand(cache, 0.3), rtol=2.0**-7, atol=6e-3)


def test_caches_that_lie_anyhow(triton_device: str) -> None:
    """Heads that don't lie on 16 bytes, queries whose features lie apart."""
    for of in (Sizes(2, 2, 4, 2, 18, 10, 70), Sizes(2, 1, 4, 1, 30, 12, 70, rows=True)):
        cache = filled(of, torch.bfloat16, triton_device)
        exact = by_hand(cache, 0.3)
        for q in (cache.q, cache.q.transpose(2, 3).contiguous().transpose(2, 3)):
            found = attend(replace(cache, q=q), 0.3)
            torch.testing.assert_close(found.double(), exact, rtol=2.0**-7, atol=6e-3)


def test_what_is_written_anywhere_else_does_not_count(triton_device: str, splits: int) -> None:
    """Entries behind a sequence's last one may be read, so long as they are finite."""
    cache = filled("latents", torch.bfloat16, triton_device)
    before = attend(cache, 0.3)
    assert cache.rows is not None
    for i, row in enumerate(cache.rows.tolist()):
        cache.keys[row, int(cache.positions[i].max()) + 1 :] = 1e30
    others = [row for row in range(len(cache.keys)) if row not in cache.rows.tolist()]
    cache.keys[others] = float("nan")
    assert torch.equal(attend(cache, 0.3), before)


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter, where the sink leaves nothing
def test_a_sink_may_outweigh_everything(triton_device: str) -> None:
    """One is alike to the scores, one leaves a thousandth, one nothing."""
    cache = filled("heads", torch.bfloat16, triton_device)
    assert cache.sinks is not None
    cache.sinks[:3] = torch.tensor([0.0, 12.0, 300.0])
    found, exact = attend(cache, 0.3), by_hand(cache, 0.3)
    for head in (0, 1):
        assert 0 < calc_diff(found[:, :, head], exact[:, :, head]) < MOST
    assert not found[:, :, 2].any()


def test_a_nan_that_is_seen_is_told(triton_device: str, splits: int) -> None:
    cache = filled("heads", torch.bfloat16, triton_device)
    cache.keys[1, 0, 0, 3] = float("nan")
    found = attend(cache, 0.3).isnan()
    assert found[1, :, :3].all() and not found[1, :, 3:].any() and not found[[0, 2]].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRODUCTION)
def test_caches_of_production(triton_device: str, name: str) -> None:
    check(triton_device, PRODUCTION[name], 20)


@pytest.mark.gpu
def test_attention_to_a_cache_waits_for_nothing(triton_device: str) -> None:
    cache = filled("latents", torch.bfloat16, triton_device)
    attend(cache, 0.3)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(cache, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_these_checks_run(triton_device: str) -> None:
    check(triton_device, CACHES["latents"], 1)
