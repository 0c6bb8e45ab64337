"""`fp8moe plan` as it is typed: text, files, exit codes, and one sentence for each mistake."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fp8moe.__main__ import main
from fp8moe.cli import grpo, sft
from fp8moe.cli.cluster import clusters, compose_cluster
from fp8moe.cli.compose import as_yaml, compose
from fp8moe.cli.plan import configuration, parse_tokens
from fp8moe.cli.resume import compose_run
from fp8moe.errors import ConfigError
from fp8moe.plan.memory import rank_memory
from fp8moe.plan.prediction import tokens_of
from fp8moe.plan.search import paste, remedies
from fp8moe.plan.step_time import step_time
from fp8moe.train.batch import global_batch
from fp8moe.train.config import resolve

V3 = ["experiment=dsv3_pretrain", "parallel=dsv3_2048", "cluster=h800_2048"]
LITE = ["model=dsv2_lite_16b", "seq_len=2048", "batch.sequences=32", "steps=1000", "validation.samples=32"]


def figures(path: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_deepseek_v3_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    code = main(["plan", *V3, "--json", str(path)])
    out, found = capsys.readouterr().out, figures(path)
    assert code == (0 if found["fits"] else 4)
    lines = out.splitlines()
    start = lines.index("can't run as written:")
    assert "data.paths=[] names no token files" in lines[start + 1]
    assert "makes 24 micro-batches" in lines[start + 2] and "needs at least 32" in lines[start + 2]
    assert lines[start + 3] == "" and len(found["refused"]) == 2
    assert re.search(r"^(fits|does not fit), ", out, re.MULTILINE) and "every figure is a prediction" in lines[0]
    for words in ("tokens/s/GPU", "GPU hours", "MFU", "communication hidden", "bubble", " days, ", "$"):
        assert words in out
    config = compose([*V3[:2], "data.paths=[a]"]).config
    legal = resolve(compose([*V3[:2], "data.paths=[a]", "batch.ramp_from=null"]).config, 2048)
    ranks, time = rank_memory(legal), step_time(legal, compose_cluster(V3[2:]))
    assert [rank["total"] for rank in found["memory"]["balanced"]] == [rank.total for rank in ranks]
    assert [rank["kinds"] for rank in found["memory"]["balanced"]] == [rank.kinds for rank in ranks]
    assert found["time"]["seconds"] == time.seconds and found["mfu"]["causal"] == time.mfu
    assert found["run"]["tokens"] == tokens_of(config) == pytest.approx(14.8e12, rel=2e-3)
    assert found["run"]["gpu_hours"] == pytest.approx(time.gpu_hours(tokens_of(config)))
    assert found["run"]["price"] == pytest.approx(2.0 * found["run"]["gpu_hours"])
    assert found["fits"] == (max(rank.total for rank in ranks) <= 85e9)
    assert f"{found['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU" in out
    assert "pipeline rank 0,15: embedding + blocks 0-3; block 60 + head + MTP; 4.934e9 parameters" in out
    for part in found["time"]["parts"]:
        assert re.search(rf"^{re.escape(part['name'])} .* {re.escape(part['source'])}$", out, re.MULTILINE)


def test_every_rank_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LITE, "parallel.pp=8", "parallel.schedule=1f1b", "parallel.max_imbalance=1.5", "batch.micro_batch=1"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("GB of pipeline rank"))
    told = [int(end) for column in header.split()[4:] for part in column.split(",") for end in part.split("-")]
    assert {0, 7} <= set(told)
    balanced, uneven = (rank_memory(resolve(compose(words).config, 8), imbalance=much) for much in (1.0, 1.5))
    row = next(line for line in out.splitlines() if line.startswith("all "))
    assert float(row.split()[1]) == pytest.approx(balanced[0].total / 1e9, abs=0.006)
    row = next(line for line in out.splitlines() if line.startswith("all at 1.5 times"))
    assert float(row.split()[4]) == pytest.approx(uneven[0].total / 1e9, abs=0.006)
    assert "times an even share: fits too, rank " in out and "pipeline rank 0: embedding + block" in out


def test_a_plan_ends_with_what_would_be_faster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    words = ["experiment=qwen3_30b_8gpu", "cluster=h100_8", "--json", str(path)]
    assert main(["plan", *words, "batch.micro_batch=1"]) == 0
    out, found = capsys.readouterr().out, figures(path)["faster"]
    last = out[out.index("\n\nfaster by prediction (of the step now: waits for the host ") :]
    assert found and f"\n{shlex.join(found[0]['settings'])} " in last and "batch.micro_batch=2" in found[0]["settings"]
    assert main(["plan", *words, *found[0]["settings"]]) == 0
    out, alone = capsys.readouterr().out, figures(path)
    assert alone["tokens_per_second_per_gpu"] == found[0]["tokens_per_second_per_gpu"]
    assert max(rank["total"] for rank in alone["memory"]["balanced"]) == found[0]["bytes"]
    assert all("parallel.capacity_factor=1.5" in one["settings"] for one in alone["faster"]), "which comes last"
    assert main(["plan", *LITE, "cluster=h100_1", "--json", str(path)]) == 4
    assert figures(path)["faster"] == []


def test_search_prints_a_line_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", "--search", *LITE, "cluster=h100_8", "cluster.price_per_gpu_hour=3", "--json", str(path)]) == 0
    out, found = capsys.readouterr().out, figures(path)["search"]
    line = next(line for line in out.splitlines() if line.startswith("  fp8moe train"))
    assert line.strip() == found["command"] and not any("cluster" in word for word in shlex.split(line))
    config = resolve(compose(shlex.split(line)[4:]).config, 8)
    best = found["best"][0]
    assert (config.parallel.pp, config.ep, config.micro_batch) == tuple(
        best["layout"][key] for key in ("pp", "ep", "micro_batch")
    )
    assert step_time(config, compose_cluster([])).tokens_per_second_per_gpu == best["tokens_per_second_per_gpu"]
    speeds = [one["tokens_per_second_per_gpu"] for one in found["best"]]
    assert len(speeds) == 5 and speeds == sorted(speeds, reverse=True) and found["smaller_memory"] in out
    rows = [line for line in out.splitlines() if re.match(r"[1-5] +\d", line)]
    assert len(rows) == 5 and f"{speeds[0]:,.0f}" in rows[0]


def test_a_setting_that_forbids_its_own_plan_leaves_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LITE, "parallel.pp=3", "cluster=h100_1", "cluster.gpus_per_node=2", "--search"]
    assert main(["plan", *words[:-1]]) == 2
    assert "parallel.pp=3 does not divide 2 processes" in capsys.readouterr().err
    assert main(["plan", *words]) == 4  # 16B parameters on two GPUs
    captured = capsys.readouterr()
    assert captured.out.startswith("can't be planned as written: parallel.pp=3 does not divide 2")
    assert captured.err.startswith("fp8moe: no layout of dsv2_lite_16b fits 2 GPUs of 85.0 GB: the least (pp=")
    assert captured.err.count("\n") == 1 and " GB too much: use cluster.nodes=" in captured.err


def test_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LITE, "cluster=h100_1"]) == 4
    out = capsys.readouterr().out
    assert re.search(r"^does not fit, [\d.]+ GB too much: .*; fp8moe plan --search lists", out, re.MULTILINE)


def test_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    main(["plan", *LITE, "--tokens", "2.5T", "--json", str(path)])
    found = figures(path)
    assert found["run"]["tokens"] == 2.5e12 and "\n2.5T tokens: " in capsys.readouterr().out
    seconds = 2.5e12 / (8 * found["tokens_per_second_per_gpu"])
    assert found["run"]["days"] == pytest.approx(seconds / 86400)
    assert found["run"]["gpu_hours"] == pytest.approx(8 * seconds / 3600)
    assert (parse_tokens("300"), parse_tokens("2e12"), parse_tokens("1.5b")) == (300, 2e12, 1.5e9)
    for text in ("x", "0", "-1", "1e30", "1.2.3", ""):
        with pytest.raises(ConfigError, match=r"--tokens .* must be a number of tokens"):
            parse_tokens(text)


def test_tokens_of_a_batch_that_grows() -> None:
    words = [*LITE, "batch.ramp_from=8", "batch.ramp_samples=500", "steps=60"]
    config = compose(words).config
    consumed = 0
    for _ in range(60):
        consumed += global_batch(config.batch, consumed)
    assert tokens_of(config) == consumed * 2048 < 60 * 32 * 2048
    assert tokens_of(compose([*words, "steps=3"]).config) == 24 * 2048


def test_every_cluster_composes() -> None:
    for name in clusters():
        cluster = compose_cluster([f"cluster={name}"])
        assert cluster.name == name and cluster.gpu.lower() == name.split("_")[0]
    nodes = compose_cluster(["cluster=h200_8x8", "cluster.nodes=4", "cluster.price_per_gpu_hour=3"])
    assert (nodes.gpus, nodes.price_per_gpu_hour, nodes.memory_gb) == (32, 3.0, 150.0)
    assert asdict(compose_cluster([])) == asdict(compose_cluster(["cluster=h100_8"]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cluster=h80_2048"], r"cluster=h80_2048 is not one of h100_1, .*: did you mean h800_2048\?"),
        (["cluster.node=3"], r"unknown key cluster.node: did you mean cluster.nodes\?"),
        (["cluster.nodes=a"], "cluster.nodes='a' .* must be a whole number"),
        (["cluster.nodes=0"], "cluster.nodes=0 must be at least 1"),
        (["cluster.memory_gb=nan"], "cluster.memory_gb=nan must be a number"),
        (["cluster.gpu=B200"], "cluster.gpu='B200' is not one of H100, H200, H800"),
        (["cluster.nodes=1,2"], "'cluster.nodes=1,2' must give cluster.nodes one value"),
        (["~cluster"], "'~cluster' must give cluster one value"),
        (["cluster.name=${oc.env:HOME}"], "cluster.name=.* calls a resolver"),
        (["model=tinny"], r"model=tinny is not one of .*: did you mean tiny\?"),
        (["--tokens", "many"], "--tokens 'many' must be a number of tokens"),
        (["precision=fp32"], "precision.mode=fp32"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and err.count("\n") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LITE, "--json", str(tmp_path / "no" / "where.json")]) == 2
    said = capsys.readouterr()
    assert f"where.json is in {tmp_path / 'no'}, which is not there: make it, or use another file" in said.err
    assert not said.out, "before the work, which a search takes minutes for"


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A run directory that can be named: its configuration, and a checkpoint elsewhere."""
    saved = [*LITE, "precision=bf16", f"checkpoint.path={tmp_path / 'saved'}", "model.max_seq_len=1024", "seq_len=1024"]
    (tmp_path / "config.yaml").write_text(as_yaml(compose(saved).config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("typed", "command", "begin"),
    [
        (["--command", "sft"], ["data.paths=[a]"], sft.begin),
        (["experiment=grpo"], ["grpo.prompts=12", "grpo.minibatches=3"], grpo.begin),
        (["--command", "grpo"], ["grpo.minibatches=2", "grpo.server=http://a/v1", "grpo.server_model=b",
                                 "grpo.refresh_url=http://a"], grpo.begin),
    ],
)  # fmt: skip
def test_what_sft_and_grpo_would_run_is_planned(
    typed: list[str], command: list[str], begin: Callable[..., Any], trained: str, tmp_path: Path
) -> None:
    """Model and precision of init_from, the command's experiment, the batch of its samples."""
    settings = [f"init_from={trained}", "batch.micro_batch=1", *command]
    theirs = compose_run(settings, 8, None, begin)[0].config
    options = [word for word in typed if "=" not in word]
    arguments = [*options, *settings, *(word for word in typed if "=" in word), "cluster=h200_8"]
    cluster = compose_cluster(["cluster=h200_8"])
    found, _ = configuration([one for one in arguments if "=" in one and "cluster" not in one], cluster, *options[1:])
    assert found == theirs
    assert main(["plan", *arguments, "validation.samples=8", "--json", str(tmp_path / "plan.json")]) in (0, 4)
    layout = figures(tmp_path / "plan.json")["layout"]
    assert layout["num_microbatches"] * 8 == theirs.batch.sequences and theirs.precision.mode.value == "bf16"


def test_without_init_from_the_typed_model_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=r1_zero", "model=moonlight_16b", "grpo.samples=8", "grpo.rollout_batch=64", "cluster=h200_8x8"]
    assert main(["plan", *words, "--json", str(tmp_path / "plan.json")]) == 0
    found, out = figures(tmp_path / "plan.json"), capsys.readouterr().out
    assert found["layout"]["num_microbatches"] * 64 == 512 * 8 // 16, "as fp8moe grpo fills in"
    assert found["rollouts"]["time"]["mean_tokens"] == 16384 and "\n\nrollouts, apart from the updates" in out
    assert {"rollouts", "updates"} < set(found["memory"]["balanced"][0]["phases"])
    assert main(["plan", *words, "--mean-tokens", "1e3", "--json", str(tmp_path / "plan.json")]) == 0
    assert figures(tmp_path / "plan.json")["rollouts"]["time"]["mean_tokens"] == 1000
    assert main(["plan", *words, "--mean-tokens", "1M"]) == 2
    assert "--mean-tokens 1e+06 must be from 1 to grpo.max_tokens=32768: use 32768" in capsys.readouterr().err
    assert main(["plan", *words, "--mean-tokens", "0"]) == 2
    assert "must be a number of tokens from 1 to 1e18: write for example 2048\n" in capsys.readouterr().err
    assert main(["plan", "--command", "sft", *LITE]) == 0
    assert "steps of epochs=2 follow from the data, which a plan does not read" in capsys.readouterr().out


def test_a_search_names_the_command_and_the_rows_that_would_fit() -> None:
    words = ["experiment=r1_zero", "model=dsv2_lite_16b", "seq_len=4096", "grpo.max_tokens=2048"]
    cluster = compose_cluster(["cluster=h100_8"])
    config = compose([*words, "grpo.rollout_batch=4096"]).config
    assert next(remedies(config, cluster)) == "grpo.rollout_batch=16"
    assert paste(config, words, resolve(config, 8), cluster, "grpo").startswith("fp8moe grpo --nproc 8 experiment=r1")


def test_a_teacher_is_planned_or_named(trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    words = ["--command", "sft", f"init_from={trained}", "data.paths=[a]", "cluster=h200_8", "--json", str(path)]
    main(["plan", *words, f"distill.teacher={trained}"])
    taught, out = figures(path), capsys.readouterr().out
    assert "teacher's forwards" in out and taught["refused"] == []
    assert taught["memory"]["balanced"][0]["kinds"]["teacher"] > 4e9
    main(["plan", *words, "distill.teacher=nowhere"])
    plain, out = figures(path), capsys.readouterr().out
    assert "distill.teacher can't be opened, since nowhere does not exist" in out and "; planned without it" in out
    assert plain["time"]["seconds"] < taught["time"]["seconds"]


def test_a_run_that_goes_on_is_planned_with_its_own_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(compose([*LITE, "name=theirs", "batch.micro_batch=2"]).text)
    main(["plan", f"resume={tmp_path}", "seq_len=1024", "cluster=h100_8"])
    out = capsys.readouterr().out
    assert out.startswith("theirs on h100_8: 8 H100 in 1 node;") and "32 sequences of 1,024 tokens a step" in out
