"""A rollout server on a thread of the test: transformers on the directories that a run exports, in FP32.

It speaks as SGLang does, /v1/completions and /update_weights_from_disk, and draws what the built-in generator would: a
request has a seed, and of the few names of a small run the seed tells which one it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fp8moe.cli.grpo import export_weights
from fp8moe.model.transformer import generator_of
from fp8moe.post.completions import seed_of
from fp8moe.post.grpo import Grpo
from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from tests.post.distill.served import Answer, Served, served
from tests.post.runs import policy_config

SMALL = (
    *("grpo.samples=4", "grpo.kl=0", "grpo.held_out_count=2", "grpo.max_tokens=6", "plan=off"),
    *("validation.samples=8", "model.mtp_depth=0", "steps=3", "checkpoint.background=false"),
)


class Rollouts:
    """told: directories in the order in which it was told of them. asked: (step of the weights, prompt, seed) of all
    completions. before: called first of a completion's request, with its number; it may answer in its place. change:
    called with a choice before it is sent. on_told: the answer to an announcement, in place of loading. load: the model
    of a directory."""

    def __init__(self, num_ids: int, names: dict[int, tuple[str, int]]) -> None:
        self.told: list[str] = []
        self.asked: list[tuple[int, tuple[int, ...], int]] = []
        self.before: Any = lambda body, number: None
        self.change: Any = lambda choice: None
        self.on_told: Answer | None = None
        self.load: Any = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._num_ids, self._names, self._lock = num_ids, names, threading.Lock()
        self._model: Any = None

    def __call__(self, body: dict[str, Any], number: int) -> Answer:
        if "model_path" in body and self.on_told is not None:
            return self.on_told
        if "model_path" in body:
            self.told.append(body["model_path"])
            self._model = self.load(body["model_path"])
            return 200, {}, {"success": True, "message": "Succeeded to update model weights."}
        with self._lock:
            answer = self.before(body, len(self.asked))
            if answer is not None:
                return answer
            step = int(self.told[-1].rpartition("/")[2])
            self.asked.append((step, tuple(body["prompt"]), body["seed"]))
            choice = self._completion(body)
            self.change(choice)
            return 200, {}, {"choices": [choice]}

    @torch.no_grad()
    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        uniform = torch.rand(body["max_tokens"], dtype=torch.float64, generator=self._generator(body["seed"]))
        ids, logprobs, finish = [], [], "length"
        for number in uniform:
            logits = self._model(torch.tensor([body["prompt"] + ids])).logits[0, -1, : self._num_ids].float()
            logp = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
            reached = logp.double().exp().cumsum(0)
            drawn = torch.searchsorted(reached, number * reached[-1], right=True)
            token = int(logp.argmax() if body["temperature"] == 0 else drawn)
            ids.append(token)
            logprobs.append(float(logp[token]))
            if token in body["stop_token_ids"]:
                finish = "stop"
                break
        return {
            "index": 0,
            "text": "",
            "token_ids": ids,
            "finish_reason": finish,
            "logprobs": {"tokens": [""] * len(ids), "token_logprobs": logprobs},
        }

    def _generator(self, seed: int) -> torch.Generator:
        name = self._names.get(seed)
        return torch.Generator().manual_seed(seed) if name is None else generator_of(*name)


def names_of(config: TrainConfig, batches: int) -> dict[int, tuple[str, int]]:
    """By seed, the names and numbers of all samples that the first batches may ask for."""
    grpo, seed = config.grpo, config.seed
    every = [
        (f"{seed}/{place}/{i}/{problem}", sample)
        for place in range(batches * (grpo.dynamic_rounds + 1))
        for i in range(grpo.prompts)
        for problem in range(grpo.train_count)
        for sample in range(grpo.samples)
    ]
    return {seed_of(*one): one for one in every}


@contextmanager
def rollouts_served(config: TrainConfig, num_ids: int, batches: int = 6) -> Iterator[tuple[Served, Rollouts]]:
    """A server while the block runs."""
    rollouts = Rollouts(num_ids, names_of(config, batches))
    with served(rollouts) as endpoint:
        yield endpoint, rollouts


def clear(endpoint: Served, rollouts: Rollouts) -> None:
    for made in (endpoint.bodies, endpoint.headers, endpoint.paths, rollouts.told, rollouts.asked):
        made.clear()
    rollouts.before, rollouts.change, rollouts.on_told = (lambda body, number: None), (lambda choice: None), None


def config_of(corpus: list[str], url: str, *settings: str, world_size: int = 1) -> TrainConfig:
    root = url.removesuffix("/v1")
    by_server = (f"grpo.server={url}", "grpo.server_model=policy", "grpo.refresh_precision=fp32")
    tries = ("grpo.server_tries=2", "grpo.server_wait=0.01", "grpo.server_concurrency=3")
    told = f"grpo.refresh_url={root}/update_weights_from_disk"
    if any(setting.startswith("grpo.refresh_command") for setting in settings):
        told = "grpo.refresh_url=null"
    return policy_config(corpus, *SMALL, *by_server, *tries, told, *settings, world_size=world_size)


def method() -> Grpo:
    return Grpo(export=export_weights)


def built(config: TrainConfig, folder: Path) -> tuple[Run, Grpo]:
    folder.mkdir(exist_ok=True)
    made, device = method(), torch.device("cpu")
    run = build(config, mesh_of(config, device), device, folder, open_data=made.open_data)
    made.begin(run)
    return run, made
