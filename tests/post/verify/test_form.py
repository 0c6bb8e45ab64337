"""Verifiers of form, the registry of names, and what becomes of a verifier that fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fp8moe.errors import ConfigError
from fp8moe.post.verify.registry import verifier
from fp8moe.post.verify.verdict import NamedVerifier, Verdict, judge

CHINESE = "我们先把两个数加起来，然后检查结果。"


def ok(spec: str, text: str, **row: Any) -> bool:
    return verifier(spec)(text, row).ok


def test_ended() -> None:
    assert ok("ended", "x", ended="stop") and ok("ended", "x")
    assert not ok("ended", "x", ended="max_tokens") and not ok("ended", " \n", ended="stop")


def test_length() -> None:
    assert ok("length:max_chars=3", "abc") and not ok("length:max_chars=3", "abcd")
    assert ok("length:min_chars=3", "abc") and not ok("length:min_chars=3", "ab")
    assert ok("length:max_tokens=5,min_tokens=2", "abc", tokens=5)
    assert not ok("length:max_tokens=5", "abc", tokens=6) and not ok("length:min_tokens=2", "abc", tokens=1)
    unknown = verifier("length:max_tokens=5")("abc", {"tokens": None})
    assert unknown.raised and not unknown.ok and "counted no tokens" in unknown.reason


def test_language() -> None:
    english = {"prompt": "What is 2 + 2?"}
    assert ok("language", "It is four.", **english) and ok("language", "2 + 2 = 4", **english)
    assert not ok("language", CHINESE, **english) and ok("language", CHINESE, prompt="二加二是多少？")
    assert not ok("language", "First we add, 然后检查结果看看对不对.", **english)
    assert ok("language", "Let $\\alpha = \\beta$ and\n```\nя = 1\n```\nso it is.", **english)
    assert ok("language:script=cyrillic", "Сначала сложим числа.", **english)
    assert not ok("language:script=latin", "Сначала сложим числа.")
    assert ok("language:share=0.5", "First we add 然后.", **english)
    japanese = {"prompt": "これは何ですか"}
    assert ok("language", "日本語の文章です", **japanese) and not ok("language", "This is text", **japanese)
    assert ok("language", "답은 넷입니다", prompt="이 더하기 이는?")
    assert ok("language", "42", prompt="6 * 7 = ?")


def test_repetition() -> None:
    assert ok("repetition", "one two three four five six seven eight nine ten " * 4)
    assert not ok("repetition", "one two three four five six seven eight nine ten " * 5)
    assert not ok("repetition", "ha " * 20) and not ok("repetition", "a" * 400) and not ok("repetition", CHINESE * 6)
    assert ok("repetition", "") and ok("repetition:n=2,times=9", "a b " * 9) and not ok("repetition:n=2", "a b " * 9)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("answr", "is none of answer, code"),
        ("length:max_tokens", "is no option: write options as name=value"),
        ("length:most=5", "most is no option of it: use min_tokens, max_tokens, min_chars, max_chars"),
        ("answer:strict=1", "use none, it has no options"),
        ("length:max_chars=many", "must be a number: use max_chars=100"),
        ("length:max_chars=2.5", "must be a whole number: use 2"),
        ("language:script=elvish", "script=elvish is not known: use prompt, latin"),
        ("language:share=nan", "share=nan must be above 0"),
        ("repetition:n=0", "must be at least 1"),
        ("code:seconds=0", "code.seconds=0.0 must be above 0"),
    ],
)
def test_a_name_that_can_not_be_is_one_sentence(spec: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        verifier(spec)
    assert f"--verify {spec}: " in str(raised.value) or "is none of" in str(raised.value)
    assert said in str(raised.value) and "\n" not in str(raised.value)


OWN = """
from fp8moe.post.verify.verdict import Verdict
def even(text, row, off=0):
    return Verdict((int(text) + off) % 2 == 0, "odd")
def plain(text, row):
    return text == "4"
def nothing(text, row):
    pass
"""


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_verifiers_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    module = "my_verifiers_of_a_test"
    assert ok(f"{module}:even", "4") and not ok(f"{module}:even", "3") and ok(f"{module}:even:off=1", "3")
    assert ok(f"{module}:plain", "4") and not ok(f"{module}:plain", "5")
    assert verifier(f"{module}:nothing")("4", {}) == Verdict(False, "returned NoneType and no Verdict", raised=True)
    failed = verifier(f"{module}:even")("four", {})
    assert failed.raised and failed.reason.startswith("raised ValueError: invalid literal")


def test_the_first_that_rejects_is_the_last_asked() -> None:
    asked: list[str] = []

    def named(name: str, verdict: Verdict) -> NamedVerifier:
        def verify(text: str, row: Mapping[str, Any]) -> Verdict:
            asked.append(name)
            return verdict

        return NamedVerifier(name, verify)

    yes, no, last = named("yes", Verdict(True)), named("no", Verdict(False, "x")), named("last", Verdict(True))
    assert judge("", {}, [yes, no, last]) == {"yes": Verdict(True), "no": Verdict(False, "x")}
    assert asked == ["yes", "no"]
    known = {"yes": Verdict(True), "no": Verdict(True), "last": Verdict(False, raised=True)}
    assert judge("", {}, [yes, no, last], known)["last"].ok
    assert asked == ["yes", "no", "last"], "only one that raised is asked again"
