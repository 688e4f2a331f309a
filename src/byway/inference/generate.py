"""Generate a model's answers: in batches padded on the left, with the chat template it was trained with.

Greedy unless a temperature is given. A row ends at the model's end token or the template's end-of-turn token. The modes
of the model, the random state and the tokenizer are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from byway.core.modes import evaluating
from byway.data.documents import Message
from byway.data.template import Piece, bracketed, control_strings, stop_tokens, strings, unbracketed
from byway.data.tokens import Tokenizer
from byway.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Prompt", "as_messages", "generate_text", "prompt_tokens"]

Prompt = str | Sequence[Message]
"""A text, or the messages of a conversation."""


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
    raw: bool = False,
    system: str | None = None,
    tools: Sequence[Message] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return the model's answers, in the order of `prompts`, without prompts and control tokens.

    Args:
        model: a causal or encoder-decoder model, with or without adapters.
        prompts: texts (each a user turn, if the model has a chat template and `raw` is False) or lists of messages.
        temperature: 0 is greedy; else tokens are sampled from softmax(logits / temperature), among the likeliest ones
            whose probabilities sum to `top_p`.
        seed: of the sampling.
        raw: continue the texts as they are, without the chat template.
        system: a system message for prompts that are texts.
        tools: JSON schemas of functions, for the template.
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
    if problems:
        raise ConfigError("; ".join(problems))
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so it cannot generate text", "use a base with a tokenizer")
    if on_text is not None and len(prompts) > 1:
        raise ConfigError(f"on_text needs a single prompt; there are {len(prompts)}")
    conversations = [as_messages(p, tokenizer, raw=raw, system=system) for p in prompts]
    tokens = prompt_tokens(tokenizer, conversations, tools=tools)
    if model.config.is_encoder_decoder:  # an encoder expects its end token
        tokens = [list(tokenizer(p).input_ids) if isinstance(p, str) else ids for p, ids in zip(conversations, tokens, strict=True)]
    _check_lengths(model, tokens, max_new_tokens)
    options = _options(model, tokenizer, max_new_tokens, temperature, top_p)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # similar lengths together, the longest first: little padding
    answers: dict[int, str] = {}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            written = _generate(model, tokenizer, [tokens[i] for i in rows], options, on_text)
            answers |= dict(zip(rows, written, strict=True))
            if on_batch is not None:
                on_batch(len(answers), len(tokens))
    return [answers[i] for i in range(len(tokens))]


def as_messages(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, raw: bool = False, system: str | None = None) -> Prompt:
    """Return a text as a user turn, after `system`, if the model has a chat template; anything else unchanged."""
    if not isinstance(prompt, str):
        return prompt
    if raw or not tokenizer.chat_template:
        if system is not None:
            why = "raw prompts are continued as they are" if raw else "the model has no chat template"
            raise ConfigError(f"there is a system message, but {why}", "write it into the prompt")
        return prompt
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, tools: Sequence[Message] | None = None
) -> list[list[int]]:
    """Return the tokens of prompts, as in training: strings of control tokens inside messages stay text.

    Raises:
        ConfigError: the tokenizer has no chat template for messages.
        DataError: a prompt has no tokens, or the template refuses it.
    """
    own = Tokenizer(tokenizer)
    pieces = [Piece(p) if isinstance(p, str) else _written(tokenizer, p, tools) for p in prompts]
    found: list[list[int]] = []
    for number, (prompt, result) in enumerate(zip(prompts, own.encode(pieces), strict=True)):
        if isinstance(result, Exception):
            raise DataError(f"prompt {number + 1} {result}")
        ids = result[0]
        if isinstance(prompt, str) and ids[: len(own.prefix)] != own.prefix:
            ids = own.prefix + ids
        if not ids:
            raise DataError(f"prompt {number + 1} is empty, so there is nothing to continue")
        found.append(list(ids))
    return found


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Message] | None) -> Piece:
    """Return the conversation with the generation prompt, with control-token strings in its messages marked as text."""
    if not tokenizer.chat_template:
        raise ConfigError("the model has no chat template, so messages cannot be written for it", "use a text to continue (--raw)")

    def apply(messages: list[Any], tools: list[Any] | None) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is foreign code and may raise anything
            raise DataError(f"the chat template refuses the messages: {error}") from error

    given, schemas = list(messages), list(tools) if tools else None
    plain = apply(given, schemas)
    control = control_strings(tokenizer)
    if not any(control.search(text) for text in strings([given, schemas])):
        return Piece(plain)
    text, literal = unbracketed(apply(bracketed(given, control), bracketed(schemas, control)))
    if text != plain:
        raise DataError("a message contains the string of a control token, and the chat template rewrites it", "write it differently")
    return Piece(plain, literal=literal)


def _check_lengths(model: PreTrainedModel, tokens: Sequence[Sequence[int]], new: int) -> None:
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> dict[str, Any]:
    stops = stop_tokens(model, tokenizer)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, *stops) if t is not None), 0)
    sampled: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {
        "max_new_tokens": max_new_tokens,
        "max_length": None,
        "eos_token_id": stops or None,
        "pad_token_id": pad,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "use_cache": True,
        "return_dict_in_generate": False,
        **sampled,
    }


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    options: Mapping[str, Any],
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
        streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)  # whole words, as they are finished
    out: Any = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids.to(device), attention_mask=mask.to(device), streamer=streamer, **options
    )
    stops: set[int] = set(options["eos_token_id"] or ())
    answers: list[str] = []
    for row in out[:, width if decoder_only else 0 :].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        answers.append(str(tokenizer.decode(row[:end], skip_special_tokens=True)))
    return answers
