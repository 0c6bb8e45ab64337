"""Which sizes are warmed up, and that each can be run; the compiling itself needs a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8moe.cli import warmup
from fp8moe.cli.warmup import GemmSizes, calls, choose_cache, gemm_sizes
from fp8moe.errors import ConfigError
from fp8moe.layers.attention import GqaConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import Linear
from fp8moe.layers.moe import GroupedLinear
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router
from fp8moe.model.transformer import Transformer
from tests.model.shapes import changed, model_config

TINY = model_config(
    vocab_size=512,
    dim=64,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    kv_lora_rank=32,
    nope_dim=16,
    rope_dim=16,
    v_dim=16,
    dense_hidden=96,
    expert_hidden=48,
    num_experts=8,
    topk=2,
    q_lora_rank=48,
    max_seq_len=64,
)


def linears_of_a_model(config):
    """(dense, expert, unquantized) weights' shapes of a real model, read off its parameters."""
    recipe = Recipe(Precision.FP8)
    model = Transformer(config, recipe, LocalDispatcher(config.experts.num_experts))
    modules = list(model.modules())
    linears = [m for m in modules if isinstance(m, Linear)]
    dense = {tuple(m.weight.shape) for m in linears if m.recipe.fp8}
    unquantized = {tuple(m.weight.shape) for m in modules if isinstance(m, Router)}
    unquantized |= {tuple(m.weight.shape) for m in linears if not m.recipe.fp8}
    return dense, {tuple(m.weight.shape[1:]) for m in modules if isinstance(m, GroupedLinear)}, unquantized


@pytest.mark.parametrize("q_lora_rank", [48, 0])
def test_sizes_are_those_of_the_model(q_lora_rank):
    config = changed(TINY, q_lora_rank=q_lora_rank)
    sizes = gemm_sizes(config, tokens=64, ep=2)
    for given in (sizes.linears, sizes.experts, sizes.unquantized):
        assert len(given) == len(set(given))  # each size once
    assert (set(sizes.linears), set(sizes.experts), set(sizes.unquantized)) == linears_of_a_model(config)
    assert sizes.num_experts == 4 and sizes.rows == 4 * 128  # 32 rows an expert, padded
    assert (sizes.dim, sizes.topk, sizes.tokens) == (64, 2, 64)
    assert gemm_sizes(config, tokens=1000, ep=1).rows == 8 * 256  # 250 rows an expert
    assert gemm_sizes(config, tokens=1025, ep=1).rows == 8 * 384  # 257 at most


def test_a_model_without_dense_layers_or_shared_experts():
    config = changed(TINY, num_dense_layers=0, num_shared_experts=0)
    sizes = gemm_sizes(config, tokens=64, ep=1)
    assert (set(sizes.linears), set(sizes.experts), set(sizes.unquantized)) == linears_of_a_model(config)


def test_a_model_of_grouped_queries_with_a_dense_layer_among_mixtures():
    attention = GqaConfig(num_heads=6, num_kv_heads=2, head_dim=16, rope_dim=8, qkv_bias=True)
    config = replace(TINY, attention=attention, num_dense_layers=0, dense_layers=(1,))
    sizes = gemm_sizes(config, tokens=64, ep=1)
    assert (set(sizes.linears), set(sizes.experts), set(sizes.unquantized)) == linears_of_a_model(config)
    assert {(160, 64), (64, 96), (192, 64)} <= set(sizes.linears)


def test_every_call_runs():
    sizes = GemmSizes(
        linears=((144, 64),),
        experts=((96, 64), (64, 48)),
        unquantized=((48, 64),),
        num_experts=2,
        tokens=20,
        rows=256,
        dim=64,
        topk=2,
    )
    names = []
    for name, call in calls(sizes, torch.device("cpu")):
        call()
        names.append(name)
    assert names[:4] == ["Linear 144x64", "2 experts 96x64", "2 experts 64x48", "BF16 Linear 48x64"]
    assert names[4:] == ["permutation of rows of 64 to 2 experts", "messages of rows of 64 to 2 experts"]


def test_the_cache_is_where_it_was_asked_for(monkeypatch):
    monkeypatch.setenv(warmup.CACHE_VARIABLE, "from-the-environment")
    assert choose_cache(Path("given")) == Path("given")
    assert choose_cache(None) == Path("from-the-environment")
    monkeypatch.delenv(warmup.CACHE_VARIABLE)
    assert choose_cache(None).name.startswith("fp8moe-kernels-")


def test_no_processes_are_refused():
    with pytest.raises(ConfigError, match="--processes=0 must be at least 1"):
        warmup.main(["--processes", "0"])


def test_precisions_without_kernels_compile_nothing_and_fp8_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for precision in ("bf16", "fp32"):
        assert warmup.main([f"precision={precision}"]) == 0
        assert f"precision {precision} runs on PyTorch's own kernels" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="compiles for the GPU that it runs on and torch sees 0"):
        warmup.main([])
    with pytest.raises(ValueError, match=r"batch.*: use"):  # processes are those of the whole run
        warmup.main(["--processes", "3", "parallel.ep=1"])
