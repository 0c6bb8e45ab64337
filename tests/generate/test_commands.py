"""`fp8moe generate` and `fp8moe eval` on a run's directory, and the lines that end a run."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fp8moe.__main__ import main
from fp8moe.cli.command import parse
from fp8moe.cli.generate import _ends, command_parser
from fp8moe.cli.trained import trained_at
from fp8moe.generate import open as generate_open
from fp8moe.generate.open import load_model
from fp8moe.generate.samples import last_lines
from fp8moe.generate.text import Vocabulary
from fp8moe.train.loop import run_to_end
from fp8moe.train.processes import mesh_of
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, differing, weights_of

TEMPLATE = "{% for m in messages %}{{ m.content }} = {% endfor %}"


def generated(run: Path, tmp_path: Path, *arguments: str) -> list[dict]:
    assert main(["generate", str(run), "--json", str(tmp_path / "out.json"), *arguments]) == 0
    return json.loads((tmp_path / "out.json").read_text())["completions"]


def test_text_streams_to_stdout_and_figures_to_stderr(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (one,) = generated(run, tmp_path, "--prompt", "delta = ", "--max-tokens", "12")
    shown = capsys.readouterr()
    assert shown.out == f"delta = {one['completion']}\n"
    assert len(one["ids"]) == 12 and one["ended"] == "max_tokens"
    assert "12 tokens, " in shown.err and "tokens/s after 3 prompt tokens in" in shown.err
    vocabulary = Vocabulary(run / "tokenizer.json", 300)
    assert vocabulary.decode(one["ids"]) == one["completion"]


def test_a_run_a_checkpoint_and_other_ways_to_the_same_text(run: Path, tmp_path: Path) -> None:
    words = ("--prompt", "delta = ", "--max-tokens", "10")
    plain = generated(run, tmp_path, *words)
    checkpoint = run / "checkpoints" / "step-12"
    assert generated(checkpoint, tmp_path, *words) == plain
    shutil.copytree(checkpoint, tmp_path / "moved" / "step-12")
    assert generated(tmp_path / "moved", tmp_path, *words, "--tokenizer", str(run / "tokenizer.json")) == plain
    assert generated(run, tmp_path, *words, "--mtp") == plain
    (tmp_path / "prompt.txt").write_text("delta = ")
    assert generated(run, tmp_path, "--file", str(tmp_path / "prompt.txt"), *words[2:]) == plain
    several = generated(run, tmp_path, "--prompt", "import", *words, "--batch", "1")
    assert several[1] == plain[0] and several[0]["prompt"] == "import"
    for other in (("--ema",), ("precision=fp8",), ("--temperature", "2")):
        found = generated(run, tmp_path, *words, *other)
        assert len(found[0]["ids"]) > 0 and (found != plain or other == ("precision=fp8",))


def test_a_hugging_face_directory_speaks_as_the_run_that_it_was_exported_from(run: Path, tmp_path: Path) -> None:
    words = ["--prompt", "delta = ", "--max-tokens", "12"]
    released = tmp_path / "released"
    assert main(["export", str(run), str(released), "--precision", "fp32"]) == 0
    assert generated(released, tmp_path, *words, "precision=fp32") == generated(run, tmp_path, *words, "precision=fp32")
    assert main(["generate", str(released), *words, "--ema"]) == 2


def loaded(run: str, ep: int, averaged: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The weights and biases of this rank, and which rank of ep it is."""
    config = trained_at(run, [f"parallel.ep={ep}"], 2).config
    mesh = mesh_of(config, torch.device("cpu"))
    model = load_model(config, mesh, torch.device("cpu"), run, averaged=averaged)
    assert not hasattr(model, "main_grads")
    return model.state_dict(), mesh.ep_rank


@pytest.mark.parametrize("averaged", [False, True])
def test_ranks_load_their_experts_and_all_else(run: Path, averaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP32 the checkpoint's masters, or their average, to the bit; read a few tensors at a time."""
    monkeypatch.setattr(generate_open, "MOST_VALUES", 5000)
    stored: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / "step-12").glob("*.safetensors"):
        stored |= load_file(file)
    kind = "ema" if averaged else "master"
    for state, ep_rank in run_ranks(loaded, 2, str(run), 2, averaged):
        assert any(".experts." in name for name in state)
        for name, tensor in state.items():
            if "counts_E" in name:
                continue
            key = f"bias.{name.removesuffix('.bias_E')}" if "bias_E" in name else f"{kind}.{name}"
            whole = torch.cat([stored[one].flatten() for one in sorted(stored) if one.partition("@")[0] == key])
            mine = whole.chunk(2)[ep_rank] if ".experts." in name else whole
            assert torch.equal(tensor.flatten(), mine), name


def test_stops_and_several_prompts_in_order(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (whole,) = generated(run, tmp_path, "--prompt", "delta = ", "--max-tokens", "10")
    stop = whole["completion"][3:5]
    capsys.readouterr()
    found = generated(run, tmp_path, "--prompt", "delta = ", "--prompt", "x", "--max-tokens", "10", "--stop", stop)
    assert found[0]["completion"] == whole["completion"][: whole["completion"].index(stop)]
    assert found[0]["ended"] == "stop"
    assert capsys.readouterr().out == "".join(
        f"--- {i} of 2\n{one['prompt']}{one['completion']}\n" for i, one in enumerate(found, 1)
    )


def test_chats_go_on_turn_by_turn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    (mine / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "delta"}]')
    words = ("--max-tokens", "4")
    (one,) = generated(mine, tmp_path, "--chat", str(tmp_path / "chat.json"), *words)
    assert one == generated(mine, tmp_path, "--prompt", "delta = ", *words)[0]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("delta\n\nself\n"))
    (second,) = generated(mine, tmp_path, "--chat", "-", *words)
    assert second["prompt"] == f"delta = {one['completion']} = self = "


def test_a_chat_ends_at_the_token_that_ends_a_turn(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    (mine / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|fim_middle|>\n{% endfor %}")
    trained, words = trained_at(str(mine), [], 1), [str(mine), "--chat", "messages.json"]
    vocabulary = trained.vocabulary()
    of_turn, of_text = vocabulary.token("<|fim_middle|>"), vocabulary.end_of_text
    assert _ends(parse(command_parser(), words), trained, vocabulary) == {of_turn, of_text}
    assert _ends(parse(command_parser(), [*words, "--ignore-end"]), trained, vocabulary) == set()
    assert _ends(parse(command_parser(), [str(mine), "--prompt", "a"]), trained, vocabulary) == {of_text}


def test_text_and_token_files_are_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, corpus: list
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("delta = gamma(self, 2)\nself = delta(é)\n" * 5)
    prefix = corpus[1].partition("=[")[2].rstrip("]")
    words = ["--text", str(text), "--tokens", prefix, "--limit", "150", "--json", str(tmp_path / "s.json")]
    assert main(["eval", str(run), *words]) == 0
    shown = capsys.readouterr().out
    by_text, by_tokens = json.loads((tmp_path / "s.json").read_text())
    vocabulary = Vocabulary(run / "tokenizer.json", 300)
    tokens = len(vocabulary.encode(text.read_text()))
    assert tokens < 150 and by_text["tokens"] == tokens, "end-of-text stands in front"
    assert by_text["bytes"] == len(text.read_text().encode())
    nats = by_text["nats_a_token"] * by_text["tokens"]
    assert by_text["bits_per_byte"] == pytest.approx(nats / math.log(2) / by_text["bytes"])
    assert by_text["perplexity"] == pytest.approx(math.exp(by_text["nats_a_token"]))
    assert by_tokens["tokens"] == 149 and by_tokens["nats_a_token"] < by_text["nats_a_token"]
    assert f"{by_text['bits_per_byte']:.4f} bits per byte, perplexity " in shown and f"{prefix}: " in shown


def test_multiple_choice_is_scored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    quiz = tmp_path / "quiz.jsonl"
    rows = [{"question": "delta =", "choices": ["gamma(self, 2)", "qqqqzzz;;;"], "answer": 0}] * 3
    quiz.write_text("\n".join(json.dumps(row | {"answer": i % 2}) for i, row in enumerate(rows)))
    assert main(["eval", str(run), "--choices", str(quiz), "--json", str(tmp_path / "s.json")]) == 0
    (score,) = json.loads((tmp_path / "s.json").read_text())
    assert score["accuracy"] == score["accuracy_a_byte"] == pytest.approx(2 / 3) and score["questions"] == 3
    assert "accuracy 66.7%, by likelihood a byte 66.7%, by chance 50.0%; 3 questions" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, code, words", [
    ("generate NONE --prompt a", 2, "NONE does not exist: name a run directory, its checkpoints/step-N, or"),
    ("generate EMPTY --prompt a", 2, "EMPTY is neither a run directory, with its config.yaml, nor a checkpoint: name"),
    ("generate HF --prompt a", 2, "HF/config.json"),
    ("generate RUN", 2, "there is nothing to continue: add --prompt TEXT, --file PATH or --chat PATH"),
    ("generate RUN --prompt a --cuda-graphs", 2, "--cuda-graphs needs a GPU and the model computes on the cpu: leave"),
    ("generate RUN --prompt a --chat b", 2, "--chat can't stand beside --prompt or --file: use one of them"),
    ("generate RUN --prompt=", 2, "prompt 1 is empty: give at least one character"),
    ("generate RUN --prompt a --stop-token no", 2, "--stop-token='no' is no token of the tokenizer"),
    ("generate RUN --prompt a --tokenizer NONE", 3, "there is no tokenizer at NONE: name a tokenizer.json with --tok"),
    ("generate RUN --prompt a model.max_seq_len=32 --file LONG", 2, "prompt 2 has 200 tokens and the model's context"),
    ("generate RUN --prompt a parallel.pp=2", 2, "parallel.pp=2 is for training: use parallel.ep, or leave it out"),
    ("generate RUN --prompt a model.dim=128", 2, "is a checkpoint of another model: model.dim=64 there and 128 here"),
    ("generate RUN --prompt a --nproc 3 parallel.ep=3", 2, "parallel.ep=3 does not divide num_experts=4: use 1, 2 or"),
    ("generate RUN --chat - --nproc 2", 2, "--chat - reads stdin, which 2 processes can't share: use one process"),
    ("generate RUN --prompt a --top-p 2", 2, "sampling.top_p=2.0 must be above 0 and at most 1"),
    ("generate RUN --prompt a --json NONE/a", 2, "--json=NONE/a is in NONE, which is not there: make it, or use anot"),
    ("eval RUN --text LONG --json EMPTY", 2, "--json=EMPTY is a directory and must be a file: use --json EMPTY/sco"),
    ("generate RUN --file NONE", 3, "NONE can't be read (No such file or directory): name a text file"),
    ("eval RUN", 2, "nothing to score: add --text PATH, --tokens PREFIX or --choices PATH"),
    ("eval RUN --text NONE", 3, "NONE can't be read (No such file or directory): name a text file"),
    ("eval RUN --choices LONG", 3, "line 1 of LONG is not JSON"),
    ("eval RUN --choices KEYS", 3, "line 1 of KEYS needs the keys question, choices, answer, choices being a list"),
    ("eval RUN --text LONG --seq-len 9999", 2, "--seq-len=9999 exceeds model.max_seq_len=1024: use at most 1024"),
    ("eval RUN --text LONG --batch 0", 2, "--batch=0 must be at least 1: use 1 or more"),
])  # fmt: skip
def test_mistakes_are_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: str, code: int, words: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "HF").mkdir()
    (tmp_path / "HF" / "config.json").write_text("{}")
    (tmp_path / "LONG").write_text("z;" * 100)
    (tmp_path / "KEYS").write_text('{"question": "a", "answer": 0}')
    places = {name: str(tmp_path / name) for name in ("NONE", "EMPTY", "HF", "LONG", "KEYS")} | {"RUN": str(run)}
    for name, place in places.items():
        arguments, words = arguments.replace(name, place), words.replace(name, place)
    assert main(arguments.split()) == code
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_damage_is_said_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """In the last sentence, or in the line that passes it over; a command without a log file prints warnings."""
    copy, text = tmp_path / "copy", tmp_path / "text"
    shutil.copytree(run, copy)
    text.write_text("z;" * 20)
    (newest,) = (copy / "checkpoints").glob("step-*")
    (newest / "index.json").unlink()
    assert main(["eval", str(copy), "--text", str(text)]) == 3
    told = capsys.readouterr().err
    assert told.count("index.json is missing") == 1
    assert told.splitlines()[-1].startswith(f"fp8moe: none of the 1 checkpoints that RUN={copy} may use is whole (")
    assert not [one for one in caplog.records if one.levelname == "WARNING"]
    shutil.copytree(run / "checkpoints" / newest.name, copy / "checkpoints" / "step-1")
    assert main(["eval", str(copy), "--text", str(text)]) == 0
    told = capsys.readouterr().err
    assert told.endswith(
        f"checkpoint {newest}: index.json is missing; it is damaged and passed over\n"
        f"checkpoint {copy}/checkpoints/step-1 is whole and taken in its place\n"
    )
    assert told.count("index.json is missing") == 1


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_only_the_run_is_required(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command]) == 2
    sentence = f"the following arguments are required: RUN; see fp8moe {command} --help"
    assert capsys.readouterr().err == f"fp8moe: {sentence}\n"


def lines_of(settings: list[str], run_dir: str, ranks: int = 2) -> str:
    run = built(configured(settings, f"run_dir={run_dir}", "steps=2", world_size=ranks))
    shown: list[str] = []

    def kept(one: object) -> str:
        before, generator = weights_of(run), torch.get_rng_state()
        shown.append(last_lines(run))
        assert not differing(before, weights_of(run)) and torch.equal(generator, torch.get_rng_state())
        return shown[0]

    before = [layer.dispatcher for layer in run.model.modules() if hasattr(layer, "dispatcher")]
    run_to_end(run, time.perf_counter(), kept)
    assert before == [layer.dispatcher for layer in run.model.modules() if hasattr(layer, "dispatcher")]
    return shown[0]


@pytest.mark.parametrize("settings, completions", [
    (("parallel.ep=2", "precision=fp8", "parallel.max_imbalance=1.5"), 3),
    (("parallel.ep=2", "validation.completions=0", "checkpoint.at_end=false"), None),
])  # fmt: skip
def test_a_run_ends_with_completions_and_the_commands_to_go_on_with(
    corpus: list[str], tmp_path: Path, settings: tuple[str, ...], completions: int | None
) -> None:
    """The same lines on every rank, whatever the run's dispatcher allows."""
    one, other = run_ranks(lines_of, 2, [*corpus, "batch.micro_batch=2", *settings], str(tmp_path))
    assert one == other and one.count(" -> '") + one.count(' -> "') == (completions or 0)
    if completions is None:
        assert one == ""
    else:
        assert f"go on with\n  fp8moe generate {tmp_path} --prompt" in one
        assert f"  fp8moe train resume={tmp_path} steps=4" in one


def test_a_run_with_a_pipeline_ends_with_the_text_of_one_process(corpus: list[str], tmp_path: Path) -> None:
    settings, folders = [*corpus, "batch.micro_batch=2", "precision=fp32"], (tmp_path / "one", tmp_path / "two")
    (alone,) = run_ranks(lines_of, 1, settings, str(folders[0]), 1)
    found = run_ranks(lines_of, 2, [*settings, "parallel.pp=2"], str(folders[1]))
    assert alone.count(" -> '") + alone.count(' -> "') == 3
    assert found == [alone.replace(str(folders[0]), str(folders[1]))] * 2
    first, second = (json.loads((folder / "samples.json").read_text()) for folder in folders)
    assert first == second and [set(one) for one in first["samples"]] == [{"prompt", "text"}] * 3
