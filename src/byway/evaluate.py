"""How good is a run, on held-out rows: loss, perplexity or accuracy with the adapter and without, and exact match of generated answers.

Loss is the mean over labelled tokens (Σ nll / labels), perplexity its exponential. Exact match asks whether the whole answer equals the
reference, apart from white space around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from byway.core import disabled
from byway.data.documents import Completion, Conversation, Document
from byway.errors import BywayError, ConfigError, DataError
from byway.generate import Prompt, generate_text
from byway.tasks import Task, load, moved

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.recipe import Recipe
    from byway.recipe.sections import Data
    from byway.runs import Found

__all__ = ["Answer", "Evaluation", "ExactMatch", "evaluate_run", "exact_match", "run_examples"]

_LONGEST_ANSWER = 512


@dataclass(frozen=True)
class Answer:
    """One generated answer beside its reference."""

    where: str
    reference: str
    answer: str

    @property
    def right(self) -> bool:
        """Equal, apart from white space around them."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class ExactMatch:
    """Generated answers beside their references."""

    answers: tuple[Answer, ...]
    skipped: int = 0
    """Rows without a reference text (a tool call, plain tokens)."""

    @property
    def share(self) -> float:
        """Answers that are exactly right, over all compared."""
        return sum(a.right for a in self.answers) / max(len(self.answers), 1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on `rows` examples."""

    source: str
    rows: int
    adapter: dict[str, float]
    """Metrics with the adapter."""
    base: dict[str, float]
    """The same without it."""
    exact: ExactMatch | None = None
    base_exact: ExactMatch | None = None
    lines: tuple[str, ...] = field(default=())
    """What became of the rows."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""

        def finite(metrics: dict[str, float]) -> dict[str, float | None]:
            return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

        found: dict[str, Any] = {"source": self.source, "rows": self.rows, "adapter": finite(self.adapter), "base": finite(self.base)}
        for name, exact in (("adapter", self.exact), ("base", self.base_exact)):
            if exact is not None:
                found[name] |= {"exact_match": exact.share, "exact_match_rows": len(exact.answers)}
        return found


def evaluate_run(
    found: Found,
    *,
    data: str | None = None,
    limit: int | None = None,
    generate: bool = False,
    compare: bool = False,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    on_batch: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure a run on its held-out rows, or on `data` (read like them).

    Args:
        found: a run, or an adapter inside one.
        limit: so many rows at most.
        generate: also let the model answer (chat and prompt/completion rows); `compare`: the bare base too.
        max_new_tokens: default: one and a half times the longest reference.
        on_batch: hears (what is done, batches done, batches in all).

    Raises:
        ConfigError: no recipe, or nothing was held out and no `data` is named.
        DataError: no usable rows.
    """
    if found.recipe is None:
        raise ConfigError(f"{found.path} is not a run: there is no recipe.yaml that says how rows are read", "give the run's directory")
    task, source = _task(found.recipe, data, limit)
    model, tokenizer, _ = found.load()
    rows = task.encode(tokenizer, int(_embedding_rows(model)))
    examples = rows.evaluation or rows.train
    report = rows.reports["eval" if rows.evaluation else "train"]
    fast = task.language_model and _labels_only_holds(task, model, examples[:1])

    def heard(what: str) -> Callable[[int, int], None] | None:
        tell = on_batch
        return None if tell is None else lambda done, total: tell(what, done, total)

    adapter = task.evaluate(model, examples, labels_only=fast, on_batch=heard("with the adapter"))
    with disabled(model):
        base = task.evaluate(model, examples, labels_only=fast, on_batch=heard("without"))
    exact = base_exact = None
    if generate:
        documents = list(task.held_out.items if task.held_out is not None else task.documents.items)
        options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        exact = exact_match(model, tokenizer, documents, on_batch=heard("answers"), **options)
        if compare:
            with disabled(model):
                base_exact = exact_match(model, tokenizer, documents, on_batch=heard("answers of the base"), **options)
    return Evaluation(
        source=source, rows=len(examples), adapter=adapter, base=base, exact=exact, base_exact=base_exact, lines=tuple(report.lines())
    )


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[Document],
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Let `model` answer the last turn of each conversation (or complete each prompt) and compare with what stands there, greedily.

    Raises DataError where no document has a reference text.
    """
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so no answer can be generated")
    asked = [(document, *asked_of) for document in documents if (asked_of := _asked(document)) is not None]
    if not asked:
        raise DataError("no row has an answer to compare with", "exact match needs conversations or prompt/completion rows")
    if max_new_tokens is None:
        longest = max(len(ids) for ids in tokenizer([reference for _, _, reference, _ in asked], add_special_tokens=False).input_ids)
        max_new_tokens = min(longest + longest // 2 + 8, _LONGEST_ANSWER)
    answers: dict[int, str] = {}
    groups: dict[str, list[int]] = {}
    for number, (_, _, _, tools) in enumerate(asked):
        groups.setdefault(repr(tools), []).append(number)  # a batch shares one template call's tools
    for numbers in groups.values():
        done = len(answers)
        written = generate_text(
            model,
            tokenizer,
            [asked[n][1] for n in numbers],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            raw=True,
            tools=asked[numbers[0]][3],
            on_batch=None if on_batch is None else lambda now, _, before=done: on_batch(before + now, len(asked)),
        )
        answers |= dict(zip(numbers, written, strict=True))
    found = tuple(Answer(document.where, reference, answers[n]) for n, (document, _, reference, _) in enumerate(asked))
    return ExactMatch(found, len(documents) - len(asked))


def _asked(document: Document) -> tuple[Prompt, str, Any] | None:
    """(prompt, reference answer, tools), or None where there is no answer in words."""
    if isinstance(document, Conversation) and not document.unusable():
        last = document.messages[-1]
        return (document.messages[:-1], last["content"], document.tools) if last["content"].strip() else None
    if isinstance(document, Completion) and not document.unusable():
        return document.prompt, document.completion, None
    return None


def _task(recipe: Recipe, data: str | None, limit: int | None) -> tuple[Task[Any], str]:
    """The task over the rows to evaluate: nothing else is read than what is needed for them."""
    cls = load(recipe.data.task)
    seed = recipe.train.seed
    own = recipe.data
    if data is None and own.eval is None and own.eval_fraction is not None:
        return cls(replace(own, eval_limit=limit or own.eval_limit), seed=seed), "held-out share of the training rows"
    source = data if data is not None else own.eval
    if source is None:
        raise ConfigError("the run held no rows out (no data.eval), and none are named", "name a file with --data")
    if own.task == "classification" and own.labels is None:  # the classes are those of the training rows, in their order
        own = replace(own, labels=_class_names(cls(own, seed=seed)))
    bare = replace(own, train=source, limit=limit or own.eval_limit, eval=None, eval_limit=None, eval_fraction=None)
    return cls(bare, seed=seed), source if isinstance(source, str) else ", ".join(source)


def _class_names(task: Task[Any]) -> tuple[str, ...]:
    return tuple(task.base_options()["label_names"])


def run_examples(recipe: Recipe, tokenizer: Any, *, limit: int) -> list[list[int]]:
    """Token ids of the first `limit` held-out rows of a run (training rows where none were held out), as it encoded them."""
    own: Data = recipe.data
    source = own.eval if own.eval is not None else own.train
    if own.task == "classification" and own.labels is None:
        own = replace(own, labels=_class_names(load(own.task)(own, seed=recipe.train.seed)))
    few = replace(own, train=source, limit=limit, eval=None, eval_limit=None, eval_fraction=None)
    rows = load(own.task)(few, seed=recipe.train.seed).encode(tokenizer, len(tokenizer))
    return [list(example.input_ids) for example in rows.train]


def _embedding_rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _labels_only_holds(task: Task[Any], model: PreTrainedModel, examples: Sequence[Any]) -> bool:
    """Whether logits for labelled tokens alone give the plain loss on one row."""
    import torch

    from byway.tasks import evaluating

    batch = moved(task.collate(list(examples)), model.device)
    try:
        with evaluating(model), torch.no_grad():
            plain, _ = task.loss(model, batch)
            own, _ = task.loss(model, batch, labels_only=True)
    except BywayError:
        return False  # this model's head cannot be asked for some rows only: the plain way then
    return math.isclose(float(plain), float(own), rel_tol=1e-2 if model.dtype != torch.float32 else 1e-4)
