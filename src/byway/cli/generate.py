"""``byway generate``: answers to prompts on stdout, one after another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from byway.cli import ui
from byway.errors import ConfigError

__all__ = ["read_prompts", "run"]


def run(
    path: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, a checkpoint in one, or an adapter's directory.")],
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with one prompt a line; - reads all of stdin as one prompt.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before every prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token; higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="With a temperature: sample among the most likely tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With a temperature: the seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 8,
    base: Annotated[
        str | None, typer.Option(help="The base, where the adapter does not say it: a directory, .gguf file or hub id.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the bare base's answer too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
) -> None:
    """Let a trained adapter answer: data on stdout, talk on stderr."""
    prompts = read_prompts(prompt, prompt_file)
    from byway.inference.runs import find

    found = find(path, base)
    from byway.core.attach import disabled
    from byway.inference.generate import generate_text

    model, tokenizer, adapters = found.load()
    for note in dict.fromkeys(note for adapter in adapters for note in adapter.notes):
        ui.note(f"note: {note}")
    if tokenizer is not None and not tokenizer.chat_template and not raw:
        ui.note("the model has no chat template: the prompt is continued as it is")
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size, "raw": raw,
        "system": system,
    }  # fmt: skip
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
    """The prompts of the options; ConfigError if there is none or the file cannot be read."""
    prompts = list(given or ())
    if file is not None and str(file) == "-":
        prompts.append(sys.stdin.read().rstrip("\n"))
    elif file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the prompts in {str(file)!r} cannot be read: {error}", "give a text file with one prompt a line") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt", "give --prompt TEXT or --prompt-file FILE (- for stdin)")
    if any(not prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is empty")
    return prompts
