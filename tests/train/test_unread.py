"""Settings that no part of a run would read are refused in one sentence, before a process starts; defaults never."""

from __future__ import annotations

import pytest

from fp8moe.errors import ConfigError
from tests.train.runs import configured

PROBLEMS = ("data=problems", "data.cache_dir=null", "data.validation_share=0.1")
FILES = ("data.paths=[a.jsonl,b.jsonl]",)
OF_GRPO = [  # settings, and what the refusal says
    (
        ("batch.ramp_from=4", "batch.ramp_samples=64"),
        "batch.ramp_from=4 makes a batch grow and fp8moe grpo takes the 8 samples of an update at every step: use "
        "batch.ramp_from=null",
    ),
    (("epochs=2",), "epochs=2 are passes over data and .*: use epochs=null with steps=6, or grpo.epochs for passes"),
    ((*FILES, "data.weights=[1,2]"), r"data.weights has 2 entries and .* are drawn alike: use data.weights=\[\]"),
    (("data.fim_rate=0.1",), "data.fim_rate=0.1 is not read with data.source=problems, .*: use data.fim_rate=0"),
    (("data.packing=documents",), "data.packing=documents is not read .*: use data.packing=stream"),
    (
        ("data.long_conversations=drop",),
        "data.long_conversations=drop is not read with data.source=problems, .*: use data.long_conversations=truncate",
    ),
    (
        ("optimizer.schedule.mtp_weight_until=0.5",),
        "mtp_weight_until=0.5 changes .* grpo.mtp_weight=0 throughout: use optimizer.schedule.mtp_weight_until=null",
    ),
    (("validation.completions=8",), "validation.completions=8 continues .*: use validation.completions=3, the default"),
    (
        ("data.validation_paths=[held.jsonl]",),
        r"data.validation_paths has 1 entries and data.paths is empty, .* use data.validation_paths=\[\]",
    ),
]
OF_OTHERS = [
    (
        ("grpo.samples=4",),
        "grpo.samples=4 is of fp8moe grpo, which learns from problems, and data.source is indexed: leave grpo.samples "
        "out, or use fp8moe grpo",
    ),
    (("grpo.rewards=[accuracy]",), r"grpo.rewards=\[accuracy\] is of fp8moe grpo"),
    (("data.chat_template=chatml",), "data.chat_template=chatml is not read with data.source=indexed, .* use .*=null"),
    (("data.long_conversations=drop",), "data.long_conversations=drop is not read with data.source=indexed"),
]


@pytest.mark.parametrize(("settings", "says"), OF_GRPO)
def test_what_grpo_does_not_read(settings: tuple[str, ...], says: str) -> None:
    sizes = ("grpo.prompts=2", "grpo.samples=4")
    with pytest.raises(ConfigError, match=says):
        configured([], *PROBLEMS, *sizes, *settings)


@pytest.mark.parametrize(("settings", "says"), OF_OTHERS)
def test_what_other_commands_do_not_read(settings: tuple[str, ...], says: str, corpus: list[str]) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(corpus, *settings)


def test_what_is_read_and_defaults_are_taken(corpus: list[str]) -> None:
    assert configured(corpus, "grpo.samples=16", "data.chat_template=null", "validation.completions=8")
    sizes = ("grpo.prompts=2", "grpo.samples=4")
    assert configured([], *PROBLEMS, *sizes, "validation.completions=0", "grpo.digits=3", "data.weights=[]")
    chat = ("data=chat", "data.paths=[chat.jsonl]", "data.long_conversations=drop", "data.chat_template=chatml")
    assert configured([], *chat)
