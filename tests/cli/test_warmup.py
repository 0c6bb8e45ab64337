"""Which sizes are warmed up, and that each can be run; the compiling itself needs a GPU."""

from pathlib import Path

import pytest
import torch

from fp8moe.cli import warmup
from fp8moe.cli.warmup import Sizes, calls, choose_cache, sizes_of
from fp8moe.model.config import ModelConfig

TINY = ModelConfig(
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
    """(dense, expert) weights' shapes of a real model, read off its parameters."""
    from fp8moe.layers.dispatch import LocalDispatcher
    from fp8moe.layers.experts import GroupedLinear
    from fp8moe.layers.linear import Linear
    from fp8moe.layers.recipe import Precision
    from fp8moe.model.transformer import Transformer

    model = Transformer(config, precision=Precision.FP8, dispatcher=LocalDispatcher(config.num_experts))
    modules = list(model.modules())
    linears = [m for m in modules if isinstance(m, Linear)]
    dense = {tuple(m.weight.shape) for m in linears if m.precision is Precision.FP8}
    return dense, {tuple(m.weight.shape[1:]) for m in modules if isinstance(m, GroupedLinear)}


@pytest.mark.parametrize("q_lora_rank", [48, 0])
def test_sizes_are_those_of_the_model(q_lora_rank):
    import dataclasses

    config = dataclasses.replace(TINY, q_lora_rank=q_lora_rank)
    sizes = sizes_of(config, tokens=64, ep=2)
    assert (set(sizes.linears), set(sizes.experts)) == linears_of_a_model(config)
    assert sizes.num_experts == 4 and sizes.rows == 4 * 128  # 32 rows an expert, padded
    assert (sizes.dim, sizes.topk) == (64, 2)


def test_every_call_runs():
    sizes = Sizes(
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
    assert names[4:] == ["rows of 64 to 2 experts and back"]


def test_the_cache_lies_where_it_was_asked_for(monkeypatch):
    monkeypatch.setenv(warmup.CACHE_VARIABLE, "from-the-environment")
    assert choose_cache(Path("given")) == Path("given")
    assert choose_cache(None) == Path("from-the-environment")
    monkeypatch.delenv(warmup.CACHE_VARIABLE)
    assert choose_cache(None).name.startswith("fp8moe-kernels-")


def test_no_processes_are_refused():
    from fp8moe.errors import ConfigError

    with pytest.raises(ConfigError, match="--processes=0 must be at least 1"):
        warmup.main(["--processes", "0"])
