"""Groups of completions: G samples of each prompt, with the log-probability of every token that was drawn.

A prompt goes through the model once; its cache entries are copied to the rows of its G samples, which then go on a
token a forward, with all other samples of the batch, each at its own place. A row that has ended waits until half of
the rows have, and then all of those leave: the caches are cut down once, and every forward reads them without a copy.

Sample g of a prompt is drawn from numbers that its name and g alone decide, by the inverse of the distribution function
in FP64: what is drawn depends neither on the ranks nor on what else is in the batch, but for the last bits of the
logits, which another batch or layout may change. `decode` is the generator of texts for people: it stops at strings,
guesses with the MTP module, and seeds a generator a completion, which costs a call of Python a token.

Experts are shared between ranks, so all ranks of a group make the same number of forwards: one whose rows have ended
repeats its last forward.

Legend: N rows, G samples of a prompt, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.generate.decode import check_prompts
from fp8moe.generate.routing import RoutingRecord, noting
from fp8moe.generate.session import Session
from fp8moe.model.transformer import Transformer, generator_of
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.mesh import Mesh

PROMPT_TOKENS = 1 << 14  # of prompts that go through the model together, about
DRAWN_VALUES = 1 << 25  # logits whose distribution is computed at once


@dataclass(frozen=True)
class GroupSampling:
    """samples: of a prompt. max_tokens: of a completion. temperature: 0 for the likeliest token. batch: rows of a rank
    that go on together. num_ids: ids below it are drawn. ends: ids that end a completion, which keeps them. routing:
    the experts of every token are wanted as well."""

    samples: int
    max_tokens: int
    temperature: float
    batch: int
    num_ids: int
    ends: frozenset[int]
    routing: bool = False


@dataclass(frozen=True)
class Sampled:
    """One completion: its ids, the log-probability of each when it was drawn (at the temperature), and whether one of
    `ends` ended it; else max_tokens or the model's context did.

    routing: integers [P + C - 1, L, K], the experts of the tokens of prompt and completion but the last, which went
    through no layer, in each of the layers with experts; None where they were not asked for.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    has_ended: bool
    routing: NDArray[Any] | None = field(default=None, compare=False)


@torch.no_grad()
def sample_groups(
    model: Transformer, prompts: Sequence[Sequence[int]], names: Sequence[str], config: GroupSampling, mesh: Mesh
) -> list[list[Sampled]]:
    """G completions of each prompt (token ids), the same on every rank. Collective over all ranks; no pipeline.

    names: of the prompts, which with the number of a sample decide what is drawn. Raises ConfigError for a prompt that
    is empty or too long.
    """
    check_prompts(prompts, model.config.max_seq_len)
    training, at_once = model.training, max(1, config.batch // config.samples)
    mine = list(range(len(prompts)))[mesh.dp_rank :: mesh.dp]
    found: dict[int, list[Sampled]] = {}
    model.eval()
    for first in range(0, -(-len(prompts) // mesh.dp), at_once):
        part = mine[first : first + at_once]
        chosen = part or [0]  # keeps step with the other ranks
        rows = _Rows(model, [prompts[i] for i in chosen], [names[i] for i in chosen], config, mesh)
        completions = rows.run()
        for number, i in enumerate(part):
            found[i] = completions[number * config.samples : (number + 1) * config.samples]
    model.train(training)
    everyone = {i: group for of_rank in gather(found, mesh.world_group) for i, group in of_rank.items()}
    return [everyone[i] for i in range(len(prompts))]


class _Rows:
    """The samples of some prompts while they grow, G rows a prompt."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        names: Sequence[str],
        config: GroupSampling,
        mesh: Mesh,
    ) -> None:
        self._prompts, self._config, self._group = prompts, config, mesh.ep_group
        self._pp_group = mesh.pp_group
        self._device = next(model.parameters()).device
        count, context = len(prompts) * config.samples, model.config.max_seq_len
        lengths = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(config.samples)
        self._limits = (context - lengths).clamp(max=config.max_tokens).to(self._device)
        self._places = lengths.to(self._device)  # of the token that is not in the caches yet
        self._rows = torch.arange(count, device=self._device)  # of the results, of the rows that are left
        longest = int((lengths + self._limits.cpu()).max())
        self._session = Session(model, count, longest)
        self._routing = RoutingRecord(model, count, longest) if config.routing else None
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

    def run(self) -> list[Sampled]:
        """All rows to their ends."""
        hidden_ND = self._prompts_through()
        for step in range(self._config.max_tokens):
            alive = self._draw(step, hidden_ND)
            if not self._anyone(bool(alive.any())):
                break
            if bool(alive.any()) and 2 * int(alive.sum()) <= len(alive):
                self._keep(alive.nonzero().flatten())
            hidden_ND = self._forward(step)
        ids, logprobs, counts = self._ids.tolist(), self._logprobs.tolist(), self._counts.tolist()
        routing: list[NDArray[Any] | None] = [None] * len(counts)
        if self._routing is not None:
            routing = [*self._routing.of_rows((self._places + self._counts - 1).tolist(), self._pp_group)]
        return [
            Sampled(tuple(ids[row][:count]), tuple(logprobs[row][:count]), bool(ended), routing[row])
            for row, (count, ended) in enumerate(zip(counts, self._ended.tolist(), strict=True))
        ]

    def _prompts_through(self) -> Tensor:
        """The hidden state [N, D] behind the last token of each row's prompt; prompts of a length go together."""
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(self._prompts):
            by_length.setdefault(len(prompt), []).append(number)
        parts = []
        for length, numbers in by_length.items():
            size = max(1, PROMPT_TOKENS // length)
            parts += [numbers[i : i + size] for i in range(0, len(numbers), size)]
        most = int(all_reduce(torch.tensor(len(parts)), self._group, dist.ReduceOp.MAX))
        each = self._config.samples
        last: dict[int, Tensor] = {}
        for numbers in parts + parts[:1] * (most - len(parts)):
            rows = [number * each for number in numbers]
            hidden_BSD = self._through([self._prompts[i] for i in numbers], rows, [0] * len(rows))
            last |= dict(zip(numbers, hidden_BSD[:, -1], strict=True))
        first = torch.arange(len(self._prompts), device=self._device) * each
        self._session.take(first.repeat_interleave(each))
        if self._routing is not None:
            self._routing.take(first.repeat_interleave(each))
        return torch.stack([last[number] for number in range(len(self._prompts))]).repeat_interleave(each, 0)

    def _draw(self, step: int, hidden_ND: Tensor) -> Tensor:
        """Draw token number `step` of the rows that go on -> bool [N], those that go on behind it."""
        rows = self._rows
        logits = self._session.logits(hidden_ND)[:, : self._config.num_ids]
        tokens, logprobs = draw(logits, self._uniform[rows, step], self._config.temperature)
        going = self._going(step)
        self._ids[rows, step] = torch.where(going, tokens, 0)
        self._logprobs[rows, step] = torch.where(going, logprobs, 0.0)
        self._counts[rows] += going
        self._ended[rows] |= going & torch.isin(tokens, self._ends)
        return self._going(step + 1)

    def _going(self, step: int) -> Tensor:
        """bool [N]: the rows that get a token number `step`."""
        counts = self._counts[self._rows]
        return (counts == step) & ~self._ended[self._rows] & (counts < self._limits[self._rows])

    def _forward(self, step: int) -> Tensor:
        """Put token number `step` of every row through the model, the last of one that has ended -> hidden [N, D]."""
        rows = self._rows
        number = self._counts[rows].clamp(max=step + 1, min=1) - 1
        ids = self._ids[rows, number]
        places = self._places[rows] + number
        at = list(range(len(rows)))
        return self._through(ids[:, None].tolist(), at, places.tolist())[:, 0]

    def _through(self, ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """New tokens of some of the rows that are left -> hidden [B, S, D]."""
        with noting(self._routing, self._rows[list(rows)], starts, len(ids[0])):
            return self._session.forward(ids, rows, starts)

    def _keep(self, kept: Tensor) -> None:
        self._rows = self._rows[kept]
        self._session.take(kept)

    def _anyone(self, alive: bool) -> bool:
        """Whether a rank that shares experts goes on."""
        if self._group is None:
            return alive
        return bool(all_reduce(torch.tensor(int(alive)), self._group, dist.ReduceOp.MAX))


def draw(logits_NV: Tensor, uniform_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] by numbers FP64 in [0, 1), and their log-probabilities FP32 at the temperature.

    temperature 0: the likeliest tokens, with their log-probabilities at temperature 1.
    """
    tokens, logprobs = [], []
    size = max(1, DRAWN_VALUES // logits_NV.shape[1])
    for logits, uniform in zip(logits_NV.split(size), uniform_N.split(size), strict=True):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            chosen = logp.argmax(-1)
        else:
            reached = logp.double().exp_().cumsum_(-1)
            chosen = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
            chosen = chosen.clamp(max=logp.shape[1] - 1)
        tokens.append(chosen)
        logprobs.append(logp.gather(1, chosen[:, None])[:, 0])
    return torch.cat(tokens), torch.cat(logprobs)
