"""The training loop.

One step: the gradient of (Σ of the losses over the step's labels) / (their number), summed over micro-batches, so that
it equals that of one big batch whatever the rows' lengths are; clipping; one AdamW update. Between steps: evaluate,
save, stop, each when it is due. What is due is decided from the progress alone, so that a resumed run does exactly what
the uninterrupted one would have done.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byway.core.adapter import Adapter
from byway.core.attach import disabled
from byway.core.slots import penalties
from byway.errors import ConfigError, RunError, listed
from byway.recipe.recipe import Recipe
from byway.tasks.task import Task
from byway.train import checkpoint, randomness
from byway.train.checkpoint import FOLDER, Progress
from byway.train.directory import claim, occupied
from byway.train.levers.share_prefix import SharePrefix
from byway.train.mode import training_mode
from byway.train.plan.machine import peak_mb
from byway.train.reporting.events import Evaluated, Evaluating, Finished, Note, Observer, Planned, Saved, Stepped, Stopping
from byway.train.reporting.log import Log, mean_loss_of_last_epoch
from byway.train.reporting.report import write_results
from byway.train.setup import Session, prepare, threads
from byway.train.signals import Stopped, StopRequest, listening

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Run", "train"]

MAX_SKIPPED = 5
"""The run ends after this many steps in a row without a finite gradient."""


@dataclass(frozen=True)
class Run:
    """The result of a run."""

    adapter: Adapter | tuple[Adapter, ...]
    """The trained adapter, attached to `model`; a tuple if the recipe has several methods. The best one if rows were
    held out, else the last."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    metrics: dict[str, Any]
    """step, loss (of the last step), epoch_loss (mean of the last epoch), tokens, labels, seconds; with held-out rows
    also eval_…, best_step, and base_… for the bare base."""
    directory: Path
    task: Task[Any]
    """The task, with the run's rows."""


def train(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Observer | None = None,
) -> Run:
    """Run a recipe and write its output directory.

    Args:
        recipe: a :class:`byway.Recipe`, a dict, or the path of a YAML file.
        resume: continue from the newest complete checkpoint in the output directory.
        overwrite: replace the run in the output directory.
        on_event: receives events (:mod:`byway.train.reporting.events`); nothing is printed.

    Raises:
        ConfigError, DataError, TargetError, AdapterError: bad input, found before anything is written.
        RunError: the run failed; the last checkpoint is intact.
        KeyboardInterrupt: after SIGINT or SIGTERM, with a complete checkpoint; a second signal does not wait for one.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else Recipe.load(recipe)
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks.isdecimal() and int(ranks) > 1:  # each process would run the whole recipe in the same directory
        raise ConfigError(
            f"WORLD_SIZE is {ranks}: a launcher such as torchrun started {ranks} processes, and training on several is not supported yet",
            "start one process: byway train RECIPE (or unset WORLD_SIZE)",
        )
    tell = on_event or (lambda event: None)
    with threads(recipe.train.threads):
        session = prepare(recipe, resume=resume, overwrite=overwrite, note=lambda text: tell(Note(text)))
        tell(Planned(session.plan, session.saved.progress.step if session.saved else 0))
        with occupied(session.place), listening() as stop:
            return _Loop(session, tell, stop).run()


class _StopNow(Exception):
    """Ends an evaluation early; it is repeated after ``--resume``."""


class _Loop:
    """The state of one run."""

    def __init__(self, session: Session, tell: Observer, stop: StopRequest) -> None:
        self.session = session
        self.tell = tell
        self.stop = stop
        self.train = session.recipe.train
        self.task, self.model, self.order, self.optimizer = session.task, session.model, session.order, session.optimizer
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        self.directory = session.place.path
        self.saved_step = -1

    def run(self) -> Run:
        """Run to the end. From here on the directory is written to."""
        session, saved = self.session, self.session.saved
        randomness.seed(self.train.seed)
        if saved is not None:
            checkpoint.load_adapters(session.adapters, saved.adapter, str(saved.path / "adapter.safetensors"))
            self.optimizer.load(saved.optimizer, saved.plain["optimizer"])
            randomness.restore(saved.random, saved.plain["random"])
            self.progress, self.saved_step = saved.progress, saved.progress.step
            self.best = saved.adapter if saved.progress.best_step == saved.progress.step else saved.best
        claim(session.place, session.recipe)
        self.log = Log(self.directory, after_step=self.progress.step if saved else None, tensorboard=self.train.tensorboard)
        try:
            training_mode(self.model)
            with session.engaged.engaged(self.model), session.caching.opened(lambda text: self.tell(Note(text))):
                self._steps()
                base = self._base_metrics()
        finally:
            self.model.eval()
            self.log.close()
        return self._finish(base)

    def _steps(self) -> None:
        progress = self.progress
        while True:
            if self.stop.number is not None:
                self.tell(Stopping(signal.Signals(self.stop.number).name))
            if self.session.rows.evaluation and self._evaluation_due() and progress.evaluated != progress.step and not self.stop:
                self._evaluate()
            over = progress.step >= self.order.total or (self.train.patience is not None and progress.stale >= self.train.patience)
            if (self._saving_due() or over or self.stop) and self.saved_step != progress.step:
                self._save()
            if self.stop.number is not None:
                raise Stopped(self.stop.number, self.directory / FOLDER / f"step-{progress.step}")
            if over:
                return
            self._step()

    # ---------------------------------------------------------------- when

    def _evaluation_due(self) -> bool:
        """True after every `eval_every` steps, else after each epoch; and at the end."""
        progress = self.progress
        if progress.step == 0:
            return False
        if progress.step >= self.order.total:
            return True
        if self.train.eval_every is not None:
            return progress.step % self.train.eval_every == 0
        return self.order.ends_epoch(progress.epoch, progress.position)

    def _saving_due(self) -> bool:
        """True after every `save_every` steps, else where an evaluation is due (or would be, with rows for it)."""
        if self.train.save_every is not None:
            return self.progress.step > 0 and self.progress.step % self.train.save_every == 0
        return self._evaluation_due()

    # ---------------------------------------------------------------- a step

    def _step(self) -> None:
        progress, session, began = self.progress, self.session, time.perf_counter()
        progress.epoch, progress.position, step = self.order.next(progress.epoch, progress.position)
        micros = [[session.rows.train[i] for i in micro] for micro in step]
        labels = max(sum(self.task.labels(e) for micro in micros for e in micro), 1)
        losses: list[Tensor] = []
        for indices, examples in zip(step, micros, strict=True):
            batch = session.engaged.batch(self.task, examples, session.device)
            with session.caching.micro(indices, batch):
                loss, _ = self.task.loss(self.model, batch, labels_only=session.engaged.labels_only)
            self.optimizer.backward(loss / labels)
            losses.append(loss.detach())
        penalty = penalties(self.model)
        if penalty is not None:
            self.optimizer.backward(penalty)
        sums = torch.stack(losses).double().cpu()  # the only device synchronization per step
        bad = None if bool(torch.isfinite(sums).all()) else int((~torch.isfinite(sums)).nonzero()[0])
        norm = self.optimizer.norm() if bad is None else math.nan
        usable = math.isfinite(norm)
        rate = self.optimizer.rate(progress.step)
        if usable:
            self.optimizer.update(progress.step, self._after_step)
            progress.skipped_in_a_row = 0
        elif bad is None:
            progress.skipped += 1
            progress.skipped_in_a_row = 0 if self.optimizer.rescaling else progress.skipped_in_a_row + 1
            self.optimizer.skip()
        progress.step += 1
        progress.position += 1
        tokens, seconds = sum(self.task.length(e) for micro in micros for e in micro), time.perf_counter() - began
        progress.tokens, progress.labels, progress.seconds = progress.tokens + tokens, progress.labels + labels, progress.seconds + seconds
        row = {
            "step": progress.step,
            "epoch": self._epoch(),
            "loss": float(sums.sum()) / labels,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "labels": labels,
            "seconds": round(seconds, 4),
            "memory_mb": peak_mb(session.device),
        } | ({} if usable else {"skipped": True})
        self.tell(Stepped(self.log.write(row), self.order.total))
        if bad is not None:
            rows = listed([self.task.where(e) for e in micros[bad]], 10)
            raise RunError(
                f"the loss is {float(sums[bad])} at step {progress.step}, in the batch of these rows: {rows}",
                f"lower train.learning_rate (now {self.train.learning_rate:g}), or look at these rows; {self._last_good()}",
            )
        if progress.skipped_in_a_row >= MAX_SKIPPED:
            raise RunError(
                f"{MAX_SKIPPED} steps in a row, up to step {progress.step}, had a gradient that is not finite and was not applied",
                f"lower train.learning_rate (now {self.train.learning_rate:g}), or base.dtype: fp32; {self._last_good()}",
            )

    def _after_step(self) -> None:
        """Call the methods' hooks; gradients are still there, since a budget schedule reads them."""
        for adapter in self.session.adapters:
            adapter.method.after_step(adapter, self.progress.step + 1, self.order.total)

    def _epoch(self) -> float:
        progress = self.progress
        return round(progress.epoch + progress.position / len(self.order.epoch(progress.epoch)), 6)

    def _last_good(self) -> str:
        there = checkpoint.complete(self.directory / FOLDER)
        return f"the last good checkpoint is {there[0][1]} (--resume)" if there else "no checkpoint had been written yet"

    # ---------------------------------------------------------------- between steps

    def _evaluate(self) -> None:
        progress, began = self.progress, time.perf_counter()
        found = self._measured()
        if found is None:
            return
        progress.evaluated = progress.step
        better = self._is_better(found)
        if better:
            progress.best = {name: value for name, value in found.items() if math.isfinite(value)}
            progress.best_step, progress.stale = progress.step, 0
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in checkpoint.state_of(self.session.adapters).items()}
        else:
            progress.stale += 1
        row = {"eval": True, "step": progress.step, "epoch": self._epoch(), **found, "rows": len(self.session.rows.evaluation)}
        row["seconds"] = round(time.perf_counter() - began, 4)
        self.tell(Evaluated(self.log.write(row), better))

    def _measured(self) -> dict[str, float] | None:
        """Return the metrics on the evaluation rows; None if a signal cut it short."""
        session = self.session

        def on_batch(done: int, total: int) -> None:
            if self.stop:
                raise _StopNow
            self.tell(Evaluating(done, total))

        # cached states are those of rows in which nothing is shared
        how = session.engaged if session.caching.evaluation is None else session.engaged.without(SharePrefix.key, "")
        with randomness.preserved():
            try:
                return self.task.evaluate(
                    self.model,
                    session.rows.evaluation,
                    micro_tokens=2 * self.order.micro_tokens,  # nothing is kept for a backward pass
                    pack=how.packed,
                    labels_only=how.labels_only,
                    batch=lambda examples: how.batch(self.task, examples, session.device),
                    on_batch=on_batch,
                    around=session.caching.evaluating,
                )
            except _StopNow:
                return None

    def _base_metrics(self) -> dict[str, float]:
        """Return the metrics of the bare base, to compare the result with. Empty without evaluation rows."""
        if not self.session.rows.evaluation:
            return {}
        with disabled(self.model):
            return self._measured() or {}

    def _is_better(self, found: Mapping[str, float]) -> bool:
        """Compare by the task's criterion, then by loss. A result that is not finite is never better."""
        if not all(math.isfinite(found[name]) for name in (self.task.criterion, "loss")):
            return False
        sign = -1.0 if self.task.higher_is_better else 1.0
        new, old = ((sign * m[self.task.criterion], m["loss"]) for m in (found, self.progress.best or found))
        return self.progress.best_step is None or new < old

    def _save(self) -> None:
        best = self.best if self.progress.best_step != self.progress.step else None
        session = self.session
        path = checkpoint.write(
            self.directory / FOLDER,
            self.progress,
            session.essentials,
            session.adapters,
            self.optimizer,
            best,
            self.train.keep_checkpoints,
            session.tokenizer,
        )
        self.saved_step = self.progress.step
        self.tell(Saved(path, self.progress.step))

    # ---------------------------------------------------------------- the end

    def _finish(self, base: Mapping[str, float]) -> Run:
        """Load the best adapter if an evaluation chose one, and write the results."""
        session, progress = self.session, self.progress
        if self.best is not None:
            checkpoint.load_adapters(session.adapters, self.best, "the best evaluation")
        checkpoint.save_adapters(session.adapters, self.directory / "adapter", session.tokenizer)
        last = next((row for row in reversed(self.log.rows) if not row.get("eval")), {})
        metrics: dict[str, Any] = {
            "step": progress.step,
            "loss": last.get("loss"),
            "epoch_loss": mean_loss_of_last_epoch(self.log.rows),
            "tokens": progress.tokens,
            "labels": progress.labels,
            "seconds": round(progress.seconds, 3),
            "skipped_steps": progress.skipped,
        }
        if progress.best_step is not None:
            metrics |= {"best_step": progress.best_step} | {f"eval_{name}": value for name, value in progress.best.items()}
        metrics |= {f"base_{name}": value if math.isfinite(value) else None for name, value in base.items()}
        write_results(self.directory, session.recipe, session.plan, self.log.rows, metrics, session.rows.reports)
        self.tell(Finished(self.directory, metrics))
        adapter = session.adapters[0] if len(session.adapters) == 1 else session.adapters
        return Run(adapter, session.model, session.tokenizer, metrics, self.directory, session.task)
