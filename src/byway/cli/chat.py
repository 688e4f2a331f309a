"""``byway chat``: a conversation with a run or an adapter, with the bare base beside it when asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byway.cli import ui
from byway.errors import BywayError

if TYPE_CHECKING:
    from byway.data.documents import Message

__all__ = ["run"]

_HELP = "/both: the bare base's answer beside the adapter's, on and off   /reset: forget the conversation   /quit: end"


def run(
    path: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, a checkpoint in one, or an adapter's directory.")],
    *,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token; higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="With a temperature: sample among the most likely tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With a temperature: the seed of the sampling.")] = 0,
    base: Annotated[str | None, typer.Option(help="The base, where the adapter does not say it.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Begin with both answers, adapter and bare base.")] = False,
) -> None:
    """Talk to a trained adapter; answers appear while they are written."""
    from byway.inference.runs import find

    found = find(path, base)
    model, tokenizer, adapters = found.load()
    for note in dict.fromkeys(note for adapter in adapters for note in adapter.notes):
        ui.note(f"note: {note}")
    templated = tokenizer is not None and bool(tokenizer.chat_template)
    if not templated:
        ui.note("the model has no chat template: every line is continued as it is, and nothing is remembered")
    ui.note(_HELP)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    _Chat(model, tokenizer, system if templated else None, templated, compare, options).talk()


class _Chat:
    """One conversation: what was said, and how answers are made."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, templated: bool, both: bool, options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.templated, self.both = templated, both
        self.start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)

    def talk(self) -> None:
        """Read lines until /quit or the end of the input."""
        while (line := self._line()) is not None:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text == "/reset":
                self.messages = list(self.start)
                ui.note("forgotten")
            elif text == "/both":
                self.both = not self.both
                ui.note("both answers" if self.both else "the adapter's answer only")
            elif text.startswith("/"):
                ui.note(_HELP)
            elif text:
                self._answer(text)

    def _line(self) -> str | None:
        if ui.is_terminal(sys.stdin):
            print(ui.paint("you> ", "bold", sys.stderr), end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line if line else None

    def _answer(self, text: str) -> None:
        from byway.core.attach import disabled

        asked = [*self.messages, {"role": "user", "content": text}] if self.templated else text
        try:
            if self.both:
                with disabled(self.model):
                    self._write("base", asked)
            answer = self._write("adapter", asked)
        except BywayError as error:  # a line that cannot be answered does not end the conversation
            ui.error(error.message, error.hint or "/reset makes the conversation short again")
            return
        if isinstance(asked, list):
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _write(self, who: str, asked: Any) -> str:
        """Let the model answer, shown while it is written."""
        from byway.inference.generate import generate_text

        if self.both:
            print(ui.paint(f"{who}> ", "cyan", sys.stdout), end="", flush=True)

        def show(text: str) -> None:
            print(text, end="", flush=True)

        (answer,) = generate_text(self.model, self.tokenizer, [asked], on_text=show, **self.options)
        print(flush=True)
        return answer
