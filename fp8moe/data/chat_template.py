"""Chat templates: what turns a conversation into text, and which parts of that text the assistant wrote.

A template is Jinja, which is data: it comes with a tokenizer (chat_template.jinja, or in tokenizer_config.json), is a
file of the user's, or one of two built-in ones: `chatml`, for tokenizers that have its two tokens, and `plain`, for any
other, such as one that was trained here. It runs in Jinja's immutable sandbox, as in `transformers`, and reaches
neither files nor Python. It is given no date (`strftime_now`), or the same conversation would be other text tomorrow.

What the assistant wrote, exactly, in one of two ways:
- the template says so: everything inside `{% generation %}` ... `{% endgeneration %}`, as `transformers` reads it;
- else by rendering prefixes. The text of the messages before an answer, with the generation prompt, is what a model is
  asked to continue; the text of the messages up to that answer is what it should have made of it. Their difference is
  what is learned: the answer and what ends its turn. That holds only where each of these texts begins the next one, up
  to the whole conversation, which is compared for every answer; a template that writes earlier turns anew, as those
  that take reasoning out of them, is refused. White space behind the token that ends a turn is not learned: the model
  is no longer asked there.

Refused: searching the text for the answer's words, which stand in the question as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from fp8moe.data.durable import unreadable
from fp8moe.data.sources import DataConfig
from fp8moe.data.tokenizer import KNOWN_END_OF_TEXT, load_tokenizer
from fp8moe.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{{ message.role | capitalize }}:\n"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{{ '\\n' }}{% endif %}"
    ),
}
WRITE = "write message.content of the role assistant in data.chat_template"  # advice
# Noncharacters of Unicode, which no text for interchange has, around what a template marks.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template. source: where it is from, for messages. names: the special tokens that templates name, bos_token and
    eos_token. added: the tokenizer's added tokens, by which the end of a turn is known."""

    text: str
    source: str
    names: Mapping[str, str]
    added: tuple[str, ...] = ()

    @cached_property
    def _compiled(self) -> Template:
        return _compile(self.text, self.source)

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """The text of messages; asks: with the prompt behind which the assistant answers. Raises ConfigError."""
        return _MARKS.sub("", self._rendered(messages, asks=asks))

    def asked(self, messages: Sequence[Message]) -> list[str]:
        """The text behind which the assistant answers, in the parts in which it is encoded, those of training where the
        template says which. Raises ConfigError."""
        try:
            return [text for text, _ in self.parts(messages, asks=True)]
        except ConfigError:
            return [self.render(messages, asks=True)]

    def parts(self, messages: Sequence[Message], *, asks: bool = False) -> list[tuple[str, bool]]:
        """The text of a whole conversation in parts, each with whether the assistant wrote it. Raises ConfigError."""
        whole = self._rendered(messages, asks=asks)
        if _MARKED.search(self.text):
            if "".join(_MARKS.findall(whole)).replace(_BEGIN + _END, ""):
                raise ConfigError(
                    f"{self.source} has {{% generation %}} inside {{% generation %}}: write one at a time"
                )
            pieces = _MARKS.split(whole)  # in turn outside and inside
            return [(piece, bool(number % 2)) for number, piece in enumerate(pieces) if piece]
        places = [0]
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], asks=True)
            until = self._rendered(messages[: number + 1], asks=False)
            if not (until.startswith(before) and whole.startswith(until) and len(before) >= places[-1]):
                if until == self._rendered(messages[:number], asks=False):
                    raise ConfigError(f"{self.source} writes nothing of message {number + 1}, the assistant's: {WRITE}")
                raise ConfigError(
                    f"{self.source} renders message {number + 1}, the assistant's, otherwise than a model is asked for "
                    "it, so what to learn of it can't be told: mark it by {% generation %} and {% endgeneration %} in "
                    "data.chat_template"
                )
            places += [len(before), len(before) + len(self._without_space(until[len(before) :]))]
        pieces = [whole[start:end] for start, end in pairwise([*places, len(whole)])]
        return [(piece, bool(number % 2)) for number, piece in enumerate(pieces) if piece]

    def _without_space(self, answer: str) -> str:
        """An answer without the white space behind the token that ends its turn, where one does."""
        bare = answer.rstrip()
        return bare if bare.endswith(self.added) else answer

    def _rendered(self, messages: Sequence[Message], *, asks: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._compiled.render(
                    messages=list(messages), tools=None, documents=None, add_generation_prompt=asks, **self.names
                )
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ConfigError(
                f"{self.source} refuses these messages ({_one_line(error)}): change them, or the template"
            ) from error

    def files(self) -> dict[str, str]:
        """The files by which a directory keeps this template beside its tokenizer: name -> text."""
        return {TEMPLATE_FILE: self.text, CONFIG_FILE: f"{json.dumps(dict(self.names), indent=1)}\n"}


def open_template(given: str | None, tokenizer_path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template `given`: a built-in one's name, or a file's path; None: the one beside the tokenizer.

    Raises ConfigError where there is none, or where the tokenizer lacks its tokens; DataError where it can't be read.
    """
    folder = tokenizer_path.parent
    names = special_names(folder, tokenizer)
    added = tuple(one.content for one in tokenizer.get_added_tokens_decoder().values())
    if given is None:
        found = ChatTemplate(_beside(folder), f"the chat template in {folder}", names, added)
    elif given in BUILT_IN:
        if given == "chatml" and not all(tokenizer.token_to_id(token) is not None for token in CHATML_TOKENS):
            raise ConfigError(
                f"data.chat_template=chatml needs the tokens {' and '.join(CHATML_TOKENS)} and {tokenizer_path} has "
                "not both: use plain"
            )
        found = ChatTemplate(BUILT_IN[given], f"the chat template {given}", names, added)
    elif Path(given).is_file():
        found = ChatTemplate(_read(Path(given)), given, names, added)
    else:
        raise ConfigError(
            f"data.chat_template={given} is neither a file nor built in: name a Jinja file, or {' or '.join(BUILT_IN)}"
        )
    _compile(found.text, found.source)
    return found


def open_chat_tools(config: DataConfig) -> tuple[Path, Tokenizer, ChatTemplate]:
    """The path of the tokenizer of conversations, itself, and the template. Raises ConfigError and DataError."""
    if config.tokenizer is None:
        raise ConfigError(
            "data.source=chat needs a tokenizer and data.tokenizer is null: name a tokenizer.json, or begin by fp8moe "
            "sft init_from=RUN, which takes the run's"
        )
    path = Path(config.tokenizer)
    tokenizer = load_tokenizer(path)
    return path, tokenizer, open_template(config.chat_template, path, tokenizer)


def special_names(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that templates call bos_token and eos_token: those of tokenizer_config.json, else none and the token
    that ends a text. Raises DataError."""
    config = _configuration(folder)
    end = next((name for name in KNOWN_END_OF_TEXT if tokenizer.token_to_id(name) is not None), "")
    return {name: _content(config.get(name), default) for name, default in (("bos_token", ""), ("eos_token", end))}


def _content(value: object, default: str) -> str:
    """The text of a token as tokenizer_config.json holds it: itself, or as a mapping."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else default


def _beside(folder: Path) -> str:
    if (folder / TEMPLATE_FILE).is_file():
        return _read(folder / TEMPLATE_FILE)
    found = _configuration(folder).get("chat_template")
    if isinstance(found, list):  # several by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    if isinstance(found, str):
        return found
    raise ConfigError(
        f"{folder} has no chat template, neither {TEMPLATE_FILE} nor in {CONFIG_FILE}: "
        "use data.chat_template=plain for fp8moe sft, or a file's path; --prompt for fp8moe generate"
    )


def _configuration(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing where there is none. Raises ConfigError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): copy it again") from error
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: convert it to UTF-8") from error


def _compile(text: str, source: str) -> Template:
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block {% generation %}, whose text comes out between two marks."""

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise ConfigError(f"{source} is not a Jinja template ({_one_line(error)}): change it") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
