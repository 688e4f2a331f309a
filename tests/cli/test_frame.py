"""The command line's frame: fast help, exit codes, error lines, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from byway import cli
from byway.cli import main, ui
from byway.errors import ConfigError, RunError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent.parent)}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of ``byway schema``."""

    def install(run: Callable[..., Any]) -> None:
        module = types.ModuleType("byway.cli.schema")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "byway.cli.schema", module)

    return install


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from byway.cli import main; code = main(['--help'])\n"
        "names = ('torch', 'transformers', 'datasets', 'pydantic', 'yaml', 'rich', 'safetensors', 'numpy')\n"
        "heavy = [m for m in names if m in sys.modules]\n"
        "own = [m for m in sys.modules if m.startswith('byway.cli.') and m != 'byway.cli.ui']\n"
        "print(code, heavy, own)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.stdout.splitlines()[-1] == "0 [] []"
    print(f"byway --help: {min(seconds):.3f} s of CPU")
    assert min(seconds) < 0.3


def test_help_lists_the_commands_that_exist_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.split("Commands:\n")[1].splitlines() if line.strip()]
    assert listed == [name for name in cli.COMMANDS if (Path(cli.__file__).parent / f"{name}.py").is_file()]
    assert {"schema", "methods", "data"} <= set(listed)
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_every_file_that_is_a_command_has_a_row() -> None:
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "ui"}
    assert {name for name in files if not name.startswith("_")} <= set(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.available())
def test_each_command_explains_itself_without_torch(name: str) -> None:
    code = f"import sys; from byway.cli import main; main([{name!r}, '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.startswith(f"Usage: byway {name}") and done.stdout.splitlines()[-1] == "False" and done.stderr == ""


def test_a_command_of_the_contract_without_a_file_does_not_exist_yet(capsys: pytest.CaptureFixture[str]) -> None:
    later = [name for name in cli.COMMANDS if name not in cli.available()]
    for name in later:
        assert main([name, "x"]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: byway {name}: this command does not exist yet\nhint: ") and said.out == ""


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["methdos"], "byway has no command 'methdos'", "did you mean 'methods'?"),
        (["zzz"], "byway has no command 'zzz'", "there are: "),
        (["schema", "--foo"], "No such option: --foo", "byway schema --help"),
        (["--foo"], "No such option: --foo", "byway --help"),
        (["data"], "Missing argument", "byway data --help"),
        (["data", "nope.yaml", "--rows", "x"], "", "byway data --help"),
        (["data", "nope.yaml"], "recipe 'nope.yaml' does not exist", ""),
        (["methods", "loro"], "there is no method 'loro'", "did you mean 'lora'?"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.out == "" and "Traceback" not in said.err
    assert f"hint: {hint}" in said.err if hint else True
    assert list(tmp_path.iterdir()) == []


ENDS: list[tuple[Callable[[], Any], int, str]] = [
    (lambda: None, 0, ""),
    (lambda: 130, 130, ""),
    (lambda: _raise(ConfigError("rank is 0", "set it to 8")), 2, "error: rank is 0\nhint: set it to 8\n"),
    (lambda: _raise(RunError("disk full")), 3, "error: disk full\n"),
    (lambda: _raise(KeyboardInterrupt()), 130, ""),
    (lambda: _raise(typer.Exit(143)), 143, ""),
    (lambda: _raise(MemoryError()), 3, "error: out of memory\n"),
    (lambda: _raise(BrokenPipeError()), 141, ""),
    (
        lambda: _raise(KeyError("x")),
        1,
        "error: KeyError: 'x'\nThis is a bug in Byway, not in your input.\nhint: run the command again with --debug",
    ),
]


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("run", "code", "said"), ENDS)
def test_however_a_command_ends_the_exit_code_says_it(
    run: Callable[[], Any],
    code: int,
    said: str,
    command: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # a closed pipe would take the test's own stdout with it
    command(lambda: run())
    assert main(["schema"]) == code
    assert capfd.readouterr().err.startswith(said)


def test_debug_shows_the_traceback_wherever_it_stands(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda: _raise(ConfigError("rank is 0")))
    for arguments in (["--debug", "schema"], ["schema", "--debug"]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("Traceback") and said.endswith("error: rank is 0\n")
    assert main(["schema"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_stands_after_two_dashes_belongs_to_the_command(command: Callable[..., None]) -> None:
    seen: list[list[str]] = []

    def run(words: list[str]) -> None:
        seen.append(words)

    command(run)
    assert main(["schema", "--", "--debug"]) == 0 and seen == [["--debug"]]


def test_a_reader_that_has_gone_is_no_bug() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "byway", "--help"], stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_the_schema_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["title"] == "Byway recipe" and said.err == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_the_methods_take_one_line_each_of_at_most_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    from byway import methods

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(ui, "is_terminal", lambda stream: terminal)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.split()[1:2] in (["yes"], ["no"], ["partly"])] == list(methods.names())
    assert max(map(len, lines)) <= 80 and len(lines) <= len(methods.names()) + 5


def test_a_method_is_explained_field_by_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "lora"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^dropout +0\.0 .*Dropout", out, re.MULTILINE)
    assert "can be merged: yes; source: byway/methods/lora.py" in out
    assert main(["methods", "bitfit"]) == 0 and "can be merged: where the model has biases" in capsys.readouterr().out


def test_compare_without_generate_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--compare"]) == 2 and "add --generate" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import byway

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"byway {byway.__version__}\n"


# ---------------------------------------------------------------- ui


class Terminal:
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_and_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    screen: Any = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert ui.paint("a", "red", screen) == "\x1b[31ma\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert ui.paint("a", "red", screen) == "a"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert ui.paint("a", "red", screen) == "a"
    assert ui.paint("a", "red", sys.stderr) == "a"


def test_learned_text_and_control_tokens_can_be_told_without_colour() -> None:
    spans = [("<s>", False, True), ("Hi", False, False), (" there", True, False), ("</s>", True, True)]
    assert ui.marked(spans) == "«<s>»Hi⟦ there«</s>»⟧"


def test_a_table_in_a_pipe_is_aligned_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    ui.table("t", ["a", "long"], [("x" * 150, 1), ("y", None)])
    assert capsys.readouterr().out.splitlines() == ["t", "a" + " " * 151 + "long", "x" * 150 + "  1", "y" + " " * 151 + "None"]


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_durations_are_clock_times(seconds: float, text: str) -> None:
    assert ui.duration(seconds) == text


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with ui.progress(100, "training", start=20, clock=lambda: now[0]) as bar:
        for step in range(21, 101):
            now[0] += 1.0
            bar.update(step, loss=1.5, tokens_per_second=1234.5, memory_mb=2048.0)
        bar.note("saved")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training 21/100  loss 1.5000  1,234 tokens/s  2.0 GB  1:19 left"
    assert lines[-2] == "training 100/100  loss 1.5000  1,234 tokens/s  2.0 GB  0:00 left" and lines[-1] == "saved"
    assert len(lines) == 10  # step 21, every 10 s until 100, the last step, the note
