"""Run one real step of a recipe and check what usually goes wrong unnoticed. Nothing is kept."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from byway.core.adapter import adapters
from byway.core.attach import activate, detach
from byway.core.slots import base_modules
from byway.data.labelled import LabelledExample
from byway.data.preview import TextSpan
from byway.data.template import ChatTemplate, stop_tokens
from byway.errors import BywayError, listed
from byway.formats.load import load
from byway.train import checkpoint
from byway.train.directory import inspect as inspect_output
from byway.train.levers.choose import keys
from byway.train.mode import training_mode
from byway.train.plan.machine import peak_mb
from byway.train.setup import Session, prepare, threads

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe

__all__ = ["Check", "Diagnosis", "diagnose"]

_FEW_LEARNED = 0.02
_ROWS_LOOKED_AT = 200
_ROUND_TRIPS = 20
_QUANTILES = (("shortest", 0.0), ("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("longest", 1.0))


@dataclass(frozen=True)
class Check:
    """One check. ``hint``: what to do if it failed."""

    name: str
    good: bool
    found: str
    hint: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the first row as the model sees it."""

    checks: tuple[Check, ...]
    sample: tuple[TextSpan, ...] = ()
    sample_where: str = ""

    @property
    def good(self) -> bool:
        """True if every check passed."""
        return all(check.good for check in self.checks)


def diagnose(recipe: Recipe, note: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """Prepare the run as ``byway train`` does, make two steps, write and read a checkpoint, in a temporary directory.

    Raises:
        ConfigError, DataError, TargetError, AdapterError: the run cannot be prepared.
    """
    with tempfile.TemporaryDirectory(prefix="byway-doctor-") as folder, threads(recipe.train.threads):
        session = prepare(replace(recipe, output=str(Path(folder, "run"))), note=note)
        try:
            inspect_output(recipe, resume=False, overwrite=False)
            checks = [Check("output", True, f"{recipe.output} is free")]
        except BywayError as error:
            checks = [Check("output", False, error.message, error.hint)]
        checks += [*_rows(session), *_words(session), *_steps(session), _checkpoint(session, Path(folder)), *_numbers(session)]
        if session.tokenizer is None:
            return Diagnosis(tuple(checks))
        row = session.task.preview(session.rows.train[0], session.tokenizer)
    return Diagnosis(tuple(checks), row.spans, row.where)


# ---------------------------------------------------------------- rows


def _rows(session: Session) -> Iterator[Check]:
    for part, report in session.rows.reports.items():
        kept = report.used / max(report.rows, 1)
        dropped = "; ".join(f"{d.count} dropped: {d.reason} ({', '.join(d.where)})" for d in report.dropped)
        hint = "byway data RECIPE shows which rows are dropped, and why" if kept < 0.5 else ""
        yield Check(f"{part} rows", kept >= 0.5, f"{report.used:,} of {report.rows:,} used" + (f"; {dropped}" if dropped else ""), hint)
    report, examples, task = session.rows.reports["train"], session.rows.train, session.task
    lengths = sorted(task.length(e) for e in examples)
    points = ", ".join(f"{name} {lengths[min(int(q * len(lengths)), len(lengths) - 1)]:,}" for name, q in _QUANTILES)
    cut = report.truncated / max(len(examples), 1)
    yield Check(
        "lengths",
        cut <= 0.5,
        f"tokens: {points}; {report.truncated:,} cut to max_length {report.max_length:,}",
        f"raise data.max_length: rows have up to {report.longest:,} tokens" if cut > 0.5 else "",
    )
    if task.language_model:
        labels, tokens = sum(task.labels(e) for e in examples), sum(lengths)
        share = labels / max(tokens, 1)
        hint = "byway data RECIPE shows which tokens are in the loss; check data.learn and data.format" if share < _FEW_LEARNED else ""
        yield Check("loss tokens", share >= _FEW_LEARNED, f"{labels:,} of {tokens:,} tokens are in the loss ({share:.1%})", hint)
    elif counts := Counter(e.label for e in examples if isinstance(e, LabelledExample)):
        good = len(counts) > 1
        yield Check(
            "classes", good, "; ".join(task.describe(examples)), "" if good else "there is only one class, so nothing can be learned"
        )


def _words(session: Session) -> Iterator[Check]:
    """Check tokenizer, chat template and end-of-turn token."""
    tokenizer, model, examples = session.tokenizer, session.model, session.rows.train[:_ROWS_LOOKED_AT]
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    highest = max(max(e.input_ids) for e in examples)
    yield Check(
        "vocabulary",
        highest < rows,
        f"token ids up to {highest:,}, the model has {rows:,}",
        "" if highest < rows else "resize the model's embeddings",
    )
    if tokenizer is None or not session.task.language_model:
        return
    tried = examples[:_ROUND_TRIPS]
    lossy = [e for e in tried if not _survives(tokenizer, e.input_ids)]
    yield Check(
        "round trip",
        not lossy,
        f"{len(tried) - len(lossy)} of {len(tried)} rows decode and encode back to the same text",
        f"the tokenizer loses text, first in {session.task.where(lossy[0])}: does it belong to this model?" if lossy else "",
    )
    if tokenizer.chat_template and session.recipe.data.task == "chat":
        template = ChatTemplate(tokenizer)
        hint = "" if template.ends_turns else "use a chat template that ends an answer with a control token"
        end = f"an answer ends with {template.end!r}" if template.end else "answers have no end token"
        yield Check("chat template", template.ends_turns, f"{end}; answers start exactly where the generation prompt ends", hint)
    stops = set(stop_tokens(model, tokenizer))
    limit = session.rows.reports["train"].max_length
    whole = [e for e in examples if len(e.input_ids) < limit]
    ending = [e for e in whole if any(label in stops for label in e.labels)]
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops))
    good = bool(stops) and len(ending) == len(whole)
    yield Check(
        "end of turn",
        good,
        f"{len(ending)} of {len(whole)} complete rows have an end token in the loss ({names or 'no end token is known'})",
        "" if good else "otherwise the model never learns to stop: set the tokenizer's eos token, or end the template's turns with a token",
    )


def _survives(tokenizer: Any, ids: Sequence[int]) -> bool:
    """True if decoding and encoding again keeps the text, except white space (SentencePiece adds a leading one)."""

    def text(these: Sequence[int]) -> str:
        return str(tokenizer.decode(list(these), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    once = text(ids)
    again = text(tokenizer(once, add_special_tokens=False).input_ids)
    return "".join(once.split()) == "".join(again.split())


# ---------------------------------------------------------------- two steps


def _steps(session: Session) -> Iterator[Check]:
    """Run forward, backward and update on the first step's rows, twice: some gradients are zero only at first."""
    names = {id(p): name for adapter in session.adapters for name, p in adapter.named_parameters()}
    trained = [p for adapter in session.adapters for _, p in adapter.named_parameters()]
    before = [p.detach().clone() for p in trained]
    training_mode(session.model)
    with session.engaged.engaged(session.model):
        first = _backward(session)
        state = {id(p): None if p.grad is None else (bool(torch.isfinite(p.grad).all()), bool(p.grad.any())) for p in trained}
        session.optimizer.norm()
        session.optimizer.update(session.order.total // 2)  # mid-schedule, where the learning rate is not near zero
        second = _backward(session)
    later = {id(p): p.grad is not None and bool(p.grad.any()) for p in trained}
    session.model.eval()
    finite = torch.isfinite(torch.tensor([first, second])).all()
    yield Check(
        "loss", bool(finite), f"{first:.4f}, after one step {second:.4f}", "" if finite else "base.dtype: fp32, or look at the rows"
    )
    cut = [names[key] for key, found in state.items() if found is None]
    odd = [names[key] for key, found in state.items() if found is not None and not found[0]]
    zero = [key for key, found in state.items() if found is not None and found == (True, False)]
    explained = [key for key in zero if later[key]]
    dead = [names[key] for key in zero if not later[key]]
    problems = [
        *([f"{len(cut)} get no gradient: {listed(cut, 3)}"] if cut else []),
        *([f"{len(odd)} are not finite: {listed(odd, 3)}"] if odd else []),
        *([f"{len(dead)} are zero in both steps: {listed(dead, 3)}"] if dead else []),
    ]
    why = f"; {len(explained)} are zero in the first step only, where their partner factor is zero" if explained else ""
    yield Check(
        "gradients",
        not problems,
        "; ".join(problems) if problems else f"all {len(trained)} trainable tensors get a finite gradient{why}",
        "" if not problems else "these tensors do not train: exclude their modules (method.exclude) or find out why",
    )
    still = [names[id(p)] for p, old in zip(trained, before, strict=True) if torch.equal(p, old) and id(p) not in explained]
    moved_share = f"{len(trained) - len(still)} of {len(trained)} tensors moved in the first step"
    yield Check("update", not still or bool(dead or cut), moved_share, f"not moved: {listed(still, 3)}" if still else "")


def _backward(session: Session) -> float:
    """Compute the gradients of the first step's mean loss into ``.grad``; return the loss."""
    for adapter in session.adapters:
        for _, parameter in adapter.named_parameters():
            parameter.grad = None
    task, engaged = session.task, session.engaged
    micros = [[session.rows.train[i] for i in micro] for micro in session.order.epoch(0)[0]]
    labels = max(sum(task.labels(e) for micro in micros for e in micro), 1)
    total = 0.0
    for examples in micros:
        batch = engaged.batch(task, examples, session.device)
        loss, _ = task.loss(session.model, batch, labels_only=engaged.labels_only)
        (loss / labels).backward()
        total += float(loss.detach()) / labels
    return total


# ---------------------------------------------------------------- files and numbers


def _checkpoint(session: Session, folder: Path) -> Check:
    """Write and read a checkpoint, and load the adapter's files next to the trained adapter."""
    try:
        path = checkpoint.write(
            folder / "checkpoints", checkpoint.Progress(step=1), session.essentials, session.adapters, session.optimizer, None, 1
        )
        saved = checkpoint.read(path)
        own = checkpoint.state_of(session.adapters)
        same = own.keys() == saved.adapter.keys() and all(torch.equal(saved.adapter[k], t.cpu()) for k, t in own.items())
        size = sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
        for adapter in session.adapters:
            files = path / "adapter" if len(session.adapters) == 1 else path / "adapter" / adapter.name
            taken = adapters(session.model)
            spare = next(n for n in (f"doctor-{i}" for i in range(len(taken) + 1)) if n not in taken)
            activate(session.model, [])
            try:
                load(session.model, files, spare)
                detach(session.model, spare)
            finally:
                activate(session.model, list(taken))
    except BywayError as error:
        return Check("checkpoint", False, error.message, error.hint)
    return Check("checkpoint", same, f"{size / 1e6:,.1f} MB, written, read and loaded again", "" if same else "it reads back differently")


def _numbers(session: Session) -> Iterator[Check]:
    base, trained = Counter[str](), Counter[str]()
    tensors = [(base, p) for _, module in base_modules(session.model) for p in module._parameters.values()]
    tensors += [(trained, p) for adapter in session.adapters for _, p in adapter.named_parameters()]
    for counts, parameter in tensors:
        if parameter is not None:
            counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    shown = "; ".join(
        f"{what} " + ", ".join(f"{n:,} {d}" for d, n in counts.items()) for what, counts in (("base", base), ("trainable", trained))
    )
    narrow = [d for d in trained if d in ("bfloat16", "float16")]
    yield Check("dtypes", not narrow, shown, f"small updates are lost in {narrow[0]}: train in float32" if narrow else "")
    used, guess = peak_mb(session.device), session.plan.memory_mb
    yield Check("memory", True, f"estimated {guess:,} MB for model and step; peak of this process so far {used:,} MB")
    yield Check("engine", True, session.engaged.line(keys(session.recipe.engine.levers)))
