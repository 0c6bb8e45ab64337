"""A verifier is a function of a text and its row that gives a Verdict; `judge` asks several in turn.

The row is what the prompt's line held (`answer`, `tests`), and what is known of the sample: `tokens`, `ended`. A
verifier that raises, or gives no verdict, is no reason to lose a night's samples: its sample is excluded and counted
apart. Verifiers are asked in their order and the first that rejects is the last that is asked, so cheap ones come first
and every rejected sample counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """ok: accepted. reason: why not, one short sentence. raised: the verifier failed, which says nothing of the
    text."""

    ok: bool
    reason: str = ""
    raised: bool = False


Verifier = Callable[[str, Mapping[str, Any]], Verdict]


@dataclass(frozen=True)
class NamedVerifier:
    """A verifier, the words that asked for it (`length:max_tokens=512`), and keys that a prompt's line must have."""

    name: str
    verify: Verifier
    needs: tuple[str, ...] = ()

    def __call__(self, text: str, row: Mapping[str, Any]) -> Verdict:
        """The verdict on a text; an exception becomes one with `raised`. A plain bool is a verdict too."""
        try:
            verdict: Any = self.verify(text, row)
        except Exception as error:
            return Verdict(False, f"{type(error).__name__}: {error}"[:300], raised=True)
        if isinstance(verdict, bool):
            return Verdict(verdict)
        if not isinstance(verdict, Verdict):
            return Verdict(False, f"it returned {type(verdict).__name__} and no Verdict", raised=True)
        return verdict


def judge(
    text: str, row: Mapping[str, Any], verifiers: Sequence[NamedVerifier], known: Mapping[str, Verdict] | None = None
) -> dict[str, Verdict]:
    """Verdicts by name, up to and with the first that rejects; those in `known` are not asked for again."""
    verdicts: dict[str, Verdict] = {}
    for verifier in verifiers:
        found = (known or {}).get(verifier.name)
        verdicts[verifier.name] = verifier(text, row) if found is None or found.raised else found
        if not verdicts[verifier.name].ok:
            break
    return verdicts
