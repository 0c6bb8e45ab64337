"""A run of this framework as the teacher: the samples are those of `generate`, whatever the batch and the ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fp8moe.__main__ import main
from fp8moe.generate.decode import GenerationConfig, generate
from fp8moe.generate.sampling import SamplingConfig
from tests.generate.small import PROMPTS, VOCABULARY, alone, small_model
from tests.post.distill.test_command import count, lines, untimed

TEMPLATE = "{% for m in messages %}{{ m.content }} = {% endfor %}"
TEXTS = ["alpha = ", "delta = ", "import", "self"]


def distilled(run: Path, folder: Path, name: str, *options: str) -> int:
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in TEXTS))
    words = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / f"{name}.jsonl"), "--max-tokens", "8"]
    return main(["distill", "generate", str(run), *words, "--temperature", "1.0", "--workers", "1", *options])


def samples(folder: Path, name: str) -> list[dict[str, Any]]:
    return lines(folder / f"{name}.samples.jsonl")[1:]


def texts(folder: Path, name: str) -> dict[tuple[int, int], str]:
    return {(one["line"], one["sample"]): one["text"] for one in samples(folder, name)}


def test_a_draw_decides_what_is_drawn() -> None:
    """Of the same prompt in another batch, at another place; without numbers their places are these."""
    model, mesh = small_model(), alone()
    config = GenerationConfig(6, batch=2, sampling=SamplingConfig(1.0))

    def drawn(prompts: list[list[int]], draws: list[int] | None) -> list[list[int]]:
        found, _ = generate(model, prompts, config, mesh, num_ids=VOCABULARY, accept=lambda *_: False, draws=draws)
        return [one.ids for one in found]

    plain = drawn(PROMPTS, None)
    assert plain == drawn(PROMPTS, [0, 1, 2, 3, 4])
    assert drawn([PROMPTS[4], PROMPTS[1], PROMPTS[1]], [4, 1, 7])[:2] == [plain[4], plain[1]]
    several = drawn([PROMPTS[1]] * 4, [1, 7, 8, 2**31 - 1])
    assert several[0] == plain[1] and len({tuple(one) for one in several}) > 2


def test_rows_of_a_run_and_their_provenance(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distilled(run, tmp_path, "out", "--plain", "--samples", "3", "precision=fp32") in (0, 3)
    found = samples(tmp_path, "out")
    assert [(one["line"], one["sample"]) for one in found] == [(i, k) for i in range(1, 5) for k in range(3)]
    assert len({one["text"] for one in found}) > 6
    for one in found:
        made = one["provenance"]
        assert (made["teacher"], made["model"], made["step"], made["temperature"]) == ("fp8moe", str(run), 4, 1.0)
        assert one["tokens"] <= 8 and one["prompt_tokens"] > 0 and one["ended"] in ("stop", "max_tokens")
        assert one["verdicts"]["ended"]["ok"] == (one["ended"] == "stop" and bool(one["text"].strip()))
    assert distilled(run, tmp_path, "small", "--plain", "--samples", "3", "--batch", "1", "precision=fp32") in (0, 3)
    assert texts(tmp_path, "small") == texts(tmp_path, "out")
    assert distilled(run, tmp_path, "other", "--plain", "--seed", "1", "precision=fp32") in (0, 3)
    assert texts(tmp_path, "other") != {key: text for key, text in texts(tmp_path, "out").items() if key[1] == 0}


def test_more_samples_later_and_after_a_cut(run: Path, tmp_path: Path) -> None:
    """Half the file gone, as a kill leaves it: the same rows come again."""
    words = ("--plain", "--samples", "2", "precision=fp32", "--stop", "a")
    distilled(run, tmp_path, "out", *words)
    stored = tmp_path / "out.samples.jsonl"
    whole, chats = stored.read_text(), (tmp_path / "out.jsonl").read_text()
    stored.write_text(whole[: len(whole) // 2])
    distilled(run, tmp_path, "out", *words)
    assert untimed(lines(stored)) == untimed([json.loads(line) for line in whole.splitlines()])
    assert untimed(lines(tmp_path / "out.jsonl")) == untimed([json.loads(line) for line in chats.splitlines()])
    assert len(chats.splitlines()) > 0, "a stop text ended some"
    distilled(run, tmp_path, "out", "--plain", "--samples", "3", "precision=fp32", "--stop", "a")
    assert len(samples(tmp_path, "out")) == 12 and len(texts(tmp_path, "out")) == 12


def test_a_chat_template_and_stop_tokens(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    assert distilled(mine, tmp_path, "none") == 2
    assert "has no chat template" in capsys.readouterr().err
    (mine / "chat_template.jinja").write_text(TEMPLATE)
    distilled(mine, tmp_path, "chat", "--temperature", "0")
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": TEXTS[0]}]))
    words = ["--chat", str(tmp_path / "chat.json"), "--max-tokens", "8", "--json", str(tmp_path / "out.json")]
    assert main(["generate", str(mine), *words]) == 0
    (one,) = json.loads((tmp_path / "out.json").read_text())["completions"]
    assert samples(tmp_path, "chat")[0]["text"] == one["completion"]
    assert distilled(mine, tmp_path, "stop", "--stop-token", "<nothing>") == 2


def test_a_prompt_beyond_the_context_is_named_and_the_rest_goes_on(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "alpha " * 3000}, {"prompt": "x"}]
    (tmp_path / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["--prompts", str(tmp_path / "long.jsonl"), "--output", str(tmp_path / "long_out.jsonl"), "--plain"]
    main(["distill", "generate", str(run), *words, "--max-tokens", "4", "--stop", "a"])
    shown = capfd.readouterr()
    assert len(samples(tmp_path, "long_out")) == 1
    assert count(shown.out, "no answer") == 1


def test_two_ranks_give_the_samples_of_one(run: Path, tmp_path: Path) -> None:
    words = ("--plain", "--samples", "2", "precision=fp32")
    distilled(run, tmp_path, "one", *words)
    distilled(run, tmp_path, "two", *words, "--nproc", "2", "parallel.ep=2")
    assert texts(tmp_path, "two") == texts(tmp_path, "one")
