"""The last lines of a training run: completions of held-out text by the model as it is, and the commands to go on with.

The beginnings of the first validation samples are continued, on all ranks that train: a few tokens within a few
seconds; of conversations their first answer. They are drawn, by the run's seed, since a young model's likeliest text
soon repeats itself. `groups` draws them, as it can do so in a pipeline: the text is the same on every layout.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fp8moe.data.durable import write_text
from fp8moe.generate.groups import GroupSampling, sample_groups
from fp8moe.generate.open import exact_dispatcher
from fp8moe.generate.stages import stages_of
from fp8moe.generate.text import Vocabulary
from fp8moe.layers.moe import MoE
from fp8moe.train.json_lines import SAMPLES
from fp8moe.train.run import Run

PROMPT_TOKENS, NEW_TOKENS, SECONDS = 16, 24, 20.0
TEMPERATURE, TOP_P = 0.7, 0.9


def last_lines(run: Run, command: str = "train") -> str:
    """Completions and commands, as text. Collective over all ranks."""
    return "\n".join(filter(None, ["\n".join(_completions(run)), commands(run, command)]))


def _completions(run: Run) -> list[str]:
    count, tokenizer = run.config.validation.completions, run.data.tokenizer
    if not count or tokenizer is None:
        return []
    if run.zero is not None:
        run.zero.wait_weights()
    vocabulary = Vocabulary(tokenizer.path, run.config.model.vocab_size)
    prompts = [_prompt(run, sample) for sample in range(count)]
    names = [f"{run.config.seed}/end of the run/{number}" for number in range(count)]
    sampling = GroupSampling(
        1, NEW_TOKENS, TEMPERATURE, count, vocabulary.num_ids, vocabulary.ends, top_p=TOP_P, seconds=SECONDS
    )
    with exact_dispatch(run):
        groups = sample_groups(run.model, prompts, names, sampling, run.mesh, stages_of(run))
    shown = [
        (vocabulary.decode(prompt), vocabulary.decode(one.ids)) for prompt, (one,) in zip(prompts, groups, strict=True)
    ]
    if run.is_first:
        texts = [{"prompt": prompt, "text": text} for prompt, text in shown]
        sampled = {"step": run.step, "temperature": TEMPERATURE, "top_p": TOP_P, "samples": texts}
        with suppress(OSError):
            write_text(run.run_dir / SAMPLES, json.dumps(sampled, indent=1) + "\n")
    lines = ["", f"held-out text -> what the model goes on with, temperature {TEMPERATURE}, top-p {TOP_P}"]
    return [*lines, *(f"  {prompt!r} -> {text!r}" for prompt, text in shown)]


def _prompt(run: Run, sample: int) -> list[int]:
    """The beginning of a held-out sample: a few tokens, of a conversation up to where the assistant answers."""
    window, most = run.data.validation.window(sample), run.config.model.max_seq_len - 1
    length = min(PROMPT_TOKENS, run.config.seq_len, most)
    if window.predicted is not None:
        length = min(max(int(window.predicted.argmax()), 1), run.config.seq_len, most)
    ids: list[int] = window.tokens[:length].tolist()
    return ids


@contextmanager
def exact_dispatch(run: Run) -> Iterator[None]:
    """Rows of few tokens go to experts by exact counts, without the bounds that the run's dispatcher may have."""
    layers = [module for module in run.model.modules() if isinstance(module, MoE)]
    exact = exact_dispatcher(run.config, run.mesh)
    for layer in layers:
        layer.dispatcher = exact
    try:
        yield
    finally:
        for layer in layers:
            layer.dispatcher = run.dispatcher


def commands(run: Run, command: str = "train") -> str:
    """The commands that go on with a run of `fp8moe COMMAND`; none where it has saved nothing."""
    if run.saver.newest is None:
        return ""
    name, resume = shlex.quote(str(run.run_dir)), shlex.quote(f"resume={run.run_dir}")
    ask = '--prompt "def read("' if run.data.chat is None else "--chat -"
    generating = [] if run.data.tokenizer is None else [f"  fp8moe generate {name} {ask}"]
    return "\n".join(["", "go on with", *generating, f"  fp8moe {command} {resume} steps={2 * run.config.steps}"])
