"""Small released models: written by transformers itself, or under released names in block FP8, and loaded back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from fp8moe.cli.compose import to_dataclass
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.transformer import Transformer
from fp8moe.train import checkpoint

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=32,
    q_lora_rank=32, qk_rope_head_dim=16, v_head_dim=16, qk_nope_head_dim=16, num_experts_per_tok=3,
    first_k_dense_replace=1, max_position_embeddings=64, initializer_range=0.05, attn_implementation="eager",
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 0.707, "mscale_all_dim": 1.4}  # fmt: skip
V3 = SIZES | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)
V2 = SIZES | dict(n_group=None, topk_group=None, topk_method="greedy", norm_topk_prob=False)
CONFIGS: dict[str, Any] = {
    "v3": DeepseekV3Config(**V3),
    "v3, yarn, no query latent": DeepseekV3Config(**V3 | dict(q_lora_rank=None, rope_parameters=YARN)),
    "v3, one group, three heads": DeepseekV3Config(
        **V3 | dict(n_group=1, topk_group=1, num_attention_heads=3, num_key_value_heads=3, qk_nope_head_dim=32)
    ),
    "v3, eight groups, not normalised": DeepseekV3Config(
        **V3
        | dict(
            n_group=8, topk_group=4, n_routed_experts=16, num_experts_per_tok=8, norm_topk_prob=False, rms_norm_eps=1e-5
        )
    ),
    "v2, greedy": DeepseekV2Config(**V2),
    "v2, yarn, no query latent": DeepseekV2Config(**V2 | dict(q_lora_rank=None, rope_parameters=YARN)),
    "v2, groups": DeepseekV2Config(
        **V2 | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0)
    ),
    "v2, two shared, three heads": DeepseekV2Config(
        **V2
        | dict(
            n_shared_experts=2, hidden_size=48, num_attention_heads=3, num_key_value_heads=3, first_k_dense_replace=0
        )
    ),
}
# Families with grouped-query attention.
GROUPED = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, num_experts_per_tok=3, max_position_embeddings=64, attn_implementation="eager",
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
QWEN3 = GROUPED | dict(num_experts=8, moe_intermediate_size=48)
GLM4 = GROUPED | dict(n_routed_experts=8, moe_intermediate_size=48, num_key_value_heads=2)
OLMOE = {key: value for key, value in GROUPED.items() if key != "head_dim"} | dict(num_experts=8, intermediate_size=48)
GPT_OSS = GROUPED | dict(
    num_local_experts=8, intermediate_size=48, sliding_window=8, experts_implementation="eager",
    rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
)  # fmt: skip
OSS_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "truncate": False}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
CONFIGS |= {
    "qwen3": Qwen3MoeConfig(**QWEN3 | dict(norm_topk_prob=True)),
    "qwen3, dense every second, biases": Qwen3MoeConfig(**QWEN3 | dict(decoder_sparse_step=2, attention_bias=True)),
    "qwen3, three heads, dense in the middle": Qwen3MoeConfig(
        **QWEN3 | dict(num_attention_heads=3, num_key_value_heads=1, head_dim=32, mlp_only_layers=[1])
    ),
    "qwen3, yarn": Qwen3MoeConfig(
        **QWEN3
        | dict(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        )
    ),
    "glm4": Glm4MoeConfig(**GLM4),
    "glm4, biases, norms, half rotated": Glm4MoeConfig(
        **GLM4 | dict(attention_bias=True, use_qk_norm=True, rope_parameters=HALF, num_key_value_heads=1)
    ),
    "glm4, groups, two shared": Glm4MoeConfig(
        **GLM4 | dict(n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=1.5, norm_topk_prob=False)
    ),
    "glm4, whole heads rotated": Glm4MoeConfig(
        **GLM4 | dict(rope_parameters=HALF | {"partial_rotary_factor": 1.0}, first_k_dense_replace=2)
    ),
    "olmoe": OlmoeConfig(**OLMOE),
    "olmoe, clipped": OlmoeConfig(**OLMOE | dict(clip_qkv=0.3)),
    "olmoe, biases, normalised": OlmoeConfig(**OLMOE | dict(attention_bias=True, norm_topk_prob=True)),
    "gpt_oss": GptOssConfig(**GPT_OSS),
    "gpt_oss, yarn, three heads": GptOssConfig(
        **GPT_OSS | dict(rope_parameters=OSS_YARN, num_attention_heads=3, num_key_value_heads=1, head_dim=32)
    ),
    "gpt_oss, windows in all layers": GptOssConfig(**GPT_OSS | dict(layer_types=["sliding_attention"] * 3)),
    "gpt_oss, one expert a token": GptOssConfig(
        **GPT_OSS | dict(num_experts_per_tok=1, swiglu_limit=0.05, layer_types=["full_attention"] * 3)
    ),
    "olmoe, all heads": OlmoeConfig(**OLMOE | dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
}
# Sizes with several blocks of 128, the last of which are short.
WIDE = DeepseekV3Config(**V3 | dict(hidden_size=192, intermediate_size=208, kv_lora_rank=144, num_hidden_layers=2))
# Every width a multiple of 128, as far as transformers needs it.
ALIGNED = DeepseekV3Config(
    **V3 | dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2, q_lora_rank=128,
                kv_lora_rank=128, qk_rope_head_dim=128, qk_nope_head_dim=32, v_head_dim=32)
)  # fmt: skip


def random_model(config: Any, seed: int = 0) -> Any:
    """The class of transformers with random weights; gains differ from one, router biases are mostly negative."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-1.5, 0.2)
            else:
                tensor.normal_(0, 0.05)
    return model.float().eval()


def write(config: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save a random model as transformers does -> the model."""
    model = random_model(config)
    model.to(dtype).save_pretrained(folder, **options)
    return model.float()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> None:
    """Put other tensors, in one file, and other keys of config.json in the place of a directory's."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    change(folder, **config)


def change(folder: Path, **config: Any) -> None:
    """Put keys into config.json; those of value `...` are taken out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def with_mtp(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The tensors with an MTP layer behind the last, as released: a block like the last one, four more, two copies."""
    last, prefix = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    generator = torch.Generator().manual_seed(layer)

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape).uniform_(-0.1, 0.1, generator=generator).to(tensor.dtype)

    extra = {name.replace(last, prefix): like(tensor) for name, tensor in tensors.items() if name.startswith(last)}
    norm, embedding = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    wide = norm.new_empty(len(norm), 2 * len(norm))
    extra |= {f"{prefix}{name}.weight": like(norm) for name in ("enorm", "hnorm", "shared_head.norm")}
    extra[f"{prefix}eh_proj.weight"] = like(wide)
    extra[f"{prefix}embed_tokens.weight"] = embedding.clone()
    extra[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return dict(tensors) | extra


def block_fp8(weight: Tensor, factor: float | None = 1.0) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes and scales [ceil(N/128), ceil(K/128)], each scale amax/448 times `factor` in FP32, or the
    power of two above; written plainly."""
    n, k = weight.shape
    codes, scales = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(-(-n // 128), -(-k // 128))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            block = weight[i : i + 128, j : j + 128].float()
            scale = block.abs().max() / 448
            scale = torch.exp2(torch.ceil(torch.log2(scale))) if factor is None else scale * factor
            scales[i // 128, j // 128] = scale
            codes[i : i + 128, j : j + 128] = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def in_block_fp8(tensors: Mapping[str, Tensor], factor: float | None = 1.0) -> dict[str, Tensor]:
    """Projections in block FP8, the rest in BF16, as DeepSeek-V3 was released."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "proj" in name and "eh_proj" not in name:
            out[name], out[name + "_scale_inv"] = block_fp8(tensor, factor)
        else:
            out[name] = tensor.float() if "correction_bias" in name else tensor.to(torch.bfloat16)
    return out


QUANTIZATION = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def imported(run: Path, precision: Precision = Precision.FP32) -> Transformer:
    """The model of a run directory's newest checkpoint, read back as any program could."""
    (path,) = checkpoint.below(run)
    stored = json.loads((path / "state.json").read_text())["model"]
    config = to_dataclass(ModelConfig, stored, "model")
    model = Transformer(config, Recipe(precision), LocalDispatcher(config.experts.num_experts))
    files = {}
    for file in path.glob("*.safetensors"):
        files |= load_file(file)
    state = {}
    for name, entry in json.loads((path / "index.json").read_text())["tensors"].items():
        if name.startswith(("master.", "bias.")):
            state[name] = torch.cat([files[part["name"]] for part in entry["parts"]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.pop(f"master.{name}").view(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith(".bias_E"):
                buffer.copy_(state.pop(f"bias.{name.removesuffix('.bias_E')}"))
    assert not state, f"nobody has a place for {sorted(state)}"
    quantize_weights(model)
    return model.eval()


def ids(vocab_size: int, length: int = 40) -> Tensor:
    """Token ids [2, length]."""
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
