"""Folders of data sets as they lie on the Hugging Face hub: which of their files are the train split.

The hub tells splits by names, of folders (`train/`, `test/`) or of files (`data/train-00000-of-00002.parquet`,
`dev.jsonl`, `wiki.valid.txt`): a name holds the word of a split, apart from other letters. Such a folder given whole is
read as its train split, without the data set's card, and the other splits are left out and counted; otherwise the test
split would be trained on. The words are those of the `datasets` library.

A folder is one of these where at least two splits are found. Tables and JSON lines decide where there are any. Refused
then: a file of no split, or none of train, since to guess would train on a test split or lose text silently. Of a
folder of plain text all files must name a split, or it is read whole: books have such words in their titles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8moe.errors import DataError

TRAIN = "train"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+?)[-.]\d{5}-of-\d{5}\b")
_CARD = ".md"


@dataclass(frozen=True)
class TrainSplit:
    """The train split of the folder `root`: its files; of the others those of other splits, by split, and the rest."""

    root: Path
    files: list[Path]
    others: dict[str, list[Path]]
    rest: list[Path]

    def described(self) -> str:
        """What is read and what is left out, as a line."""
        left = [f"{len(files)} of {split}" for split, files in sorted(self.others.items())]
        left += [f"{len(self.rest)} of no split"] if self.rest else []
        return (
            f"{self.root} is read as its train split, {len(self.files)} of its files; left out: {', '.join(left)} "
            "(tokenize another split by its name, for data.validation_paths)"
        )


def train_split(root: Path, files: Sequence[Path], is_text: Callable[[Path], bool]) -> TrainSplit | None:
    """The train split among the readable `files` below `root`; None where they are of fewer than two splits.

    is_text: whether a file is plain text. Raises DataError where there are several and what to read isn't clear.
    """
    cards = [file for file in files if file.suffix.lower() == _CARD]
    texts = [file for file in files if file not in cards and is_text(file)]
    tables = [file for file in files if file not in cards and not is_text(file)]
    data, rest = (tables, texts + cards) if tables else (texts, cards)
    splits: dict[str, list[Path]] = {}
    for file in data:
        splits.setdefault(split_of(file.relative_to(root)), []).append(file)
    unknown, train = splits.pop("", []), splits.pop(TRAIN, [])
    if len(splits) + bool(train) < 2 or (unknown and not tables):
        return None
    if unknown or not train:
        names = ", ".join([*([TRAIN] if train else []), *sorted(splits)])
        what = f"{len(unknown)} of none, {unknown[0].relative_to(root)}" if unknown else "none of train"
        raise DataError(f"{root} has files of the splits {names} and {what}: name the files to read, not the folder")
    shards = sorted({found[1] for file in train if (found := _SHARD.match(str(file)))})
    if len({Path(name).name for name in shards}) > 1:
        names = ", ".join(sorted({Path(name).name for name in shards}))
        raise DataError(f"{root} has the train splits {names}: name the files of one, {shards[0]}-*")
    return TrainSplit(root, train, splits, rest)


def split_of(name: Path) -> str:
    """The split that a relative path names, by its outermost folder that does or by the file; empty: none."""
    for part in name.parts:
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return ""
