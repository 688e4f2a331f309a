"""What rows are for: how they are read, what head they need, their loss and their measure. One file a task.

To add one: write ``tasks/<name>.py`` with one :class:`Task`, and name it in :data:`TASKS` beside the value of ``data.task`` that it serves.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from byway.data.batches import plan_epoch
from byway.data.prepare import read_documents
from byway.engine.attention.unpack import BOUNDS
from byway.engine.loss.cross_entropy import NLL, LossTerms
from byway.engine.shared_prefix import share
from byway.errors import ConfigError, DataError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.data.formats import Documents
    from byway.data.report import DataReport
    from byway.engine.shared_prefix import Sharing
    from byway.recipe.sections import Data

__all__ = ["READ", "TASKS", "Rows", "Task", "evaluating", "load"]

TASKS: Mapping[str, str] = {"chat": "causal_lm", "text": "causal_lm", "classification": "classification"}
"""``data.task`` → the file here that does it."""

READ = "positions_read"
"""Under this key of a batch stand the positions that a head reads, (b, t) or (1, T) as the layers see them; the model is not given it."""

E = TypeVar("E")


def _nothing(indices: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Rows(Generic[E]):
    """Examples to learn from and to evaluate on, with what became of the rows they come from."""

    train: Sequence[E]
    evaluation: Sequence[E]
    reports: Mapping[str, DataReport]
    """``train`` and, where there are rows for it, ``eval``."""
    notes: tuple[str, ...] = ()


class Task(ABC, Generic[E]):
    """One task over the rows of a recipe's ``data`` section. `E` is its example: token ids, what is learned, and where it comes from."""

    head: ClassVar[str]
    """The head that it needs, as :func:`byway.load_base` calls it."""
    criterion: ClassVar[str] = "loss"
    """The metric by which evaluations are compared."""
    higher_is_better: ClassVar[bool] = False
    language_model: ClassVar[bool] = False
    """Whether its loss is that of next-token prediction, which the engine knows how to save on."""
    among: ClassVar[Sequence[str]]
    """The formats that detection may choose from."""

    def __init__(self, data: Data, *, seed: int, terms: LossTerms = NLL) -> None:
        """Read the rows that `data` names; nothing is tokenized yet. `terms` are learned by, not measured. Raises DataError."""
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
        return read_documents(source, format=data.format, columns=data.columns, among=self.among, skip_bad=data.skip_bad_rows, limit=limit)

    def base_options(self) -> dict[str, Any]:
        """The keywords for :func:`byway.load_base` that this task adds."""
        return {"task": self.head}

    def resolved(self) -> Data:
        """The ``data`` section with what the rows have settled, so that the run's own recipe says it; default unchanged."""
        return self.data

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Rows[E]:
        """The rows as the model will see them. Raises DataError where nothing can be learnt."""

    @abstractmethod
    def collate(self, examples: Sequence[E], *, packed: bool = False) -> dict[str, Any]:
        """One batch for :meth:`loss`, on the CPU."""

    @abstractmethod
    def length(self, example: E) -> int:
        """Its tokens."""

    @abstractmethod
    def labels(self, example: E) -> int:
        """How many labels it puts into the loss; over a batch, :meth:`loss` counts the sum of these."""

    @abstractmethod
    def where(self, example: E) -> str:
        """The row it comes from."""

    @abstractmethod
    def content(self, example: E) -> object:
        """What is learnt from it, without where it comes from."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
        """The SUM of the losses over the labels of a batch (float32; :attr:`terms` are in it), and their number."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> dict[str, float]:
        """Sums over one batch, to be added up over all: ``loss`` (−log p alone), ``labels`` and what the task counts besides."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What the sums over all batches say, ``loss`` (a mean) among it."""

    def cut(self, example: E, tokens: int) -> E:
        """A piece of `example` of at most `tokens` tokens (≥ 4) that still has a label, for proofs and measurements before a run.

        Default: the example as it is.
        """
        return example

    def read_by_head(self, examples: Sequence[E]) -> dict[str, list[tuple[int, ...]]]:
        """Which tokens of each example the head may read, in words → positions; fewest first.

        What a head does read is found out from the loss; this is what is tried. Default nothing: all of them.
        """
        return {}

    def reading(self, examples: Sequence[E], rule: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`batch`, collated from `examples`, with the positions that by `rule` of :meth:`read_by_head` are read."""
        starts = batch.get("cu_seq_lens_q")
        table = batch["input_ids"]
        marked = torch.zeros(table.shape if starts is None else (1, int(starts[-1])), dtype=torch.bool, device=table.device)
        begins = [i * table.shape[1] for i in range(len(examples))] if starts is None else starts.tolist()
        flat = [begin + place for begin, places in zip(begins, self.read_by_head(examples)[rule], strict=False) for place in places]
        marked.view(-1)[flat] = True
        return {**batch, READ: marked}

    def digest(self, examples: Sequence[E]) -> str:
        """SHA-256 over the contents, in their order."""
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
        share_prefix: bool = False,
        sharing: Sharing | None = None,
        read: str | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        around: Callable[[Sequence[int]], AbstractContextManager[None]] = _nothing,
    ) -> dict[str, float]:
        """Metrics of `model` on `examples`, in evaluation mode; afterwards its modes are what they were and nothing has changed.

        `pack`: inside :func:`byway.engine.attention.packing.packing` only; `share_prefix`: then what rows begin with in common is
        computed once (:func:`byway.engine.shared_prefix.share`); `sharing`: so too, and alike rows are put together. `read`:
        inside :func:`byway.engine.last_layer.last_layer`, which rule of :meth:`read_by_head` holds. `on_batch` is told (batches done,
        batches in all). `around`: the indices of a batch → a context in which it is computed.
        """
        if not examples:
            raise DataError("there are no rows to evaluate on")
        lengths = [self.length(example) for example in examples]
        together = None if sharing is None else sharing.rearranged
        (batches,) = plan_epoch(
            lengths, epoch=0, seed=0, rows_per_step=len(lengths), micro_tokens=micro_tokens, pack=pack, rearrange=together
        )
        shared = share_prefix or sharing is not None
        device = next(model.parameters()).device
        sums: dict[str, float] = {}
        with evaluating(model), torch.no_grad():
            for number, indices in enumerate(batches, start=1):
                chosen = [examples[i] for i in indices]
                batch = self.collate(chosen, packed=pack)
                batch = share(batch) if shared else batch
                batch = moved(batch if read is None else self.reading(chosen, read, batch), device)
                with around(indices):
                    measured = self.measure(model, batch, labels_only=labels_only)
                for name, value in measured.items():
                    sums[name] = sums.get(name, 0.0) + value
                if on_batch is not None:
                    on_batch(number, len(batches))
        return self.metrics(sums)


def load(name: str) -> type[Task[Any]]:
    """The task class that serves ``data.task: name``. Raises ConfigError."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r} (there are: {listed(TASKS)})", nearest(name, TASKS))
    module = importlib.import_module(f"byway.tasks.{TASKS[name]}")
    (found,) = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Task) and c.__module__ == module.__name__]
    return found


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; bounds of packed documents stay where each layer's attention reads them, on the CPU."""
    return {key: value.to(device) if isinstance(value, Tensor) and key not in BOUNDS else value for key, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context every module is in evaluation mode; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def split(documents: Documents, fraction: float, seed: int, limit: int | None) -> tuple[Documents, Documents]:
    """(rest, held out): a share of the documents, drawn by `seed`, both in their own order; at least one in each."""
    count = len(documents.items)
    if count < 2:
        raise DataError(f"{documents.source}: data.eval_fraction needs at least 2 rows, there is {count}", "name rows with data.eval")
    drawn = random.Random(f"byway held out, seed {seed}").sample(range(count), min(max(round(fraction * count), 1), count - 1))
    chosen = set(drawn)
    out = [document for i, document in enumerate(documents.items) if i in chosen]
    rest = [document for i, document in enumerate(documents.items) if i not in chosen]
    return replace(documents, items=rest), replace(documents, items=out[:limit])
