"""The documentation is true: every command in it is one that the program takes, links lead somewhere, the site builds.

Commands are parsed by the program's parsers, settings composed as `fp8moe train` composes them and, in a block of code,
resolved for the number of processes. The pages of END_TO_END are executed from first to last, in one folder,
by forks of this process: a training line on one process, with SMALL sizes for what it does not say.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest

from fp8moe.__main__ import COMMANDS
from fp8moe.cli.command import parse
from fp8moe.errors import ConfigError
from tests.docs.pages import ROOT, Typed, anchors, commands, links, pages

# In this order: a page goes on from the files of those before it.
END_TO_END = ("first_run", "own_text", "hugging_face", "eight_gpus", "spikes")
# Lines that are executed wherever they stand in a block: they need no run. A search takes minutes: the plan is made.
ANYWHERE = ("schedule", "plan")
# Not executed: they need a GPU, a cluster, minutes, or a fault made by hand.
LEFT_OUT = (
    "warmup",
    "numerics",
    "torchrun",
    "dsv2_lite_8gpu",
    "--search",
    "--model",
    "runs/hang",
    "parallel.timeout=8",
)
FAILS = {"optimizer.schedule.peak=10.0": 5}  # a page shows what failure looks like

TYPED = [one for page in pages() for one in commands(page)]
VOCABULARY = "model.vocab_size=512"
# FP8 needs widths of 128 somewhere, which the tiny model's latents have.
SMALL = (
    *("model.num_layers=2", "model.experts.num_experts=4", "model.router.topk=2", "model.router.num_groups=2"),
    *("model.router.top_groups=2", "seq_len=32", "batch.sequences=2", "batch.micro_batch=2", "device=cpu"),
    *("validation.samples=2", "validation.completions=0", "checkpoint.background=false"),
)
DATA = ("data=indexed", "data.paths=[tokens/corpus]", VOCABULARY, "data.validation_share=0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: the repository's README and some text of his own."""
    made = tmp_path_factory.mktemp("reader")
    (made / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    text = (f"Line {i} of a corpus: cat {i} sat on mat {i * 7 % 13} and saw bird {i * 3 % 11}." for i in range(400))
    (made / "mine.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n" for line in text))
    (made / "mine.yaml").write_text("defaults:\n  - override /model: tiny\nsteps: 4\n")
    for name in ("tokens", "runs", "models", "out"):
        (made / name).mkdir()
    check(("tokenize", "--input", "mine.jsonl", "--vocab-size", "512", "--output", "tokens/corpus"), made, "the corpus")
    return made


@pytest.mark.parametrize("typed", TYPED, ids=str)
def test_every_command_is_one_that_the_program_takes(typed: Typed, folder: Path) -> None:
    command, *words = typed.words
    if command == "COMMAND" or command.startswith("-"):
        return
    assert command in COMMANDS, f"{typed}: no such command"
    arguments = parsed(typed, command, words)
    if arguments is None or not getattr(arguments, "settings", []) or command in ANYWHERE:
        return
    from fp8moe.cli.compose import compose
    from fp8moe.train.config import resolve

    settings = [word for word in arguments.settings if not word.startswith("resume=")]
    if command == "sft" and len(settings) == len(arguments.settings):
        settings = ["data=chat", *settings]  # of the experiment that it begins with, whose model is that of init_from
    with chdir(folder):
        config = compose(settings).config
    is_whole = typed.block and not typed.open and not any(word.startswith(("--from", "resume=runs")) for word in words)
    if command == "train" and is_whole:
        resolve(config, typed.processes)


def parsed(typed: Typed, command: str, words: list[str]):
    """The arguments by the command's own parser; None for a piece of a command in a sentence."""
    module, _, function = COMMANDS[command][0].partition(":")
    parser = getattr(importlib.import_module(module), f"{function}_parser" if function else "command_parser")()
    if "--help" in words:
        return None
    try:
        return parse(parser, words)
    except ConfigError as error:
        piece = not typed.block or typed.open
        if piece and re.search(r"expected one argument|arguments are required", str(error)):
            return None
        raise AssertionError(f"{typed}: {error}") from None


@pytest.mark.slow
def test_the_pages_run_from_end_to_end(folder: Path) -> None:
    """What a reader types, in the order of the pages, ends as the page says."""
    for module in ("cli.train", "cli.evaluate", "generate.session", "interop.export_hf", "train.loop"):
        importlib.import_module(f"fp8moe.{module}")  # once, before the forks

    (folder / "models" / "released").mkdir(exist_ok=True)
    seen: set[tuple[str, ...]] = set()
    for name in END_TO_END:
        of_page = [one for one in TYPED if one.page == f"docs/{name}.md" and one.block]
        assert of_page, f"docs/{name}.md has no command"
        if name == "hugging_face":  # the page says: any export is a released model
            (folder / "models" / "released").rmdir()
            check(("export", "runs/mine", "models/released", "--precision", "bf16"), folder, "the released model")
        for one in of_page:
            if not left_out(one) and one.words not in seen:
                seen.add(one.words)
                check(small(one), folder, str(one))
    assert (folder / "out" / "tuned" / "config.json").is_file()


@pytest.mark.parametrize("command", ANYWHERE)
def test_commands_that_need_no_run_are_executed(command: str, folder: Path) -> None:
    of_command = [
        one
        for one in TYPED
        if one.words[0] == command and one.block and not any(w.startswith(("--model", "init_from=")) for w in one.words)
    ]
    assert of_command
    for words, one in {tuple(w for w in one.words if w != "--search"): one for one in of_command}.items():
        check(words, folder, str(one), allowed=(0, 4) if command == "plan" else (0,))


def left_out(typed: Typed) -> bool:
    return any(word in " ".join(typed.words) for word in LEFT_OUT) or typed.open


def small(typed: Typed) -> tuple[str, ...]:
    """A training line on one process, with small sizes for what it neither says nor takes from another run."""
    command, *words = typed.words
    if command != "train" or "--cfg" in words:
        return typed.words
    if "--nproc" in words:
        at = words.index("--nproc")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("parallel.ep=")]
    keys = {word.partition("=")[0] for word in words}
    if "--from" in words or any(word.startswith("resume=runs") for word in words):
        return (command, *words)
    data = [word for word in DATA if not {"data", "data.paths"} & keys or word == VOCABULARY]
    extra = [word for word in (*SMALL, *data) if word.partition("=")[0] not in keys]
    return (command, *words, *[word for word in extra if not word.startswith("model.vocab") or word == VOCABULARY])


def check(words: tuple[str, ...], folder: Path, said: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Run `fp8moe WORDS` in `folder`, in a fork of this process, and hold its exit code to what the page promises."""
    expected = next(((code,) for word, code in FAILS.items() if word in words), allowed)
    output = folder / "output"
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.chdir(folder)
            target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1), os.dup2(target, 2)
            from fp8moe.__main__ import main

            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = main(list(words))
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise AssertionError(f"{said} took more than 120 s")
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(ended[1])
    text = output.read_text(errors="replace")[-2000:]
    assert code in expected, f"{said}\nrun as fp8moe {' '.join(words)}\nended with {code}, not {expected}:\n{text}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """As they are read where the repository is browsed; the site's own are held by its builder."""
    for line, target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT) and found.exists(), f"{page.name}:{line}: {target} does not exist"
        if anchor:
            assert anchor in anchors(found), f"{page.name}:{line}: {found.name} has no heading {anchor}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """By the recipe of `make docs`, into another folder."""
    recipe = re.search(r"\$\(RUN\) (-m sphinx .*)", (ROOT / "Makefile").read_text())
    assert recipe is not None and " -W " in recipe[1]
    words = recipe[1].replace("$(ARGS)", "").replace("build/docs", str(tmp_path / "site")).split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    assert "docs/index.html" in (site / "index.html").read_text()
    assert "fp8moe.kernels.gemm.gemm" in (site / "docs" / "api" / "kernels.html").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file()


def test_docstrings_are_plain_text_on_the_site() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        to_rst = importlib.import_module("docstrings").to_rst
    finally:
        sys.path.remove(str(ROOT / "docs"))
    lines = ["x_TD [T, D] -> `rms_norm` of *x*, |x|:", "", "    a = b", "", "- one `y`", "  more", "- two"]
    assert to_rst(lines) == [
        *(r"x\_TD [T, D] -\> ``rms_norm`` of \*x\*, \|x\|\:", "", "::", "", "       a = b", ""),
        *("", "- one ``y``", "  more", "- two", ""),
    ]
