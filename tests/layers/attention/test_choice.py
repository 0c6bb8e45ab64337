"""Which attention kernel runs where: the table on made-up machines, refusals in one sentence, one line in the log."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import varlen

from fp8moe.layers.attention import choice, core
from fp8moe.layers.attention.choice import AUTO, Choice, Heads, Machine, choose, chosen, why_not
from fp8moe.layers.attention.mla import MlaConfig
from fp8moe.layers.recipe import Precision, Recipe

V3 = Heads(192, 128, torch.bfloat16, masked=False)
EQUAL = Heads(128, 128, torch.bfloat16, masked=False)
DOCUMENTS = replace(V3, masked=True)
CPU = Machine("cpu")
BARE = Machine("cuda", (9, 0))
VARLEN = frozenset({"plain", "grouped"})
HOPPER = Machine("cuda", (9, 0), frozenset({"cudnn", "efficient"}), None, triton=True, varlen=VARLEN)
NO_FLASH = replace(HOPPER, flash_error="it is not installed")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    chosen.cache_clear()
    yield
    chosen.cache_clear()


@pytest.mark.parametrize("heads, machine, kernel", [
    (V3, CPU, "blocked"),
    (EQUAL, CPU, "sdpa"),
    (DOCUMENTS, CPU, "blocked"),
    (replace(EQUAL, masked=True), CPU, "sdpa"),
    (V3, HOPPER, "cudnn"),
    (EQUAL, HOPPER, "cudnn"),
    (DOCUMENTS, HOPPER, "flash"),
    (DOCUMENTS, NO_FLASH, "flex"),
    (replace(EQUAL, masked=True), HOPPER, "varlen"),
    (replace(EQUAL, masked=True, group=4), HOPPER, "varlen"),
    (replace(EQUAL, masked=True, group=4), replace(NO_FLASH, varlen=frozenset({"plain"})), "flex"),
    (replace(EQUAL, window=64), HOPPER, "varlen"),
    (replace(EQUAL, masked=True, dtype=torch.float32), HOPPER, "flex"),
    (replace(EQUAL, masked=True, qk_dim=264, v_dim=264), NO_FLASH, "flex"),
    (replace(EQUAL, masked=True), replace(HOPPER, varlen=frozenset(), triton=False), "flash"),
    (V3, replace(HOPPER, fused=frozenset({"efficient"})), "flash"),
    (V3, replace(HOPPER, fused=frozenset({"efficient"}), capability=(8, 0)), "efficient"),
    (replace(V3, dtype=torch.float32), replace(HOPPER, fused=frozenset({"efficient"})), "efficient"),
    (V3, BARE, "sdpa"),
])  # fmt: skip
def test_what_auto_takes(heads: Heads, machine: Machine, kernel: str) -> None:
    assert choose(AUTO, heads, machine) == kernel
    assert why_not(kernel, heads, machine) is None


@pytest.mark.parametrize("setting, heads, machine, words", [
    ("cudnn", V3, CPU, "cudnn cannot run 192/128 heads, causal: it needs a GPU: use model.attention.backend=auto"),
    ("flex", DOCUMENTS, CPU, "flex cannot run 192/128 heads, masked by documents: it has no backward on a CPU: use "
     "model.attention.backend=auto"),
    ("cudnn", DOCUMENTS, NO_FLASH, "cudnn cannot run 192/128 heads, masked by documents: it would read a dense mask: "
     "use model.attention.backend=flex, or data.document_mask=false"),
    ("sdpa", replace(EQUAL, window=64), HOPPER, "it would read a dense mask: use model.attention.backend=varlen"),
    ("varlen", V3, HOPPER, "its values are as wide as its keys, and these are 192 and 128: use"),
    ("varlen", replace(EQUAL, group=2), replace(HOPPER, varlen=frozenset({"plain"})), "takes no grouped heads (2.12"),
    ("varlen", EQUAL, replace(HOPPER, varlen=frozenset()), "this PyTorch has none: use model.attention.backend=cudnn"),
    ("varlen", EQUAL, CPU, "it needs a GPU: use model.attention.backend=sdpa"),
    ("auto", DOCUMENTS, BARE, "auto finds no kernel for 192/128 heads, masked by documents ("),
    ("auto", DOCUMENTS, BARE, "install triton, or use data.document_mask=false"),
    ("flash", V3, CPU, "it needs a GPU: use model.attention.backend=auto"),
    ("flash", V3, replace(HOPPER, flash_error="no module"), "can't be imported (no module; extra `flash-attn`): use "
     "model.attention.backend=cudnn"),
    ("flash", V3, replace(HOPPER, capability=(8, 9)), "it needs compute capability 9.0, this GPU has 8.9: use"),
    ("flash", replace(V3, dtype=torch.float32), HOPPER, "it takes BF16, not torch.float32: use"),
    ("flex", V3, BARE, "it needs Triton: use model.attention.backend=sdpa"),
    ("cudnn", V3, replace(HOPPER, fused=frozenset({"efficient"}), flash_error="x"),
     "PyTorch's cudnn kernel does not take 192/128 heads, causal in torch.bfloat16 here: use "
     "model.attention.backend=auto"),
])  # fmt: skip
def test_a_named_kernel_that_cannot_run_is_refused(setting: str, heads: Heads, machine: Machine, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        choose(setting, heads, machine)
    assert str(refused.value).startswith("model.attention.backend=" + setting) and words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("setting", ["sdpa", "cudnn", "flex", "flash"])
def test_a_named_kernel_that_can_run_runs(setting: str) -> None:
    assert choose(setting, V3, HOPPER) == setting
    if setting in ("flex", "flash"):
        assert choose(setting, DOCUMENTS, HOPPER) == setting


def test_every_kernel_has_a_label_and_an_implementation() -> None:
    named = {kernel for kernels in choice.ORDER.values() for kernel in kernels} | set(choice.SETTINGS) - {AUTO}
    assert named == set(choice.LABELS) == set(core.BACKENDS)


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for _ in range(2):
            assert chosen(AUTO, V3, torch.device("cpu")) == Choice("blocked", saves_output=False)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == "attention: blocks of queries on a CPU for 192/128 heads, causal (model.attention.backend=auto)"


def test_a_gpus_kernels_save_their_output(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice, "machine_of", lambda device, heads: HOPPER)
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        assert chosen(AUTO, V3, torch.device("cuda")) == Choice("cudnn", saves_output=True)
    assert caplog.messages == ["attention: cuDNN for 192/128 heads, causal (model.attention.backend=auto)"]
    assert chosen("sdpa", V3, torch.device("cuda")) == Choice("sdpa", saves_output=False)


def test_what_this_pytorch_offers_is_asked_of_it() -> None:
    """2.11 knows scale and window_size, 2.12 grouped heads."""
    known = inspect.signature(varlen.varlen_attn).parameters
    assert choice._varlen() == ({"plain", "grouped"} if "enable_gqa" in known else {"plain"})


@pytest.mark.parametrize("setting", ["cudnn", "varlen", "flex", "flash"])
def test_a_layer_that_cannot_run_is_not_built(setting: str) -> None:
    config = MlaConfig(num_heads=2, kv_lora_rank=16, nope_dim=16, rope_dim=16, v_dim=16, backend=setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^model\.attention\.backend={setting} cannot run 32/16 heads, causal: "):
        config.build(32, Recipe(Precision.FP32), norm_eps=1e-6, layer=0)
    with torch.device("meta"):
        config.build(32, Recipe(Precision.FP32), norm_eps=1e-6, layer=0)  # plans may name what this machine lacks
