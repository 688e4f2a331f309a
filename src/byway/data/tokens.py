"""``text with spans -> token ids and labels``, in batches.

Ordinary text is tokenized whole, so that its ids are those of the tokenizer's own call. A text is cut only where it has
to be: around control-token strings that are text, and where a token would cross the beginning of a span in the loss
(the prompt ends there when served).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from byway.data.bad_rows import BadRow
from byway.data.control import Control, Span, added_ids
from byway.data.template import Piece
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Tokenizer"]

IGNORED = -100
"""The label of a token that is not in the loss."""


class Tokenizer:
    """A fast tokenizer with the facts about it that the encoder needs.

    ``prefix``, ``suffix``: the special tokens it puts around a text ([BOS]; [CLS] and [SEP]). ``eos``: its end token,
    or None. Raises :class:`ConfigError` for a tokenizer without character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} has no character offsets, so answers cannot be told from prompts",
                hint="use the model's fast tokenizer (tokenizer.json)",
            )
        self.own = tokenizer
        self._backend: Any = cast("Any", tokenizer).backend_tokenizer
        self.control = Control(tokenizer)
        self.added = added_ids(tokenizer)
        self.unknown: set[int] = {cast("int", tokenizer.unk_token_id)} if tokenizer.unk_token_id is not None else set()
        self.eos: int | None = cast("int | None", tokenizer.eos_token_id)
        bare, whole = self._ids("a")[0], tokenizer("a", add_special_tokens=True).input_ids
        at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
        self.prefix: list[int] = list(whole[:at])
        self.suffix: list[int] = list(whole[at + len(bare) :])
        self.longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        after_newline = [entry for entry, (_, end) in zip(*self._ids("\na"), strict=True) if end > 1]
        self.adds_space = after_newline != bare  # SentencePiece writes a space before the first word

    def encode(self, pieces: Sequence[Piece]) -> list[tuple[list[int], list[int]] | BadRow]:
        """Return ids and labels of each piece, without special tokens around it; a BadRow if it cannot be encoded."""
        whole = [index for index, piece in enumerate(pieces) if not piece.literal]
        results: list[tuple[list[int], list[int]] | BadRow | None] = [None] * len(pieces)
        if whole:
            batch = self.own(
                [pieces[index].text for index in whole],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for index, ids, offsets in zip(whole, batch["input_ids"], batch["offset_mapping"], strict=True):
                starts = [start for start, _ in offsets]
                if not _straddles(pieces[index], starts, offsets):
                    results[index] = (ids, _labels(ids, starts, pieces[index].in_loss))
        return [self._in_parts(piece) if result is None else result for piece, result in zip(pieces, results, strict=True)]

    def _in_parts(self, piece: Piece) -> tuple[list[int], list[int]] | BadRow:
        """Tokenize the parts between cuts; no token crosses a cut."""
        cuts = sorted({0, len(piece.text), *(start for start, _ in piece.in_loss), *(edge for span in piece.literal for edge in span)})
        literal = {start for start, _ in piece.literal}
        ids: list[int] = []
        starts: list[int] = []
        for start, end in pairwise(cuts):
            text = piece.text[start:end]
            try:
                part, offsets = self._as_text(text) if start in literal else self._part(text, first=start == 0)
            except BadRow as error:
                return error
            ids += part
            starts += [start + offset for offset, _ in offsets]
        return ids, _labels(ids, starts, piece.in_loss)

    def _ids(self, text: str) -> tuple[list[int], list[Span]]:
        found = self.own(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _part(self, text: str, first: bool) -> tuple[list[int], list[Span]]:
        """Tokenize a part of a text: without the space that SentencePiece puts before the first word."""
        if first or not self.adds_space:
            return self._ids(text)
        ids, offsets = self._ids("\n" + text)
        kept = [(entry, (start - 1, end - 1)) for entry, (start, end) in zip(ids, offsets, strict=True) if end > 1]
        if any(start < 0 for _, (start, _) in kept):
            return self._ids(text)
        return [entry for entry, _ in kept], [span for _, span in kept]

    def _as_text(self, text: str) -> tuple[list[int], list[Span]]:
        """Tokenize the string of a control token as ordinary text. Raises BadRow if the vocabulary cannot."""
        ids = self._without_added(text)
        if self.added.intersection(ids):  # the vocabulary contains it as a word: break the word
            ids = [entry for character in text for entry in self._without_added(character)]
        if self.added.intersection(ids) - self.unknown:
            raise BadRow(f"contains {text}, which the tokenizer can only encode as a control token")
        return ids, [(0, len(text))] * len(ids)

    def _without_added(self, text: str) -> list[int]:
        """Return the tokens of `text` in the middle of a line, without those added to the vocabulary."""
        newline, found = self._raw("\n"), self._raw("\n" + text)  # SentencePiece writes a space before the first word
        return found[len(newline) :] if found[: len(newline)] == newline else self._raw(text)

    def _raw(self, text: str) -> list[int]:
        """Run the tokenizer's steps except the one that finds added tokens (it has no option for those not special)."""
        steps = self._backend
        if steps.normalizer is not None:
            text = steps.normalizer.normalize_str(text)
        words = [text] if steps.pre_tokenizer is None else [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in steps.model.tokenize(word)]


def _straddles(piece: Piece, starts: Sequence[int], offsets: Sequence[Span]) -> bool:
    """True if a token crosses the beginning of a span in the loss."""
    before = [(start, bisect_right(starts, start - 1)) for start, _ in piece.in_loss]
    return any(count and offsets[count - 1][1] > start for start, count in before)


def _labels(ids: Sequence[int], starts: Sequence[int], in_loss: Sequence[Span]) -> list[int]:
    """Return the id of each token that begins inside a span in the loss, else -100."""
    labels = [IGNORED] * len(ids)
    for begin, end in in_loss:
        low, high = bisect_right(starts, begin - 1), bisect_right(starts, end - 1)
        labels[low:high] = ids[low:high]
    return labels
