"""`fp8moe data FILE` of conversations: how many there are, their tokens, and samples with what is learned of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fp8moe.data.card import histogram
from fp8moe.data.chat_rows import read_conversations
from fp8moe.data.chat_template import CONFIG_FILE, TEMPLATE_FILE, ChatTemplate, open_template
from fp8moe.data.chat_tokens import encode_conversation, is_silenced, rendered
from fp8moe.data.tokenizer import load_tokenizer
from fp8moe.errors import ConfigError


def print_chat(path: Path, options: argparse.Namespace) -> None:
    """Print the card of a file of conversations. Raises ConfigError and DataError."""
    next(read_conversations(path))  # a file of something else says so first
    if options.tokenizer is None:
        raise ConfigError(f"{path} holds conversations and needs a tokenizer: use --tokenizer RUN/tokenizer.json")
    tokenizer_path = Path(options.tokenizer)
    tokenizer = load_tokenizer(tokenizer_path)
    template = _template(options.chat_template, tokenizer_path, tokenizer)
    lengths, learned, unanswered, silenced = [], 0, 0, 0
    shown: list[str] = []
    for place, messages in read_conversations(path):
        parts = rendered(template, place, messages)
        ids, mask = encode_conversation(template, tokenizer, messages)
        lengths.append(len(ids))
        learned += int(mask.sum())
        is_silent = is_silenced(parts, messages)
        silenced, unanswered = silenced + is_silent, unanswered + (not is_silent and not mask.any())
        if len(shown) < options.samples:
            lines = [f"  [{'learned' if is_learned else 'given'}] {_quoted(text)}" for text, is_learned in parts]
            shown.append("\n".join([f"\n{place}, {len(ids):,} tokens, {int(mask.sum()):,} learned:", *lines]))
    tokens = np.array(lengths, dtype=np.int64)
    print(f"{path}: {len(tokens):,} conversations, {unanswered:,} without an answer, {template.source}")
    print(f"{tokens.sum():,} tokens, of which {learned / max(1, tokens.sum()):.1%} are learned")
    if silenced:
        print(f"{template.source} writes nothing of the answers of {silenced:,} conversations")
    print("\n".join(["", f"{'tokens':>23} {'conversations':>13}", *histogram(tokens), *shown]))


def _template(given: str | None, tokenizer_path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    try:
        return open_template(given, tokenizer_path, tokenizer)
    except ConfigError as error:
        if given is not None or "has no chat template" not in str(error):
            raise
        raise ConfigError(
            f"{tokenizer_path.parent} has no chat template, neither {TEMPLATE_FILE} nor in {CONFIG_FILE}: use "
            "--chat-template plain, or a file's path"
        ) from error


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
