"""The files beside a released model's weights: its tokenizer, its generation defaults, its config.json.

An import keeps them unchanged in `huggingface/` of the run directory, and an export puts them back. tokenizer.json is
used where its tokens are bytes (`data.token_bytes`); another kind, or one that needs remote code, is copied and not
used: nothing here executes a file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import yaml

from fp8moe.data.tokenizer import end_of_text_id, load_tokenizer, num_ids
from fp8moe.errors import DataError
from fp8moe.interop.families import read_json
from fp8moe.interop.hf_dir import is_hf_directory

KEPT = "huggingface"  # the folder in a run directory
TOKENIZER = "tokenizer.json"
_PATTERNS = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("*.tiktoken", "tiktoken.model", "tokenizer.model", "chat_template*", "tokenization_*.py"),
    *("generation_config.json", "config.json"),
)


def files_of(folder: Path) -> list[Path]:
    """The files of a released model that are kept beside its weights, in order of their names."""
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})


def usable(folder: Path, vocab_size: int) -> tuple[Path | None, str]:
    """The tokenizer.json of a directory, if it can be used here, and a sentence on what was found.

    Raises DataError where it has more entries than the model's vocabulary.
    """
    path = folder / TOKENIZER
    config = folder / "tokenizer_config.json"
    is_remote = config.is_file() and bool(read_json(config).get("auto_map"))
    code = sorted(one.name for one in folder.glob("tokenization_*.py"))
    if not path.is_file():
        if is_remote or code:
            return None, "its tokenizer needs code of its own, which is never executed here: copied and not used"
        return None, "no tokenizer.json: text can't be encoded, token files can be trained on"
    try:
        size = num_ids(load_tokenizer(path))
    except DataError as error:
        return None, f"{error}; copied and not used"
    if size > vocab_size:
        raise DataError(
            f"{path} has ids up to {size - 1} and the model's vocabulary has {vocab_size} entries: use the tokenizer "
            "that was released with the model"
        )
    return path, f"{TOKENIZER} of {size} ids is taken along"


def keep(source: Path, target: Path) -> None:
    """Copy the files of a released model, unchanged, to a folder that is made."""
    target.mkdir(parents=True, exist_ok=True)
    for path in files_of(source):
        shutil.copyfile(path, target / path.name)


def kept_by(run: Path) -> Path | None:
    """The folder of the released model's files that a run, or what it began from, has; None without."""
    seen = set()
    while run.resolve() not in seen:
        seen.add(run.resolve())
        if (run / KEPT).is_dir():
            return run / KEPT
        if is_hf_directory(run):
            return run
        origin = _init_from(run)
        if origin is None:
            return None
        run = origin
    return None


def _init_from(run: Path) -> Path | None:
    try:
        tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    name = tree.get("init_from") if isinstance(tree, dict) else None
    if not isinstance(name, str) or "://" in name:
        return None
    path = Path(name)
    return path.absolute().parent.parent if path.name.startswith("step-") else path


def write_own(tokenizer: Path, folder: Path) -> None:
    """A tokenizer made here, unchanged, and the tokenizer_config.json by which readers take it as it is."""
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    loaded = load_tokenizer(tokenizer)
    with contextlib.suppress(DataError):
        content["eos_token"] = loaded.id_to_token(end_of_text_id(loaded))
    (folder / "tokenizer_config.json").write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")
