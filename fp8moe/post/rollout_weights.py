"""Weights for a rollout server: exports of a run's weights by step, and how the server learns of them.

    RUN/rollout_weights/N          a Hugging Face directory of the weights after step N, whole or absent
    RUN/rollout_weights/.masters   while one is made: the FP32 masters of all ranks, written as a checkpoint is, from
                                   which the first rank exports as `fp8moe export` does
    RUN/rollouts/samples-N.jsonl   completions that these weights gave so far: none is asked for twice

Masters go by way of the disk since any layout writes them and the export reads them by ranges: no rank holds a model of
all experts. Sent to the server directly they would have to be in its processes (NCCL groups of vLLM or SGLang), which
ties a version of this program to one of theirs. The server reads the directory by the path it has here.

Exports of steps behind a run's present one are of a course that it has left, and are deleted.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fp8moe.errors import ConfigError
from fp8moe.post.endpoint import EndpointError, check_url, read_key
from fp8moe.post.http_json import RefusedError, TryAgainError, post_json
from fp8moe.post.rollouts import FOLDER as SAMPLES_FOLDER
from fp8moe.train import checkpoint
from fp8moe.train.grpo_config import GrpoConfig
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_point, state_tensors

FOLDER = "rollout_weights"
MASTERS = ".masters"
# checkpoint, run directory, new directory, precision
Exporter = Callable[[Path, Path, Path, str], None]
logger = logging.getLogger(__name__)


class RolloutWeights:
    """The exports of a run."""

    def __init__(self, run: Run, export: Exporter) -> None:
        self._run, self._export = run, export
        self.folder = run.run_dir.absolute() / FOLDER

    def path(self, step: int) -> Path:
        """Where the weights after `step` are, or will be."""
        return self.folder / str(step)

    def samples(self, step: int) -> Path:
        """The completions that the weights after `step` gave."""
        return self._run.run_dir / SAMPLES_FOLDER / f"samples-{step:06d}.jsonl"

    def steps(self) -> list[int]:
        """Of the exports there are, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def forget_after(self, step: int) -> None:
        """Delete what was made of steps behind this one, and half an export. For the first rank."""
        shutil.rmtree(self.folder / MASTERS, ignore_errors=True)
        for old in self.steps():
            if old > step:
                self._delete(old)

    def write_masters(self) -> None:
        """Write the weights as they are, for `make`. Collective over all ranks."""
        run, at = self._run, save_point(self._run)
        tensors = {name: one for name, one in state_tensors(run).items() if name.startswith(("master.", "bias."))}
        text = checkpoint.state_text(at.state, run.config.model, {"config": asdict(run.config), "shapes": run.shapes})
        kept = checkpoint.CheckpointConfig(keep=1)
        checkpoint.save(
            self.folder / MASTERS, run.step, text, tensors, kept=kept, is_first=run.is_first, group=run.mesh.world_group
        )

    def make(self, step: int) -> None:
        """The export of `step` from the masters that were written, and older ones deleted. For the first rank."""
        grpo, masters = self._run.config.grpo, self.folder / MASTERS
        self._export(masters / f"step-{step}", self._run.run_dir, self.path(step), grpo.refresh_precision)
        shutil.rmtree(masters, ignore_errors=True)
        for old in self.steps()[: -grpo.refresh_keep]:
            self._delete(old)

    def _delete(self, step: int) -> None:
        shutil.rmtree(self.path(step), ignore_errors=True)
        self.samples(step).unlink(missing_ok=True)


class Announcement:
    """Tells a server to load a directory: by a POST to grpo.refresh_url, or by running grpo.refresh_command."""

    def __init__(self, config: GrpoConfig) -> None:
        """Raises ConfigError."""
        self._config, self._key = config, read_key(config.server_key_env)
        if config.refresh_url is not None:
            example = "http://HOST:PORT/update_weights_from_disk"
            check_url("grpo.refresh_url", config.refresh_url, config.server_key_env, example)

    def tell(self, path: Path) -> None:
        """Return when the server has the weights at `path`. Tried as often as a request.

        Raises ConfigError where it refuses them, EndpointError where it can't be told.
        """
        config = self._config
        for number in range(config.server_tries):
            try:
                if config.refresh_url is None:
                    self._run_command(path)
                else:
                    self._post(config.refresh_url, path)
                return
            except TryAgainError as error:
                reason = str(error)
                if number + 1 < config.server_tries:
                    time.sleep(max(config.server_wait * 2**number, error.after))
        key = "grpo.refresh_command" if config.refresh_url is None else f"grpo.refresh_url={config.refresh_url}"
        raise EndpointError(f"{key} did not bring {path} to the server in {config.server_tries} tries ({reason})")

    def _post(self, url: str, path: Path) -> None:
        try:
            answer = post_json(url, {"model_path": str(path)}, self._key, self._config.server_timeout)
        except RefusedError as error:
            raise ConfigError(f"grpo.refresh_url={url} refuses {path} ({error}): see the server's log") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            said = str(answer.get("message", ""))[:200]
            raise ConfigError(f"grpo.refresh_url={url} did not load {path} ({said}): see the server's log")

    def _run_command(self, path: Path) -> None:
        """Run the command, without a shell. It has the environment of the run, the key included."""
        argv = [part.replace("{path}", str(path)) for part in self._config.refresh_command]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._config.server_timeout,
                text=True,
                errors="replace",
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TryAgainError(f"{argv[0]} took more than {self._config.server_timeout:g} s") from error
        except OSError as error:
            raise ConfigError(
                f"grpo.refresh_command can't run {argv[0]} ({error.strerror}): name a program that is there"
            ) from error
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())[-200:]
            raise TryAgainError(f"{argv[0]} ended with {done.returncode}" + (f": {said}" if said else ""))
