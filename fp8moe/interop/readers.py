"""The rules by which vLLM and SGLang read a directory, as checks that run before an export counts as written.

From vLLM 0.33: layers/quantization/fp8.py (Fp8Config.from_config, Fp8MoEMethod.create_weights), layers/quantization/
utils/fp8_utils.py (validate_fp8_block_shape, per_token_group_quant_fp8), utils/quant_utils.py (is_layer_skipped); from
SGLang 0.5.23: srt/layers/quantization/fp8.py and fp8_utils.py, which agree with them. Names and shapes are in
`reader_names`. What breaks a rule is loaded wrongly, or not at all and without a word; so a key that has a default
there must be written.

    config     keys that are read are there, those with a silent default too; rotation by rope_theta; no key contradicts
               what a loader has as a constant
    names      every tensor that is looked for, in its shape, and no other
    dtypes     FP8 with FP32 scales [ceil(N/128), ceil(K/128)]; all else in torch_dtype, the routers' bias in FP32
    modules    a projection is FP8 unless its module is listed by full path; what is listed exists and is not FP8
    merged     layers that are merged are FP8 in all parts or none, and end at multiples of 128 but for the last
    widths     inputs and experts' hidden features of FP8 layers are multiples of 128
    shards     index and files hold the same tensors; safetensors' header says {"format": "pt"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fp8moe.errors import DataError
from fp8moe.interop.reader_names import COMMON, KEYS, MLA_TYPES, Shape, expected

SCALE = "_scale_inv"
INDEX = "model.safetensors.index.json"
MERGED = (("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))
DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
_NEVER_FP8 = ("embed_tokens", "lm_head", "shared_head.head", "eh_proj", "mlp.gate", "mlp.router")


def check_directory(folder: Path, name: object, *, served: bool = True) -> None:
    """Raise DataError with the first rule that a directory, which is called `name`, breaks, and their number.

    served: by vLLM or SGLang; else by transformers, which reads every key of config.json.
    """
    broken = list(broken_rules(folder, served=served))
    if broken:
        raise DataError(f"{name} breaks {len(broken)} rules of its readers, the first: {broken[0]}")


def broken_rules(folder: Path, *, served: bool = True) -> Iterator[str]:
    """A sentence on every rule that a directory breaks; `served` as in `check_directory`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = list(_keys(config))
    yield from keys
    if keys:
        return
    found: dict[str, tuple[str, Shape]] = {}
    yield from _shards(folder, found)
    names = expected(config)
    if served:
        yield from _constants(config)
        yield from _names(found, names)
    yield from _dtypes(config, found)
    fp8 = {name for name, (dtype, _) in found.items() if dtype == "F8_E4M3"}
    yield from _modules(config, found, fp8)
    yield from _merged(names, fp8)
    yield from _widths(names, fp8)


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    family = "mla" if kind in MLA_TYPES else str(kind)
    if family not in KEYS:
        yield f"config.json: model_type={kind!r} is none of {', '.join((*MLA_TYPES, *list(KEYS)[1:]))}"
        return
    required, silent = KEYS[family]
    yield from (f"config.json lacks {key}" for key in (*COMMON, *required) if key not in config)
    yield from (
        f"config.json lacks {key}, for which readers have a silent default" for key in silent if key not in config
    )
    method, score = config.get("topk_method"), config.get("scoring_func")
    if family == "mla" and (method == "noaux_tc") != (score == "sigmoid"):
        yield f"config.json: topk_method={method} contradicts scoring_func={score}"
    if config.get("torch_dtype") not in DTYPES:
        yield f"config.json: torch_dtype={config.get('torch_dtype')!r} is none of {', '.join(DTYPES)}"
    quantization = config.get("quantization_config")
    if quantization is not None:
        wanted = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        for key, value in wanted.items():
            if quantization.get(key) != value:
                yield f"config.json: quantization_config.{key}={quantization.get(key)!r} must be {value!r}"


def _constants(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that vLLM's OLMoE has as constants (models/olmoe.py): what config.json says of them is not read."""
    if config["model_type"] != "olmoe":
        return
    for key, value in {"norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5}.items():
        if config.get(key) != value:
            yield f"config.json: {key}={config.get(key)} and vLLM's OLMoE has {value}: use --for transformers"


def _shards(folder: Path, found: dict[str, tuple[str, Shape]]) -> Iterator[str]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {path.name for path in folder.glob("*.safetensors")}
    if files != set(index.values()):
        yield f"{INDEX} names {len(set(index.values()))} files and there are {len(files)}"
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as shard:
            if (shard.metadata() or {}).get("format") != "pt":
                yield f"{file} has no metadata format=pt"
            for name in shard.keys():  # noqa: SIM118 - no mapping
                one = shard.get_slice(name)
                found[name] = (one.get_dtype(), tuple(one.get_shape()))
                if index.get(name) != file:
                    yield f"{INDEX} has {name} in {index.get(name)} and it is in {file}"


def _names(found: Mapping[str, tuple[str, Shape]], names: Mapping[str, Shape]) -> Iterator[str]:
    for name, shape in names.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name][1] != shape:
            yield f"{name} is {list(found[name][1])} and config.json makes it {list(shape)}"
    for name in found:
        if name not in names and name.removesuffix(SCALE) not in names:
            yield f"{name} is looked for by no reader"


def _dtypes(config: Mapping[str, Any], found: Mapping[str, tuple[str, Shape]]) -> Iterator[str]:
    plain, is_fp8 = DTYPES[config["torch_dtype"]], "quantization_config" in config
    for name, (dtype, shape) in found.items():
        base = name.removesuffix(SCALE)
        if base != name:
            if found.get(base, ("",))[0] != "F8_E4M3":
                yield f"{name} is there and {base} is not FP8"
            continue
        if dtype == "F8_E4M3":
            scale = found.get(name + SCALE)
            grid = tuple(-(-size // 128) for size in shape)
            if not is_fp8:
                yield f"{name} is FP8 and config.json has no quantization_config"
            if scale != ("F32", grid):
                yield f"{name + SCALE} must be F32 {list(grid)} and is {scale}"
        elif name.endswith("e_score_correction_bias"):
            if dtype != "F32":
                yield f"{name} must be F32, in which readers add it, and is {dtype}"
        elif dtype != plain:
            yield f"{name} is {dtype} and torch_dtype says {plain}"


def _modules(config: Mapping[str, Any], found: Mapping[str, tuple[str, Shape]], fp8: set[str]) -> Iterator[str]:
    if "quantization_config" not in config:
        return
    listed = set(config["quantization_config"].get("modules_to_not_convert") or ())
    modules = {name.removesuffix(".weight") for name in found if name.endswith(".weight")}
    wholes = {f"{module.partition('.mlp.experts.')[0]}.mlp.experts" for module in modules if ".mlp.experts." in module}
    for module in sorted(listed - modules - wholes):
        yield f"modules_to_not_convert has {module}, which is no module's full path"
    for name in sorted(fp8):
        module = name.removesuffix(".weight")
        if module in listed or any(module.endswith(one) for one in _NEVER_FP8):
            yield f"{name} is FP8 and its reader takes it as {config['torch_dtype']}"
    for module in sorted(modules - listed):
        if _is_projection(module) and f"{module}.weight" not in fp8:
            yield f"{module}.weight is not FP8 and modules_to_not_convert lacks {module}"


def _is_projection(module: str) -> bool:
    """Whether readers quantize a module unless it is listed."""
    return module.endswith("_proj") and not module.endswith("eh_proj")


def _merged(names: Mapping[str, Shape], fp8: set[str]) -> Iterator[str]:
    for name in names:
        head, _, last = name.removesuffix(".weight").rpartition(".")
        for group in MERGED:
            if last != group[0]:
                continue
            parts = [one for one in (f"{head}.{part}.weight" for part in group) if one in names]
            if len({part in fp8 for part in parts}) > 1:
                yield f"{' and '.join(parts)} are merged and some are FP8, others not"
            for part in parts[:-1]:
                if part in fp8 and names[part][0] % 128:
                    yield f"{part} is merged before another and its {names[part][0]} rows are no multiple of 128"
    wholes: dict[str, set[bool]] = {}
    for name in names:
        if ".mlp.experts." in name and name.endswith(".weight"):
            wholes.setdefault(name.partition(".mlp.experts.")[0], set()).add(name in fp8)
    yield from (f"{name}.mlp.experts are FP8 in part" for name, kinds in wholes.items() if len(kinds) > 1)


def _widths(names: Mapping[str, Shape], fp8: set[str]) -> Iterator[str]:
    for name in sorted(fp8 & names.keys()):
        n, k = names[name]
        if k % 128:
            yield f"{name} is FP8 and its {k} inputs are no multiple of 128"
        if ".mlp.experts." in name and not name.endswith("down_proj.weight") and n % 128:
            yield f"{name} is FP8 and its {n} hidden features are no multiple of 128"
