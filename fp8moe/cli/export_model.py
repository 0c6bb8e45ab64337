"""`fp8moe export CHECKPOINT OUT`: a checkpoint as a Hugging Face directory, for vLLM, SGLang and transformers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, make_parser, parse

if TYPE_CHECKING:
    from fp8moe.interop.export_hf import Export
    from fp8moe.model.config import ModelConfig

DESCRIPTION = """\
Write a checkpoint as a Hugging Face directory: config.json, safetensors with an index, tokenizer files, a model card. A
run directory stands for its newest checkpoint. The rules of vLLM's and SGLang's loaders are checked before it counts.

  fp8moe export runs/mine out/mine --precision bf16
  fp8moe export runs/mine out/mine-fp8 --precision fp8 --ema
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("export", DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run directory: its newest")
    parser.add_argument("out", metavar="OUT", help="the directory that is made")
    parser.add_argument(
        "--precision", choices=["bf16", "fp8", "fp32"], default="bf16", help="of the weights; default bf16"
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights in their place")
    parser.add_argument("--mtp", choices=["keep", "drop"], default="keep", help="the MTP module; default keep")
    parser.add_argument(
        "--for",
        dest="reader",
        choices=["vllm", "transformers"],
        default="vllm",
        help="whose rules decide what is FP8; default vllm, which are SGLang's too",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """The command `fp8moe export`."""
    arguments = parse(command_parser(), argv)
    from fp8moe.cli.checkpoint import found
    from fp8moe.interop.new_directory import check_empty

    out = Path(arguments.out)
    check_empty(out)
    path = found(arguments.checkpoint)[-1]
    run = path.absolute().parent.parent if isinstance(path, Path) else None
    lines = write_export(
        path,
        run,
        out,
        arguments.precision,
        reader=arguments.reader,
        averaged=arguments.ema,
        with_mtp=arguments.mtp == "keep",
    )
    print("\n".join(lines))
    return 0


def write_export(
    path: Any,
    run: Path | None,
    out: Path,
    precision: str,
    *,
    reader: str = "vllm",
    averaged: bool = False,
    with_mtp: bool = True,
) -> list[str]:
    """Write the checkpoint at `path` of the run directory `run` to the new directory `out` -> sentences on it.

    Raises ConfigError, DataError and SpaceError; nothing is left then.
    """
    from fp8moe.interop.card import model_card
    from fp8moe.interop.export_hf import config_of, write_directory
    from fp8moe.interop.stored import Stored
    from fp8moe.interop.tokenizer_files import kept_by

    stored = Stored(path, averaged=averaged)
    model = _model_of(stored.state)
    kept = None if run is None else kept_by(run)  # the released model's files that the run began with
    if not with_mtp:
        model = replace(model, mtp_depth=0)
    export = _export(stored, model, precision, reader, kept)
    said = _said(export, reader, averaged=averaged)
    ids = _ids(kept, run, model)
    files = {"config.json": f"{json.dumps(config_of(export, ids), indent=2)}\n", "README.md": ""}
    files |= {"README.md": model_card(export, out.resolve().name, said)} | _generation(kept, ids)
    size = write_directory(export, out, files, lambda folder: _copy(kept, run, folder))
    said += _requantized(export)
    return [f"{out}: {export.family.model_type}, {size / 1e9:.3f} GB in {export.output}", *said]


def _model_of(state: dict[str, Any]) -> ModelConfig:
    from fp8moe.cli.compose import to_dataclass
    from fp8moe.model.config import ModelConfig

    return to_dataclass(ModelConfig, state["model"], "model")


def _export(stored: Any, model: ModelConfig, output: Any, reader: Any, kept: Path | None) -> Export:
    from fp8moe.errors import ConfigError
    from fp8moe.interop.export_hf import Export
    from fp8moe.interop.families import family_for, read_json
    from fp8moe.interop.precision import plan_fp8

    before = None if kept is None else read_json(kept / "config.json").get("model_type")
    family = family_for(model, before)
    if output == "fp8" and not family.has_fp8:
        raise ConfigError(f"--precision fp8 and the readers of {family.model_type} have no block FP8: use bf16")
    scales = stored.state.get("config", {}).get("precision", {}).get("scales", "recipe")
    export = Export(stored, family, model, output, None, scales == "power_of_two", reader == "vllm")
    if output != "fp8":
        return export
    plan = plan_fp8(export.parameters(), reader)
    if not plan.fp8:
        reason = next(one for one in plan.kept.values() if one != "never FP8")
        raise ConfigError(f"--precision fp8 and no weight of this model can be FP8 ({reason}): use bf16")
    return replace(export, plan=plan, requantized=set() if _is_from_fp8(stored, kept) else None)


def _is_from_fp8(stored: Any, kept: Path | None) -> bool:
    """Whether a checkpoint is a model of block FP8 as it was imported."""
    from fp8moe.interop.families import read_json

    untrained = stored.state.get("step") == 0 and "imported_from" in stored.state
    return untrained and kept is not None and read_json(kept / "config.json").get("quantization_config") is not None


def _requantized(export: Export) -> list[str]:
    """A sentence on FP8 weights whose codes are not the source's."""
    if not export.requantized:
        return []
    return [
        f"{len(export.requantized)} weights are quantized anew, {min(export.requantized)} the first: the source's "
        "scales are not amax/448; no value moves by more than one step of E4M3"
    ]


def _said(export: Export, reader: str, *, averaged: bool) -> list[str]:
    """Sentences on what is written."""
    said = ["the average of the weights"] if averaged else []
    said += [f"the MTP module as layer {export.config.num_layers}"] if export.config.mtp_depth else []
    if export.plan is None:
        return said
    said.append(f"for {reader}: {len(export.plan.fp8)} weights in FP8, blocks of 128x128")
    for reason, count in Counter(r for r in export.plan.kept.values() if r != "never FP8").items():
        names = [name for name, one in export.plan.kept.items() if one == reason]
        said.append(f"{count} stay BF16, {names[0]} the first: {reason}")
    if export.plan.reblocked:
        said.append(
            f"{len(export.plan.reblocked)} weights have blocks of their own, not the training's, since they were "
            f"joined at no multiple of 128, or their rows change blocks: {', '.join(export.plan.reblocked)}"
        )
    return said


def _ids(kept: Path | None, run: Path | None, model: ModelConfig) -> dict[str, Any]:
    """Ids of special tokens: the released model's, or the tokenizer's."""
    from fp8moe.data.tokenizer import end_of_text_id, load_tokenizer
    from fp8moe.errors import DataError
    from fp8moe.interop.families import read_json

    if kept is not None:
        return {key: value for key, value in read_json(kept / "config.json").items() if key.endswith("_token_id")}
    if run is None or not (own := run / "tokenizer.json").is_file():
        return {}
    try:
        return {"eos_token_id": end_of_text_id(load_tokenizer(own))}
    except DataError:
        return {}


def _generation(kept: Path | None, ids: dict[str, Any]) -> dict[str, str]:
    """generation_config.json, where the released model has none."""
    if kept is not None and (kept / "generation_config.json").is_file():
        return {}
    content = {"_from_model_config": True, **{key: value for key, value in ids.items() if value is not None}}
    return {"generation_config.json": f"{json.dumps(content, indent=2)}\n"}


def _copy(kept: Path | None, run: Path | None, folder: Path) -> None:
    """The tokenizer's files, unchanged; those of a tokenizer made here, with what readers need beside it."""
    from fp8moe.data.chat_template import TEMPLATE_FILE
    from fp8moe.interop.tokenizer_files import keep, write_own

    if kept is not None:
        keep(kept, folder)
    elif run is not None and (own := run / "tokenizer.json").is_file():
        write_own(own, folder)
    if run is not None and (template := run / TEMPLATE_FILE).is_file():  # of a fine-tuning
        shutil.copyfile(template, folder / TEMPLATE_FILE)
