"""A run that goes on is the same run: its own configuration holds for every key that nobody typed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8moe.cli.compose import as_yaml, compose
from fp8moe.cli.resume import compose_run, note
from fp8moe.errors import ConfigError
from fp8moe.train.config import resolve
from fp8moe.train.run_dir import describe_start
from tests.faults.runs import forked
from tests.train.runs import SMALL, write_corpus

FIRST = ["experiment=quickstart", "precision=bf16", "optimizer.beta2=0.9", "optimizer.schedule.peak=1e-2", "steps=40"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of 4 processes, at step 40, as far as configurations are concerned."""
    folder = tmp_path / "run"
    step = folder / "checkpoints" / "step-40"
    step.mkdir(parents=True)
    for name in ("state.json", "manifest.json"):
        (step / name).touch()
    describe_start(folder, 0, as_yaml(resolve(compose(FIRST).config, 4)), None)
    return folder


def resumed(run: Path, *settings: str, world_size: int = 4) -> Any:
    composed, origin = compose_run([f"resume={run}", *settings], world_size)
    assert origin is not None and origin.run == run
    return composed.config


@pytest.mark.parametrize("key", ["resume", "run_dir", "checkpoint.path"])
@pytest.mark.parametrize("value", ["0.5", "true", "[a]"])
def test_a_place_that_is_no_text_is_one_sentence(key: str, value: str) -> None:
    """They are read before the configuration is made, which checks every type."""
    settings = ["resume=auto", f"{key}={value}"]
    with pytest.raises(ConfigError, match=rf"^{key}=.* must be text: quote it, '{key}=\"") as caught:
        compose_run(settings, 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^checkpoint=3 must be a group of keys: write checkpoint\.path=PATH$"):
        compose_run(["resume=auto", "checkpoint=3"], 1)


def test_no_paths_are_no_wish_for_the_text_of_this_python(run: Path) -> None:
    """An empty list, of a shell's variable that is not set, would start a run on other text in silence."""
    says = r"^data\.paths=\[\] names 0 files, and data\.source=stdlib would train on the text of this Python: name at"
    for words, origin in ((["data.paths=[]"], None), (["data.paths=[]", "experiment=quickstart"], None),
                          (["data.paths=[]"], str(run))):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            compose_run(words, 4, origin)
    for words in (["data.paths=[]", "data=stdlib"], ["data.source=stdlib", "data.paths=[]"], []):
        assert compose_run(words, 4)[0].config.data.source == "stdlib"
    with pytest.raises(ConfigError, match=r"^resume=required goes on in a run directory and run_dir is not set: add"):
        compose_run(["resume=required"], 4)


def test_a_folder_of_checkpoints_means_its_run(run: Path) -> None:
    """As one of its checkpoints does: the run goes on in its directory."""
    for named in (run / "checkpoints", run / "checkpoints" / "step-40"):
        composed, origin = compose_run([f"resume={named}", "steps=80"], 4)
        assert origin is not None and origin.run == run and composed.config.run_dir == str(run)
        _, origin = compose_run([], 4, from_run=str(named))
        assert origin is not None and origin.run == run and not origin.goes_on


def test_what_was_not_typed_is_the_runs(run: Path) -> None:
    first = resolve(compose(FIRST).config, 4)
    config = resumed(run, "steps=80")
    assert yaml.safe_load(as_yaml(config)) == yaml.safe_load(as_yaml(first)) | {
        "steps": 80,
        "resume": str(run),
        "run_dir": str(run),
    }
    # The five that are easily forgotten: experiment, data, precision, optimizer, model.
    assert (config.model, config.data, config.precision) == (first.model, first.data, first.precision)
    assert config.optimizer == first.optimizer and config.optimizer.beta2 == 0.9
    assert config.model.router.bias_gamma == 0.01, "which the experiment sets"


def test_the_whole_command_again_is_the_same_run(run: Path) -> None:
    again = compose_run([*FIRST, "resume=auto", f"run_dir={run}"], 4)[0].config
    assert again.optimizer == resumed(run).optimizer and again.model == resumed(run).model
    # Typed keys win even where they are the defaults; those of an experiment where it changes something.
    other = compose_run(["experiment=quickstart", "precision=fp8", "resume=auto", f"run_dir={run}"], 4)[0].config
    assert other.precision.mode == "fp8" and other.optimizer.schedule.peak == 3e-3 and other.optimizer.beta2 == 0.9
    chosen = resumed(run, "optimizer=adamw", "optimizer.eps=1e-7").optimizer
    assert (chosen.beta2, chosen.eps) == (0.95, 1e-7), "a group that is chosen is taken whole"
    decaying = resumed(run, "lr_schedule=wsd").optimizer
    assert [segment.shape for segment in decaying.schedule.phases] == ["constant", "sqrt"]
    assert replace(decaying, schedule=again.optimizer.schedule) == again.optimizer, "but for the run's peak and warm-up"
    assert (decaying.schedule.peak, decaying.schedule.warmup_steps) == (1e-2, 10)
    assert resumed(run, "~lr_schedule").optimizer == again.optimizer


def test_the_note_names_every_difference(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed, origin = compose_run([f"resume={run}", "steps=80", "precision=fp8"], 4)
    told = note(origin, composed.config)
    assert told == (
        f"goes on from {run} step 40 with its configuration; changed: precision.mode bf16 -> fp8, steps 40 -> 80"
    )
    same, origin = compose_run([f"resume={run}"], 4)
    assert note(origin, same.config) == f"goes on from {run} step 40 with its configuration, nothing changed"
    shutil.rmtree(run / "checkpoints")
    fresh, origin = compose_run(["resume=auto", f"run_dir={run}"], 4)
    assert note(origin, fresh.config) == (
        f"nothing to resume in {run}: starts at step 0 with its configuration, nothing changed"
    )
    empty = compose([f"run_dir={run.parent / 'new'}", "resume=auto"]).config
    assert note(None, empty) == f"nothing to resume in {run.parent / 'new'}: starts at step 0"
    assert note(None, compose([]).config) is None


def test_token_ids_end_where_the_vocabulary_of_the_model_does(run: Path) -> None:
    """Of the model that the run will have, whichever of the two groups is chosen; unless data.vocab_size is typed."""

    def sizes(*settings: str) -> tuple[int, int]:
        config = compose_run(settings, 1, str(run))[0].config
        return config.data.vocab_size, config.model.vocab_size

    assert sizes() == (4096, 4096)
    assert sizes("model=olmoe_7b") == (50304, 50304)
    assert sizes("model.vocab_size=8192") == (8192, 8192)
    assert sizes("model.vocab_size=8192", "data.vocab_size=4096") == (4096, 8192)
    other = run.parent / "other"
    other.mkdir()
    describe_start(other, 0, as_yaml(compose([*FIRST, "model.vocab_size=8192"]).config), None)
    chosen = compose_run(["data=indexed", "data.paths=[a]"], 1, str(other))[0].config
    assert (chosen.data.vocab_size, chosen.data.source) == (8192, "indexed")
    chosen = compose_run(["data=indexed", "data.paths=[a]", "data.vocab_size=300"], 1, str(other))[0].config
    assert chosen.data.vocab_size == 300
    describe_start(other, 0, as_yaml(compose([*FIRST, "model.vocab_size=8192", "data.vocab_size=500"]).config), None)
    assert compose_run(["model.vocab_size=1024"], 1, str(other))[0].config.data.vocab_size == 500, "which was set"


@pytest.mark.parametrize("key", ["checkpoint.path", "resume", "init_from"])
def test_a_password_in_a_url_is_refused_and_not_said(key: str) -> None:
    """Settings are written to config.yaml, logs and checkpoints."""
    for url in ("s3://user:hunter2@bucket/a", "ftp://u:hun/ter2@host:21/a", "simplecache::sftp://u:hunter2@host/a@b"):
        with pytest.raises(
            ConfigError, match=rf"^{key}=\w.*was given with a password, and settings are written"
        ) as caught:
            compose_run([f"'{key}=\"{url}\"'".strip("'")], 1)
        assert "ter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a", "hdfs://user@host:9000/a", "http://host:9000/a@b", "memory://a:b", "a:b@c"]
)
def test_other_places_are_legal(url: str) -> None:
    assert compose([f'checkpoint.path="{url}"']).config.checkpoint.path == url


def test_another_number_of_processes_chooses_its_layout(run: Path) -> None:
    def layout(world_size: int) -> tuple[int, int, int]:
        config = replace(resumed(run, world_size=world_size), resume="none", run_dir=None)
        resolved = resolve(config, world_size)
        return resolved.dp, resolved.ep, resolved.micro_batch

    assert layout(2) == (2, 2, 8)
    typed = [*FIRST, "parallel.ep=2", "batch.micro_batch=2"]
    describe_start(run, 0, as_yaml(resolve(compose(typed).config, 4)), None)
    assert layout(2) == (2, 2, 2), "what fits stays"
    assert layout(1) == (1, 1, 2)
    assert resumed(run, "batch.micro_batch=8", world_size=2).batch.micro_batch == 8


def test_a_new_run_like_another(run: Path) -> None:
    composed, origin = compose_run(["steps=5"], 4, str(run))
    assert composed.config.resume == "none" and composed.config.run_dir is None
    assert composed.config.optimizer.beta2 == 0.9 and composed.config.steps == 5
    assert note(origin, composed.config) == f"a new run with the configuration of {run}; changed: steps 40 -> 5"
    with pytest.raises(ConfigError, match=r"--from begins a new run and resume=auto goes on with an old one"):
        compose_run(["resume=auto", f"run_dir={run}"], 4, str(run))
    with pytest.raises(ConfigError, match=r"config.yaml can't be read \(No such file or directory\): name a run dir"):
        compose_run([], 4, str(run.parent / "nowhere"))
    for broken in ("a: [", "- 1\n"):
        (run / "config.yaml").write_text(broken)
        with pytest.raises(ConfigError, match=r"it is not YAML|holds no settings"):
            compose_run([], 4, str(run))


def test_allowing_a_change_is_of_one_start(run: Path) -> None:
    config = resumed(run, "resume_changes=[data]")
    assert config.resume_changes == ("data",)
    describe_start(run, 40, as_yaml(config), None)
    assert resumed(run).resume_changes == ()
    with pytest.raises(ValueError, match=r"resume_changes=model is nothing that may change: use data, tokenizer"):
        resumed(run, "resume_changes=[model]")


def test_an_experiment_from_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - override /optimizer: adamw_dsv3\nsteps: 7\nmodel:\n  dim: 128\n"
    )
    monkeypatch.chdir(tmp_path)
    config = compose(["experiment=./mine.yaml", "seq_len=64"]).config
    assert (config.name, config.steps, config.model.dim, config.seq_len) == ("mine", 7, 128, 64)
    assert config.optimizer == compose(["optimizer=adamw_dsv3"]).config.optimizer
    with pytest.raises(ConfigError, match=r"experiment=none.yaml can't be read \(No such file"):
        compose(["experiment=none.yaml"])
    (tmp_path / "mine.yaml").write_text("stepz: 7\n")
    with pytest.raises(ConfigError, match=r"unknown key stepz|stepz"):
        compose(["experiment=./mine.yaml"])


def test_by_its_command_in_a_run_directory_that_was_moved(tmp_path: Path) -> None:
    def fp8moe(name: str, *words: str, code: int = 0) -> str:
        process = forked(["train", *words], 1, tmp_path / name)
        assert process.wait() == [code], process.said()
        return process.said()

    corpus = write_corpus(tmp_path)
    small = [word for word in SMALL if not word.startswith("steps")]
    fp8moe("first", *small, *corpus, "precision=bf16", "steps=2", f"run_dir={tmp_path / 'old'}")
    (tmp_path / "old").rename(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "grammar.tokenizer.json").read_bytes()
    said = fp8moe("second", f"resume={tmp_path / 'run'}", "steps=3")
    assert f"goes on from {tmp_path / 'run'} step 2 with its configuration; changed: steps 2 -> 3\n" in said
    files = sorted(path.name for path in (tmp_path / "run").glob("config*.yaml"))
    assert files == ["config-0.yaml", "config-2.yaml", "config.yaml"] and not (tmp_path / "old").exists()
    assert yaml.safe_load((tmp_path / "run" / "config-0.yaml").read_text())["steps"] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"]["mode"] == "bf16"
    said = fp8moe("refused", f"resume={tmp_path / 'run'}", "steps=4", "data.validation_share=0.3", code=2)
    assert "so that it would train on held-out text: use 0.2" in said
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 3
