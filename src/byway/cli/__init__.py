"""The command line. One file a command, imported only when that command is called.

To add a command: write ``cli/<name>.py`` with one function ``run``; its row in `COMMANDS` is already there (or add it). Nothing else.

::

    def run(
        recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's.")] = None,
        *,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")] = False,
    ) -> None:
        '''The text of ``byway <name> --help``.'''

Rules: import torch, transformers and the rest of byway inside ``run`` (``byway <name> --help`` should be quick too); print data with
``ui.out`` or ``ui.table`` (stdout) and everything else with ``ui.note`` and friends (stderr); raise a BywayError for whatever the user can
repair; return nothing, or the exit code. `main` turns errors into ``error:`` and ``hint:`` lines and exit codes, and shows the traceback
with ``--debug``, which every command understands.

Exit codes: 0 done; 2 bad input, found before work started; 3 failed midway; 4 a rank failed; 130 and 143 after SIGINT and SIGTERM;
1 a bug of ours.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from byway.cli import ui
from byway.errors import BywayError, listed, nearest

__all__ = ["COMMANDS", "available", "main"]

COMMANDS: dict[str, str] = {
    "quickstart": "Fine-tune the built-in model on the built-in data, from nothing to a merged model.",
    "train": "Fine-tune a base model as a recipe says.",
    "eval": "Measure a run on held-out rows.",
    "generate": "Let a run or an adapter answer a prompt.",
    "chat": "Talk to a run or an adapter, with the bare base beside it.",
    "data": "Show a recipe's rows as the model will see them.",
    "doctor": "Try one real step of a recipe and say what is wrong.",
    "merge": "Fold an adapter into its base: a plain model directory, with a certificate.",
    "inspect": "Show what is in an adapter.",
    "methods": "List the methods with their fields.",
    "schema": "Print the recipe's JSON schema.",
    "extract": "Make an adapter from a base and a tuned model.",
    "diff": "Compare two adapters or models.",
    "combine": "Combine adapters into one.",
    "convert": "Convert an adapter to another program's format.",
    "lint": "Check an adapter's files.",
    "plan": "Estimate what a recipe will cost.",
    "compare": "Compare runs.",
    "serve": "Serve a base with many adapters.",
}
"""Command → what it does, in the order of ``byway --help``. Those without a file do not exist yet and are not shown."""


def available() -> tuple[str, ...]:
    """The commands that have a file."""
    here = Path(__file__).parent
    return tuple(name for name in COMMANDS if (here / f"{name}.py").is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; `argv` without the program's name, default ``sys.argv[1:]``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i >= end]
    name = next((a for a in arguments if not a.startswith("-")), None)
    return _guarded(lambda: _dispatch(name, arguments or ["--help"]), name, debug=debug)


def _dispatch(name: str | None, arguments: list[str]) -> int:
    there = available()
    if name is not None and name not in there:
        if name in COMMANDS:
            return _refuse(f"byway {name}: this command does not exist yet", f"there are: {', '.join(there)}")
        return _refuse(f"byway has no command {name!r}", nearest(name, there) or f"there are: {listed(there)}")
    result = _app(name, there)(args=arguments, prog_name="byway", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _refuse(message: str, hint: str) -> int:
    ui.error(message, hint)
    return 2


def _app(called: str | None, there: Sequence[str]) -> typer.Typer:
    """The application: the called command with its options, the others as their one line of help."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Parameter-efficient fine-tuning on frozen models.")
    app.callback(invoke_without_command=True)(_top)
    for name in there:
        if name == called:
            app.command(name)(importlib.import_module(f"byway.cli.{name}").run)
        else:
            app.command(name, help=COMMANDS[name])(_listed_only)
    return app


def _listed_only() -> None:
    """Stands for a command in the list of commands."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from byway import __version__

        ui.out(f"byway {__version__}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; after any command too."),
) -> None:
    """The options that stand before a command; both have done their work when this is called."""


def _guarded(call: Callable[[], int], name: str | None, *, debug: bool) -> int:
    """The exit code of `call`, whatever happens in it; with `debug` the traceback goes to stderr first."""
    try:
        code = call()
        sys.stdout.flush()
        return code
    except Exception as error:
        if debug:
            _traceback()
        return _code_of(error, name, debug=debug)
    except KeyboardInterrupt:
        ui.note("interrupted")
        return 130
    except SystemExit as stop:  # click's own answer to a reader that has gone (head, less) would be exit code 1
        if isinstance(stop.__context__, BrokenPipeError):
            return 141
        raise


def _code_of(error: Exception, name: str | None, *, debug: bool) -> int:
    usage: Any = (
        typer.BadParameter.__base__
    )  # typer brings its own copy of click since 0.26, or uses click's: the class is the same by name
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
            ui.note("interrupted")
            return 130
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing is left to say
            return 141
        case MemoryError():
            ui.error("out of memory", "smaller micro-batches (train.micro_batch_tokens), shorter rows, or a smaller base")
            return 3
        case _:
            hint = (
                "please report it with the traceback above" if debug else "repeat the command with --debug for the traceback, and report it"
            )
            ui.error(f"{type(error).__name__}: {error}\nthis is a bug in byway, not in your input", hint)
            return 1


def _traceback() -> None:
    import traceback

    traceback.print_exc(file=sys.stderr)
