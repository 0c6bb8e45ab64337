"""Rollouts by a server that fail: bad answers, weights that it does not load, settings that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8moe.errors import ConfigError
from fp8moe.post.endpoint import EndpointError
from fp8moe.post.rollout_weights import Announcement
from fp8moe.train.config import TrainConfig
from fp8moe.train.step import train_step
from tests.post.distill.served import Served
from tests.post.rollouts_served import Rollouts, built, clear, config_of, method
from tests.post.runs import policy_config


@pytest.fixture(autouse=True)
def forgotten(server: tuple[Served, Rollouts]) -> None:
    clear(*server)


def first_error(config: TrainConfig, folder: Path) -> str:
    with pytest.raises((ConfigError, EndpointError)) as raised:
        run, made = built(config, folder)
        train_step(run, next_work=made.work)
    assert "\n" not in str(raised.value)
    return f"{getattr(raised.value, 'exit_code', None)} {raised.value}"


def test_bad_answers_end_the_run_in_one_sentence(
    corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path
) -> None:
    endpoint, rollouts = server
    config = config_of(corpus, endpoint.url)
    rollouts.change = lambda choice: choice.pop("logprobs")
    assert "2 " + endpoint.url + "/completions gives no log-probabilities" in first_error(config, tmp_path / "a")
    rollouts.change = lambda choice: choice["token_ids"].pop()
    assert "log-probabilities for" in first_error(config, tmp_path / "b")
    rollouts.change = lambda choice: None
    chosen: list[int] = []

    def before(body: dict[str, Any], number: int) -> Any:
        chosen.append(body["seed"])
        return (500, {}, {}) if body["seed"] == chosen[0] else None

    rollouts.before = before
    alone = config_of(corpus, endpoint.url, "grpo.held_out_count=0", "grpo.server_wait=0.3")
    said = first_error(alone, tmp_path / "c")
    assert said.startswith(f"75 {endpoint.url} gave 15 of 16 samples") and "no answer in 2 tries (HTTP 500" in said
    rollouts.before = lambda body, number: (400, {}, {"error": "too long"})
    said = first_error(config, tmp_path / "d")
    assert said.startswith(f"2 {endpoint.url} gave 0 of 2 samples, the first that is missing is number 0 of problem ")
    assert "refused (HTTP 400" in said and "too long" in said


def test_a_validation_without_the_server_ends_no_run(
    corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint, rollouts = server
    run, made = built(config_of(corpus, endpoint.url), tmp_path)
    rollouts.before = lambda body, number: (0, {}, b"")
    for kept in (tmp_path / "rollouts").iterdir():
        kept.unlink()  # the answers of the beginning, which the same weights would give again
    assert made.score(run) == {}
    (said,) = [record.message for record in caplog.records if "held-out problems" in record.message]
    assert said.startswith(f"held-out problems are not scored after step 0: {endpoint.url} gave no answer in 2 tries")


def test_telling_the_server_by_a_command(corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path) -> None:
    endpoint, _ = server

    def told(*command: str) -> Announcement:
        return Announcement(config_of(corpus, endpoint.url, f"grpo.refresh_command={json.dumps(command)}").grpo)

    script = "import os, sys; open(sys.argv[1], 'a').write(sys.argv[2] + ';' + sys.argv[3])"
    told(sys.executable, "-c", script, f"{tmp_path}/said", "--to={path}", "$HOME; ls").tell(Path("/w/7"))
    assert (tmp_path / "said").read_text() == "--to=/w/7;$HOME; ls", "no shell reads it"
    with pytest.raises(ConfigError, match=r"grpo.refresh_command can't run no-such-program \(No such file"):
        told("no-such-program", "{path}").tell(Path("/w/7"))
    fails = "import sys; print('no room', file=sys.stderr); sys.exit(3)"
    with pytest.raises(
        EndpointError, match=r"did not bring /w/7 to the server in 2 tries \(.* ended with 3: no room\)"
    ):
        told(sys.executable, "-c", fails, "{path}").tell(Path("/w/7"))


def test_a_server_that_does_not_load_the_weights(
    corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path
) -> None:
    _, rollouts = server
    config = config_of(corpus, server[0].url)
    rollouts.on_told = (400, {}, {"success": False, "message": "another shape"})
    said = first_error(config, tmp_path / "a")
    assert said.startswith("2 grpo.refresh_url=http://") and "refuses" in said and "another shape" in said
    rollouts.on_told = (200, {}, {"success": False, "message": "no such layer"})
    assert "did not load" in first_error(config, tmp_path / "b")
    rollouts.on_told = (503, {}, {})
    said = first_error(config, tmp_path / "c")
    assert said.startswith("75 grpo.refresh_url=") and f"did not bring {tmp_path}/c/rollout_weights/0 to the" in said


BAD: list[tuple[tuple[str, ...], str]] = [
    (("grpo.stale=1",), "grpo.stale is of a server and grpo.server is null: name its URL, or leave grpo.stale out"),
    (("grpo.server=http://h/v1",), "grpo.server needs the name of its model"),
    (("grpo.server=http://h/v1", "grpo.server_model=m"), "grpo.refresh_url or grpo.refresh_command and neither is set"),
    (
        ("grpo.server=http://h/v1", "grpo.server_model=m", "grpo.refresh_url=http://h/u", "grpo.refresh_command=[a]"),
        "and both are set: set one",
    ),
    (("grpo.server=http://h/v1", "grpo.server_model=m", "grpo.refresh_command=[a]"), "must contain {path}"),
    (
        ("grpo.server=http://h/v1", "grpo.server_model=m", "grpo.refresh_url=http://h/u", "grpo.refresh=3"),
        "make weights up to 2 steps old and grpo.stale=0: use grpo.refresh=1 or grpo.stale=2",
    ),
    (
        ("grpo.server=h/v1", "grpo.server_model=m", "grpo.refresh_url=http://h/u"),
        "grpo.server='h/v1' is no URL: use http://HOST:PORT/v1",
    ),
    (
        ("grpo.server=http://me:pass@h/v1", "grpo.server_model=m", "grpo.refresh_url=http://h/u"),
        "grpo.server must have no user, password or query",
    ),
    (
        ("grpo.server=http://h/v1", "grpo.server_model=m", "grpo.refresh_url=ftp://h/u"),
        "grpo.refresh_url='ftp://h/u' is no URL",
    ),
]


@pytest.mark.parametrize(("settings", "says"), BAD)
def test_settings_that_do_not_fit(settings: tuple[str, ...], says: str, corpus: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        method().open_data(policy_config(corpus, *settings), None)  # type: ignore[arg-type]
    assert says in str(raised.value)
