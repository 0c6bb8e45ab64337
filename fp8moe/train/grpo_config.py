"""Settings of `fp8moe grpo`: problems, rollouts, rewards, and the objective.

They stand on this floor, below `fp8moe.post` which reads them, because a run's configuration is one class
(`train.config.TrainConfig`): config.yaml, checkpoints, `resume` and the table of keys then hold them like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8moe.limits import COUNT, POSITIVE, Range, check_fields


@dataclass(frozen=True)
class GrpoConfig:
    """What `fp8moe grpo` samples, how it is rewarded, and the objective of the updates; no other command reads it."""

    task: str = "addition"  # the task whose problems are posed where data.paths names no file: addition
    digits: int = 2  # of a task's numbers
    train_count: int = 4096  # problems of a task that are trained on
    held_out_count: int = 512  # problems that are scored with every validation; 0: none
    prompt_format: str = "{prompt} "  # text around a problem where there is no chat template
    system: str | None = None  # the system message of a chat
    prompts: int = 32  # problems a batch of rollouts
    samples: int = 16  # completions of each, a group
    max_tokens: int = 256  # of a completion
    temperature: float = 1.0  # of the rollouts and of the policy that is trained
    rollout_batch: int = 512  # sequences that a rank decodes together
    # forwards of tokens that the run itself samples are CUDA graphs, which save the host nearly all of their launches;
    # they need a GPU
    cuda_graphs: bool = False
    minibatches: int = 1  # updates that share out a batch of rollouts
    epochs: int = 1  # passes over a batch of rollouts
    # more problems are drawn, at most so many times, in place of groups that score alike (DAPO's dynamic sampling)
    dynamic_rounds: int = 0
    rewards: tuple[str, ...] = ("accuracy", "format")  # accuracy, format, think, or module:function
    reward_weights: tuple[float, ...] = ()  # of each reward in the sum; empty: 1
    # seconds that a call of module:function may take before its sample is left out and its process is started anew;
    # None: no bound
    reward_timeout: float | None = 60.0
    normalize_std: bool = True  # advantages are divided by the group's deviation; Dr. GRPO: false
    # the mean that the objective is: of samples, each the mean of its tokens (sequence, GRPO); of all tokens (token,
    # DAPO); of samples, each its sum divided by max_tokens (constant, Dr. GRPO)
    average: Literal["sequence", "token", "constant"] = "sequence"
    clip_low: float = 0.2  # a ratio below 1 - this is clipped where the advantage is negative
    clip_high: float = 0.2  # a ratio above 1 + this is clipped where the advantage is positive; DAPO: 0.28
    kl: float = 0.001  # weight of the KL to the reference, the weights that the run began from; 0: none is kept
    # steps after which the reference becomes the present policy, a multiple of the updates of a batch (minibatches x
    # epochs); 0: never
    reference_every: int = 0
    # most that a token counts for the rollout's probability being below the training's (truncated importance sampling);
    # None: the mismatch is measured and not corrected
    importance_cap: float | None = 2.0
    # every token of an update goes to the experts that the rollout chose for it, weighted by their present scores
    router_replay: bool = False
    mtp_weight: float = 0.0  # of the MTP module's cross entropy on the samples
    # an OpenAI-compatible server (vLLM, SGLang) that samples in place of the run itself, its URL up to and with /v1;
    # None: the weights in training sample
    server: str | None = None
    server_model: str | None = None  # the name by which it serves the model
    server_key_env: str = "OPENAI_API_KEY"  # the environment variable with its key, where it wants one
    server_concurrency: int = 64  # samples that are asked for at once
    server_tries: int = 6  # of a request before it is given up
    server_wait: float = 1.0  # seconds before the second try, doubled each time
    server_timeout: float = 600.0  # seconds without an answer
    refresh: int = 1  # batches of rollouts from one export of the weights
    # where an export is announced by a POST of {"model_path": PATH}, as SGLang's /update_weights_from_disk takes it
    refresh_url: str | None = None
    refresh_command: tuple[str, ...] = ()  # in place of refresh_url: a program and its arguments, {path} among them
    refresh_precision: Literal["bf16", "fp8", "fp32"] = "bf16"  # of the exported weights
    refresh_keep: int = 2  # exports that stay in RUN/rollout_weights, the newest
    # steps by which the weights that sampled a batch may be older than those of its first update; where it covers a
    # whole batch's updates, the server samples the next batch meanwhile
    stale: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            "grpo",
            digits=Range(least=1, most=12),
            train_count=POSITIVE,
            held_out_count=COUNT,
            prompts=Range(least=1, most=2**20),
            samples=Range(least=2, most=2**16),
            max_tokens=POSITIVE,
            temperature=Range(above=0, most=100, use="use 1.0"),
            rollout_batch=Range(least=1, most=2**16),
            minibatches=Range(least=1, most=2**16),
            epochs=Range(least=1, most=64),
            dynamic_rounds=Range(least=0, most=64),
            reward_weights=Range(least=-1e6, most=1e6, use="use 1.0"),
            reward_timeout=Range(above=0, most=86400, use="use 60, or null for no bound"),
            clip_low=Range(above=0, below=1, use="use 0.2"),
            clip_high=Range(above=0, most=1e6, use="use 0.2"),
            kl=Range(least=0, most=1e6, use="use 0 for none"),
            reference_every=COUNT,
            importance_cap=Range(above=0, most=1e6, use="use 2.0, or null for no correction"),
            mtp_weight=Range(least=0, most=1e6, use="use 0 for none"),
            server_concurrency=Range(least=1, most=1024),
            server_tries=Range(least=1, most=100),
            server_wait=Range(least=0, most=600, use="use 1.0"),
            server_timeout=Range(above=0, most=86400, use="use 600"),
            refresh=Range(least=1, most=2**16),
            refresh_keep=Range(least=1, most=2**16),
            stale=Range(least=0, most=2**16, use="use 0 to wait for each other"),
        )
        if not self.rewards:
            raise ValueError("grpo.rewards=[] has 0 rewards and at least 1 is needed: use grpo.rewards=[accuracy]")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"grpo.reward_weights has {len(self.reward_weights)} weights for {len(self.rewards)} rewards: give one "
                "for each, or none"
            )
        if self.prompts % self.minibatches:
            nearest = max(n for n in range(1, self.minibatches + 1) if self.prompts % n == 0)
            raise ValueError(
                f"grpo.minibatches={self.minibatches} does not divide grpo.prompts={self.prompts}: use {nearest}"
            )
        if self.reference_every % self.updates:
            nearest = max(round(self.reference_every / self.updates), 1) * self.updates
            raise ValueError(
                f"grpo.reference_every={self.reference_every} must be a multiple of the {self.updates} updates of a "
                f"batch (grpo.minibatches={self.minibatches} x grpo.epochs={self.epochs}), of which the reference's "
                f"log-probabilities are taken once: use {nearest}, or 0 for never"
            )
        if "{prompt}" not in self.prompt_format:
            raise ValueError(
                f"grpo.prompt_format={self.prompt_format!r} must contain {{prompt}}, which the problem stands in for: "
                "use grpo.prompt_format='{prompt} '"
            )
        self._check_server()

    def _check_server(self) -> None:
        """Raise ValueError unless the settings of rollouts by a server fit together."""
        if self.server is None:
            for name in ("server_model", "refresh_url", "refresh_command", "stale"):
                if getattr(self, name) != getattr(GrpoConfig, name):
                    raise ValueError(
                        f"grpo.{name} is of a server and grpo.server is null: name its URL, or leave grpo.{name} out"
                    )
            return
        if not self.server_model:
            raise ValueError("grpo.server needs the name of its model and grpo.server_model is null: name it")
        if (self.refresh_url is None) == (not self.refresh_command):
            given = "neither is" if self.refresh_url is None else "both are"
            raise ValueError(
                f"grpo.server is told of weights by grpo.refresh_url or grpo.refresh_command and {given} set: set one"
            )
        if self.refresh_command and not any("{path}" in part for part in self.refresh_command):
            raise ValueError(
                "grpo.refresh_command must contain {path}, which the directory of the weights stands in for: add it"
            )
        if self.router_replay:
            raise ValueError(
                "grpo.router_replay=true needs the experts of every token and grpo.server gives none: use "
                "grpo.router_replay=false, or grpo.server=null"
            )
        if self.lag > self.stale:
            raise ValueError(
                f"grpo.refresh={self.refresh} batches of {self.updates} updates make weights up to {self.lag} steps old"
                f" and grpo.stale={self.stale}: use grpo.refresh={self.stale // self.updates + 1} or "
                f"grpo.stale={self.lag}"
            )

    def check_batch(self, sequences: int, unit: int) -> None:
        """Raise ValueError where a batch, a multiple of `unit`, has fewer sequences than an update has samples."""
        samples = self.group_samples // self.minibatches
        if sequences < samples:
            raise ValueError(
                f"batch.sequences={sequences} is below the {samples} samples of an update, grpo.prompts x grpo.samples "
                f"/ grpo.minibatches = {self.prompts} x {self.samples} / {self.minibatches}: use batch.sequences="
                f"{-(-samples // unit) * unit}, or fewer samples"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps a batch of rollouts."""
        return self.minibatches * self.epochs

    def reference_is_due(self, taken: int, consumed: int) -> bool:
        """Whether a reference taken after `taken` samples is replaced after `consumed`: never within a batch."""
        period = self.reference_every * (self.group_samples // self.minibatches)
        is_used_up = consumed % (self.group_samples * self.epochs) == 0
        return period > 0 and is_used_up and consumed // period > taken // period

    @property
    def lag(self) -> int:
        """Steps by which an export is older than the first update of the last batch that it samples."""
        return (self.refresh - 1) * self.updates

    @property
    def is_ahead(self) -> bool:
        """Whether the next batch is sampled while updates of this one run."""
        return self.server is not None and self.stale >= self.lag + self.updates

    @property
    def group_samples(self) -> int:
        """Completions of a batch of rollouts."""
        return self.prompts * self.samples
