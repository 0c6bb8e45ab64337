"""The entry point: `fp8moe COMMAND ...` and `python -m fp8moe COMMAND ...` are the same.

A command is a function `(argv) -> exit code` of a module of `fp8moe.cli`, imported only when it runs; `fp8moe --help`
loads no torch. An exception of a command ends here as one sentence on stderr and an exit code: 2 configuration,
3 data, 4 out of memory, 5 non-finite, 6 hang, 7 no space on disk, 75 preempted, 130 interrupted, 1 anything else (a
defect of this program, shown with its traceback).
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

from fp8moe.cuda_environment import prepare

# torch's C++ code prints warnings of every connection that is tried again; errors still show. It reads this once.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once too: `cli.threads`
prepare(os.environ)

# Python's collector looks for cycles after so many new objects, 700 by itself: a tenth of a start, which is imports,
# whose objects all stay.
COLLECT_AFTER = (10_000, 20, 50)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("fp8moe.cli.train", "train a model; --nproc N starts N processes on this machine"),
    "sft": ("fp8moe.cli.sft", "fine-tune a model on conversations; as train, with other data and defaults"),
    "grpo": ("fp8moe.cli.grpo", "improve a model by reinforcement learning on problems with answers (GRPO)"),
    "keys": ("fp8moe.cli.keys", "list the keys of a run, or those that a word finds: fp8moe keys warmup"),
    "plan": ("fp8moe.cli.plan", "predict a run's memory, speed and cost on a cluster, and search its layouts"),
    "doctor": ("fp8moe.cli.doctor", "look for what would prevent or slow a run on this machine, or on all nodes"),
    "tokenize": ("fp8moe.cli.tokenize", "make indexed token files from text or JSON lines"),
    "data": ("fp8moe.cli.data", "print what token files or conversations hold: lengths, bytes per token, samples"),
    "import": ("fp8moe.cli.import_model", "make a run directory of a released model"),
    "watch": ("fp8moe.cli.watch", "show a run in the terminal while it trains"),
    "report": ("fp8moe.cli.report", "make an HTML page of a run, or of several side by side"),
    "generate": ("fp8moe.cli.generate", "continue prompts or answer a chat with a trained model"),
    "distill": ("fp8moe.cli.distill", "have a teacher answer prompts and keep what verifiers accept"),
    "eval": ("fp8moe.cli.evaluate", "bits per byte of text and accuracy of multiple choice, by a trained model"),
    "export": ("fp8moe.cli.export_model", "write a checkpoint for vLLM, SGLang and transformers"),
    "verify": ("fp8moe.cli.checkpoint:verify", "verify the bytes of a run's checkpoints"),
    "inspect": ("fp8moe.cli.checkpoint:inspect", "print what a checkpoint holds"),
    "schedule": ("fp8moe.cli.schedule", "print, draw and simulate a pipeline schedule"),
    "numerics": ("fp8moe.cli.numerics", "train the same run in FP8, BF16 and FP32 and compare the losses"),
    "warmup": ("fp8moe.cli.warmup", "compile every kernel that a configuration needs, before the run"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: fp8moe COMMAND ...", "", *lines, "", "fp8moe COMMAND --help lists the options of a command"]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` defaults to the arguments of the process, which then ends."""
    if argv is None:
        gc.set_threshold(*COLLECT_AFTER)
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        if argv is None:
            gc.freeze()  # else Python, as it ends, collects all that torch has made: half a second
        return code
    except BrokenPipeError:  # `fp8moe ... | head`: the reader has gone, and the interpreter must not flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from fp8moe import __version__

        print(f"fp8moe {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(command, COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"fp8moe: {command!r} is not one of the {len(COMMANDS)} commands: {advice}", file=sys.stderr)
        return 2
    return _run(COMMANDS[command][0], rest)


def _run(module: str, arguments: list[str]) -> int:
    try:
        name, _, function = module.partition(":")
        return int(getattr(importlib.import_module(name), function or "main")(arguments))
    except KeyboardInterrupt:
        print("fp8moe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        from fp8moe.cli.command import explain

        failure = explain(error)
        if failure.traceback:
            print(failure.traceback, file=sys.stderr, end="")
        print(f"fp8moe: {failure.sentence}", file=sys.stderr)
        return failure.code


if __name__ == "__main__":
    sys.exit(main())
