"""The base class of tasks, with what is the same for all of them: reading rows, holding some out, evaluating."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from byway.core.modes import evaluating
from byway.data.batches import plan_epoch
from byway.data.formats import read_documents
from byway.data.preview import PreviewRow
from byway.engine.attention.unpack import BOUNDS
from byway.engine.loss.cross_entropy import NLL, LossTerms
from byway.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.data.encode import Encoded
    from byway.data.formats import Documents
    from byway.data.report import DataReport
    from byway.recipe.sections import Data

__all__ = ["READ", "Rows", "Task", "moved"]

READ = "positions_read"
"""Key of a batch: the positions a head reads, bool, (b, t) or (1, T) as the layers see them; no input of the model."""

E = TypeVar("E")

_OPTIONAL = {
    "labels": "data.labels names the classes of a classification task",
    "template": "data.template is a chat template",
    "template_variables": "data.template_variables are for a chat template",
    "learn": "data.learn: last selects the last turn of a chat",
}
"""The keys of the ``data`` section that belong to some tasks only."""


@dataclass(frozen=True)
class Rows(Generic[E]):
    """The examples to train and to evaluate on, with a report on the rows they come from."""

    train: Sequence[E]
    evaluation: Sequence[E]
    reports: Mapping[str, DataReport]
    """``train`` and, if there are evaluation rows, ``eval``."""
    notes: tuple[str, ...] = ()


class Task(ABC, Generic[E]):
    """One task over the rows of a recipe's ``data`` section. `E` is the type of its examples."""

    head: ClassVar[str]
    """The head it needs: a key of :data:`byway.base.heads.HEADS`."""
    formats: ClassVar[Sequence[str]]
    """The row formats that detection chooses from: names of :data:`byway.data.formats.FORMATS`."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """The keys of the ``data`` section it takes among ``labels``, ``template``, ``template_variables`` and ``learn``
    (``learn: last``)."""
    criterion: ClassVar[str] = "loss"
    """The metric by which evaluations are compared."""
    higher_is_better: ClassVar[bool] = False
    language_model: ClassVar[bool] = False
    """True if the loss is that of next-token prediction, for which the engine has further optimizations."""

    def __init__(self, data: Data, *, seed: int, terms: LossTerms = NLL) -> None:
        """Read the rows that `data` names; nothing is tokenized yet.

        Args:
            data: the recipe's ``data`` section.
            seed: selects the rows of ``data.eval_fraction``.
            terms: label smoothing and z-loss of the training loss; evaluations leave them out.

        Raises:
            ConfigError: a key of `data` does not go with this task; found before anything is read.
            DataError: rows that cannot be read.
        """
        if problems := self.check(data):
            raise ConfigError("; ".join(why for _, why in problems))
        self.data = data
        self.terms = terms
        self.pad_id = 0
        documents = self._read(data.train, data.limit)
        held_out = None if data.eval is None else self._read(data.eval, data.eval_limit)
        if data.eval_fraction is not None:
            documents, held_out = split(documents, data.eval_fraction, seed, data.eval_limit)
        self.documents, self.held_out = documents, held_out

    def _read(self, source: str | tuple[str, ...], limit: int | None) -> Documents:
        data = self.data
        return read_documents(
            source, format=data.format, columns=data.columns, among=self.formats, skip_bad=data.skip_bad_rows, limit=limit
        )

    @classmethod
    def check(cls, data: Data) -> list[tuple[str, str]]:
        """Return (key, what is wrong) for each key of the ``data`` section that does not go with this task."""
        given = {
            "labels": data.labels is not None,
            "template": data.template is not None,
            "template_variables": bool(data.template_variables),
            "learn": data.learn == "last",
        }
        wrong = [key for key, is_given in given.items() if is_given and key not in cls.keys]
        return [(key, f"{_OPTIONAL[key]}, but data.task is {data.task}") for key in wrong]

    @classmethod
    def complete(cls, data: Data) -> bool:
        """True if `data` says all that this task needs; False if :meth:`resolved` has to complete it from the rows."""
        return True

    def resolved(self) -> Data:
        """Return the ``data`` section completed from rows and files, as the run's own recipe records it."""
        return self.data

    def base_options(self) -> dict[str, Any]:
        """Return the keyword arguments for :func:`byway.load_base` that this task adds."""
        return {"task": self.head}

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the base's tokenizer what the ``data`` section says about text; it is saved with the adapter."""

    def encode(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Rows[E]:
        """Turn the rows into examples as the model will see them.

        Raises:
            ConfigError: there is no tokenizer, or one that does not suit.
            DataError: rows that do not fit the task, or none that is usable.
        """
        train = self.encode_documents(self.documents, tokenizer, vocabulary_size)
        if self.held_out is None:
            return Rows(train.examples, (), {"train": train.report})
        held_out = self.encode_documents(self.held_out, tokenizer, vocabulary_size)
        common = len(train.keys & held_out.keys)
        notes = (f"evaluation examples that are also training examples: {common:,}",) if common else ()
        return Rows(train.examples, held_out.examples, {"train": train.report, "eval": held_out.report}, notes)

    @abstractmethod
    def encode_documents(self, documents: Documents, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Encoded[E]:
        """Turn the documents of one source into examples. Raises as :meth:`encode`."""

    @abstractmethod
    def collate(self, examples: Sequence[E], *, packed: bool = False) -> dict[str, Any]:
        """Return one batch for :meth:`loss`, on the CPU; its labels are under ``labels``."""

    @abstractmethod
    def length(self, example: E) -> int:
        """Return the number of tokens of an example."""

    @abstractmethod
    def labels(self, example: E) -> int:
        """Return the number of labels an example adds to the loss, as :meth:`loss` counts them."""

    @abstractmethod
    def where(self, example: E) -> str:
        """Return the address of the row an example comes from."""

    @abstractmethod
    def content(self, example: E) -> object:
        """Return the training content of an example, without its address; its repr must be stable."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
        """Return the SUM of the losses over the labels of a batch (float32, with :attr:`terms`), and their number."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> dict[str, float]:
        """Return sums over one batch: ``loss`` (−log p alone), ``labels``, and whatever :meth:`metrics` needs."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics from the sums over all batches: ``loss`` (mean over labels), :attr:`criterion`, others."""

    def cut(self, example: E, tokens: int) -> E:
        """Return a piece, with a label, of at most `tokens` (≥ 4) tokens, for trials before a run; default: all."""
        return example

    def read_by_head(self, examples: Sequence[E]) -> dict[str, list[tuple[int, ...]]]:
        """Return candidate rules for the tokens that a head reads: a rule in words → its positions in each example.

        Fewest positions first; the loss tells which rule holds. Default: none, the head may read every position.
        """
        return {}

    def reading(self, examples: Sequence[E], rule: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return `batch`, collated from `examples`, with the positions of `rule` (:meth:`read_by_head`) marked."""
        starts = batch.get("cu_seq_lens_q")
        table = batch["input_ids"]
        marked = torch.zeros(table.shape if starts is None else (1, int(starts[-1])), dtype=torch.bool, device=table.device)
        begins = [i * table.shape[1] for i in range(len(examples))] if starts is None else starts.tolist()
        flat = [begin + place for begin, places in zip(begins, self.read_by_head(examples)[rule], strict=False) for place in places]
        marked.view(-1)[flat] = True
        return {**batch, READ: marked}

    def describe(self, examples: Sequence[E]) -> list[str]:
        """Return lines on all examples of one source for ``byway data``; default: none."""
        return []

    def preview(self, example: E, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
        """Return an example for display; default: its address and size, without text."""
        return PreviewRow(self.where(example), f"{self.length(example):,} tokens", ())

    def digest(self, examples: Sequence[E]) -> str:
        """Return the SHA-256 of the contents, in order."""
        state = hashlib.sha256()
        for example in examples:
            state.update(repr(self.content(example)).encode())
        return state.hexdigest()

    def evaluate(
        self,
        model: nn.Module,
        examples: Sequence[E],
        *,
        micro_tokens: int = 2048,
        pack: bool = False,
        labels_only: bool = False,
        rearrange: Callable[..., Any] | None = None,
        batch: Callable[[Sequence[E]], dict[str, Any]] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        around: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None,
    ) -> dict[str, float]:
        """Return the metrics of `model` on `examples`, in evaluation mode; every module's mode is restored afterwards.

        Args:
            micro_tokens: tokens of one forward pass.
            pack: inside :func:`byway.engine.attention.packing.packing` only.
            labels_only: the output head runs on the tokens in the loss only.
            rearrange: puts rows together that share a prefix (:meth:`byway.engine.shared_prefix.Sharing.rearranged`).
            batch: examples → the batch of a forward pass, on the model's device; default :meth:`collate`.
            on_batch: called with (batches done, number of batches).
            around: indices of a batch's examples → a context in which it is computed.

        Raises:
            DataError: there are no examples.
        """
        if not examples:
            raise DataError("there are no rows to evaluate on")
        lengths = [self.length(example) for example in examples]
        (batches,) = plan_epoch(
            lengths, epoch=0, seed=0, rows_per_step=len(lengths), micro_tokens=micro_tokens, pack=pack, rearrange=rearrange
        )
        device = next(model.parameters()).device
        sums: dict[str, float] = {}
        with evaluating(model), torch.no_grad():
            for number, indices in enumerate(batches, start=1):
                chosen = [examples[i] for i in indices]
                inputs = moved(self.collate(chosen, packed=pack), device) if batch is None else batch(chosen)
                with nullcontext() if around is None else around(indices):
                    measured = self.measure(model, inputs, labels_only=labels_only)
                for name, value in measured.items():
                    sums[name] = sums.get(name, 0.0) + value
                if on_batch is not None:
                    on_batch(number, len(batches))
        return self.metrics(sums)


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `batch` on `device`; the bounds of packed documents stay on the CPU, where attention reads them."""
    return {key: value.to(device) if isinstance(value, Tensor) and key not in BOUNDS else value for key, value in batch.items()}


def split(documents: Documents, fraction: float, seed: int, limit: int | None) -> tuple[Documents, Documents]:
    """Return (rest, held out): `fraction` of the documents, drawn by `seed`, in order; neither part is empty."""
    count = len(documents.items)
    if count < 2:
        raise DataError(f"{documents.source}: data.eval_fraction needs at least 2 rows, there is {count}", "name rows with data.eval")
    drawn = random.Random(f"byway held out, seed {seed}").sample(range(count), min(max(round(fraction * count), 1), count - 1))
    chosen = set(drawn)
    out = [document for i, document in enumerate(documents.items) if i in chosen]
    rest = [document for i, document in enumerate(documents.items) if i not in chosen]
    return replace(documents, items=rest), replace(documents, items=out[:limit])
