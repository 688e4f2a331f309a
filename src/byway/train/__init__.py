"""Training: a recipe in, a trained adapter and its run directory out.

::

    loop.py        train: the steps, and what is due between them
    setup.py       everything that can be refused, before anything is written
    order.py       which rows are in which step        optim.py        AdamW, schedule, clipping
    levers.py      which savings are on                plan.py         the run in numbers
    checkpoint.py  checkpoints/step-N/, whole or not   essentials.py   what a resume may not change
    randomness.py  the state of every generator        signals.py      Ctrl-C and SIGTERM
    directory.py   what may be in the output           events.py       what an observer is told
    log.py         metrics.jsonl, the curve            report.py       the page for people
"""

from __future__ import annotations

from byway.train.loop import Run, train
from byway.train.signals import Stopped

__all__ = ["Run", "Stopped", "train"]
