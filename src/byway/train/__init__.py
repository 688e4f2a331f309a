"""Train a recipe: from a checked plan to an adapter and its run directory.

::

    loop.py        train(): steps, evaluations, checkpoints
    setup.py       everything that can be refused, before anything is written
    levers/        the optimizations: one file each; choose.py decides, prove.py tests them on a probe
    plan/          the run in numbers: memory, layers to recompute
    order.py       which rows are in which step        optim.py        AdamW, schedule, clipping
    checkpoint.py  checkpoints/step-N/, all or nothing essentials.py   what a resume must not change
    randomness.py  the state of every random generator signals.py      SIGINT and SIGTERM
    directory.py   the run's directory                 mode.py         training mode
    doctor.py      one real step, with everything checked
    reporting/     events for observers, metrics.jsonl, the loss curve, report.html
"""

from __future__ import annotations

from byway.train.loop import Run, train
from byway.train.signals import Stopped

__all__ = ["Run", "Stopped", "train"]
