"""``byway generate``: answer prompts with a run or an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
from byway.errors import ConfigError

__all__ = ["read_prompts", "run"]


def run(
    path: Trained,
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt. Can be repeated.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with one prompt per line. -: read all of stdin as one prompt.")
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts answered at once.")] = 8,
    stop: Stop = None,
    template_variable: TemplateVariables = None,
    base: Base = None,
    allow_import: AllowImport = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the answers of the base model without the adapter.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
) -> None:
    """Answer prompts with a run or an adapter. Answers go to stdout, messages to stderr."""
    prompts = read_prompts(prompt, prompt_file)
    from byway.inference.runs import find

    found = find(path, base, allow_import=allow_import)
    from byway.core.attach import disabled
    from byway.inference.generate import generate_text
    from byway.inference.settings import left_aside

    model, tokenizer, adapters = found.load()
    for note in dict.fromkeys(note for adapter in adapters for note in adapter.notes):
        ui.note(f"note: {note}")
    if not model.can_generate():
        from byway.cli._scores import show_scores

        length = None if found.recipe is None else found.recipe.data.max_length
        return show_scores(model, tokenizer, prompts, max_length=length, batch_size=batch_size, compare=compare)
    if tokenizer is not None and not tokenizer.chat_template and not raw:
        ui.note("The model has no chat template: the prompt is continued as it is.")
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size, "raw": raw,
        "system": system, "stop": stop or (), "template_variables": variables(template_variable),
    }  # fmt: skip
    if aside := left_aside(model):
        ui.note(f"note: {aside}")
    answers = generate_text(model, tokenizer, prompts, **options)
    if not compare:
        for answer in answers:
            ui.out(answer)
        return
    with disabled(model):
        bare = generate_text(model, tokenizer, prompts, **options)
    for question, with_adapter, without in zip(prompts, answers, bare, strict=True):
        ui.out(f"prompt:  {question}\nbase:    {without}\nadapter: {with_adapter}\n")


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """Return the prompts given as options and in a file.

    Raises:
        ConfigError: there is no prompt, one is empty, or the file cannot be read.
    """
    prompts = list(given or ())
    if file is not None and str(file) == "-":
        prompts.append(sys.stdin.read().rstrip("\n"))
    elif file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read prompts from {str(file)!r}: {error}", "give a text file with one prompt per line") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("no prompt given", "use --prompt TEXT or --prompt-file FILE (- for stdin)")
    if any(not prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is empty", "give every prompt some text")
    return prompts
