"""The two forms of a sample (DeepSeek-V3 report, section 5.1): <problem, original response> and <system prompt,
problem, R1 response>.

Short: the problem and an answer without its reasoning. The answer is the line's own `response` where it has one, which
is the report's original response; else the teacher is asked without a system prompt. Long: a system prompt that asks
for reflection and verification, the problem, and the teacher's reasoning and answer; the teacher is given the same
prompt.

Reasoning stands in `<think>` tags, as R1 writes it, whether a server gives it apart or within its text.
"""

from __future__ import annotations

from fp8moe.post.distill.teacher import Form, Messages, Reply

SYSTEM_PROMPT = (
    "Work on the problem step by step before you answer. Say what is asked and what is given. At each step ask "
    "whether it follows, and check results in a second way: put them back into the problem, try a small case, "
    "estimate their size. Where something does not fit, say so, go back to the last step that is certain, and take "
    "another way. Give the answer only when it has passed such a check, and state it plainly at the end."
)
FORMS: dict[str, tuple[Form, ...]] = {"short": ("short",), "long": ("long",), "both": ("short", "long")}
_OPEN, _CLOSE = "<think>", "</think>"


def messages_of(prompt: str, form: Form, system_prompt: str) -> Messages:
    """What a teacher is asked, and what a row begins with."""
    question = {"role": "user", "content": prompt}
    return (question,) if form == "short" else ({"role": "system", "content": system_prompt}, question)


def split_reasoning(text: str) -> tuple[str, str]:
    """Reasoning and answer of a text. A chat template may have written the opening tag, so it may be missing; without a
    closing one a text that opens it is all reasoning."""
    before, closed, after = text.partition(_CLOSE)
    if closed:
        return before.strip().removeprefix(_OPEN).strip(), after.strip()
    if text.lstrip().startswith(_OPEN):
        return text.strip().removeprefix(_OPEN).strip(), ""
    return "", text


def response_of(reply: Reply, form: Form) -> str:
    """The assistant's message: the answer, in the long form behind its reasoning; "" where there is no answer."""
    inline, answer = split_reasoning(reply.text)
    reasoning = reply.reasoning.strip() or inline
    if form == "short" or not reasoning or not answer:
        return answer
    return f"{_OPEN}\n{reasoning}\n{_CLOSE}\n\n{answer}"
