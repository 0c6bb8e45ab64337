"""GRPO as a method of training (`train.method`): batches of rollouts, and the updates that learn from them.

    batch of rollouts    problems -> G completions of each -> rewards -> more problems for groups that score alike
      log-probabilities    of all completions, by training's forward: the policy before its first update, the reference
      update 1 .. U        a minibatch of groups -> advantages, shares -> the objective's gradient -> the train step

Which batch and which part of it a step takes depends on the samples consumed alone, as with token files: a run that
resumes, or goes back to a checkpoint, finds its place by that number. Rewards are computed on the ranks in turn and
exchanged (`post.scoring`); all ranks hold the whole batch and decide alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8moe.data.build import Data
from fp8moe.data.tokenizer import TokenizerInfo
from fp8moe.errors import ConfigError
from fp8moe.generate.groups import GroupSampling
from fp8moe.model.loss import LossCounts, count_predicted
from fp8moe.model.transformer import labels_after_next
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.post.endpoint import Endpoint, EndpointError
from fp8moe.post.held_out import HeldOut
from fp8moe.post.logprobs import label_logprobs
from fp8moe.post.packed import Packed, pack
from fp8moe.post.policy import Mismatch, PolicyLoss, PolicyTokens, group_advantages, mismatch, token_shares
from fp8moe.post.problems import Posed, ProblemSet, chosen, open_problems
from fp8moe.post.reference import reference_weights
from fp8moe.post.replay import RoutingChanges, check_replay
from fp8moe.post.rollout_server import RolloutServer, endpoint_of
from fp8moe.post.rollout_weights import Announcement, Exporter
from fp8moe.post.rollouts import BuiltIn, Generator, Rollouts, load, rollouts_of, save, with_logprobs
from fp8moe.post.scoring import Scorer, score_rollouts
from fp8moe.schedule.build import microbatches
from fp8moe.train.config import TrainConfig
from fp8moe.train.method import StepWork
from fp8moe.train.processes import choose_device
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_and_stop

logger = logging.getLogger(__name__)


@dataclass
class _Batch:
    """A batch of rollouts in use: its number, what it is, what was measured while it was made."""

    number: int
    rollouts: Rollouts
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Grpo:
    """The steps of a run of GRPO. export: writes weights for a rollout server, which a run with grpo.server needs."""

    def __init__(self, export: Exporter | None = None) -> None:
        self._export = export
        self._batch: _Batch | None = None
        self._loss: PolicyLoss | None = None

    def open_data(self, config: TrainConfig, mesh: Mesh) -> Data:
        """The problems; the validation loss is that of held-out solutions. Raises ConfigError and DataError."""
        self._grpo = grpo = config.grpo
        if config.data.source != "problems":
            raise ConfigError(
                f"fp8moe grpo learns from problems and data.source is {config.data.source}: go on with a run of its "
                "own, or begin from this one, init_from=RUN"
            )
        check_replay(config)
        if grpo.cuda_graphs and grpo.server is None and (device := choose_device(config)).type != "cuda":
            raise ConfigError(
                f"grpo.cuda_graphs=true needs a GPU and this run computes on the {device.type}: use "
                "grpo.cuda_graphs=false"
            )
        if grpo.server is not None:
            Endpoint(endpoint_of(grpo), "completions")  # a setting that can't be is said before anything is written
            Announcement(grpo)
        self._scorer = Scorer(grpo)
        self._posed = posed = Posed(config)
        self._train, held = open_problems(config, is_first=mesh.rank == 0)
        self._prompts = [posed.prompt(problem) for problem in self._train]
        longest = max(map(len, [*self._prompts, *map(posed.prompt, held)]))
        if longest + grpo.max_tokens > config.seq_len + 1:
            raise ConfigError(
                f"the longest prompt has {longest} tokens and grpo.max_tokens={grpo.max_tokens} follow, and a row has "
                f"seq_len + 1 = {config.seq_len + 1}: use seq_len={longest + grpo.max_tokens - 1}"
            )
        self._held_out = HeldOut(held[: grpo.held_out_count], posed, grpo.max_tokens, grpo.rollout_batch)
        sets = [
            ProblemSet(part, posed, config.seq_len, document_mask=config.data.document_mask)
            for part in (self._train, held)
        ]
        path = posed.vocabulary.path
        info = TokenizerInfo(path, posed.vocabulary.num_ids, posed.vocabulary.end_of_text)
        return Data(sets[0], sets[1], config.data.vocab_size, info, None, None, posed.template)

    def begin(self, run: Run) -> None:
        """Score the model that the run begins with."""
        self._generator: Generator = BuiltIn(run)
        if run.config.grpo.server is not None:
            assert self._export is not None, "weights for a server need an exporter"
            self._generator = RolloutServer(run, self._export)
        self._first = run.step
        if run.step == 0:
            self._held_out.score(run, self._generator, "before")

    def work(self, run: Run) -> StepWork:
        """The minibatch of the next step, its batch of rollouts made or found first."""
        grpo = run.config.grpo
        per_step = grpo.group_samples // grpo.minibatches
        number, within = divmod(run.sampler.consumed, grpo.group_samples * grpo.epochs)
        if self._batch is None or self._batch.number != number:
            with self._saved_if_server_is_down(run):
                self._batch = self._make(run, number, is_begun=within > 0)
                self._begin_next(run, number + 1, within // per_step)
        run.sampler.consumed += per_step
        minibatch = within // per_step % grpo.minibatches
        return self._update(run, self._batch.rollouts, minibatch)

    def _begin_next(self, run: Run, number: int, done: int) -> None:
        """Have the generator begin with a batch, `done` updates of the one before being made."""
        grpo = run.config.grpo
        if grpo.is_ahead and run.step + grpo.updates - done < run.config.steps:
            _, prompts, names = self._posed_for(run, number, 0)
            self._generator.ahead(prompts, names, self._sampling(), grpo.lag + done)

    @contextmanager
    def _saved_if_server_is_down(self, run: Run) -> Iterator[None]:
        """Save the run, as it was after its last step, before the error of a server ends it. All ranks raise it."""
        try:
            yield
        except EndpointError as error:
            if run.point is None:
                raise
            with run.preemption.changing():
                raise EndpointError(f"{error}: {save_and_stop(run, self._first)}") from error

    def _update(self, run: Run, rollouts: Rollouts, minibatch: int) -> StepWork:
        grpo = run.config.grpo
        groups = len(rollouts.prompts) // grpo.minibatches
        part = slice(minibatch * groups * rollouts.group, (minibatch + 1) * groups * rollouts.group)
        numbers = torch.arange(len(rollouts.completions))[part]
        found = group_advantages(rollouts.rewards[part], rollouts.group, normalize_std=grpo.normalize_std)
        shares = token_shares(rollouts.lengths[part], found.is_scored, grpo)
        packed = _packed(run, rollouts, numbers[found.is_trained].tolist())

        def of_tokens(values: Tensor) -> Tensor:
            every = torch.zeros(len(rollouts.completions), dtype=torch.float64)
            every[part] = values
            return packed.spread(every.repeat_interleave(rollouts.lengths))

        tokens = PolicyTokens(
            of_tokens(found.of_samples),
            of_tokens(shares),
            packed.spread(rollouts.old),
            packed.spread(rollouts.rollout),
            None if rollouts.reference is None else packed.spread(rollouts.reference),
        )
        scale = max(packed.tokens, 1)
        self._loss = PolicyLoss(tokens.to(run.device), grpo, scale)
        mtp = torch.tensor([count_predicted(one.labels_BS, labels_after_next(one))[1] for one in packed.batches]).sum()
        counts = LossCounts(packed.tokens, int(all_reduce(mtp, run.mesh.dp_group)), packed.rows)
        return StepWork(packed.batches, counts, self._loss, grpo.mtp_weight)

    def _make(self, run: Run, number: int, *, is_begun: bool) -> _Batch:
        """Batch number `number`; is_begun: updates were made of it, so it is the one that was kept."""
        started, grpo = time.perf_counter(), run.config.grpo
        if is_begun:
            kept = gather(load(run.run_dir, number) if run.is_first else None, run.mesh.world_group)[0]
            if kept is not None:
                return _Batch(number, kept)
            logger.warning("batch %d of rollouts was not kept: it is made anew by the present weights", number)
        rollouts, figures = self._sample(run, number)
        seconds = time.perf_counter() - started
        figures |= {"rollout_seconds": seconds, "rollout_tokens_per_second": int(rollouts.lengths.sum()) / seconds}
        every = list(range(len(rollouts.completions)))
        packed = _packed(run, rollouts, every)
        with RoutingChanges(run) as changes:
            old = self._logprobs(run, rollouts, packed)
        reference = None
        if run.reference is not None:
            with reference_weights(run, run.reference):
                reference = self._logprobs(run, rollouts, packed.with_own_experts())
            figures["reference_step"] = run.reference.step
        rollouts = with_logprobs(rollouts, old, reference)
        apart: Mismatch = mismatch(old, rollouts.rollout, grpo.importance_cap)
        figures |= {
            "entropy": -float(old.double().mean()) if old.numel() else None,
            "mismatch_kl": apart.kl,
            "mismatch_largest": apart.largest,
            "capped_share": apart.capped,
            **changes.figures(rollouts.routing),
        }
        if grpo.updates > 1 and run.is_first and run.run_dir.is_dir():
            save(rollouts, run.run_dir, number)
        return _Batch(number, rollouts, figures, seconds)

    def _logprobs(self, run: Run, rollouts: Rollouts, packed: Packed) -> Tensor:
        """FP32 [K] on every rank: log-probabilities by the model as it is."""
        found = label_logprobs(run, packed.batches, run.config.grpo.temperature)
        mine = packed.collected(found.view(packed.places_MT.shape), len(rollouts.rollout))
        return all_reduce(mine, run.mesh.dp_group)

    def _sample(self, run: Run, number: int) -> tuple[Rollouts, dict[str, Any]]:
        """Completions with their rewards; groups that score alike are drawn anew where that is asked for."""
        grpo = run.config.grpo
        max_age = grpo.lag + grpo.updates * grpo.is_ahead
        whole: Rollouts | None = None
        drawn = alike = failures = 0
        oldest = run.step
        for round_number in range(grpo.dynamic_rounds + 1):
            problems, prompts, names = self._posed_for(run, number, round_number)
            groups = self._generator.sample(prompts, names, self._sampling(), max_age)
            oldest = min(oldest, self._generator.drawn_by)
            asked, unscored = [self._train[one] for one in problems], rollouts_of(prompts, groups, len(grpo.rewards))
            found, failed = score_rollouts(unscored, asked, self._posed.text, self._scorer, run.mesh)
            advantages = group_advantages(found.rewards, found.group, normalize_std=False)
            drawn, alike, failures = drawn + len(problems), alike + advantages.alike, failures + failed
            before = 0 if whole is None else len(whole.prompts)
            has_spread = advantages.is_trained.view(len(problems), -1).any(1)
            is_last = round_number == grpo.dynamic_rounds
            too_few = is_last and before + int(has_spread.sum()) < grpo.minibatches  # then the others fill up
            if grpo.dynamic_rounds and not too_few:
                found = found.only(has_spread.nonzero().flatten().tolist())
            whole = found if whole is None else whole.joined(found)
            if len(whole.prompts) >= grpo.prompts:
                break
        assert whole is not None
        count = min(len(whole.prompts), grpo.prompts) // grpo.minibatches * grpo.minibatches
        figures = {"rollout_weights": oldest, "groups_drawn": drawn, "groups_alike": alike, "reward_failures": failures}
        return whole.only(range(count)), figures | whole.figures(self._scorer.names)

    def _posed_for(self, run: Run, number: int, round_number: int) -> tuple[list[int], list[list[int]], list[str]]:
        """(problems, their prompts, what decides their samples) of one round of a batch."""
        grpo, seed = run.config.grpo, run.config.seed
        place = number * (grpo.dynamic_rounds + 1) + round_number
        problems = chosen(len(self._train), place, grpo.prompts, seed)
        names = [f"{seed}/{place}/{i}/{problem}" for i, problem in enumerate(problems)]
        return problems, [self._prompts[problem] for problem in problems], names

    def _sampling(self) -> GroupSampling:
        grpo, posed = self._grpo, self._posed
        batch, ids, routing = grpo.rollout_batch, posed.vocabulary.num_ids, grpo.router_replay
        return GroupSampling(grpo.samples, grpo.max_tokens, grpo.temperature, batch, ids, posed.ends, routing)

    def figures(self, run: Run) -> Mapping[str, Any]:
        """Of the step just done, and of its batch of rollouts where the step was its first."""
        assert self._loss is not None and self._batch is not None
        of_policy = self._loss.figures(run.mesh)
        of_batch, self._batch.figures = self._batch.figures, {}
        return {
            "rollouts": self._batch.number + 1,
            **of_batch,
            "clip_share": of_policy.clip_share,
            "kl": of_policy.kl,
            "ratio_deviation": of_policy.ratio_deviation,
            "old_kl": of_policy.old_kl,
        }

    def score(self, run: Run) -> Mapping[str, Any]:
        """Accuracy of the likeliest answers on held-out problems; nothing where a server gives none."""
        try:
            return self._held_out.score(run, self._generator, f"after step {run.step}")
        except EndpointError as error:  # the next batch ends the run, if the server stays away
            logger.warning("held-out problems are not scored after step %d: %s", run.step, error)
            return {}


def _packed(run: Run, rollouts: Rollouts, samples: Sequence[int]) -> Packed:
    least, multiple = microbatches(run.config.parallel.schedule, run.config.parallel.pp)
    return pack(rollouts, samples, run, least=least, multiple=multiple)
