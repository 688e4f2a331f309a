"""Rows to examples in one call, for the recipe's ``data`` section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from byway.data.encode import Encoded, Overflow, encode
from byway.data.formats import FORMATS, Documents, to_documents
from byway.data.rows import Source, read_rows
from byway.data.template import Learn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GENERATIVE", "prepare", "read_documents"]

GENERATIVE = tuple(entry.name for entry in FORMATS if entry.name != "classification")
"""The formats that chat and text tasks choose from."""


def read_documents(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    among: Iterable[str] | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Documents:
    """Read `source` and convert its rows; see :func:`byway.data.rows.read_rows` and :func:`byway.data.formats.to_documents`."""
    rows = read_rows(source, skip_bad=skip_bad, limit=limit)
    return to_documents(rows, format=format, columns=columns, among=among, skip_bad=skip_bad)


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    learn: Learn = "responses",
    overflow: Overflow = "truncate",
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    control_in_text: bool = True,
    vocabulary_size: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Encoded:
    """Read, convert and encode `source` for a generative task; the options are those of the three steps."""
    documents = read_documents(source, format=format, columns=columns, among=GENERATIVE, skip_bad=skip_bad, limit=limit)
    return encode(
        documents,
        tokenizer,
        max_length=max_length,
        learn=learn,
        overflow=overflow,
        template=template,
        template_kwargs=template_kwargs,
        control_in_text=control_in_text,
        vocabulary_size=vocabulary_size,
    )
