"""Check of the files that a run reads, before it starts a process or makes its directory.

Their headers, sizes and order are checked here, which takes a fraction of a second; every token id is compared with the
vocabulary once, when the data is prepared (`build`).
"""

from __future__ import annotations

from pathlib import Path

from fp8moe.data.chat_rows import read_conversations
from fp8moe.data.chat_template import open_chat_tools
from fp8moe.data.chat_tokens import rendered
from fp8moe.data.fim import open_fim
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.sources import DataConfig
from fp8moe.data.tokenizer import check_beside, check_size, load_tokenizer, tokenizer_beside


def check_files(config: DataConfig) -> None:
    """Raises DataError at a token file or tokenizer that is missing, unreadable or broken, or lacks a sentinel of FIM,
    and at token files of another tokenizer than `tokenizer`; ConfigError at one that has more ids than `vocab_size`. Of
    conversations each file's first row and the template are looked at. Writes nothing."""
    if config.source == "chat":
        _, tokenizer, template = open_chat_tools(config)
        check_size(tokenizer, config.vocab_size)
        for name in (*config.paths, *config.validation_paths):
            place, messages = next(read_conversations(Path(name)))
            rendered(template, place, messages)
        return
    if config.source == "problems":
        if config.tokenizer is not None:
            check_size(load_tokenizer(Path(config.tokenizer)), config.vocab_size)
        return
    for prefix in (*config.paths, *config.validation_paths):
        IndexedDataset(prefix)
    given = None if config.tokenizer is None else Path(config.tokenizer)
    path = given or tokenizer_beside(config.paths + config.validation_paths)
    if path is not None:
        check_size(load_tokenizer(path), config.vocab_size)
    if given is not None:
        check_beside(given, config.paths + config.validation_paths)
    if path is not None or config.source == "indexed":
        open_fim(config, path, 0)
