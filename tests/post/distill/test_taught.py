"""A run with a teacher: its top k, a step on one rank and two, whole runs, logits in chunks, what is refused."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from fp8moe.cli import grpo
from fp8moe.cli.compose import as_yaml
from fp8moe.cli.export_model import main as export
from fp8moe.cli.resume import compose_run
from fp8moe.cli.teacher import find_teacher
from fp8moe.cli.train import Command, main
from fp8moe.data.tokenizer import train_tokenizer
from fp8moe.errors import ConfigError
from fp8moe.model import head_loss as module
from fp8moe.post.distill.taught import Taught
from fp8moe.post.distill.teacher_topk import teacher_topk
from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig
from fp8moe.train.loop import run_to_end
from fp8moe.train.opening import opening
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from fp8moe.train.run_dir import describe_start, make_run_dir
from fp8moe.train.step import train_step
from tests.generate.test_no_whole_logits import CHUNK, SEQ_LEN, Spy
from tests.parallel.ranks import run_ranks
from tests.train.runs import SMALL, VOCABULARY, built, configured, differing, joined, stored

CPU = torch.device("cpu")
QUIET = ("report=false", "validation.completions=0", "checkpoint.background=false")


@pytest.fixture(scope="module")
def teacher(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another size: wider, of 3 blocks and 8 experts, trained for 2 steps in FP32."""
    folder = tmp_path_factory.mktemp("teacher")
    sizes = ("model.dim=96", "model.num_layers=3", "model.experts.num_experts=8", "model.init_std=0.1")
    run = built(configured(corpus, *sizes, *QUIET, "steps=2", "precision=fp32", "seed=5", f"run_dir={folder}"))
    assert run.data.tokenizer is not None
    describe_start(folder, 0, as_yaml(run.config), run.data.tokenizer.path)
    run_to_end(run, time.perf_counter())
    return folder


@pytest.fixture
def settings(corpus: list[str], teacher: Path) -> list[str]:
    return [*corpus, *QUIET, f"distill.teacher={teacher}", "distill.topk=16", "precision=fp32"]


def taught(config: TrainConfig) -> tuple[Run, Taught]:
    """The run as it begins, in one process or inside `run_ranks`."""
    source = find_teacher(config)
    assert source is not None
    method = Taught(source)
    run_dir = Path(config.run_dir or "nowhere")
    if config.run_dir is not None:
        make_run_dir(config.run_dir, config.name, config.resume)
    run = build(config, mesh_of(config, CPU), CPU, run_dir, open_data=method.open_data)
    method.begin(run)
    return run, method


def step(settings: list[str], world_size: int = 1) -> tuple[dict[str, Tensor], float, float, float]:
    """(this rank's tensors, loss, MTP loss, KL) after one step."""
    run, method = taught(configured(settings, world_size=world_size))
    report = train_step(run, next_work=method.work)
    run.reader.close()
    assert report.mtp_loss is not None
    return stored(run), report.loss, report.mtp_loss, method.figures(run)["distill_kl"]


def test_the_teacher_is_read_as_its_whole_logits_say(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    run, method = taught(configured([*settings, "seq_len=150", "model.max_seq_len=512"]))
    batch = run.data.train.batch([0, 1])
    run.reader.close()
    found = teacher_topk(method._model, batch, 16, 1.0)
    with torch.no_grad():
        positions = method._model.positions(batch.positions_BS, batch.document_lengths)
        hidden, _ = method._model.run_blocks(method._model.embedding(batch.inputs_BS.flatten()), positions)
        logp = method._model.head(method._model.norm(hidden)).double().log_softmax(1)
    values, ids = logp.topk(17)
    torch.testing.assert_close(found.logp.double(), values[:, :16], rtol=0, atol=1e-5)
    assert torch.equal(found.ids.sort(1).values, ids[:, :16].sort(1).values.int())
    rest = logp.scatter(1, ids[:, :16], -torch.inf).logsumexp(1)
    torch.testing.assert_close(found.rest.double(), rest, rtol=0, atol=1e-5)


def test_a_step_over_two_ranks_or_by_another_schedule_is_that_of_one(settings: list[str]) -> None:
    alone, loss, mtp_loss, kl = step(settings)
    ranks = run_ranks(step, 2, [*settings, "parallel.ep=2"], 2)
    together = joined(tensors for tensors, *_ in ranks)
    vee = step([*settings, "parallel.schedule=dualpipev"])
    assert kl > 0.01 and all(one[1:] == pytest.approx((loss, mtp_loss, kl), rel=1e-5) for one in (*ranks, vee))
    compared = 0
    for name, whole in joined([alone]).items():
        if name.startswith("exp_avg."):  # the gradient, but for a factor
            assert (together[name] - whole).norm() <= 1e-4 * whole.norm() + 1e-9, name
            compared += bool(whole.any())
    assert compared > 30


def test_a_hugging_face_directory_teaches_as_the_run_that_was_exported(
    settings: list[str], teacher: Path, tmp_path: Path
) -> None:
    export([str(teacher), str(tmp_path / "out"), "--precision", "fp32"])
    *_, expected = step(settings)
    *_, kl = step([*settings, f"distill.teacher={tmp_path / 'out'}"])
    assert kl == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_mean_of_cross_entropy_and_kl_and_the_mtp_module_keeps_its_own(settings: list[str]) -> None:
    _, loss, mtp_loss, kl = step([*settings, "distill.weight=0.25"])
    run = built(configured([one for one in settings if not one.startswith("distill")]))
    plain = train_step(run)
    run.reader.close()
    assert loss == pytest.approx(0.75 * plain.loss + 0.25 * kl, rel=1e-5) and plain.mtp_loss == mtp_loss


def test_a_run_taught_by_its_own_weights_has_no_kl_and_no_gradient_of_the_head(
    corpus: list[str], teacher: Path, tmp_path: Path
) -> None:
    sizes = ("model.dim=96", "model.num_layers=3", "model.experts.num_experts=8", "model.mtp_weight=0")
    own = ("distill.weight=1", "distill.topk=8", f"distill.teacher={teacher}", f"init_from={teacher}")
    run, method = taught(configured([*corpus, *QUIET, *sizes, *own, "precision=fp32", "model.router.aux_loss_alpha=0"]))
    report = train_step(run, next_work=method.work)
    run.reader.close()
    assert abs(method.figures(run)["distill_kl"]) < 1e-6 and abs(report.loss) < 1e-6
    assert report.grad_norm < 1e-5


def test_logits_of_neither_are_whole(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    more = [f"seq_len={SEQ_LEN}", "batch.sequences=2", "model.max_seq_len=512", "precision=bf16"]
    for extra in ([], ["distill.temperature=2"]):
        run, method = taught(configured([*settings, *more, *extra]))
        with Spy() as spy:
            train_step(run, next_work=method.work)
        run.reader.close()
        assert not spy.whole and spy.most == CHUNK


def test_a_run_learns_from_its_teacher_and_goes_on_with_it(settings: list[str], tmp_path: Path) -> None:
    """4 steps at once, and 1 and 3: the same bits; metrics and configuration name what was learned from."""
    ends = {}
    for name, parts in (("whole", [4]), ("parts", [1, 4])):
        folder = tmp_path / name
        for steps in parts:
            began = ["resume=required"] if steps > parts[0] else []
            typed = [*settings, *began, f"run_dir={folder}", f"steps={steps}"]
            config = configured([*typed, "lr_schedule=constant", "optimizer.schedule.peak=1e-2", "distill.weight=1"])
            run, method = taught(config)
            describe_start(folder, run.step, as_yaml(config), None)
            run_to_end(run, time.perf_counter(), method=method)
        ends[name] = stored(run)
    assert not differing(ends["whole"], ends["parts"])
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    kls = [row["distill_kl"] for row in rows if "distill_kl" in row]
    assert len(kls) == 4 and kls[3] < kls[0]
    stored_config = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert f"taught by {config.distill.teacher}: KL on its likeliest 16 tokens, weight 1, temperature 1" in opening(run)
    again, _ = compose_run([f"resume={tmp_path / 'parts'}", "steps=6"], 1, None)
    assert again.config.distill.teacher == stored_config["distill"]["teacher"] is not None


def test_the_command_trains_with_a_teacher(settings: list[str], tmp_path: Path) -> None:
    assert main([*SMALL, *settings, f"run_dir={tmp_path / 'run'}", "steps=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["distill_kl"] > 0


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.vocab_size=320", r"has a vocabulary of 300 and model.vocab_size=320: use a teacher of the same"),
        ("distill.topk=301", "distill.topk=301 exceeds model.vocab_size=300: use at most 300"),
        ("distill.teacher=nowhere", "distill.teacher can't be opened, since nowhere does not exist: name a run"),
        ("distill.teacher=s3://name:secret@host/run", "distill.teacher"),
        ("distill.weight=0", r"distill.weight=0.0 must be above 0 and at most 1: use distill.teacher=null for none"),
        ("distill.temperature=0", "distill.temperature=0.0 must be"),
        ("seq_len=25", "computes in FP8, and .* = 2 x 25 = 50 tokens must be a multiple of 16, which FP8 needs"),
    ],
)
def test_what_can_not_be_learned_from_is_refused(
    setting: str, sentence: str, settings: list[str], teacher: Path, tmp_path: Path
) -> None:
    if "FP8" in sentence:
        settings = [*settings, f"distill.teacher={changed(teacher, tmp_path, 'precision', mode='fp8')}"]
    with pytest.raises((ConfigError, ValueError), match=sentence) as refused:
        find_teacher(configured([*settings, setting]))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("axis", "sentence"), [("pp", "a teacher is held whole"), ("cp", "reads whole sequences")])
def test_layouts_that_cut_models_or_sequences_are_refused(axis: str, sentence: str, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"{sentence}.* parallel.{axis}=2 .*use parallel.{axis}=1"):
        configured([*settings, f"parallel.{axis}=2"], world_size=2)


def test_a_teacher_with_a_short_context_or_experts_that_do_not_divide_is_refused(
    settings: list[str], teacher: Path, tmp_path: Path
) -> None:
    short = changed(teacher, tmp_path / "short", "model", max_seq_len=32)
    with pytest.raises(ConfigError, match="has a context of 32 tokens and seq_len=64: use seq_len=32"):
        find_teacher(configured([*settings, "seq_len=64", f"distill.teacher={short}"]))
    wide = ("model.experts.num_experts=16", "parallel.ep=16", "batch.sequences=32", "validation.samples=32")
    config = configured([*settings, *wide], world_size=16)
    with pytest.raises(ConfigError, match=r"ep=16 does not divide the 8 experts .*: use parallel.ep=1, 2, 4 or 8"):
        find_teacher(config)


def test_another_tokenizer_is_refused_and_one_that_is_written_differently_is_not(
    settings: list[str], teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(settings)
    source = find_teacher(config)
    assert source is not None and source.tokenizer == teacher / "tokenizer.json"
    rewritten, other = tmp_path / "rewritten.json", tmp_path / "other.json"
    rewritten.write_text(json.dumps(json.loads(source.tokenizer.read_text()), indent=3))
    train_tokenizer(iter(["some other words that are 1 2 3 4"] * 30), VOCABULARY).save(str(other))
    source.check_tokenizer(rewritten, "T")
    with pytest.raises(ConfigError, match=r"T has another tokenizer, .*: \d+ of its \d+ ids stand for the same token"):
        source.check_tokenizer(other, "T")
    assert not caplog.records
    replace(source, tokenizer=None).check_tokenizer(other, "T")
    assert "T has no tokenizer" in caplog.text


def test_reinforcement_learning_takes_no_teacher(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"fp8moe grpo learns from no teacher: use distill.teacher=null"):
        Command("grpo", grpo.command_parser, grpo.begin, grpo.method).train(configured(settings))


def changed(run: Path, folder: Path, group: str, **values: object) -> Path:
    """A copy of a run whose config.yaml says otherwise."""
    copy = folder / "changed"
    shutil.copytree(run, copy)
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree[group] |= values
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    return copy
