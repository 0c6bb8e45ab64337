"""Templates and a tokenizer for tests of conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fp8moe.data.tokenizer import train_tokenizer

ADDED = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Written for these tests after the layout of Llama 3's and DeepSeek-V3's.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{{ '' }}{% endif %}"
)
DEEPSEEK = (
    "{{ '<｜begin▁of▁sentence｜>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "Is c d right?"},
    {"role": "assistant", "content": "Yes: c d\n"},
]


def chat_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with the tokens of three kinds of templates."""
    tokenizer = train_tokenizer(["a b c d right yes be brief is what", "1+2=3 Answer: 3\n"] * 9, 270)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ADDED])
    return tokenizer


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def exchange(question: str, answer: str) -> dict[str, Any]:
    """A row with one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
