"""Groups of completions: G samples of each prompt, with the log-probability of every token that was drawn.

A prompt goes through the model once; its cache entries are copied to the rows of its G samples, which then go on a
token a forward, with all other samples of the batch, each at its own place. A row that has ended waits until half of
the rows have, and then all of those leave: the caches are cut down once, and every forward reads them without a copy.

Sample g of a prompt is drawn from numbers that its name and g alone decide, by the inverse of the distribution function
in FP64: what is drawn depends neither on the ranks nor on what else is in the batch, but for the last bits of the
logits, which another batch or layout may change. `decode` is the generator of texts for people: it stops at strings,
guesses with the MTP module, and seeds a generator a completion, which costs a call of Python a token.

Experts are shared between ranks, so all ranks of a group make the same number of forwards: one whose rows have ended
repeats its last forward. In a pipeline every rank computes its stages alone (`stages`). On a GPU the forwards behind
the prompts may be graphs (`captured`); the host waits for the device once a token, to know how many rows go on.

Legend: N rows, G samples of a prompt, D model, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.generate.captured import CapturedForward, DecodingGraphs
from fp8moe.generate.decode import check_prompts
from fp8moe.generate.routing import RoutingRecord, noting
from fp8moe.generate.sampling import draw
from fp8moe.generate.session import Session, Where
from fp8moe.generate.stages import LocalStage, Stages, WholeModel
from fp8moe.model.transformer import Transformer, generator_of
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.mesh import Mesh

PROMPT_TOKENS = 1 << 14  # of prompts that go through the model together, about


@dataclass(frozen=True)
class GroupSampling:
    """samples: of a prompt. max_tokens: of a completion. temperature: 0 for the likeliest token. batch: rows of a rank
    that go on together. num_ids: ids below it are drawn. ends: ids that end a completion, which keeps them. routing:
    the experts of every token are wanted as well. top_p: share of the probability that is drawn from. seconds: after
    which all completions end, with a token at least; None: no limit."""

    samples: int
    max_tokens: int
    temperature: float
    batch: int
    num_ids: int
    ends: frozenset[int]
    routing: bool = False
    top_p: float = 1.0
    seconds: float | None = None

    @property
    def prompts_at_once(self) -> int:
        """Prompts of a rank whose samples go on together."""
        return max(1, self.batch // self.samples)

    @property
    def rows(self) -> int:
        """Rows of a rank that go on together, at most."""
        return self.prompts_at_once * self.samples


@dataclass(frozen=True)
class Sampled:
    """One completion: its ids, the log-probability of each when it was drawn (at the temperature, of all tokens), and
    whether one of `ends` ended it; else max_tokens, the model's context or the time did.

    routing: integers [P + C - 1, L, K], the experts of the tokens of prompt and completion but the last, which went
    through no layer, in each of the layers with experts; None where they were not asked for.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    has_ended: bool
    routing: NDArray[Any] | None = field(default=None, compare=False)


@torch.no_grad()
def sample_groups(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    config: GroupSampling,
    mesh: Mesh,
    pipeline: Stages | None = None,
    graphs: DecodingGraphs | None = None,
) -> list[list[Sampled]]:
    """G completions of each prompt (token ids), the same on every rank. Collective over all ranks.

    names: of the prompts, which with the number of a sample decide what is drawn. pipeline: the stages of this rank;
    None: the model is whole. graphs: of forwards behind the prompts, for `config.rows` tokens; None: there are none.
    Raises ConfigError for a prompt that is empty or too long.
    """
    check_prompts(prompts, model.config.max_seq_len)
    stages: Stages = WholeModel(model) if pipeline is None else pipeline
    training, at_once = model.training, config.prompts_at_once
    mine = list(range(len(prompts)))[mesh.dp_rank :: mesh.dp]
    found: dict[int, list[Sampled]] = {}
    deadline = None if config.seconds is None else time.perf_counter() + config.seconds
    model.eval()
    for first in range(0, -(-len(prompts) // mesh.dp), at_once):
        part = mine[first : first + at_once]
        sets = [part[i :: stages.sets] for i in range(min(stages.sets, at_once))]
        every = []
        for numbers in sets:
            chosen = numbers or [0]  # keeps step with the other ranks
            posed = [prompts[i] for i in chosen], [names[i] for i in chosen]
            every.append(_Rows(model, *posed, config, mesh, stages, deadline, graphs))
        _complete(every, stages, config.max_tokens)
        for numbers, rows in zip(sets, every, strict=True):
            completions = rows.completions()
            for number, i in enumerate(numbers):
                found[i] = completions[number * config.samples : (number + 1) * config.samples]
        del every, rows  # whose caches would stand beside the next ones
    stages.finish()
    model.train(training)
    every_rank = gather(found if mesh.pp_rank == 0 else {}, mesh.world_group)
    everyone = {i: group for of_rank in every_rank for i, group in of_rank.items()}
    return [everyone[i] for i in range(len(prompts))]


def _complete(every: Sequence[_Rows], stages: Stages, max_tokens: int) -> None:
    """All sets of rows to their ends, a token of each set in turn."""
    for stage in stages.local:
        for rows in every:
            rows.prompts_through(stage)
    going = list(every)
    for step in range(max_tokens):
        going = [rows for rows in going if rows.take_tokens(step)]
        for stage in stages.local:
            for rows in going:
                rows.forward(stage, step)


class _Rows:
    """The samples of some prompts while they grow, G rows a prompt."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        names: Sequence[str],
        config: GroupSampling,
        mesh: Mesh,
        stages: Stages,
        deadline: float | None,
        graphs: DecodingGraphs | None,
    ) -> None:
        self._prompts, self._config, self._stages, self._deadline = prompts, config, stages, deadline
        self._group, self._pp_group = mesh.ep_group, mesh.pp_group
        self._device = next(model.parameters()).device
        count, context = len(prompts) * config.samples, model.config.max_seq_len
        lengths = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(config.samples)
        self._limits = (context - lengths).clamp(max=config.max_tokens).to(self._device)
        self._places = lengths.to(self._device)  # of the token that is not in the caches yet
        self._rows = torch.arange(count, device=self._device)  # of the results, of the rows that are left
        layers = [layer for stage in stages.local for layer in stage.layers]
        self._longest_prompt, self._most = int(lengths.max()), int((lengths + self._limits.cpu()).max())
        self._session = Session(model, count, self._most, layers=layers)
        self._forwards = {stage: CapturedForward(model, graphs) for stage in stages.local}
        self._routing = RoutingRecord(model, count, self._most) if config.routing else None
        self._drawn: Tensor | None = None  # tokens and log-probabilities, on the rank that draws
        self._ids = torch.zeros(count, config.max_tokens, dtype=torch.int64, device=self._device)
        self._logprobs = torch.zeros(count, config.max_tokens, dtype=torch.float32, device=self._device)
        self._counts = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._ended = torch.zeros(count, dtype=torch.bool, device=self._device)
        self._ends = torch.tensor(sorted(config.ends) or [-1], device=self._device)
        if config.temperature > 0:
            each = [generator_of(name, sample) for name in names for sample in range(config.samples)]
            numbers = [torch.rand(config.max_tokens, dtype=torch.float64, generator=one) for one in each]
            self._uniform = torch.stack(numbers).to(self._device)
        else:
            self._uniform = torch.zeros(count, 1, dtype=torch.float64, device=self._device).expand(
                -1, config.max_tokens
            )

    def completions(self) -> list[Sampled]:
        """What the rows have become. Collective over a pipeline where the experts are wanted."""
        ids, logprobs, counts = self._ids.tolist(), self._logprobs.tolist(), self._counts.tolist()
        routing: list[NDArray[Any] | None] = [None] * len(counts)
        if self._routing is not None:
            routing = [*self._routing.of_rows((self._places + self._counts - 1).tolist(), self._pp_group)]
        return [
            Sampled(tuple(ids[row][:count]), tuple(logprobs[row][:count]), bool(ended), routing[row])
            for row, (count, ended) in enumerate(zip(counts, self._ended.tolist(), strict=True))
        ]

    def prompts_through(self, stage: LocalStage) -> None:
        """Put the prompts through a stage, those of a length together; behind the head draw the first tokens."""
        last: dict[int, Tensor] = {}
        for numbers in self._prompt_parts():
            rows = [number * self._config.samples for number in numbers]
            ids_BS = self._session.ids([self._prompts[i] for i in numbers])
            where = self._session.where(rows, [0] * len(rows), ids_BS.shape[1])
            made_TD = self._compute(stage, self._given(stage, ids_BS), where, self._rows[rows])
            if stage.head:
                last |= dict(zip(numbers, made_TD.unflatten(0, ids_BS.shape)[:, -1], strict=True))
            else:
                self._stages.send(stage, made_TD)
        if stage.head:
            hidden_BD = torch.stack([last[number] for number in range(len(self._prompts))])
            self._draw(0, hidden_BD.repeat_interleave(self._config.samples, 0))

    def _prompt_parts(self) -> list[list[int]]:
        """The prompts that go through together, by number; as many parts on all ranks that share experts."""
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(self._prompts):
            by_length.setdefault(len(prompt), []).append(number)
        parts = []
        for length, numbers in by_length.items():
            size = max(1, PROMPT_TOKENS // length)
            parts += [numbers[i : i + size] for i in range(0, len(numbers), size)]
        most = int(all_reduce(torch.tensor(len(parts)), self._group, dist.ReduceOp.MAX))
        return parts + parts[:1] * (most - len(parts))

    def _given(self, stage: LocalStage, ids_BS: Tensor) -> Tensor:
        """What a stage is given for new tokens: their ids, or what the stage before made of them."""
        return ids_BS if stage.embedding else self._stages.receive(stage, ids_BS.numel())

    def _compute(self, stage: LocalStage, given: Tensor, where: Where, rows: Tensor) -> Tensor:
        """New tokens through a stage, [T, D]; the head's behind the final norm. rows: of the results, int64 [B]."""
        session = self._session
        x_TD = session.embed(given) if stage.embedding else given
        length = len(x_TD) // len(rows)
        with noting(self._routing, rows, where.starts_B, length):
            x_TD = session.blocks(stage.layers, x_TD, length, where)
        return session.normed(x_TD) if stage.head else x_TD

    def _draw(self, step: int, hidden_ND: Tensor) -> None:
        """Draw token number `step` of the rows that are left, and share it; past the deadline -1, but for the first."""
        logits, config = self._session.logits(hidden_ND)[:, : self._config.num_ids], self._config
        tokens, logprobs = draw(logits, self._uniform[self._rows, step], config.temperature, config.top_p)
        if step and self._deadline is not None and time.perf_counter() > self._deadline:
            tokens.fill_(-1)
        self._drawn = torch.stack([tokens.double(), logprobs.double()])
        self._stages.share(self._drawn)

    def take_tokens(self, step: int) -> bool:
        """Note token number `step` of each row, drawn here or elsewhere -> whether any rank has rows that go on."""
        if step == 0:
            first = torch.arange(len(self._prompts), device=self._device) * self._config.samples
            self._session.take(first.repeat_interleave(self._config.samples))
            if self._routing is not None:
                self._routing.take(first.repeat_interleave(self._config.samples))
        rows, drawn = self._rows, self._drawn
        tokens, logprobs = self._stages.drawn(len(rows)) if drawn is None else drawn
        self._drawn = None
        going = self._going(step) & (tokens >= 0)
        self._ids[rows, step] = torch.where(going, tokens.long(), 0)
        self._logprobs[rows, step] = torch.where(going, logprobs.float(), 0.0)
        self._counts[rows] += going
        self._ended[rows] |= going & torch.isin(tokens.long(), self._ends)
        alive = self._going(step + 1)
        count = int(alive.sum())
        if not self._anyone(count > 0):
            return False
        if 0 < 2 * count <= len(alive):
            kept = alive.nonzero().flatten()
            self._rows = rows[kept]
            self._session.take(kept)
        return True

    def _going(self, step: int) -> Tensor:
        """bool [N]: the rows that get a token number `step`."""
        counts = self._counts[self._rows]
        return (counts == step) & ~self._ended[self._rows] & (counts < self._limits[self._rows])

    def forward(self, stage: LocalStage, step: int) -> None:
        """Put token number `step` of every row through a stage, the last of one that has ended; behind the head draw
        the next."""
        rows, forward = self._rows, self._forwards[stage]
        number = self._counts[rows].clamp(max=step + 1, min=1) - 1
        ids, places = self._ids[rows, number], self._places[rows] + number
        length = forward.length(self._longest_prompt + step + 1, self._most)

        def compute(given: Tensor, places: Tensor) -> Tensor:
            return self._compute(stage, given, Where(None, places, length), rows)

        made_ND = forward.run(length, compute, self._given(stage, ids[:, None]), places)
        if stage.head:
            self._draw(step + 1, made_ND)
        else:
            self._stages.send(stage, made_ND)

    def _anyone(self, alive: bool) -> bool:
        """Whether a rank that shares experts goes on."""
        if self._group is None:
            return alive
        return bool(all_reduce(torch.tensor(int(alive)), self._group, dist.ReduceOp.MAX))
