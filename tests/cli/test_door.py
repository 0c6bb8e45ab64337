"""The one door: commands, help, exit codes, all inside this process."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from fp8moe.__main__ import COMMANDS, main


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


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_helps_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"fp8moe {command}" in capsys.readouterr().out


def test_errors_end_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
