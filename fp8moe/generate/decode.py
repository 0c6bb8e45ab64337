"""Generation: prompts of any lengths to completions, a token a forward, or up to two with the MTP module.

Prompts are put through the model one by one, each without padding; then all sequences of a batch go on together, each
at its own place. A sequence that has ended leaves the batch. Sequences of a rank with the same prompt, samples of it,
share its forward: the cache entries are copied, and each draws its own first token of the same logits, so what is drawn
is what it would draw alone. Not with the MTP module, which reads the prompt beside the token that was drawn behind it.

With the MTP module (speculative decoding; DeepSeek-V3 report, section 5.4.3): the module guesses the token after the
next, the model computes both places in one forward, and the guess counts if it is the token that the model gives there.
A guess that is wrong costs its place in the batch; its cache entries are overwritten by the next forward. What is
generated is what plain decoding generates, drawn tokens too: a draw is compared with the guess, so a guess is accepted
with the probability that the model gives it.

On several ranks sequences are dealt out over all of them, and every rank makes the same number of forwards, since
experts are shared: a rank whose sequences have all ended repeats its last one's forward, and the result is dropped. New
tokens are exchanged each step, so that all ranks know every completion and decide alike which have ended. On a GPU the
forwards behind the prompts may be graphs (`captured`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fp8moe.errors import ConfigError
from fp8moe.generate.captured import CapturedForward, DecodingGraphs
from fp8moe.generate.sampling import Sampler, SamplingConfig
from fp8moe.generate.session import Session, Where
from fp8moe.limits import POSITIVE, Range, check_fields
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh

Ended = Literal["stop", "max_tokens", "context"]


@dataclass(frozen=True)
class GenerationConfig:
    """max_tokens: of a completion. batch: sequences that go on together. mtp: speculative decoding."""

    max_tokens: int = 128
    batch: int = 32
    mtp: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(
            self,
            "generation",
            max_tokens=POSITIVE,
            batch=Range(least=1, most=2**16),
        )

    def tokens_at_once(self, ranks: int) -> int:
        """Tokens of one of so many ranks in a forward behind the prompts, at most."""
        return -(-self.batch // ranks) * (1 + self.mtp)


@dataclass
class Completion:
    """Prompt number `number` and what follows it so far; `ended` says why nothing more does."""

    number: int
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    ended: Ended | None = None


@dataclass
class Figures:
    """Counts of a generation over all ranks; seconds of rank 0 for the prompts and for the tokens after them.

    steps: forwards of a sequence after its prompt. drafts, accepted: guesses of the MTP module.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    drafts: int = 0
    accepted: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0


Accept = Callable[[Completion, int], bool]  # the completion with its new id last, and that id -> whether it ends there


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raise ConfigError unless every prompt has a token and leaves room for one more in `context` tokens."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ConfigError(f"prompt {number} is empty: give at least one character")
        if len(prompt) >= context:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens and the model's context, model.max_seq_len, is {context}: "
                f"use at most {context - 1}"
            )


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    mesh: Mesh,
    *,
    num_ids: int,
    accept: Accept,
    draws: Sequence[int] | None = None,
    graphs: DecodingGraphs | None = None,
) -> tuple[list[Completion], Figures]:
    """Completions of `prompts` (token ids), the same on every rank. Collective over all ranks; no pipeline.

    num_ids: ids below it are generated. accept: called on every rank for every token, in order within a completion.
    draws: for each prompt the number that, with the seed, decides what it draws; its place in `prompts` if None.
    graphs: of forwards behind the prompts, for `config.tokens_at_once` tokens; None: there are none.
    Raises ConfigError for a prompt that is empty or too long, and for mtp without an MTP module.
    """
    context = model.config.max_seq_len
    check_prompts(prompts, context)
    if config.mtp and model.mtp is None:
        raise ConfigError("the model has no MTP module, model.mtp_depth=0: leave --mtp out")
    completions = [Completion(number, prompt) for number, prompt in enumerate(prompts)]
    figures, training = Figures(), model.training
    model.eval()
    numbers = range(len(prompts)) if draws is None else draws
    for start in range(0, len(completions), config.batch):
        batch = completions[start : start + config.batch]
        draw_of = {one.number: numbers[one.number] for one in batch}
        _Batch(model, batch, config, mesh, num_ids, accept, draw_of, graphs).run(figures)
    model.train(training)
    return completions, figures


@dataclass
class _Sequence:
    """A sequence of this rank: its row in the caches, the token that is not in them yet and its place, the MTP
    module's guess of the one after it."""

    completion: Completion
    row: int
    is_copy: bool
    last: int = 0
    place: int = 0
    draft: int = 0


class _Batch:
    """Completions that go on together; this rank runs every dp-th of them, or a copy of the first to keep step."""

    def __init__(
        self,
        model: Transformer,
        completions: list[Completion],
        config: GenerationConfig,
        mesh: Mesh,
        num_ids: int,
        accept: Accept,
        draw_of: Mapping[int, int],
        graphs: DecodingGraphs | None,
    ) -> None:
        self._completions, self._config, self._mesh, self._accept = completions, config, mesh, accept
        self._draw_of = draw_of
        self._first = completions[0].number
        most, dealt = -(-len(completions) // mesh.dp), [completions[rank :: mesh.dp] for rank in range(mesh.dp)]
        filled = [[*part, completions[0]][:most] for part in dealt]
        mine, own = filled[mesh.dp_rank], len(dealt[mesh.dp_rank])
        self._mine = [_Sequence(one, row, is_copy=row >= own) for row, one in enumerate(mine)]
        self._prompt_forwards = max(len({tuple(one.prompt) for one in part}) for part in filled)
        self._limits = [min(len(one.prompt) + config.max_tokens, model.config.max_seq_len) for one in completions]
        device = next(model.parameters()).device
        self._length = max(self._limits) + 2  # the last two tokens may come at once, and a guess behind them
        self._session = Session(model, len(mine), self._length, mtp=config.mtp)
        self._forwards, self._drafts = CapturedForward(model, graphs), CapturedForward(model, graphs)
        self._sampler = Sampler(config.sampling, [draw_of[one.number] for one in mine], num_ids, device)

    def run(self, figures: Figures) -> None:
        """All completions to their ends."""
        began = time.perf_counter()
        first = [(one, self._prompt(one)) for one in self._mine] if self._config.mtp else self._shared_prompts()
        self._exchange({one.completion.number: [token] for one, token in first if not one.is_copy}, figures)
        figures.prompt_tokens += sum(len(one.prompt) for one in self._completions)
        decoding = time.perf_counter()
        figures.prompt_seconds += decoding - began
        while any(one.ended is None for one in self._completions):
            alive = [one for one in self._mine if not one.is_copy and one.completion.ended is None]
            step = self._step_with_drafts if self._config.mtp else self._step
            new = step(alive or self._mine[:1])
            self._exchange({one.completion.number: new[i] for i, one in enumerate(alive)}, figures, decoding=True)
        figures.decode_seconds += time.perf_counter() - decoding

    def _prompt(self, one: _Sequence) -> int:
        """The token after a sequence's prompt, and the guess behind it."""
        prompt = one.completion.prompt
        ids, where = self._session.ids([prompt]), self._session.where([one.row], [0], len(prompt))
        hidden_BSD = self._session.forward(ids, where)
        one.last = self._draw([one], hidden_BSD[:, -1])[0]
        one.place = len(prompt)
        drafts = self._session.draft(hidden_BSD, self._session.ids([[*prompt[1:], one.last]]), where)
        one.draft = self._guess(drafts[:, -1])[0]
        return one.last

    def _shared_prompts(self) -> list[tuple[_Sequence, int]]:
        """The sequences with the token after each one's prompt; every prompt goes through the model once."""
        groups: dict[tuple[int, ...], list[_Sequence]] = {}
        for one in self._mine:
            groups.setdefault(tuple(one.completion.prompt), []).append(one)
        first, row_of = [], list(range(len(self._mine)))
        for prompt, group in groups.items():
            hidden_BSD = self._forward_prompt(prompt, group[0].row)
            logits_BV = self._session.logits(hidden_BSD[:, -1]).expand(len(group), -1)
            drawn = self._sampler.draw([self._draw_of[one.completion.number] for one in group], logits_BV)
            for one, token in zip(group, drawn, strict=True):
                one.last, one.place, row_of[one.row] = token, len(prompt), group[0].row
                first.append((one, token))
        for _ in range(self._prompt_forwards - len(groups)):  # keeps step with ranks that have more prompts
            self._forward_prompt(self._mine[0].completion.prompt, 0)
        if len(groups) < len(self._mine):
            self._session.take(torch.tensor(row_of))
        return first

    def _forward_prompt(self, prompt: Sequence[int], row: int) -> Tensor:
        return self._session.forward(self._session.ids([prompt]), self._session.where([row], [0], len(prompt)))

    def _step(self, alive: Sequence[_Sequence]) -> list[list[int]]:
        """The next token of each sequence; one that has ended already gets the same again."""
        hidden_BSD = self._run(self._forwards, self._session.forward, alive, [[one.last] for one in alive])
        new = self._draw(alive, hidden_BSD[:, 0])
        for one, token in zip(alive, new, strict=True):
            self._advance(one, [token])
        return [[token] for token in new]

    def _step_with_drafts(self, alive: Sequence[_Sequence]) -> list[list[int]]:
        """The next token of each sequence, and the one after it where the MTP module guessed the first of both."""
        both = [[one.last, one.draft] for one in alive]
        hidden_BSD = self._run(self._forwards, self._session.forward, alive, both)
        new = [[token] for token in self._draw(alive, hidden_BSD[:, 0])]
        right = [i for i, one in enumerate(alive) if new[i][0] == one.draft]
        if right:
            for i, token in zip(right, self._draw([alive[i] for i in right], hidden_BSD[right, 1]), strict=True):
                new[i].append(token)
        after = [[*tokens, tokens[0]][:2] for tokens in new]  # behind a wrong guess any token: it is written over
        drafts_BSD = self._run(self._drafts, self._session.draft, alive, after, hidden_BSD)
        ends = drafts_BSD[list(range(len(alive))), [len(tokens) - 1 for tokens in new]]
        for one, tokens, draft in zip(alive, new, self._guess(ends), strict=True):
            self._advance(one, tokens, draft)
        return new

    def _run(
        self,
        forward: CapturedForward,
        call: Callable[..., Tensor],
        alive: Sequence[_Sequence],
        ids: Sequence[Sequence[int]],
        *given: Tensor,
    ) -> Tensor:
        """`call` of `given`, new tokens and where they go, as a graph where there are graphs."""
        rows, seq_len = tuple(one.row for one in alive), len(ids[0])
        where = self._session.where(rows, [one.place for one in alive], seq_len)
        length = forward.length(where.length, self._length)

        def compute(ids_BS: Tensor, starts_B: Tensor, rows_B: Tensor, *others: Tensor) -> Tensor:
            return call(*others, ids_BS, Where(rows_B if len(rows_B) else None, starts_B, length))

        rows_B = where.starts_B[:0] if where.rows_B is None else where.rows_B
        return forward.run(length, compute, self._session.ids(ids), where.starts_B, rows_B, *given)

    def _advance(self, one: _Sequence, tokens: Sequence[int], draft: int = 0) -> None:
        if one.completion.ended is None and not one.is_copy:
            one.last, one.draft = tokens[-1], draft
            one.place += len(tokens)

    def _draw(self, sequences: Sequence[_Sequence], hidden_BD: Tensor) -> list[int]:
        return self._sampler.draw(
            [self._draw_of[one.completion.number] for one in sequences], self._session.logits(hidden_BD)
        )

    def _guess(self, hidden_BD: Tensor) -> list[int]:
        """The MTP module's likeliest tokens."""
        guesses: list[int] = self._session.logits(hidden_BD).argmax(-1).tolist()
        return guesses

    def _exchange(self, new: dict[int, list[int]], figures: Figures, *, decoding: bool = False) -> None:
        """Give this rank's new tokens to all ranks, and append all of theirs to the completions."""
        table = torch.zeros(len(self._completions), 3, dtype=torch.int64)
        for number, tokens in new.items():
            table[number - self._first, : len(tokens) + 1] = torch.tensor([len(tokens), *tokens])
        rows = all_reduce(table, self._mesh.world_group).tolist()
        for one, (count, *tokens), limit in zip(self._completions, rows, self._limits, strict=True):
            if decoding and count:
                figures.steps += 1
                figures.drafts += self._config.mtp
                figures.accepted += count - 1
            for token in tokens[:count]:
                if one.ended is None:
                    one.ids.append(token)
                    figures.new_tokens += 1
                    one.ended = self._end(one, token, limit)

    def _end(self, one: Completion, token: int, limit: int) -> Ended | None:
        if self._accept(one, token):
            return "stop"
        if len(one.prompt) + len(one.ids) >= limit:
            return "max_tokens" if len(one.ids) >= self._config.max_tokens else "context"
        return None
