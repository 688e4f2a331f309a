"""The padding token, which tokenizer and configuration both name: decided once per loaded base, so that they agree.

Batches are padded with the tokenizer's token. The head of a decoder that classifies reads the last token that is not
the configuration's, so if the two differ it reads padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from byway.base.heads import HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["agree", "forget_impossible", "text_config"]


def forget_impossible(config: PreTrainedConfig) -> None:
    """Remove padding ids outside the vocabulary (-1 in old Llama files), with which no embedding can be built."""
    text = text_config(config)
    for part in () if text is None else (config, text):
        values = part.to_dict()
        index, size = values.get("pad_token_id"), values.get("vocab_size")
        if index is not None and size is not None and not _known(index, size):
            part.pad_token_id = None


def agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Give `tokenizer` and the configurations of `model` one padding token; return a note if they named two.

    The tokenizer's comes first. A model that counts positions by the padding id (RoBERTa) was trained with that of its
    configuration, and keeps it. A classifier of an encoder-decoder reads the state of the end token, which the
    tokenizer writes, so there the configuration takes that of the tokenizer too.
    """
    from byway.core.families.positions import Positions

    config: Any = model.config
    text = text_config(config)
    values = {} if text is None else text.to_dict()
    size = values.get("vocab_size")
    if text is None or size is None:
        return ""
    end = tokenizer.eos_token_id
    if config.is_encoder_decoder and type(model).__name__.endswith(HEADS["classification"].endings) and _known(end, size):
        config.eos_token_id = end
    stated, own = values.get("pad_token_id"), tokenizer.pad_token_id
    special: list[Any] = [end, tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    # an id that is a default of the configuration class may be an ordinary word here
    candidates = [Positions.of(model).padding_id, own, *(index for index in special if index == stated), *special, stated, 0]
    chosen = next(index for index in candidates if _known(index, size))
    if own != chosen:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    text.pad_token_id = chosen
    for other in (config, vars(model).get("generation_config")):  # only models that generate have one
        if other is not None and other.to_dict().get("pad_token_id") is not None:
            other.pad_token_id = chosen
    if own is None or own == chosen == (chosen if stated is None else stated):
        return ""
    told = "none" if stated is None else stated
    return f"its tokenizer pads with token {own}, its config.json with {told}, of {size:,} tokens: both use {chosen} now"


def text_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the configuration of the text model; None if there are several, each with a padding token of its own."""
    try:
        return config.get_text_config()
    except ValueError:
        return None


def _known(index: object, size: int) -> bool:
    return isinstance(index, int) and 0 <= index < size
