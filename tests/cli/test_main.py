"""The entry point: commands, help, exit codes."""

from __future__ import annotations

import gc
import subprocess
import sys
import types

import pytest

from fp8moe import __version__
from fp8moe.__main__ import COLLECT_AFTER, COMMANDS, main


def test_help_lists_every_command_and_loads_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2
    code = "import sys; from fp8moe.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert (
        capsys.readouterr().err == f"fp8moe: 'trian' is not one of the {len(COMMANDS)} commands: did you mean train?\n"
    )
    assert main(["xyz"]) == 2
    assert capsys.readouterr().err.endswith(f"use one of {', '.join(COMMANDS)}\n")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_prints_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: fp8moe {command} ")
    assert f"\n  fp8moe {command} " in shown, "an example is missing"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("-V", "--version"):
        assert main([word]) == 0
        assert capsys.readouterr().out == f"fp8moe {__version__}\n"


def test_a_process_that_ends_collects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And seldom before. A caller of `main` goes on, and its objects stay the collector's, as often as it was."""
    asked: list[object] = []
    monkeypatch.setattr(gc, "freeze", lambda: asked.append("all"))
    monkeypatch.setattr(gc, "set_threshold", lambda *numbers: asked.append(numbers))
    assert main(["--version"]) == 0 and asked == []
    monkeypatch.setattr(sys, "argv", ["fp8moe", "--version"])
    assert main() == 0 and asked == [COLLECT_AFTER, "all"]


def test_a_reader_that_has_gone_is_no_error() -> None:
    """`fp8moe schedule | head -1`: a pipe that is closed early."""
    command = [sys.executable, "-m", "fp8moe", "schedule", "--pp", "16", "--microbatches", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 141


def test_an_exception_becomes_a_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[BaseException] = []

    def failing(argv: list[str]) -> int:
        raise raised[-1]

    monkeypatch.setitem(sys.modules, "fp8moe.cli.train", types.SimpleNamespace(main=failing))  # type: ignore[arg-type]
    for error, code, err in [
        (ValueError("size 3"), 2, "fp8moe: size 3\n"),
        (KeyboardInterrupt(), 130, "fp8moe: interrupted\n"),
    ]:
        raised.append(error)
        assert main(["train"]) == code
        assert capsys.readouterr().err == err
    raised.append(KeyError("lost"))
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("fp8moe: KeyError: 'lost'\n")
