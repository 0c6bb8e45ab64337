"""Rollouts by a server: a `Generator` that asks vLLM or SGLang for completions, with weights that the run exports.

The first rank exports, tells the server and asks; the others wait, and get what it got. All of that is on a thread, so
that `ahead` can begin with the next batch while updates of this one run, and so that ranks meet every second while they
wait: a server may take longer than a collective. One job at a time: weights are never changed while a batch is drawn.

    present weights, or an export that is not too old  -> all ranks write masters, the first one exports them
    the server has others                              -> it is told (`rollout_weights`)
    completions that these weights gave before         -> are read from the run directory
    the others                                         -> are asked for and kept, one line each as it comes

Of exports that are young enough the oldest is taken: a run that resumes then asks the weights that it had asked, and
finds their completions. So it goes on with the batches of a run that was never stopped, as long as the server's own
draws do not matter: what was drawn is never drawn again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fp8moe.errors import ConfigError
from fp8moe.generate.groups import GroupSampling, Sampled
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.post.completions import read_completion, request_body, seed_of
from fp8moe.post.endpoint import Endpoint, EndpointConfig, EndpointError, Failure
from fp8moe.post.kept_samples import KeptSamples, Place
from fp8moe.post.rollout_weights import Announcement, Exporter, RolloutWeights
from fp8moe.train.grpo_config import GrpoConfig
from fp8moe.train.run import Run

MEETING = 1.0  # seconds between two meetings of the ranks that wait


@dataclass
class _Job:
    """Completions that are asked for: what decides them, and on the first rank what came of it."""

    names: tuple[str, ...]
    step: int
    done: threading.Event = field(default_factory=threading.Event)
    groups: list[list[Sampled]] | None = None
    error: Exception | None = None


def endpoint_of(config: GrpoConfig) -> EndpointConfig:
    """The server of a configuration. Raises ConfigError."""
    assert config.server is not None and config.server_model is not None
    return EndpointConfig(
        config.server,
        config.server_model,
        config.server_key_env,
        config.server_concurrency,
        config.server_tries,
        config.server_wait,
        config.server_timeout,
        url_key="grpo.server",
        model_key="grpo.server_model",
    )


class RolloutServer:
    """A server's samples of a run. export: writes a Hugging Face directory."""

    def __init__(self, run: Run, export: Exporter) -> None:
        """Raises ConfigError. Collective over all ranks."""
        grpo = run.config.grpo
        self._run, self._config = run, endpoint_of(grpo)
        self._endpoint = Endpoint(self._config, "completions")
        self._announcement, self._weights = Announcement(grpo), RolloutWeights(run, export)
        self._told: int | None = None  # the step of the weights that the server has
        self._job: _Job | None = None  # in work, or done and not taken yet
        self._seen = run.step
        self.drawn_by = run.step
        if run.is_first:
            self._weights.forget_after(run.step)

    def sample(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int = 0
    ) -> list[list[Sampled]]:
        """The completions, begun by `ahead` or now. Raises ConfigError and EndpointError. Collective over all ranks."""
        self._forget_left_course()
        job = self._job
        if job is None or job.names != tuple(names):
            if job is not None:
                self._meet(job)
            kept, job = job, self._start(prompts, names, sampling, max_age)
            self._meet(job)
            self._job = kept
        else:
            self._meet(job)
            self._job = None
        outcome = (job.groups, job.error) if self._run.is_first else None
        groups, error = gather(outcome, self._run.mesh.world_group)[0]
        if error is not None:
            raise error
        self.drawn_by = job.step
        return groups

    def ahead(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int
    ) -> None:
        """Begin with what `sample` will be asked for. Collective over all ranks."""
        self._forget_left_course()
        if self._job is not None:
            self._meet(self._job)
        self._job = self._start(prompts, names, sampling, max_age)

    def _start(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int
    ) -> _Job:
        run = self._run
        found = None
        if run.is_first:
            found = next((step for step in self._weights.steps() if 0 <= run.step - step <= max_age), None)
        step = gather(found, run.mesh.world_group)[0]
        if step is None:
            self._weights.write_masters()
        job = _Job(tuple(names), run.step if step is None else step)
        if run.is_first:
            seen = run.model.config.max_seq_len
            work = self._work_of(job, [list(prompt) for prompt in prompts], sampling, seen, is_new=step is None)
            threading.Thread(target=work, name="rollouts", daemon=True).start()  # Ctrl-C waits for no timeout
        return job

    def _meet(self, job: _Job) -> None:
        """Return when the first rank has done a job, on all ranks."""
        run = self._run
        while True:
            is_done = torch.tensor(int(not run.is_first or job.done.wait(MEETING)))
            if bool(all_reduce(is_done, run.mesh.world_group, dist.ReduceOp.MIN)):
                return

    def _forget_left_course(self) -> None:
        """Drop what was made of steps behind the present one, where the run has gone back."""
        run = self._run
        if run.step < self._seen:
            if self._job is not None:
                self._meet(self._job)
                self._job = None
            if run.is_first:
                self._weights.forget_after(run.step)
            if self._told is not None and self._told > run.step:
                self._told = None
        self._seen = run.step

    def _work_of(
        self, job: _Job, prompts: list[list[int]], sampling: GroupSampling, context: int, *, is_new: bool
    ) -> Callable[[], None]:
        """What the first rank's thread does for a job; it reads nothing of the run that an update changes."""

        def work() -> None:
            try:
                if is_new:
                    self._weights.make(job.step)
                if self._told != job.step:
                    self._told = None
                    self._announcement.tell(self._weights.path(job.step))
                    self._told = job.step
                job.groups = self._ask(job, prompts, sampling, context)
            except Exception as error:
                job.error = error
            except BaseException as error:  # torch's CheckpointException is no Exception
                job.error = RuntimeError(str(error))
            finally:
                job.done.set()

        return work

    def _ask(self, job: _Job, prompts: list[list[int]], sampling: GroupSampling, context: int) -> list[list[Sampled]]:
        """All completions of a job, those that are kept and the others. Raises ConfigError and EndpointError."""
        vocab_size, ends = self._run.config.model.vocab_size, sampling.ends
        every = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(sampling.samples)]
        most = [min(sampling.max_tokens, context - len(prompt)) for prompt in prompts]

        def body(place: Place) -> dict[str, Any]:
            prompt, sample = place
            return request_body(
                self._config.model,
                prompts[prompt],
                max_tokens=most[prompt],
                temperature=sampling.temperature,
                ends=ends,
                seed=seed_of(job.names[prompt], sample),
            )

        def read(place: Place, answer: Any) -> Sampled:
            return read_completion(answer, max_tokens=most[place[0]], vocab_size=vocab_size, ends=ends)

        failed: list[tuple[Place, Failure]] = []
        with KeptSamples(self._weights.samples(job.step), job.names, sampling) as kept:
            missing = [place for place in every if place not in kept.found]
            for place, one in self._endpoint.answers(missing, body, read):
                if isinstance(one, Failure):
                    failed.append((place, one))
                else:
                    kept.keep(place, one)
        if failed:
            (prompt, sample), failure = failed[0]
            sentence = (
                f"{self._config.url} gave {len(every) - len(failed)} of {len(every)} samples, the first that is "
                f"missing is number {sample} of problem {prompt} of the batch: {failure.reason}"
            )
            raise EndpointError(sentence) if failure.again else ConfigError(sentence)
        return [[kept.found[prompt, i] for i in range(sampling.samples)] for prompt in range(len(prompts))]
