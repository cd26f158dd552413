from __future__ import annotations

import errno
import sys

import pytest

from ml_models.commands import Command, UsageError, main, run_command

COMMANDS = {
    "greet": Command(summary="say hello", run=f"{__name__}:greet"),
    "broken": Command(summary="not there", run="ml_models.no_such_module:main"),
}


def greet(argv: list[str], prog: str) -> int | None:
    if argv == ["--fail"]:
        raise UsageError("--fail: too rude")
    sys.stdout.write(f"{prog}: hello {argv}\n")
    return len(argv) or None


def test_a_command_gets_the_arguments_after_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ml", "Tools.", COMMANDS, ["greet", "a", "--b"]) == 2
    assert capsys.readouterr().out == "ml greet: hello ['a', '--b']\n"
    assert main("ml", "Tools.", COMMANDS, ["greet"]) == 0


def test_the_arguments_of_the_process_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ml", "greet", "x"])
    assert main("ml", "Tools.", COMMANDS) == 1


def test_a_commands_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ml", "Tools.", COMMANDS, ["greet", "--fail"]) == 2
    assert capsys.readouterr().err == "ml greet: --fail: too rude\n"


def test_help_lists_commands_without_importing_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ml", "Tools.", COMMANDS, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: ml COMMAND" in shown
    assert "  greet   say hello\n  broken  not there\n" in shown


def test_no_command_is_a_mistake_and_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ml", "Tools.", COMMANDS, []) == 2
    assert "greet   say hello" in capsys.readouterr().err


def test_a_misspelt_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ml", "Tools.", COMMANDS, ["gret"]) == 2
    assert capsys.readouterr().err == "ml: unknown command 'gret'; did you mean greet?\n"


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ml-models", "Tools.", COMMANDS, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("ml-models 1.")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--lr: no"), 2, "ml: --lr: no\n"),
        (OSError(errno.ENOSPC, "No space left", "out/x"), 1, "ml: No space left: out/x\n"),
        (OSError("odd"), 1, "ml: odd\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_what_users_cause_is_a_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert run_command("ml", fail) == code
    assert capsys.readouterr().err == line


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("ml", lambda: 1 // 0)
