"""Which accepted samples become training rows, and the table of a command's end.

Of the samples of a prompt and form exact copies are left out; then the first `keep` of those accepted are taken, in the
order of their numbers, or the shortest first, which is how the report's final data stay concise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fp8moe.post.distill.collect import Sample, Wanted, known_verdicts
from fp8moe.post.distill.store import Key
from fp8moe.post.distill.teacher import Form
from fp8moe.post.verify.verdict import NamedVerifier

Prefer = Literal["first", "shortest"]


@dataclass
class Table:
    """Counts of a command. asked: samples wanted. rejected, raised: by verifier. tokens: of answers, where counted."""

    prompts: int = 0
    asked: int = 0
    samples: int = 0
    failed: int = 0
    accepted: int = 0
    duplicates: int = 0
    kept: int = 0
    prompts_kept: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """As lines: counts, and shares of the samples."""
        lines: list[tuple[str, int, str]] = [
            ("prompts", self.prompts, ""),
            ("samples", self.samples, f"of {self.asked:,}" if self.samples < self.asked else ""),
        ]
        lines += [("  no answer", self.failed, "")] if self.failed else []
        lines += [(f"  rejected by {name}", count, self._share(count)) for name, count in self.rejected.items()]
        lines += [(f"  verifier failed: {name}", n, self._share(n)) for name, n in self.raised.items() if n]
        a_prompt = f"{self.kept / max(self.prompts, 1):.2f} a prompt; {self.prompts - self.prompts_kept:,} have none"
        lines += [
            ("  accepted", self.accepted, self._share(self.accepted)),
            ("  of them copies", self.duplicates, self._share(self.duplicates)),
            ("  kept", self.kept, a_prompt),
            ("tokens of prompts", self.prompt_tokens, ""),
            ("tokens of samples", self.tokens, ""),
            ("  of those kept", self.kept_tokens, ""),
        ]
        width = max(len(name) for name, *_ in lines)
        return "\n".join(f"{name:{width}} {count:>12,}  {more}".rstrip() for name, count, more in lines)

    def _share(self, count: int) -> str:
        return f"{count / max(self.samples, 1):.1%}"


def choose(
    wanted: Wanted,
    samples: Mapping[Key, Sample],
    verifiers: Sequence[NamedVerifier],
    *,
    keep: int | None = None,
    prefer: Prefer = "first",
) -> tuple[list[dict[str, Any]], Table]:
    """The training rows, in the order of the prompts, and the table of what was asked for. keep: of a prompt and
    form."""
    table = Table(len(wanted.prompts), rejected=Counter({verifier.name: 0 for verifier in verifiers}))
    groups: dict[tuple[str, Form], list[Sample]] = {}
    messages = {(one.prompt, one.form): one.messages for one in wanted.requests}
    for request in wanted.requests:
        table.asked += 1
        sample = samples.get(request.key)
        if sample is not None and _is_accepted(sample, verifiers, table):
            groups.setdefault((request.prompt, request.form), []).append(sample)
    answers = {prompt.id: prompt.row.get("answer") for prompt in wanted.prompts}
    rows = []
    for (prompt, form), accepted in groups.items():
        first: dict[str, Sample] = {}
        for sample in accepted:
            first.setdefault(sample["text"], sample)
        distinct = list(first.values())
        table.accepted += len(accepted)
        table.duplicates += len(accepted) - len(distinct)
        if prefer == "shortest":
            distinct.sort(key=_length)
        for sample in distinct[:keep]:
            table.kept += 1
            table.kept_tokens += sample["tokens"] or 0
            rows.append(_row(sample, messages[prompt, form], answers[prompt]))
    table.prompts_kept = len({prompt for prompt, _ in groups})
    return rows, table


def _is_accepted(sample: Sample, verifiers: Sequence[NamedVerifier], table: Table) -> bool:
    """Whether all verifiers accept a sample; it is counted."""
    table.samples += 1
    table.prompt_tokens += sample["prompt_tokens"] or 0
    table.tokens += sample["tokens"] or 0
    known = known_verdicts(sample)
    for verifier in verifiers:
        verdict = known[verifier.name]
        if not verdict.ok:
            (table.raised if verdict.raised else table.rejected)[verifier.name] += 1
            return False
    return True


def _length(sample: Sample) -> tuple[int, int]:
    """Tokens where the teacher counted them, then characters."""
    return sample["tokens"] or 0, len(sample["text"])


def _row(sample: Sample, messages: Sequence[Mapping[str, str]], answer: object) -> dict[str, Any]:
    """A training row: the chat, then where it comes from."""
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": sample["text"]}]}
    row |= {} if answer is None else {"answer": answer}
    kept = ("prompt_id", "line", "form", "sample", "ended", "prompt_tokens", "tokens", "provenance", "verdicts")
    return row | {key: sample[key] for key in kept}
