"""Chat templates: the text of `transformers`, the assistant's part of it exactly, and refusals of one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fp8moe.data.chat_template import BUILT_IN, ChatTemplate, open_template, special_names
from fp8moe.errors import ConfigError
from tests.data.chats import ADDED, CHATML, DEEPSEEK, LLAMA, MARKED, NAMES, TURNS, chat_tokenizer

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "deepseek": DEEPSEEK, "marked": MARKED, **BUILT_IN}
LEARNED = {
    "chatml": ["c d<|im_end|>", "Yes: c d\n<|im_end|>"],
    "llama": ["c d<|eot_id|>", "Yes: c d<|eot_id|>"],
    "deepseek": ["c d<｜end▁of▁sentence｜>", "Yes: c d\n<｜end▁of▁sentence｜>"],
    "marked": ["c d<|im_end|>", "Yes: c d\n<|im_end|>"],
    "plain": ["c d<|eot_id|>", "Yes: c d\n<|eot_id|>"],
}
LEARNED["chatml"] = LEARNED["marked"]  # the built-in one marks what the other's prefixes give


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, "the template", NAMES, ADDED)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("asks", [False, True])
def test_text_is_what_transformers_renders(name: str, asks: bool) -> None:
    tokenization = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = tokenization.render_jinja_template(
        [TURNS], chat_template=TEMPLATES[name], add_generation_prompt=asks, **NAMES
    )
    assert template(TEMPLATES[name]).render(TURNS, asks=asks) == rendered[0]


@pytest.mark.parametrize("name", ["marked", "chatml", "plain"])
def test_marked_parts_are_those_of_transformers(name: str) -> None:
    tokenization = pytest.importorskip("transformers.utils.chat_template_utils")
    text = BUILT_IN.get(name, MARKED)
    (rendered,), (spans,) = tokenization.render_jinja_template(
        [TURNS], chat_template=text, return_assistant_tokens_mask=True, **NAMES
    )
    learned = [part for part, is_learned in template(text).parts(TURNS) if is_learned]
    assert learned == [rendered[start:end] for start, end in spans]


@pytest.mark.parametrize("text, name", [
    *((text, name) for name, text in TEMPLATES.items()), (CHATML, "chatml"),
])  # fmt: skip
def test_the_assistants_words_and_the_end_of_its_turn_are_learned_and_nothing_else(text: str, name: str) -> None:
    parts = template(text).parts(TURNS)
    assert [part for part, is_learned in parts if is_learned] == LEARNED[name]
    assert "".join(part for part, _ in parts) == template(text).render(TURNS, asks=False)
    assert all(part for part, _ in parts)
    asked = template(text).asked(TURNS[:4])
    assert "".join(asked) == template(text).render(TURNS[:4], asks=True)
    assert asked == [part for part, _ in parts][: len(asked)], "as training encodes what comes before the second answer"


def test_a_turn_without_an_added_token_at_its_end_is_learned_with_its_white_space() -> None:
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    words += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert [part for part, learned in template(words).parts(TURNS) if learned] == [" c d\n", " Yes: c d\n\n"]


REWRITES = (  # reasoning of earlier turns is taken out
    "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize("text, words", [
    ("{{ raise_exception('no system role') }}", r"^the template refuses these messages \(no system role\): change"),
    ("{{ messages[9].content }}", "refuses these messages"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
    ("{{ messages.append(1) }}", "refuses these messages"),
    ("{{ 1 // 0 }}", "refuses these messages"),
    (CHATML.replace("assistant\\n", "assistant\\n<think>\\n"), r"^the template renders message 3, the assistant's, "
     r"otherwise than a model is asked for it, .*: mark it by {% generation %} and {% endgeneration %}"),
    ("{% for m in messages if m.role != 'assistant' %}U{{ m.content }}{% endfor %}"
     "{% if add_generation_prompt %}A{% endif %}",
     r"^the template writes nothing of message 3, the assistant's: write message.content of the role assistant in "),
    (REWRITES, "renders message 3, the assistant's, otherwise"),
    ("{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}", "has {% generation %} inside"),
])  # fmt: skip
def test_templates_that_fail_are_one_sentence(text: str, words: str) -> None:
    turns = [*TURNS[:2], {"role": "assistant", "content": "<think>x</think>c"}, *TURNS[3:]]
    with pytest.raises(ConfigError, match=words) as raised:
        template(text).parts(turns)
    assert "\n" not in str(raised.value)


def test_a_template_that_rewrites_history_can_still_be_asked() -> None:
    turns = [*TURNS[:2], {"role": "assistant", "content": "<think>x</think>c"}, TURNS[3]]
    assert template(REWRITES).asked(turns) == [template(REWRITES).render(turns, asks=True)]


def test_the_template_beside_a_tokenizer_and_its_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"has no chat template, .*: use data.chat_template=plain"):
        open_template(None, path, tokenizer)
    assert special_names(tmp_path, tokenizer) == {"bos_token": "", "eos_token": "<|endoftext|>"}
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "of the configuration"}]
    for content in ("of the configuration", several):
        told = {"chat_template": content, "bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
        assert open_template(None, path, tokenizer).text == "of the configuration"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    found = open_template(None, path, tokenizer)
    assert found.text == "of the file" and found.names == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert set(ADDED) <= set(found.added)
    for name, text in found.files().items():
        (tmp_path / name).write_text(text)
    assert open_template(None, path, tokenizer) == found
    assert open_template("plain", path, tokenizer).text == BUILT_IN["plain"]
    (tmp_path / "own.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"own.jinja is not a Jinja template \(Expected an expression"):
        open_template(str(tmp_path / "own.jinja"), path, tokenizer)
    with pytest.raises(ConfigError, match=r"^data.chat_template=none is neither a file nor built in: name a Jinja"):
        open_template("none", path, tokenizer)


def test_chatml_needs_its_tokens(tmp_path: Path) -> None:
    from fp8moe.data.tokenizer import train_tokenizer

    with pytest.raises(ConfigError, match=r"^data.chat_template=chatml needs the tokens .* has not both: use plain$"):
        open_template("chatml", tmp_path / "tokenizer.json", train_tokenizer(["a b"], 270))
