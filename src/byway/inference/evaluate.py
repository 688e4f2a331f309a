"""How good is a run, on held-out rows: loss, perplexity or accuracy with the adapter and without, and exact match of generated answers.

Loss is the mean over labelled tokens (Σ nll / labels), perplexity its exponential. Exact match asks whether the whole answer equals the
reference, apart from white space around it.

Rows are computed as in training: packed, logits at labels only, common heads once, each if it gives the plain loss on a few of the rows to
be measured. Nothing is differentiated, so that the loss is all that has to agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from byway.core.attach import disabled
from byway.data.batches import plan_epoch
from byway.data.documents import Completion, Conversation, Document
from byway.data.encode import Example
from byway.engine.shared_prefix import Sharing
from byway.errors import ConfigError, DataError
from byway.inference.generate import Prompt, generate_text
from byway.tasks.task import Task, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.inference.runs import Found
    from byway.recipe.recipe import Recipe
    from byway.recipe.sections import Data
    from byway.train.levers.engaged import Engaged

__all__ = ["Answer", "Evaluation", "ExactMatch", "evaluate_run", "exact_match", "measure", "run_examples"]

_LONGEST_ANSWER = 512
_MICRO_TOKENS = 2048
"""Tokens of one forward where the recipe leaves it open: nothing is kept for a backward pass."""
_WORTH = 0.05
"""Packed where this share of the positions, or more, need not be computed: attending row by row costs about as much. `on`: always."""
_PLAIN: dict[str, Any] = {"pack": "off", "labels_only": "off", "share_prefix": "off"}


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
    computed: str = ""
    """How they were computed: packed or padded, which logits, and why something was not saved."""

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
    plain: bool = False,
    on_batch: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure a run on its held-out rows, or on `data` (read like them).

    Args:
        found: a run, or an adapter inside one.
        limit: so many rows at most.
        generate: also let the model answer (chat and prompt/completion rows); `compare`: the bare base too.
        max_new_tokens: default: one and a half times the longest reference.
        plain: padded, all logits: what the savings are compared with, whatever the recipe's ``engine`` says.
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

    def heard(what: str) -> Callable[[int, int], None] | None:
        tell = on_batch
        return None if tell is None else lambda done, total: tell(what, done, total)

    recipe = replace(found.recipe, engine=replace(found.recipe.engine, **_PLAIN)) if plain else found.recipe
    adapter, base, computed = measure(model, task, examples, recipe, hear=heard)
    exact = base_exact = None
    if generate:
        documents = list(task.held_out.items if task.held_out is not None else task.documents.items)
        options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        exact = exact_match(model, tokenizer, documents, on_batch=heard("answers"), **options)
        if compare:
            with disabled(model):
                base_exact = exact_match(model, tokenizer, documents, on_batch=heard("answers of the base"), **options)
    return Evaluation(
        source=source,
        rows=len(examples),
        adapter=adapter,
        base=base,
        exact=exact,
        base_exact=base_exact,
        lines=tuple(report.lines()),
        computed=computed,
    )


def measure(
    model: PreTrainedModel,
    task: Task[Any],
    examples: Sequence[Any],
    recipe: Recipe,
    *,
    hear: Callable[[str], Callable[[int, int], None] | None] = lambda what: None,
) -> tuple[dict[str, float], dict[str, float], str]:
    """(metrics of `model` as it stands, metrics with its adapters disabled, how they were computed).

    `recipe`: its ``engine`` says which savings are tried. Rows are packed, ``auto``, where that saves 5% or more of the positions; what is
    ``on`` and does not stand here is off, with its reason: an evaluation must not fail for it. `hear`: what is measured → who hears
    (batches done, batches in all).

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("there are no rows to evaluate on")
    asked = recipe.train.micro_batch_tokens
    micro_tokens = _MICRO_TOKENS if asked == "auto" else 2 * asked
    saved = _saved(task, examples, recipe, micro_tokens)
    little = "" if recipe.engine.pack != "auto" or saved >= _WORTH else f"packing saves {saved:.1%} of the positions, which is not worth it"
    if little:
        recipe = replace(recipe, engine=replace(recipe.engine, pack="off"))
    engaged = _engaged(model, task, examples, recipe, micro_tokens)
    options: dict[str, Any] = {
        "micro_tokens": micro_tokens,
        "pack": engaged.levers.pack,
        "labels_only": engaged.levers.labels_only,
        "sharing": engaged.sharing,
    }
    with engaged.engaged(model):
        adapter = task.evaluate(model, examples, on_batch=hear("with the adapter"), **options)
        with disabled(model):
            base = task.evaluate(model, examples, on_batch=hear("without"), **options)
    return adapter, base, _computed(engaged, task, little)


def _saved(task: Task[Any], examples: Sequence[Any], recipe: Recipe, micro_tokens: int) -> float:
    """The share of the positions of a padded evaluation that a packed one would not compute."""
    lengths = [task.length(example) for example in examples]
    options: dict[str, Any] = {"epoch": 0, "seed": 0, "rows_per_step": len(lengths), "micro_tokens": micro_tokens}
    (padded,) = plan_epoch(lengths, pack=False, **options)
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in padded)
    tokens = sum(lengths)
    if recipe.engine.share_prefix != "off" and all(isinstance(example, Example) for example in examples):
        sharing = Sharing(examples)
        (packs,) = plan_epoch(lengths, pack=True, rearrange=sharing.rearranged, **options)
        tokens = sum(map(sharing.tokens, packs))
    return 1 - tokens / max(positions, 1)


def _engaged(model: PreTrainedModel, task: Task[Any], examples: Sequence[Any], recipe: Recipe, micro_tokens: int) -> Engaged:
    """The savings that `recipe` allows, that save something in a forward alone, and that prove themselves on these examples."""
    import torch

    from byway.base.arithmetic.int8 import exact_products
    from byway.train.levers.engaged import choose
    from byway.train.levers.share_prefix import with_sharing

    own = recipe.engine
    asked = {"pack": own.pack, "labels_only": own.labels_only, "share_prefix": own.share_prefix}
    wishes: dict[str, Any] = {name: "off" if wish == "off" else "auto" for name, wish in asked.items()}
    engine = replace(own, **wishes, frontier="off", recompute="off")
    one_step = replace(recipe.train, rows_per_step=len(examples), tokens_per_step=None, epochs=1, max_steps=None)
    with torch.no_grad(), exact_products(model):
        engaged, probe = choose(model, task, examples, engine)
        return with_sharing(model, task, examples, engaged, probe, replace(recipe, engine=engine, train=one_step), micro_tokens)


def _computed(engaged: Engaged, task: Task[Any], little: str) -> str:
    """One sentence on what was saved, with the reason for what was not; `little`: why it was not tried to pack."""
    levers = engaged.levers
    reasons = {**levers.reasons, **({"pack": little} if little else {})}

    def why(lever: str) -> str:
        return f" ({reasons[lever]})" if lever in reasons else ""

    said = [f"rows packed, no padding{why('pack')}" if levers.pack else f"rows padded, similar lengths together{why('pack')}"]
    if task.language_model:
        said.append(f"logits at labels only{why('labels_only')}" if levers.labels_only else f"all logits{why('labels_only')}")
    if engaged.sharing is not None:
        said.append(f"common heads once ({engaged.why_sharing})")
    return ", ".join(said)


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
