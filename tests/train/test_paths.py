"""The paths that README and the architecture page describe are the ones that run: every function named is entered."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from fp8moe.train import step
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

ROOT = Path(__file__).resolve().parent.parent.parent
SECTIONS = {"README.md": "### Follow one token", "docs/architecture.md": "## Paths"}
NAMED = re.compile(r"`((?:[a-z0-9_]+/)+[a-z0-9_]+)\.([A-Za-z_][\w.]*)`")
NOT_FUNCTIONS = {"parallel/links.Links", "model/phases.MoePass"}  # classes, named as places


def section(page: str) -> str:
    """The page's section on paths."""
    heading = SECTIONS[page]
    text = (ROOT / page).read_text()
    rest = text[text.index(heading) + len(heading) :]
    end = re.search(rf"^#{{1,{heading.index(' ')}}} ", rest, re.MULTILINE)
    return rest[: end.start() if end else None]


def named_functions(text: str) -> set[tuple[str, str]]:
    """(file without ending, qualified name) of everything that `text` names as folder/module.name."""
    return {(module, name) for module, name in NAMED.findall(text) if f"{module}.{name}" not in NOT_FUNCTIONS}


def entered(settings: list[str]) -> set[tuple[str, str]]:
    """What one training step of this rank enters, on all its threads, as (file without ending, qualified name)."""
    run = built(configured(settings, world_size=2))
    codes: set[CodeType] = set()
    step._schedule.cache_clear()  # another test of this process may have asked for the same

    def enter(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    threading.setprofile(enter)  # the communication thread starts with the first message
    sys.setprofile(enter)
    try:
        train_step(run)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found = set()
    for code in codes:
        path = Path(code.co_filename)
        if path.is_file() and path.resolve().is_relative_to(ROOT):
            module = str(path.resolve().relative_to(ROOT).with_suffix("")).removeprefix("fp8moe/")
            found.add((module, code.co_qualname))
    return found


@pytest.fixture(scope="module")
def functions_of_a_step(corpus: list[str]) -> set[tuple[str, str]]:
    settings = [*corpus, "precision=fp8", "parallel.ep=2", "model.mtp_depth=1"]
    return set.union(*run_ranks(entered, 2, settings))


def not_entered(text: str, functions: set[tuple[str, str]]) -> list[str]:
    return sorted(f"{module}.{name}" for module, name in named_functions(text) - functions)


@pytest.mark.parametrize("page", SECTIONS)
def test_what_a_page_names_is_what_runs(page: str, functions_of_a_step: set[tuple[str, str]]) -> None:
    text = section(page)
    assert len(named_functions(text)) >= 12, f"{page} names too few functions to be a path"
    assert not_entered(text, functions_of_a_step) == [], f"{page} names what a training step does not enter"


def test_a_renamed_function_is_noticed(functions_of_a_step: set[tuple[str, str]]) -> None:
    text = "`train/step.train_step` calls `train/step.train_the_passes`, then `layers/old.Layer.forward`."
    assert not_entered(text, functions_of_a_step) == ["layers/old.Layer.forward", "train/step.train_the_passes"]
