"""Evaluate a run on held-out rows: metrics with and without the adapter, and exact match of generated answers.

Loss is the mean over the tokens in the loss (Σ nll / labels), perplexity its exponential. An exact match is an answer
that equals the reference, apart from white space around both.

Rows are computed as in training: packed, logits at labels only, shared prefixes once. Each optimization is used if it
gives the plain loss on a few of the rows to be measured; there are no gradients to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from byway.base.arithmetic.int8 import exact_products
from byway.core.attach import disabled
from byway.data.batches import plan_epoch
from byway.data.documents import Completion, Conversation, Document
from byway.data.encode import Example
from byway.engine.shared_prefix import Sharing
from byway.errors import ConfigError, DataError
from byway.inference.generate import Prompt, generate_text
from byway.inference.settings import left_aside
from byway.tasks import load
from byway.tasks.task import Task
from byway.train.levers.choose import choose
from byway.train.levers.engaged import Engaged
from byway.train.levers.share_prefix import sharing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.inference.runs import Found
    from byway.recipe.recipe import Recipe

__all__ = ["Answer", "Evaluation", "ExactMatch", "evaluate_run", "exact_match", "measure", "run_examples"]

_LONGEST_ANSWER = 512
_MICRO_TOKENS = 2048
"""Tokens of one forward pass if the recipe leaves it open; nothing is kept for a backward pass."""
_WORTH = 0.05
"""Smallest share of positions saved for which ``engine.pack: auto`` packs: attention row by row costs about as much."""
_PLAIN: dict[str, Any] = {"pack": "off", "labels_only": "off", "share_prefix": "off"}


@dataclass(frozen=True)
class Answer:
    """A generated answer and its reference."""

    where: str
    reference: str
    answer: str

    @property
    def right(self) -> bool:
        """True if they are equal, apart from white space around them."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class ExactMatch:
    """Generated answers and their references."""

    answers: tuple[Answer, ...]

    @property
    def share(self) -> float:
        """Share of answers that match exactly."""
        return sum(a.right for a in self.answers) / max(len(self.answers), 1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics on `rows` examples."""

    source: str
    rows: int
    adapter: dict[str, float]
    """Metrics with the adapter."""
    base: dict[str, float]
    """Metrics without it."""
    exact: ExactMatch | None = None
    base_exact: ExactMatch | None = None
    lines: tuple[str, ...] = ()
    """The report on the rows."""
    computed: str = ""
    """The optimizations that were used, and the reasons for those that were not."""
    left_aside: str = ""
    """The base's generation settings that did not apply to generated answers."""

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""

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
    stop: Sequence[str] = (),
    template_variables: Mapping[str, Any] | None = None,
    plain: bool = False,
    on_batch: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure a run on its held-out rows, or on `data` (read like them).

    Args:
        found: a run, or an adapter inside one.
        data: rows to measure on instead.
        limit: use at most so many rows.
        generate: also generate answers (to chat and prompt/completion rows) and count exact matches.
        compare: with `generate`, do so for the base without adapter too.
        batch_size: rows per batch of generated answers.
        max_new_tokens: longest answer; default: one and a half times the longest reference.
        stop: texts at which an answer ends.
        template_variables: variables for the chat template, over those of the recipe; those of a row come first.
        plain: compute padded and with all logits, whatever the recipe's ``engine`` says.
        on_batch: called with (what is computed, batches done, number of batches).

    Raises:
        ConfigError: there is no recipe, or no rows were held out and no `data` is named.
        DataError: no row is usable.
    """
    if found.recipe is None:
        raise ConfigError(f"{found.path} is not a run: it has no recipe.yaml, which says how to read rows", "use the run's directory")
    own = found.recipe
    if template_variables:
        own = replace(own, data=replace(own.data, template_variables={**own.data.template_variables, **template_variables}))
    task, source = _task(own, data, limit)
    model, tokenizer, _ = found.load()
    embeddings: Any = model.get_input_embeddings()
    rows = task.encode(tokenizer, int(embeddings.weight.shape[0]))
    examples = rows.evaluation or rows.train
    report = rows.reports["eval" if rows.evaluation else "train"]

    def progress(what: str) -> Callable[[int, int], None] | None:
        return None if on_batch is None else partial(on_batch, what)

    recipe = replace(own, engine=replace(own.engine, **_PLAIN)) if plain else own
    adapter, base, computed = measure(model, task, examples, recipe, progress=progress)
    exact = base_exact = None
    if generate:
        documents = list(task.held_out.items if task.held_out is not None else task.documents.items)
        options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "stop": stop}
        options["template_variables"] = own.data.template_variables
        exact = exact_match(model, tokenizer, documents, on_batch=progress("answers"), **options)
        if compare:
            with disabled(model):
                base_exact = exact_match(model, tokenizer, documents, on_batch=progress("answers of the base"), **options)
    return Evaluation(
        source=source,
        rows=len(examples),
        adapter=adapter,
        base=base,
        exact=exact,
        base_exact=base_exact,
        lines=tuple(report.lines()),
        computed=computed,
        left_aside=left_aside(model) if generate else "",
    )


def measure(
    model: PreTrainedModel,
    task: Task[Any],
    examples: Sequence[Any],
    recipe: Recipe,
    *,
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda what: None,
) -> tuple[dict[str, float], dict[str, float], str]:
    """Return (metrics of `model`, metrics with its adapters disabled, the optimizations used).

    The recipe's ``engine`` says which optimizations are tried. With ``pack: auto``, rows are packed if that saves at
    least 5% of the positions. An optimization that is ``on`` but does not work here is off, with the reason: the
    evaluation must not fail because of it. `progress`: what is measured → a function called with (batches done, number
    of batches).

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
    own = recipe.engine
    wishes: dict[str, Any] = {name: "off" if getattr(own, name) == "off" else "auto" for name in _PLAIN}
    trial = replace(
        recipe,
        engine=replace(own, **wishes, frontier="off", recompute="off"),
        train=replace(recipe.train, rows_per_step=len(examples), tokens_per_step=None, epochs=1, max_steps=None),
    )
    with torch.no_grad(), exact_products(model):
        engaged = choose(model, task, examples, trial, micro_tokens)[0]
    sharing = sharing_of(engaged)
    options: dict[str, Any] = {
        "micro_tokens": micro_tokens,
        "pack": engaged.packed,
        "labels_only": engaged.labels_only,
        "rearrange": None if sharing is None else sharing.rearranged,
        "batch": lambda examples: engaged.batch(task, examples, model.device),
    }
    with engaged.engaged(model):
        adapter = task.evaluate(model, examples, on_batch=progress("with the adapter"), **options)
        with disabled(model):
            base = task.evaluate(model, examples, on_batch=progress("without"), **options)
    return adapter, base, _computed(engaged, task, little)


def _saved(task: Task[Any], examples: Sequence[Any], recipe: Recipe, micro_tokens: int) -> float:
    """Return the share of the positions of a padded evaluation that packing saves."""
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


def _computed(engaged: Engaged, task: Task[Any], little: str) -> str:
    """Describe the optimizations used, with reasons for those not used; `little`: why packing was not tried."""
    reasons = {**engaged.reasons, **({"pack": little} if little else {})}

    def why(lever: str) -> str:
        return f" ({reasons[lever]})" if lever in reasons else ""

    said = [f"rows packed, no padding{why('pack')}" if engaged.packed else f"rows padded, similar lengths together{why('pack')}"]
    if task.language_model:
        said.append(f"logits at labels only{why('labels_only')}" if engaged.labels_only else f"all logits{why('labels_only')}")
    if engaged.has("share_prefix"):
        said.append(f"shared prefixes once{why('share_prefix')}")
    return ", ".join(said)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[Document],
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    template_variables: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Answer each conversation (or complete each prompt) greedily, and compare with the row's own last turn.

    Raises:
        ConfigError: there is no tokenizer.
        DataError: no document has a reference text.
    """
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so it cannot generate answers")
    asked = [(document, *asked_of) for document in documents if (asked_of := _asked(document)) is not None]
    if not asked:
        raise DataError("no row has an answer to compare with", "exact match needs conversations or prompt/completion rows")
    if max_new_tokens is None:
        longest = max(len(ids) for ids in tokenizer([reference for _, _, reference in asked], add_special_tokens=False).input_ids)
        max_new_tokens = min(longest + longest // 2 + 8, _LONGEST_ANSWER)
    answers = generate_text(
        model,
        tokenizer,
        [prompt for _, prompt, _ in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop=stop,
        raw=True,
        template_variables=template_variables,
        on_batch=on_batch,
    )
    return ExactMatch(
        tuple(Answer(document.where, reference, answer) for (document, _, reference), answer in zip(asked, answers, strict=True))
    )


def _asked(document: Document) -> tuple[Prompt, str] | None:
    """Return (prompt, reference answer), or None if the row has no answer in words."""
    if isinstance(document, Conversation) and not document.unusable():
        reference = document.messages[-1]["content"]
        return (replace(document, messages=document.messages[:-1]), reference) if reference.strip() else None
    if isinstance(document, Completion) and not document.unusable():
        return document.prompt, document.completion
    return None


def _task(recipe: Recipe, data: str | None, limit: int | None) -> tuple[Task[Any], str]:
    """Return the task over the rows to evaluate, and their name; no other rows are read unless the task needs them."""
    own = recipe.data
    if data is None and own.eval is None and own.eval_fraction is not None:
        task = load(own.task)(replace(own, eval_limit=limit or own.eval_limit), seed=recipe.train.seed)
        return task, "held-out share of the training rows"
    source = data if data is not None else own.eval
    if source is None:
        raise ConfigError("the run held out no rows (no data.eval), and none are named", "name a file with --data")
    return _over(recipe, source, limit or own.eval_limit), source if isinstance(source, str) else ", ".join(source)


def _over(recipe: Recipe, source: str | tuple[str, ...], limit: int | None) -> Task[Any]:
    """Return the run's task over the rows of `source` alone."""
    own, cls, seed = recipe.data, load(recipe.data.task), recipe.train.seed
    if not cls.complete(own):
        own = cls(own, seed=seed).resolved()
    return cls(replace(own, train=source, limit=limit, eval=None, eval_limit=None, eval_fraction=None), seed=seed)


def run_examples(recipe: Recipe, tokenizer: Any, *, limit: int) -> list[list[int]]:
    """Return the token ids of a run's first `limit` held-out rows, as it encoded them; else of training rows."""
    source = recipe.data.train if recipe.data.eval is None else recipe.data.eval
    rows = _over(recipe, source, limit).encode(tokenizer, len(tokenizer))
    return [list(example.input_ids) for example in rows.train]
