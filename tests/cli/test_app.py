"""The command as a whole: help, versions, errors, exit statuses, and that nothing heavy loads for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Run

import chiasm
from chiasm.cli import app as app_module
from chiasm.cli.terminal import paint

VERBS = (
    *("chat", "demo", "doctor", "list", "show", "plan", "convert", "train", "eval", "reproduce", "data"),
)


def test_help_names_every_verb(run: Run) -> None:
    for words in ([], ["--help"], ["-h"]):
        ran = run(*words)
        assert ran.code == 0
        assert all(f"\n  {verb} " in ran.out for verb in VERBS)
        assert "..." not in ran.out.partition("Commands:")[2]  # every summary fits
    for verb in VERBS:
        assert run(verb, "--help").out.startswith(f"Usage: chiasm {verb} ")


def test_version(run: Run) -> None:
    assert run("--version").out == f"chiasm {chiasm.__version__}\n"


def test_the_module_leaves_with_the_status_of_the_command() -> None:
    """torchrun starts it so, and must see that a run failed."""
    command = [sys.executable, "-m", "chiasm", "no-such-verb"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from chiasm.cli.app import main\n"
        "status = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "print(time.process_time() - start, status, *heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, status, *heavy = done.stderr.split()
    assert not heavy
    assert status == "0"
    assert float(seconds) < 0.4


def test_wrong_usage_is_one_line_and_status_2(run: Run) -> None:
    for words, said in (
        (["chta"], "see chiasm --help"),
        (["chat", "--colour"], "--colour"),
        (["convert"], "see chiasm convert --help"),
        (["convert", "a", "b", "--to", "pickle"], "pickle"),
        (["list", "nonsense"], "unknown section 'nonsense'"),
        (["show", "nonsense"], "nothing is called 'nonsense'"),
        (["train"], "give either RECIPE"),
    ):
        ran = run(*words)
        assert ran.code == 2, words
        assert said in ran.error_line


def test_debug_shows_the_traceback_wherever_it_stands(run: Run) -> None:
    for words in (["--debug", "chat", "x.png", "Why?"], ["chat", "x.png", "Why?", "--debug"]):
        ran = run(*words)
        assert ran.code == 1
        assert "Traceback (most recent call last)" in ran.err
        assert ran.err.splitlines()[-1] == "error: x.png: no such file; check the path"
    assert run("chat", "x.png", "--", "--debug").error_line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("by\nzero"), 1, "ZeroDivisionError: by zero (this is a bug"),
        (BrokenPipeError(32, "broken"), 1, ""),
    ],
)
def test_other_ends(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(app_module.typer.main, "get_command", lambda _: type("C", (), {"main": broken})())
    monkeypatch.setattr(app_module, "_leave_pipe", lambda: None)
    ran = run("list")
    assert ran.code == code
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == (1 if said else 0)


def test_a_closed_pipe_is_no_news(tmp_path: Path) -> None:
    code = "import sys; from chiasm.cli.app import main; sys.exit(main())"
    command = f'"{sys.executable}" -c "{code}" list --json | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.stderr == b""


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("x", "red", stream=Terminal()) == "\x1b[31mx\x1b[0m"  # type: ignore[arg-type]
    assert paint("x", stream=Terminal()) == "x"  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("x", "red", stream=Terminal()) == "x"  # type: ignore[arg-type]
    assert paint("x", "red") == "x"
