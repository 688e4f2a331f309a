"""The command line: one file per command, imported only when that command is called.

To add a command, write ``cli/<name>.py`` with one function ``run``, and add a row to `COMMANDS` if it has none yet::

    def run(
        recipe: RecipeFile,
        overrides: Overrides = None,
        *,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done. Write nothing.")] = False,
    ) -> None:
        '''The text of ``byway <name> --help``.'''

Rules:

* Options that several commands share are in ``_options.py``.
* Import torch, transformers and most of byway inside ``run``, so that ``byway <name> --help`` is quick.
* Print data with ``ui.out`` or ``ui.table`` (stdout), and everything else with ``ui.note`` and the like (stderr).
* Raise a BywayError for anything the user can fix. Return nothing, or the exit code.

`main` turns errors into ``error:`` and ``hint:`` lines and an exit code; ``--debug`` (any command) shows the traceback.

Exit codes: 0 success; 1 a bug in Byway; 2 bad input, found before work started; 3 failed midway; 4 a rank failed;
129, 130 and 143 stopped by SIGHUP, SIGINT and SIGTERM; 141 the reader of a pipe is gone.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from byway.cli import ui
from byway.errors import BywayError, ConfigError, listed, nearest

__all__ = ["COMMANDS", "available", "main"]

COMMANDS: dict[str, str] = {
    "quickstart": "Fine-tune and merge a small chat model on built-in data.",
    "init": "Write a recipe and 20 rows of data to start from.",
    "train": "Fine-tune a base model as described by a recipe.",
    "eval": "Evaluate a run on held-out rows.",
    "generate": "Answer prompts with a run or an adapter.",
    "chat": "Chat with a run or an adapter.",
    "data": "Show a recipe's rows as the model will see them.",
    "doctor": "Run one real training step and report problems.",
    "merge": "Merge an adapter into its base model, and verify the result.",
    "inspect": "Show the contents of an adapter.",
    "methods": "List the methods and their fields.",
    "schema": "Print the JSON schema of recipes.",
    "extract": "Extract an adapter from a base model and a fine-tuned one.",
    "diff": "Compare two adapters or models.",
    "combine": "Combine several adapters into one.",
    "convert": "Convert an adapter to another library's format.",
    "lint": "Check an adapter's files.",
    "plan": "Estimate the cost of a recipe.",
    "compare": "Compare runs.",
    "serve": "Serve a base model with many adapters.",
}
"""Command → one-line description, in the order of ``byway --help``. A command without a file does not exist yet."""

_HELP = """Parameter-efficient fine-tuning on frozen models.

A recipe is a YAML file that describes a training run. A run is the directory that `byway train` writes.
To see all of it at work, start with `byway quickstart`.
"""


def available() -> tuple[str, ...]:
    """Return the commands that have a file."""
    here = Path(__file__).parent
    return tuple(name for name in COMMANDS if (here / f"{name}.py").is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. `argv`: without the program's name; default ``sys.argv[1:]``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i >= end]
    name = next((a for a in arguments if not a.startswith("-")), None)
    try:
        with _signals_unwind():
            result = _app(name)(args=arguments or ["--help"], prog_name="byway", standalone_mode=False)
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc(file=sys.stderr)
        return _report(error, name, debug=debug)
    except KeyboardInterrupt:
        ui.note("Interrupted.")
        return 130
    except _Ended as ended:
        ui.note(f"Stopped by {signal.Signals(ended.number).name}.")
        return 128 + ended.number
    except SystemExit as stop:  # click exits with code 1 if the reader of a pipe (head, less) is gone
        if isinstance(stop.__context__, BrokenPipeError):
            return 141
        raise


class _Ended(SystemExit):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP raise an exception, as SIGINT does, so that temporary files are removed.

    A signal that the caller ignores or handles is left alone; training handles SIGTERM on its own.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    taken: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # Python handles signals in the main thread only
        taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _app(called: str | None) -> typer.Typer:
    """Build the application: the called command with its options, and the other commands as one line of help each."""
    names = available()
    if called is not None and called not in names:
        if called in COMMANDS:
            raise ConfigError(f"byway {called}: this command does not exist yet", f"there are: {', '.join(names)}")
        raise ConfigError(f"byway has no command {called!r}", nearest(called, names) or f"there are: {listed(names)}")
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": 120},
        help=_HELP,
    )
    app.callback(invoke_without_command=True)(_top)
    for name in names:
        if name == called:
            app.command(name)(importlib.import_module(f"byway.cli.{name}").run)
        else:
            app.command(name, help=COMMANDS[name])(_only_listed)
    return app


def _only_listed() -> None:
    """Stand in for a command that was not called."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from byway import __version__

        ui.out(f"byway {__version__}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error. Works after a command, too."),
) -> None:
    """Declare the options before a command. `main` has handled --debug and the callback --version."""


def _report(error: Exception, name: str | None, *, debug: bool) -> int:
    """Print what went wrong in command `name` and return the exit code."""
    usage: Any = typer.BadParameter.__base__  # UsageError, of click or of typer's own copy of click (since typer 0.26)
    match error:
        case BywayError():
            ui.error(error.message, error.hint)
            return error.exit_code
        case usage():
            ui.error(error.format_message().rstrip("."), f"byway {name} --help" if name else "byway --help")
            return 2
        case typer.Exit():
            return error.exit_code
        case typer.Abort():
            ui.note("Interrupted.")
            return 130
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads stdout any more: drop what is left in its buffer
            return 141
        case OSError(errno=errno.ENAMETOOLONG):
            ui.error(f"a file name is too long: {str(error.filename)[:60]!r}...")
            return 2
        case MemoryError():
            ui.error("out of memory", "use smaller micro-batches (train.micro_batch_tokens), shorter rows or a smaller base")
            return 3
        case _:
            hint = "report it with the traceback above" if debug else "run the command again with --debug and report the traceback"
            ui.error(f"{type(error).__name__}: {error}\nThis is a bug in Byway, not in your input.", hint)
            return 1
