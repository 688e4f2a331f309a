"""Generate a model's answers: in batches padded on the left, with the chat template it was trained with.

Greedy unless a temperature is given. A row ends at the model's end token, the template's end-of-turn token or a stop
string. The modes of the model, its generation settings, the random state and the tokenizer are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from byway.core.modes import evaluating
from byway.data.bad_rows import BadRow
from byway.data.documents import Conversation, Message
from byway.data.messages import as_messages
from byway.data.template import ChatTemplate, Piece, stop_tokens
from byway.data.tokens import Tokenizer
from byway.errors import ConfigError, DataError
from byway.inference.settings import StopStrings, UntilStop, only

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Prompt", "generate_text", "prompt_tokens"]

Prompt = str | Sequence[Message] | Conversation
"""A text, the messages of a conversation, or these with their tools and template variables."""


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    stop: Sequence[str] = (),
    raw: bool = False,
    system: str | None = None,
    tools: Sequence[Message] | None = None,
    template_variables: Mapping[str, Any] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return the model's answers, in the order of `prompts`, without prompts and control tokens.

    Of the base's own generation settings only token ids are used (:func:`byway.inference.settings.structure`).

    Args:
        model: a causal or encoder-decoder model, with or without adapters.
        prompts: texts (each a user turn, if the model has a chat template and `raw` is False) or conversations.
        temperature: 0 is greedy; else tokens are sampled from softmax(logits / temperature), among the likeliest ones
            whose probabilities sum to `top_p`.
        seed: of the sampling.
        stop: texts at which an answer ends, without them.
        raw: continue the texts as they are, without the chat template.
        system: a system message for prompts that are texts.
        tools: JSON schemas of functions, for the template.
        template_variables: further variables for the template, such as ``{"enable_thinking": False}``.
        on_text: called with parts of the answer while it is generated; for a single prompt.
        on_batch: called with (prompts done, number of prompts).

    Raises:
        ConfigError: an option is out of range, there is no tokenizer, or no chat template for messages.
        DataError: a prompt is empty or does not fit into the model's context.
    """
    problems: list[str] = []
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if type(number) is not int or number < 1:
            problems.append(f"{name} is {number!r}; it must be an integer ≥ 1")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature is {temperature!r}; it must be 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p!r}; it must be above 0 and at most 1")
    if isinstance(stop, str) or not all(stop):
        problems.append(f"stop is {stop!r}; it must be a list of texts that are not empty")
    if problems:
        raise ConfigError("; ".join(problems))
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so it cannot generate text", "use a base with a tokenizer")
    if on_text is not None and len(prompts) > 1:
        raise ConfigError(f"on_text needs a single prompt; there are {len(prompts)}")
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    asked = [_asked(p, template, raw=raw, system=system) for p in prompts]
    tokens = prompt_tokens(tokenizer, asked, tools=tools, template_variables=template_variables, template=template)
    if model.config.is_encoder_decoder:  # an encoder expects its end token
        tokens = [list(tokenizer(p).input_ids) if isinstance(p, str) else ids for p, ids in zip(asked, tokens, strict=True)]
    _check_lengths(model, tokens, max_new_tokens)
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    ends = stop_tokens(model, tokenizer, template) + [added[text] for text in stop if text in added]
    options = _options(tokenizer, ends, max_new_tokens, temperature, top_p)
    stop = [text for text in stop if text not in added]
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # similar lengths together, the longest first: little padding
    answers: dict[int, str] = {}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            written = _generate(model, tokenizer, [tokens[i] for i in rows], options, stop, on_text)
            answers |= dict(zip(rows, written, strict=True))
            if on_batch is not None:
                on_batch(len(answers), len(tokens))
    return [answers[i] for i in range(len(tokens))]


def _asked(prompt: Prompt, template: ChatTemplate | None, *, raw: bool, system: str | None) -> Prompt:
    """Return a text as a user turn, after `system`, if the model has a chat template; anything else unchanged."""
    if not isinstance(prompt, str):
        return prompt
    if raw or template is None:
        if system is not None:
            why = "raw prompts are continued as they are" if raw else "the model has no chat template"
            raise ConfigError(f"there is a system message, but {why}", "write it into the prompt")
        return prompt
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    tools: Sequence[Message] | None = None,
    template_variables: Mapping[str, Any] | None = None,
    template: ChatTemplate | None = None,
) -> list[list[int]]:
    """Return the tokens of prompts, as in training: strings of control tokens inside messages stay text.

    `template`: the tokenizer's chat template, if it was examined already.

    Raises:
        ConfigError: the tokenizer has no chat template for messages.
        DataError: a prompt has no tokens, or the template refuses it.
    """
    own = Tokenizer(tokenizer)
    pieces: list[Piece] = []
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            pieces.append(Piece(prompt))
            continue
        if template is None and not tokenizer.chat_template:
            raise ConfigError("the model has no chat template, so messages cannot be written for it", "use a text to continue (--raw)")
        template = template or ChatTemplate(tokenizer)
        try:
            pieces.append(template.prompt(_conversation(prompt, tools, template_variables or {})))
        except BadRow as error:
            raise DataError(f"prompt {number} {error}") from error
    found: list[list[int]] = []
    for number, (prompt, result) in enumerate(zip(prompts, own.encode(pieces), strict=True), start=1):
        if isinstance(result, Exception):
            raise DataError(f"prompt {number} {result}")
        ids = result[0]
        if isinstance(prompt, str) and ids[: len(own.prefix)] != own.prefix:
            ids = own.prefix + ids
        if not ids:
            raise DataError(f"prompt {number} is empty, so there is nothing to continue")
        found.append(list(ids))
    return found


def _conversation(prompt: Sequence[Message] | Conversation, tools: Sequence[Message] | None, variables: Mapping[str, Any]) -> Conversation:
    """Return a prompt as rows of training data are read. A row's own template variables come before `variables`."""
    if isinstance(prompt, Conversation):
        return replace(prompt, template_kwargs={**variables, **prompt.template_kwargs})
    messages, _ = as_messages(prompt, "messages")
    return Conversation(messages=messages, tools=tuple(tools) if tools else None, template_kwargs=dict(variables))


def _check_lengths(model: PreTrainedModel, tokens: Sequence[Sequence[int]], new: int) -> None:
    """Raise DataError if the model lacks a token or a position of the prompts and their answers."""
    embeddings: Any = model.get_input_embeddings()
    rows, highest = int(embeddings.weight.shape[0]), max(map(max, tokens))
    if highest >= rows:
        raise DataError(f"a prompt has the token id {highest:,}; the model has {rows:,}", "its tokenizer belongs to another model")
    if model.config.is_encoder_decoder:
        return
    config = model.config.get_text_config().to_dict()
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    longest = max(map(len, tokens))
    if isinstance(limit, int) and longest + new > limit:
        raise DataError(
            f"the longest prompt has {longest:,} tokens, and with {new:,} new ones exceeds the model's context of {limit:,}",
            f"shorten it, or set --max-new-tokens to at most {max(limit - longest, 0):,}",
        )


def _options(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], max_new_tokens: int, temperature: float, top_p: float
) -> dict[str, Any]:
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if t is not None), 0)
    sampled: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"max_new_tokens": max_new_tokens, "eos_token_id": list(ends) or None, "pad_token_id": pad, "use_cache": True, **sampled}


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    stop: Sequence[str],
    on_text: Callable[[str], None] | None,
) -> list[str]:
    from transformers import TextStreamer

    decoder_only = not model.config.is_encoder_decoder
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), options["pad_token_id"])  # (rows, longest)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if decoder_only else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    streamer = None
    if on_text is not None:
        streamer = TextStreamer(tokenizer, skip_prompt=decoder_only, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        streamer.on_finalized_text = UntilStop(on_text, stop)  # whole words, as they are finished
    begin = width if decoder_only else 1  # after the token that a decoder starts with, which may be the end token (BART)

    def decoded(row: list[int]) -> str:
        return str(tokenizer.decode(row, skip_special_tokens=True))

    with only(model, dict(options)) as settings:
        out: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            streamer=streamer,
            generation_config=settings,
            stopping_criteria=[StopStrings(stop, begin, decoded)] if stop else None,
        )
    stops: set[int] = set(options["eos_token_id"] or ())
    answers: list[str] = []
    for row in out[:, begin:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        text = decoded(row[:end])
        answers.append(text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))])
    return answers
