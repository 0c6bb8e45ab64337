"""The table of a command's end line by line, and which of the accepted samples become rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fp8moe.post.distill.chosen import Table, choose
from fp8moe.post.distill.collect import Wanted
from fp8moe.post.distill.prompts import Prompt
from fp8moe.post.verify.verdict import NamedVerifier, Verdict

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "seed": 0}
EVEN = NamedVerifier("even", lambda text, row: len(text) % 2 == 0)


def test_every_count_has_its_line() -> None:
    counts = dict(asked=12, samples=8, failed=4, accepted=5, duplicates=1, kept=4, prompts_kept=3, prompt_tokens=1600)
    table = Table(5, tokens=2400, kept_tokens=900, rejected=Counter(answer=2), raised=Counter(code=1, form=0), **counts)
    assert [line.split() for line in table.text().splitlines()] == [
        ["prompts", "5"],
        ["samples", "8", "of", "12"],
        ["no", "answer", "4"],
        ["rejected", "by", "answer", "2", "25.0%"],
        ["verifier", "failed:", "code", "1", "12.5%"],
        ["accepted", "5", "62.5%"],
        ["of", "them", "copies", "1", "12.5%"],
        ["kept", "4", "0.80", "a", "prompt;", "2", "have", "none"],
        ["tokens", "of", "prompts", "1,600"],
        ["tokens", "of", "samples", "2,400"],
        ["of", "those", "kept", "900"],
    ]
    whole = Table(5, asked=8, samples=8).text()
    assert "no answer" not in whole and "of 8" not in whole and "failed" not in whole


def sample(number: int, text: str, tokens: int | None) -> dict[str, Any]:
    verdicts = {"even": {"ok": len(text) % 2 == 0, "reason": "", "raised": False}}
    common = {"prompt_id": "p", "line": 1, "form": "short", "ended": "stop", "prompt_tokens": 4, "provenance": {}}
    return {**common, "sample": number, "text": text, "tokens": tokens, "verdicts": verdicts}


def test_copies_and_rejected_samples_are_no_rows() -> None:
    wanted = Wanted([Prompt("p", 1, {"prompt": "1+1", "answer": 2})], ("short",), 6, "", SAMPLING)
    texts = ["abcd", "abc", "ab", "abcd", "xy"]  # the sixth has no answer
    samples = {("p", "short", i): sample(i, text, len(text)) for i, text in enumerate(texts)}
    assert not EVEN("abc", {}).ok and EVEN("ab", {}) == Verdict(True)

    def chosen(**options: Any) -> list[str]:
        rows, _ = choose(wanted, samples, [EVEN], **options)
        assert all(row["answer"] == 2 and row["messages"][0]["content"] == "1+1" for row in rows)
        return [row["messages"][-1]["content"] for row in rows]

    assert chosen() == ["abcd", "ab", "xy"] and chosen(keep=2) == ["abcd", "ab"]
    assert chosen(keep=2, prefer="shortest") == ["ab", "xy"]
    _, table = choose(wanted, samples, [EVEN], keep=2)
    found = (table.asked, table.samples, table.accepted, table.duplicates, table.kept, table.prompts_kept)
    assert found == (6, 5, 4, 1, 2, 1) and table.rejected == Counter(even=1) and not table.raised
    assert (table.prompt_tokens, table.tokens, table.kept_tokens) == (20, 15, 6)
