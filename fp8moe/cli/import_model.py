"""`fp8moe import HF_DIR OUT`: a released model becomes a run directory, from whose weights a run begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import ConfigError

if TYPE_CHECKING:
    from fp8moe.interop.hf_model import HfModel

DESCRIPTION = """\
Make a run directory (config.yaml, tokenizer.json, FP32 weights in checkpoints/step-0) of a Hugging Face directory:
config.json and safetensors in BF16, FP16, FP32 or block FP8. Nothing that is read is executed, nothing is overwritten.

  fp8moe import models/moonlight runs/moonlight
  fp8moe train --from runs/moonlight init_from=runs/moonlight data.source=indexed data.paths=[tokens/mine] steps=1000
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("import", DESCRIPTION)
    parser.add_argument("directory", metavar="HF_DIR", help="config.json and safetensors of a released model")
    parser.add_argument("out", metavar="OUT", help="the run directory that is made")
    parser.add_argument(
        "--mtp", choices=["auto", "keep", "drop"], default="auto", help="its MTP module; auto: kept where it is there"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """The command `fp8moe import`."""
    arguments = parse(command_parser(), argv)
    from fp8moe.cli.released import configuration
    from fp8moe.cli.resume import CONFIG_FILE
    from fp8moe.interop.hf_model import open_model
    from fp8moe.interop.import_run import write_run
    from fp8moe.interop.new_directory import check_empty
    from fp8moe.interop.tokenizer_files import usable

    folder, out = Path(arguments.directory), Path(arguments.out)
    check_empty(out)
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} is a run directory and needs no import: begin from it with init_from={folder}")
    model = open_model(folder, arguments.mtp)
    tokenizer, sentence = usable(folder, model.config.vocab_size)
    composed = configuration(model, None if tokenizer is None else out.absolute() / tokenizer.name)
    write_run(model, out, composed.config, composed.text, tokenizer)
    print("\n".join([*_described(model), sentence, f"{out} holds it: fp8moe train --from {out} init_from={out}"]))
    return 0


def _described(model: HfModel) -> list[str]:
    parameters = [one for one in model.parameters.values() if not one.is_bias]
    formats = Counter(one.dtype for name, one in model.directory.entries.items() if not model.directory.is_scale(name))
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in sorted(formats.items()))
    lines = [
        f"{model.family.model_type}: {sum(one.length for one in parameters) / 1e9:.3f} billion parameters in "
        f"{len(parameters)} tensors, of {len(model.directory.entries)} in the files ({kinds})"
    ]
    reasons = Counter(model.left_out.values())
    lines += [f"left out: {count} tensor{'s'[: count > 1]}, {reason}" for reason, count in reasons.items()]
    return [*lines, *model.notes]
