"""Add tokens to a base: to its tokenizer, and as rows of its embedding and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from byway.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["add_to_model", "add_to_tokenizer"]


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[str], name: str) -> dict[int, list[int]]:
    """Add `tokens`, each matched as it is written; return the id of every new one → the ids it was split into before.

    A token that is in the vocabulary already keeps its id and is not in the result.

    Raises:
        ConfigError: the base `name` has no tokenizer.
    """
    from transformers import AddedToken

    if not tokens:
        return {}
    if tokenizer is None:
        raise ConfigError(f"the base {name!r} has no tokenizer, so no tokens can be added to it", "leave add_tokens out")
    there = tokenizer.get_vocab()
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens if token not in there}
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in pieces])
    added = tokenizer.get_vocab()
    return {added[token]: list(ids) for token, ids in pieces.items()}


def add_to_model(model: PreTrainedModel, new: dict[int, list[int]]) -> None:
    """Give every new id a row in the embedding and in the head: the mean of the rows of the ids it was split into.

    The result depends on nothing random, so that the same base is made wherever the tokens are added again. A
    vocabulary that has room (rows that no token uses) is not enlarged.
    """
    if not new:
        return
    embedding: Any = model.get_input_embeddings()
    rows = max(new) + 1
    if rows > embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
        embedding = model.get_input_embeddings()
    _fill(embedding, new)
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        _fill(head, new)


def _fill(module: nn.Module, new: dict[int, list[int]]) -> None:
    import torch

    old = min(new)
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):  # a head may have a bias
            for token, pieces in new.items():
                source = parameter[pieces] if pieces else parameter[:old]
                parameter[token] = source.float().mean(0).to(parameter.dtype)
