"""``byway chat``: a conversation with a run or an adapter, next to the base model if asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byway.cli import ui
from byway.cli._options import (
    AllowImport,
    Base,
    MaxNewTokens,
    SamplingSeed,
    Stop,
    System,
    Temperature,
    TemplateVariables,
    TopP,
    Trained,
    variables,
)  # fmt: skip
from byway.errors import ConfigError, DataError

if TYPE_CHECKING:
    from byway.data.documents import Message

__all__ = ["run"]

_COMMANDS = "/both: turn the base model's answers on or off   /reset: start a new conversation   /quit: exit"


def run(
    path: Trained,
    *,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    stop: Stop = None,
    template_variable: TemplateVariables = None,
    base: Base = None,
    allow_import: AllowImport = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Start with both answers: that of the base model and that of the adapter.")
    ] = False,
) -> None:
    """Chat with a run or an adapter. Answers are shown while they are generated."""
    given = variables(template_variable)
    from byway.inference.runs import find
    from byway.inference.settings import left_aside

    model, tokenizer, adapters = find(path, base, allow_import=allow_import).load()
    for note in dict.fromkeys(note for adapter in adapters for note in adapter.notes):
        ui.note(f"note: {note}")
    if not model.can_generate():
        what = f"{type(model).__name__} writes no text, so it cannot chat"
        raise ConfigError(what, f"ask a classifier with byway generate {path} --prompt TEXT")
    templated = tokenizer is not None and bool(tokenizer.chat_template)
    if not templated:
        ui.note("The model has no chat template: each line is continued as it is, without the earlier ones.")
    ui.note(_COMMANDS)
    if aside := left_aside(model):
        ui.note(f"note: {aside}")
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or (),
        "template_variables": given,
    }  # fmt: skip
    _Chat(model, tokenizer, system if templated else None, templated, compare, options).talk()


class _Chat:
    """One conversation. `both`: show the base model's answer, too."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, templated: bool, both: bool, options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.templated, self.both = templated, both
        self.start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)

    def talk(self) -> None:
        """Read lines until /quit or the end of the input."""
        while True:
            if ui.is_terminal(sys.stdin):
                print(ui.paint("you> ", "bold", sys.stderr), end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            text = line.strip()
            if not line or text in ("/quit", "/exit"):
                return
            if text == "/reset":
                self.messages = list(self.start)
                ui.note("New conversation.")
            elif text == "/both":
                self.both = not self.both
                ui.note("Showing both answers." if self.both else "Showing the adapter's answer only.")
            elif text.startswith("/"):
                ui.note(_COMMANDS)
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        from byway.core.attach import disabled

        asked = [*self.messages, {"role": "user", "content": text}] if self.templated else text
        try:
            if self.both:
                with disabled(self.model):
                    self._write("base", asked)
            answer = self._write("adapter", asked)
        except DataError as error:  # a line that cannot be answered does not end the conversation
            ui.error(error.message, error.hint or "start a new conversation with /reset")
            return
        if isinstance(asked, list):
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _write(self, who: str, asked: Any) -> str:
        """Generate an answer and show it while it is generated."""
        from byway.inference.generate import generate_text

        if self.both:
            print(ui.paint(f"{who}> ", "cyan", sys.stdout), end="", flush=True)
        (answer,) = generate_text(self.model, self.tokenizer, [asked], on_text=lambda text: print(text, end="", flush=True), **self.options)
        print(flush=True)
        return answer
