"""Problems as a run reads them: posed in the words of the model's template, and the ends of its answers.

They come from a task (`post.tasks`), which holds its own part out, or from files of JSON lines with `prompt` and
`answer`, and `solution` where there is one; of those, data.validation_paths are held out, else the share
data.validation_share by the hash of the prompt. A problem of a file whose prompt, without the white space around it, is
also held out is not trained on, or the held-out accuracy would say what was learned by heart. The same prompt several
times among those to train on is counted and kept: who writes it twice may mean it. The validation loss of a run of GRPO
is that of the held-out solutions, of the answers alone where there are none.

All prompts are posed when the run opens its data, so one that can't be is named before anything is sampled.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fp8moe.data.chat_template import CONFIG_FILE, TEMPLATE_FILE, ChatTemplate, open_template
from fp8moe.data.chat_tokens import encode_asked, end_of_turn
from fp8moe.data.packing import Batch, Window, collate
from fp8moe.errors import ConfigError, DataError
from fp8moe.generate.text import Vocabulary, numbered_json_lines
from fp8moe.limits import shown
from fp8moe.post.tasks import Problem, problems
from fp8moe.train.config import TrainConfig

logger = logging.getLogger(__name__)
KEYS = {"prompt": str, "answer": str}  # of every line of a file


def open_problems(config: TrainConfig, *, is_first: bool = True) -> tuple[list[Problem], list[Problem]]:
    """(problems to train on, held-out ones in the order in which they are scored). is_first: the rank that says what is
    left out. Raises ConfigError and DataError."""
    grpo, data = config.grpo, config.data
    if not data.paths:
        train = problems(grpo.task, grpo.train_count, config.seed, digits=grpo.digits)
        return train, problems(grpo.task, max(grpo.held_out_count, 1), 0, digits=grpo.digits, held_out=True)
    train = [problem for path in data.paths for problem in read_problems(path)]
    if data.validation_paths:
        held = [problem for path in data.validation_paths for problem in read_problems(path)]
    else:
        held = [one for one in train if _share(one) < data.validation_share]
        train = [one for one in train if _share(one) >= data.validation_share]
    train, said = _apart(train, held)
    for sentence in said if is_first else ():
        logger.warning("%s", sentence)
    if not train or not held:
        raise DataError(
            f"{', '.join(data.paths)} give {len(train)} problems to train on and {len(held)} held out, at least 1 of "
            "each is needed: name more, or data.validation_paths"
        )
    return train, held[: max(grpo.held_out_count, 1)]


def read_problems(path: str) -> list[Problem]:
    """The problems of a file of JSON lines. Raises DataError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path} can't be read ({reason}): name a .jsonl of problems") from error
    return [_problem(f"line {number} of {path}", row) for number, row in numbered_json_lines(path, text, KEYS)]


def _problem(place: str, row: Mapping[str, Any]) -> Problem:
    """The problem of a row. Raises DataError, naming its place."""
    found = Problem(row["prompt"], str(row.get("solution") or ""), row["answer"], place)
    if not found.prompt.strip():
        raise DataError(f"{place} has a prompt of white space alone, 0 characters: write a question of at least 1")
    for name in ("prompt", "solution", "answer"):
        try:
            getattr(found, name).encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a pair
            raise DataError(
                f"{place} has half of a surrogate pair in its {name}, no text has one: remove it"
            ) from error
    return found


def _apart(train: list[Problem], held: Sequence[Problem]) -> tuple[list[Problem], list[str]]:
    """(The training problems whose prompts are not held out, sentences on those that are, and on prompts twice)."""
    prompts, said = {one.prompt.strip() for one in held}, []
    kept = [one for one in train if one.prompt.strip() not in prompts]
    if len(kept) < len(train):
        shared = [one for one in train if one.prompt.strip() in prompts]
        said.append(
            f"{len({one.prompt.strip() for one in shared})} of {len(prompts)} held-out prompts are also among the "
            f"{len(train)} training problems, {shared[0].place} is the first ({shown(shared[0].prompt.strip())}): "
            f"{len(shared)} training problems are left out and {len(kept)} remain"
        )
    if twice := len(kept) - len({one.prompt.strip() for one in kept}):
        said.append(f"{twice} of {len(kept)} training problems have the prompt of an earlier one; they are kept")
    return kept, said


def _share(problem: Problem) -> float:
    """A number in [0, 1) that the prompt alone decides, without the white space around it."""
    prompt = problem.prompt.strip().encode()
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=6).digest(), "big") / 2.0**48


def chosen(count: int, batch: int, prompts: int, seed: int) -> list[int]:
    """The numbers of the problems of batch number `batch`, of `count`: every epoch in another order."""
    found = []
    for place in range(batch * prompts, (batch + 1) * prompts):
        epoch, within = divmod(place, count)
        found.append(_order(count, epoch, seed)[within])
    return found


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    numbers = list(range(count))
    random.Random(f"problems {seed} {epoch}").shuffle(numbers)
    return numbers


class Posed:
    """How a model is asked: by the chat template of data.chat_template or the one beside the tokenizer, else by
    grpo.prompt_format. ends: ids that end an answer."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises ConfigError and DataError."""
        if config.data.tokenizer is None:
            raise ConfigError(
                "fp8moe grpo needs a tokenizer and data.tokenizer is null: name a tokenizer.json, or begin from a run "
                "that has one, init_from=RUN"
            )
        path = Path(config.data.tokenizer)
        self.vocabulary = Vocabulary(path, config.model.vocab_size)
        self._grpo = config.grpo
        self.template: ChatTemplate | None = None
        if config.data.chat_template is not None or _has_template(path.parent):
            self.template = open_template(config.data.chat_template, path, self.vocabulary.tokenizer)
        of_turn = None if self.template is None else end_of_turn(self.template, self.vocabulary.tokenizer)
        self.ends = self.vocabulary.ends | (frozenset() if of_turn is None else frozenset({of_turn}))
        if not self.ends:
            raise ConfigError(f"{path} has no token that ends a text or a turn, so no answer would end: use another")
        self.end = min(self.ends) if of_turn is None else of_turn

    @cached_property
    def _system(self) -> list[dict[str, str]]:
        return [] if self._grpo.system is None else [{"role": "system", "content": self._grpo.system}]

    def prompt(self, problem: Problem) -> list[int]:
        """The ids behind which the model answers. Raises DataError, naming the problem's place."""
        place = problem.place or f"the problem {shown(problem.prompt)}"
        if self.template is None:
            text = self._grpo.prompt_format.replace("{prompt}", problem.prompt)
            ids = self.vocabulary.encode("\n".join(filter(None, (self._grpo.system, text))))
        else:
            messages = [*self._system, {"role": "user", "content": problem.prompt}]
            try:
                ids = encode_asked(self.template, self.vocabulary.tokenizer, messages)
            except ConfigError as error:
                raise DataError(f"{place}: {error}") from error
        if not ids:
            by = "grpo.prompt_format" if self.template is None else self.template.source
            raise DataError(f"{place} gives 0 tokens by {by} and needs at least 1: write a question, or change {by}")
        return ids

    def solution(self, problem: Problem) -> list[int]:
        """The ids of its worked solution, or of its answer, and the end."""
        return [*self.vocabulary.encode(problem.solution or problem.answer), self.end]

    def text(self, ids: Sequence[int]) -> str:
        """The text of a completion, without what ended it."""
        return self.vocabulary.decode(ids[:-1] if ids and ids[-1] in self.ends else ids)


def _has_template(folder: Path) -> bool:
    """Whether a chat template lies beside a tokenizer."""
    config = folder / CONFIG_FILE
    return (folder / TEMPLATE_FILE).is_file() or (config.is_file() and '"chat_template"' in config.read_text("utf-8"))


class ProblemSet:
    """Problems with their solutions as a data set: a problem a sample, of which the solution is predicted."""

    def __init__(self, found: Sequence[Problem], posed: Posed, seq_len: int, *, document_mask: bool) -> None:
        self._found, self._posed, self._seq_len, self._document_mask = found, posed, seq_len, document_mask

    @property
    def fingerprint(self) -> str:
        return self.content()

    def content(self) -> str:
        """A hash of all problems."""
        digest = hashlib.sha256()
        for problem in self._found:
            digest.update("\0".join((problem.prompt, problem.solution, problem.answer, "")).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._found)

    def window(self, sample_id: int) -> Window:
        """A problem with its solution; behind seq_len + 1 tokens it is cut off."""
        problem = self._found[sample_id % len(self._found)]
        return one_document(self._posed.prompt(problem), self._posed.solution(problem), self._seq_len)

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        return collate([self.window(one) for one in sample_ids], document_mask=self._document_mask)


def one_document(prompt: Sequence[int], answer: Sequence[int], seq_len: int) -> Window:
    """A row with one prompt and its answer, of which the answer is predicted."""
    tokens = np.zeros(seq_len + 1, dtype=np.int64)
    predicted = np.zeros(seq_len + 1, dtype=np.uint8)
    ids = [*prompt, *answer][: seq_len + 1]
    tokens[: len(ids)] = ids
    predicted[len(prompt) : len(ids)] = 1
    return Window(tokens, np.zeros(1, dtype=np.int64), len(tokens) - len(ids), predicted)
