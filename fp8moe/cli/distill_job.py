"""The parts of `fp8moe distill generate`, made of its arguments: teacher, verifiers, what is wanted, what is stored."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp8moe.cli.launch import is_worker
from fp8moe.cli.trained import find_trained
from fp8moe.data.chat_template import CONFIG_FILE, TEMPLATE_FILE, ChatTemplate, open_template
from fp8moe.data.chat_tokens import encode_asked, end_of_turn
from fp8moe.errors import ConfigError, DataError
from fp8moe.generate.decode import GenerationConfig
from fp8moe.generate.sampling import SamplingConfig
from fp8moe.generate.text import check_stops
from fp8moe.post.distill.collect import Collector, Wanted
from fp8moe.post.distill.endpoint import EndpointTeacher
from fp8moe.post.distill.forms import FORMS, SYSTEM_PROMPT
from fp8moe.post.distill.own import OwnTeacher
from fp8moe.post.distill.prompts import read_prompts
from fp8moe.post.distill.store import samples_path, stored_samples
from fp8moe.post.distill.teacher import Messages, Teacher
from fp8moe.post.endpoint import EndpointConfig
from fp8moe.post.verify.registry import verifier
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint.folder import step_of
from fp8moe.train.rendezvous import place


def _check(arguments: argparse.Namespace) -> None:
    """Rules of the arguments among each other. Raises ConfigError."""
    for name in ("samples", "workers", "keep"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= 10**6:
            raise ConfigError(f"--{name}={value} must be from 1 to 1000000: use 1")
    if not 0 < arguments.verify_timeout <= 86400:
        raise ConfigError(f"--verify-timeout={arguments.verify_timeout} must be above 0 and at most 86400: use 60")
    if (arguments.run is None) == (arguments.endpoint is None):
        one = "one teacher is needed and none is named" if arguments.run is None else "there are two teachers"
        raise ConfigError(f"{one}: name a RUN, or --endpoint URL with --model NAME")
    if arguments.endpoint is not None and (arguments.model is None or arguments.nproc is not None):
        raise ConfigError("--endpoint needs --model NAME, and takes no --nproc: requests are bounded by --concurrency")
    output = Path(arguments.output)
    if output.is_dir():
        raise ConfigError(f"--output={output} is a directory and must be a file: use --output {output / 'chats.jsonl'}")
    if output.exists() and not samples_path(output).exists():
        raise ConfigError(f"{output} exists and {samples_path(output)} does not: name another --output")
    check_stops(arguments.stop)


class Job:
    """The command's parts, made of its arguments."""

    def __init__(self, arguments: argparse.Namespace, processes: int) -> None:
        _check(arguments)
        self.arguments = arguments
        self.output = Path(arguments.output)
        self.stored_at = samples_path(self.output)
        sampling = SamplingConfig(arguments.temperature, arguments.top_p, arguments.seed)
        self.generation = GenerationConfig(arguments.max_tokens, arguments.batch, sampling=sampling)
        names = ["ended", *(name for name in dict.fromkeys(arguments.verify) if name != "ended")]
        self.verifiers = [verifier(name, arguments.verify_timeout) for name in names]
        self.sampled = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        self.own = None if arguments.run is None else Own(arguments, processes)
        self.remote = None if self.own is not None else _endpoint(arguments, self.generation)

    def settings(self) -> dict[str, Any]:
        """What decides the samples: those of other settings are not added to."""
        teacher = self.own.identity if self.own is not None else self._remote().identity
        return {**teacher, **self.sampled, "stop": self.arguments.stop, "system_prompt": self._system_prompt()}

    def collector(self) -> Collector:
        """What is wanted and what is stored. Raises ConfigError and DataError."""
        prompts = read_prompts(self.arguments.prompts, self.verifiers)
        forms = FORMS[self.arguments.form]
        wanted = Wanted(prompts, forms, self.arguments.samples, self._system_prompt(), self.sampled)
        stored = stored_samples(self.stored_at, self.settings())
        return Collector(wanted, self.verifiers, stored, self.arguments.verify_again)

    @contextlib.contextmanager
    def teacher(self, *, needed: bool) -> Iterator[tuple[Teacher | None, bool]]:
        """The teacher, ready to answer where one is needed, and whether this rank writes."""
        if not needed:
            yield None, not is_worker() or place(os.environ).rank == 0
        elif self.own is None:
            yield self._remote(), True
        else:
            with self.own.loaded(self.generation) as loaded:
                yield loaded

    def _remote(self) -> Any:
        assert self.remote is not None
        return self.remote

    def _system_prompt(self) -> str:
        path = self.arguments.system_prompt
        if path is None:
            return SYSTEM_PROMPT
        try:
            text = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise DataError(f"--system-prompt {path} can't be read ({reason}): name a text file") from error
        if not text:
            raise DataError(f"--system-prompt {path} is empty: write what the model is to do, or leave it out")
        return text


def _endpoint(arguments: argparse.Namespace, generation: GenerationConfig) -> Teacher:
    try:
        body = None if arguments.body is None else json.loads(arguments.body)
    except ValueError as error:
        raise ConfigError(f'--body is not JSON ({error}): write an object, {{"top_k": 20}}') from error
    if body is not None and not isinstance(body, dict):
        raise ConfigError('--body must be an object: write {"top_k": 20}')
    names = ("key_env", "concurrency", "tries", "wait", "timeout")
    given = {name: getattr(arguments, name) for name in names}
    config = EndpointConfig(arguments.endpoint, arguments.model, **given)
    return EndpointTeacher(config, generation, arguments.stop, api=arguments.api, body=body)


class Own:
    """The teacher that runs here, not loaded yet: the newest checkpoint there is now."""

    def __init__(self, arguments: argparse.Namespace, processes: int) -> None:
        self._arguments = arguments
        self._trained = find_trained(arguments, processes)
        self._trained.check_graphs(arguments)
        step = None
        if isinstance(self._trained.source, str):
            where = checkpoint.location(self._trained.source)
            newest = where if checkpoint.is_complete(where) else checkpoint.below(where)[-1]
            step = step_of(newest)
            self._trained = replace(self._trained, source=str(newest))
        self._vocabulary = self._trained.vocabulary()
        self._ends = self._vocabulary.ends | {self._vocabulary.token(name) for name in arguments.stop_token}
        self._template = None if arguments.plain else self._chat_template()
        if self._template is not None and (turn := end_of_turn(self._template, self._vocabulary.tokenizer)) is not None:
            self._ends |= {turn}
        self._encode = self._encoder()
        self.identity: dict[str, Any] = {"teacher": "fp8moe", "model": arguments.run, "step": step}
        self.identity |= {"ema": arguments.ema, "plain": arguments.plain, "settings": arguments.settings}

    @contextlib.contextmanager
    def loaded(self, generation: GenerationConfig) -> Iterator[tuple[Teacher, bool]]:
        """The teacher on this rank, and whether this rank writes."""
        with self._trained.loaded(averaged=self._arguments.ema) as (model, mesh, _):
            yield (
                OwnTeacher(
                    model,
                    mesh,
                    self._vocabulary,
                    generation,
                    self._encode,
                    self.identity,
                    self._ends,
                    self._arguments.stop,
                    self._trained.graphs(self._arguments, mesh, generation),
                ),
                mesh.rank == 0,
            )

    def _chat_template(self) -> ChatTemplate:
        """The chat template beside the tokenizer. Raises ConfigError and DataError."""
        folder = self._trained.tokenizer.parent
        try:
            return open_template(None, self._trained.tokenizer, self._vocabulary.tokenizer)
        except ConfigError as error:
            if "has no chat template" not in str(error):
                raise
            raise ConfigError(
                f"{folder} has no chat template, neither {TEMPLATE_FILE} nor in {CONFIG_FILE}: use --plain, or add one"
            ) from error

    def _encoder(self) -> Callable[[Messages], list[int]]:
        """Messages to token ids: through the chat template beside the tokenizer, or as plain text."""
        vocabulary = self._vocabulary
        if self._template is None:
            return lambda messages: vocabulary.encode("\n\n".join(message["content"] for message in messages))
        template = self._template
        return lambda messages: encode_asked(template, vocabulary.tokenizer, messages)
