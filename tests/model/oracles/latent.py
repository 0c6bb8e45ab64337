"""DeepSeek-V2 in `transformers` with the same weights as ours; its names are those of DeepSeek-V3 (`hf_oracle`)."""

from __future__ import annotations

from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from fp8moe.model.config import ModelConfig
from tests.model.hf_oracle import hf_config, hf_names


def deepseek_v2(c: ModelConfig) -> DeepseekV2Config:
    assert c.router.score == "softmax" and not c.router.normalize_topk
    assert c.router.num_groups == 1 or c.router.group_score == "max"
    like_v3 = hf_config(c).to_dict()
    shared = {name: like_v3[name] for name in DeepseekV2Config().to_dict() if name in like_v3}
    method = "greedy" if c.router.num_groups == 1 else "group_limited_greedy"
    own = {"model_type": "deepseek_v2", "topk_method": method, "head_dim": None, "architectures": None}
    return DeepseekV2Config(**(shared | own), attn_implementation="eager")


def their_v2(c: ModelConfig, state: dict[str, Tensor]) -> DeepseekV2ForCausalLM:
    """The same weights in the model of `transformers`, FP32."""
    theirs = DeepseekV2ForCausalLM(deepseek_v2(c)).float()
    names = hf_names(c, state)
    named = {name: tensor for name, tensor in names.items() if not name.endswith("e_score_correction_bias")}
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return theirs
