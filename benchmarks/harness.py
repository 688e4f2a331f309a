"""What the benchmarks share: a fresh process per variant, interleaved repetitions, medians, peak memory, a results file.

A script gives :func:`measure` its variants. Each lives in a process of its own (the script itself, with ``--worker``), which prepares and
warms up, says "ready", sleeps on its standard input (no CPU is used), and runs one repetition each time it is told to. So the
repetitions of all variants take turns, A B A B, whatever the machine does meanwhile, and no variant lives in another's memory. Where the
machine cannot hold all of them, the rest follow in a second group beside the reference, which is repeated there.

Wall seconds and the CPU seconds of the process are taken in the worker; CPU seconds that anybody else used on the machine meanwhile are
noted as the foreign share. The peak is the kernel's high-water mark of the process (VmHWM).
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from machine import available_mb, busy_seconds, machine, memory_mb, versions

__all__ = ["RESULTS", "Failed", "Gate", "Loop", "Outcome", "Variant", "call", "gpu_peak_mb", "measure", "table", "write"]

RESULTS = Path(__file__).parent / "results"
PATIENCE = 1800.0
"""Seconds within which a worker must have answered."""
SPARE_MB = 1500
"""Memory that is left to the others on the machine."""


# ---------------------------------------------------------------- in the worker


class Gate:
    """A worker's side: say what there is to say, sleep until a repetition is wanted, time it.

    Standard output belongs to the protocol; whatever else is printed goes to standard error.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stdout.flush()
        os.dup2(2, 1)
        self._wall = self._cpu = self._busy = 0.0

    def send(self, kind: str, **facts: Any) -> None:
        """One line to the parent."""
        self._out.write(json.dumps({"kind": kind, **facts}) + "\n")
        self._out.flush()

    def ready(self, **facts: Any) -> None:
        """Prepared and warmed up; from here on the peak is that of the repetitions too."""
        self.send("ready", start_peak_mb=round(memory_mb("VmHWM")), resident_mb=round(memory_mb("VmRSS")), **facts)
        _forget_peak()

    def begin(self) -> bool:
        """Sleep until the next repetition is wanted and start the clocks; False when there are no more."""
        if sys.stdin.readline().strip() != "go":
            return False
        self._wall, self._cpu, self._busy = time.perf_counter(), time.process_time(), busy_seconds()
        return True

    def end(self, **facts: Any) -> None:
        """Stop the clocks; `facts` go with the repetition."""
        gpu_peak_mb()  # waits for it
        wall, cpu, busy = time.perf_counter() - self._wall, time.process_time() - self._cpu, busy_seconds() - self._busy
        foreign = max(busy - cpu, 0.0) / max(wall * (os.cpu_count() or 1), 1e-9)
        self.send("done", wall=wall, cpu=cpu, foreign=round(foreign, 3), **facts)

    def close(self, **facts: Any) -> None:
        """Say the peak and leave at once, from wherever in a training loop this is called."""
        self.send("closed", training_peak_mb=round(memory_mb("VmHWM")), gpu_peak_mb=gpu_peak_mb(), **facts)
        os._exit(0)


class Loop:
    """A gate for a training loop that is not ours: :meth:`stepped` is called after each optimizer step, and returns when to go on."""

    def __init__(self, gate: Gate, *, warmup: int, steps: int = 0, tokens: int = 0, facts: Mapping[str, Any] | None = None) -> None:
        """A repetition is `steps` steps, or (0) as many as it takes to see `tokens` tokens."""
        self.gate, self.warmup, self.steps, self.tokens = gate, warmup, steps, tokens
        self.facts = dict(facts or {})
        self.losses: list[float] = []
        self._seen = self._done = 0

    def stepped(self, loss: float, tokens: int) -> None:
        """One optimizer step is over."""
        self.losses.append(loss)
        if len(self.losses) > self.warmup:
            self._done += 1
            self._seen += tokens
            if self._done < self.steps or self._seen < self.tokens:
                return
            self.gate.end(tokens=self._seen, steps=self._done, loss=loss)
            self._next()
        elif len(self.losses) == self.warmup:
            self.gate.ready(losses=self.losses[:], **self.facts)
            self._next()

    def _next(self) -> None:
        self._seen = self._done = 0
        if not self.gate.begin():
            self.gate.close()


def gpu_peak_mb() -> int:
    """The most memory that torch has allocated on the GPU in this process, when what was asked of it is done; 0 where none is in use."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() // 2**20)


def _forget_peak() -> None:
    """Start the kernel's high-water mark anew from what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the high-water mark cannot be started anew here: the peak in training includes loading", file=sys.stderr)


# ---------------------------------------------------------------- in the parent


class Failed(Exception):
    """A worker ended without an answer; the message is the end of what it printed."""


@dataclass(frozen=True)
class Variant:
    """One thing to measure. `settings` go to the worker; `expected_mb`: what it is thought to need at most."""

    name: str
    settings: Mapping[str, Any]
    expected_mb: int = 4000


@dataclass
class Outcome:
    """What one variant gave. ``groups``: the group in which each repetition was made; ``peak_mb``: on a GPU what was allocated there."""

    ready: dict[str, Any] = field(default_factory=dict[str, Any])
    repetitions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    groups: list[int] = field(default_factory=list[int])
    peak_mb: int = 0
    training_peak_mb: int = 0
    error: str = ""

    def median(self, key: str) -> float:
        """The median over the repetitions."""
        return statistics.median(each[key] for each in self.repetitions)

    def rate(self, key: str = "tokens", by: str = "wall") -> float:
        """The median of `key` per second."""
        return statistics.median(each[key] / each[by] for each in self.repetitions)

    def ratios(self, other: Outcome, key: str = "tokens", by: str = "wall") -> list[float]:
        """This variant's rate over `other`'s, repetition by repetition, of those that took turns with each other."""
        found: list[float] = []
        for group in dict.fromkeys(self.groups):
            ours, theirs = ([r for r, g in zip(each.repetitions, each.groups, strict=True) if g == group] for each in (self, other))
            found += [(a[key] / a[by]) / (b[key] / b[by]) for a, b in zip(ours, theirs, strict=False)]
        return found

    def ratio(self, other: Outcome, key: str = "tokens", by: str = "wall") -> float:
        """The median of :meth:`ratios`."""
        return statistics.median(self.ratios(other, key, by))

    def facts(self) -> dict[str, Any]:
        """For the results file."""
        if self.error:
            return {"error": self.error[-1500:]}
        return {"peak_mb": self.peak_mb, "training_peak_mb": self.training_peak_mb, "ready": self.ready, "repetitions": self.repetitions}


class Worker:
    """A process that runs one variant."""

    def __init__(self, script: Path, settings: Mapping[str, Any], threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        command = [sys.executable, str(script), "--worker", json.dumps(dict(settings))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment, start_new_session=True
        )

    def tell(self, word: str) -> None:
        """Send a line; a worker that has died says so at the next :meth:`hear`."""
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(f"{word}\n".encode())
            stream.flush()
        except BrokenPipeError:
            pass

    def hear(self, kind: str) -> dict[str, Any]:
        """The next line, which must be of this kind. Raises Failed."""
        stream = self._process.stdout
        assert stream is not None
        waiting, _, _ = select.select([stream], [], [], PATIENCE)
        line = stream.readline() if waiting else b""
        if not line:
            why = f"gave no answer within {PATIENCE:.0f} s" if not waiting else f"ended with code {self._process.wait()}"
            raise Failed(f"{why}\n{self.said()}")
        found: dict[str, Any] = json.loads(line)
        if found.pop("kind") != kind:
            raise Failed(f"answered {line!r}, not {kind!r}\n{self.said()}")
        return found

    def said(self) -> str:
        """The end of what it printed."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-4000:]

    def stop(self) -> None:
        """End it, and whatever it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                stream.close()


def call(script: Path, settings: Mapping[str, Any], *, threads: int = 1) -> dict[str, Any]:
    """Run a worker that only answers (``gate.send("answer", ...)``); raises Failed."""
    worker = Worker(script, settings, threads)
    try:
        return worker.hear("answer")
    finally:
        worker.stop()


def measure(
    script: Path, variants: Sequence[Variant], *, repetitions: int, threads: int, say: Callable[[str], None] = print
) -> dict[str, Outcome]:
    """Prepare every variant, then `repetitions` of each, taking turns; the first one is the reference of every group."""
    outcomes = {variant.name: Outcome() for variant in variants}
    waiting, reference = list(variants), variants[0]
    alive: dict[str, Worker] = {}
    group = 0
    try:
        while waiting:
            for variant in _group(waiting, started=reference.name in alive):
                waiting.remove(variant)
                alive[variant.name] = Worker(script, variant.settings, threads)  # they prepare side by side
            for name in [name for name in alive if not outcomes[name].ready]:
                _guarded(outcomes[name], alive, name, lambda o, w=alive[name]: o.ready.update(w.hear("ready")))
                if name in alive:
                    say(f"{name}: ready, {outcomes[name].ready['resident_mb']} MB")
            for number in range(repetitions):
                for name in list(alive):
                    _guarded(outcomes[name], alive, name, lambda o, w=alive[name], g=group: _repeat(o, w, g))
                    if name in alive:
                        last = outcomes[name].repetitions[-1]
                        say(f"{name}: {number + 1}/{repetitions}  {last['wall']:.2f} s wall, {last['cpu']:.2f} s CPU")
            for name in [name for name in alive if name != reference.name or not waiting]:
                _guarded(outcomes[name], alive, name, lambda o, w=alive[name]: _close(o, w))
                if name in alive:
                    alive.pop(name).stop()
            group += 1
    finally:
        for worker in alive.values():
            worker.stop()
    return outcomes


def _group(waiting: Sequence[Variant], *, started: bool) -> list[Variant]:
    """The first of `waiting` that fit into memory together: with the reference, which may have been `started`, two at least."""
    room = available_mb() - SPARE_MB
    found: list[Variant] = []
    for variant in waiting:
        room -= variant.expected_mb
        if room < 0 and len(found) >= (1 if started else 2):
            break
        found.append(variant)
    return found


def _guarded(outcome: Outcome, alive: dict[str, Worker], name: str, act: Callable[[Outcome], None]) -> None:
    """One variant that fails does not take the others with it; its failure stands in the results."""
    try:
        act(outcome)
    except Failed as error:
        outcome.error = str(error)
        print(f"{name} FAILED: {error}", file=sys.stderr)
        alive.pop(name).stop()


def _repeat(outcome: Outcome, worker: Worker, group: int) -> None:
    worker.tell("go")
    outcome.repetitions.append(worker.hear("done"))
    outcome.groups.append(group)


def _close(outcome: Outcome, worker: Worker) -> None:
    worker.tell("stop")
    said = worker.hear("closed")
    outcome.training_peak_mb = int(said["training_peak_mb"])
    outcome.peak_mb = int(said["gpu_peak_mb"]) or max(outcome.training_peak_mb, int(outcome.ready["start_peak_mb"]))


# ---------------------------------------------------------------- what is written and shown


def write(name: str, what: str, facts: Mapping[str, Any], *, packages: Sequence[str], output: Path | None = None) -> Path:
    """`facts` with machine, versions, date and load to ``results/NAME.json`` (or `output`), whole or not at all."""
    target = output or RESULTS / f"{name}.json"
    result = {
        "what": what,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        # a path says where things lie on this machine: its last part is enough
        "command": " ".join([Path(sys.argv[0]).name, *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])]),
        "machine": machine() | {"load_at_end": round(os.getloadavg()[0], 1)},
        "versions": versions(packages),
        **facts,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    return target


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its columns as wide as they need to be; the first one to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])
