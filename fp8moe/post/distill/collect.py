"""From prompts to stored, verified samples: what is missing is asked for, verified as it comes, and appended.

Replies are verified on threads, since `code` waits for other processes, and each is on disk as soon as its verdicts
are there. On several ranks all ask the teacher, which is collective, and rank 0, the one with a writer, verifies and
writes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import fp8moe
from fp8moe.post.distill.forms import messages_of, response_of
from fp8moe.post.distill.prompts import Prompt
from fp8moe.post.distill.store import Key, SampleWriter
from fp8moe.post.distill.teacher import Failed, Form, Reply, Request, Teacher, draw_number
from fp8moe.post.verify.verdict import NamedVerifier, Verdict, judge
from fp8moe.train.provenance import commit

Sample = dict[str, Any]
_NO_TEXT = {0xFDD0: "?", 0xFDD1: "?"}  # with which chat templates mark answers
_NAMED = 10  # samples of one kind of trouble that are named; all are counted
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a teacher: `samples` of every prompt in each of `forms`. settings: of the sampling, which go
    into every row (temperature, top_p, max_tokens, seed)."""

    prompts: Sequence[Prompt]
    forms: tuple[Form, ...]
    samples: int
    system_prompt: str
    settings: Mapping[str, Any]

    @cached_property
    def requests(self) -> list[Request]:
        """All of them, in the order of the prompts; of a short form whose line has its own `response` that one."""
        seed, requests = self.settings["seed"], []
        for prompt in self.prompts:
            for form in self.forms:
                messages = messages_of(prompt.text, form, self.system_prompt)
                for sample in range(1 if self.is_original(prompt, form) else self.samples):
                    draw = draw_number(seed, prompt.id, form, sample)
                    requests.append(Request(prompt.id, form, sample, messages, draw))
        return requests

    @staticmethod
    def is_original(prompt: Prompt, form: Form) -> bool:
        """Whether the answer stands in the prompt's own line."""
        return form == "short" and "response" in prompt.row


@dataclass
class Collector:
    """samples: those stored, by key; more as they come. failed: requests without a sample."""

    wanted: Wanted
    verifiers: Sequence[NamedVerifier]
    samples: dict[Key, Sample]
    verify_again: bool = False
    failed: list[Failed] = field(default_factory=list)
    _rows: dict[str, Prompt] = field(default_factory=dict)
    _raised: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._rows = {prompt.id: prompt for prompt in self.wanted.prompts}

    def missing(self, *, original: bool = False) -> list[Request]:
        """What the teacher is still to be asked; original: what stands in the prompts' own lines and is not stored."""
        return [
            request
            for request in self.wanted.requests
            if request.key not in self.samples
            and Wanted.is_original(self._rows[request.prompt], request.form) == original
        ]

    def collect(
        self,
        teacher: Teacher | None,
        writer: SampleWriter | None,
        workers: int,
        took: Callable[[], object] = lambda: None,
    ) -> None:
        """Ask for what is missing, on every rank; verify and store it where there is a writer. took: after each answer.

        What the teacher raises is raised again when all that came before is stored.
        """
        asked = self.missing()
        if writer is None:
            for _ in teacher.replies(asked) if teacher is not None else ():
                continue
            return
        with self._verifying(writer, workers) as verify:
            self._verify_stored(verify)
            for request in self.missing(original=True):
                response = str(self._rows[request.prompt].row["response"])
                verify(self._sample(Reply(request, response), {"teacher": "original"}))
            for reply in teacher.replies(asked) if asked and teacher is not None else ():
                took()
                if isinstance(reply, Failed):
                    self._fail(reply)
                else:
                    verify(self._sample(reply, teacher.identity if teacher is not None else {}))

    @contextlib.contextmanager
    def _verifying(self, writer: SampleWriter, workers: int) -> Iterator[Callable[[Sample], None]]:
        """A function that has a sample verified and stored, soon; all are at the end, however it comes."""
        pending: deque[Future[None]] = deque()

        def store(sample: Sample) -> None:
            judged = self._judged(sample)
            with self._lock:
                writer.append(judged)
                self.samples[(judged["prompt_id"], judged["form"], judged["sample"])] = judged
                self._say_raised(judged)

        def wait(most: int) -> None:
            while pending and (len(pending) > most or pending[0].done()):
                pending.popleft().result()

        with ThreadPoolExecutor(workers, "verify") as pool:

            def verify(sample: Sample) -> None:
                pending.append(pool.submit(store, sample))
                wait(4 * workers)

            try:
                yield verify
            finally:
                wait(0)

    def _sample(self, reply: Reply, identity: Mapping[str, Any]) -> Sample:
        """What is stored of a reply, but the verdicts."""
        request = reply.request
        own = {"draw": request.draw, **self.wanted.settings} if identity.get("teacher") != "original" else {}
        made = {"version": fp8moe.__version__, "commit": commit(), "time": datetime.now(UTC).isoformat("T", "seconds")}
        text = response_of(reply, request.form).encode("utf-8", "replace").decode().translate(_NO_TEXT)
        return {
            "prompt_id": request.prompt,
            "line": self._rows[request.prompt].number,
            "form": request.form,
            "sample": request.sample,
            "text": text,
            "ended": reply.ended,
            "prompt_tokens": reply.prompt_tokens,
            "tokens": reply.tokens,
            "provenance": {**identity, **own, "form": request.form, **made},
        }

    def _judged(self, sample: Sample) -> Sample:
        row = {**self._rows[sample["prompt_id"]].row, "ended": sample["ended"], "tokens": sample["tokens"]}
        verdicts = judge(sample["text"], row, self.verifiers, known_verdicts(sample))
        return {**sample, "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()}}

    def _verify_stored(self, verify: Callable[[Sample], None]) -> None:
        """Ask the verifiers that a stored sample has not been asked by, or all again."""
        for request in self.wanted.requests:
            sample = self.samples.get(request.key)
            if sample is not None and (self.verify_again or not is_judged(sample, self.verifiers)):
                verify({**sample, "verdicts": {}} if self.verify_again else sample)

    def _say_raised(self, sample: Sample) -> None:
        for name, verdict in sample["verdicts"].items():
            if verdict["raised"]:
                self._raised += 1
                _say(
                    self._raised, f"verifier {name} failed on {_named(sample)}, which is left out: {verdict['reason']}"
                )

    def _fail(self, failed: Failed) -> None:
        self.failed.append(failed)
        request = failed.request
        name = _named({"line": self._rows[request.prompt].number, "sample": request.sample, "form": request.form})
        _say(len(self.failed), f"{name} has no answer: {failed.reason}")


def known_verdicts(sample: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdicts of a stored sample."""
    return {
        name: Verdict(bool(one["ok"]), str(one["reason"]), bool(one["raised"]))
        for name, one in sample.get("verdicts", {}).items()
    }


def is_judged(sample: Mapping[str, Any], verifiers: Sequence[NamedVerifier]) -> bool:
    """Whether the verdicts of a stored sample say if these verifiers accept it; one that raised is asked again."""
    known = known_verdicts(sample)
    for verifier in verifiers:
        verdict = known.get(verifier.name)
        if verdict is None or verdict.raised:
            return False
        if not verdict.ok:
            return True
    return True


def _named(sample: Mapping[str, Any]) -> str:
    return f"prompt {sample['line']}, {sample['form']} sample {sample['sample'] + 1}"


def _say(count: int, sentence: str) -> None:
    if count <= _NAMED:
        _logger.warning("%s", sentence)
    elif count == _NAMED + 1:
        _logger.warning("more such samples are counted and not named")
