"""What a quickstart has found: answers and scores per setting and part, and the file ``quickstart.json`` that keeps them.

The file is written twice: at the first checkpoint with what was measured before training, so that a resume need not measure it again, and
at the end with everything. Scores are never read back from it: they are counted again from the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.cli._quickstart.measure import Row, Score, read, score
from byway.disk.files import atomic_write_text, read_json, to_json
from byway.errors import ConfigError

if TYPE_CHECKING:
    from byway.workshop.merge.certificate import Certificate

__all__ = ["FILE", "PARTS", "SETTINGS", "Answers", "Result", "Sample", "read_before", "write"]

FILE = "quickstart.json"
PARTS: Mapping[str, str] = {
    "held_out": "the seen kind of wording, new names and numbers: has the job been learnt?",
    "hard": "unseen wording (indirect, ironic, other openings): how far does it carry?",
}
"""The two held-out parts, and what a score on each says."""
SETTINGS: Mapping[str, str] = {
    "before": "before",
    "before_with_examples": "before, 2 examples",
    "after": "after",
}
"""What is measured, in this order: the bare base with the instruction alone and with two worked examples before each message, then the
adapter with the instruction alone."""
_SAMPLES = (("held_out", 0), ("held_out", 1), ("hard", 0))
"""The rows that are shown: the first ones, whatever the answers are."""

Answers = Mapping[str, tuple[str, ...]]
"""Part → the model's answers in the order of its rows."""


@dataclass(frozen=True)
class Sample:
    """One row with its answers: setting → (answer, whether all of it is right)."""

    part: str
    row: Row
    answers: Mapping[str, tuple[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, and where everything lies."""

    directory: Path
    base: str
    """What the weights are called."""
    answers: Mapping[str, Answers]
    """Setting → answers."""
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Those of the training run; empty while it goes on."""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Stage → wall time in this process."""
    merged: Path | None = None
    certificate: Certificate | None = None

    @property
    def scores(self) -> dict[str, dict[str, Score]]:
        """Setting → part → score."""
        return {setting: {part: score(found, read(part)) for part, found in parts.items()} for setting, parts in self.answers.items()}

    @property
    def samples(self) -> list[Sample]:
        """Three rows with what was answered in each setting."""
        found = []
        for part, number in _SAMPLES:
            row = read(part)[number]
            given = {setting: parts[part][number] for setting, parts in self.answers.items()}
            found.append(Sample(part, row, {s: (text, score([text], [row]).exact == 1.0) for s, text in given.items()}))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        certificate = None
        if self.certificate is not None:
            kept = ("passed", "stored", "prompts", "share", "max_difference", "mean_kl", "top1_agreement")
            certificate = {name: value for name, value in asdict(self.certificate).items() if name in kept}
        return {
            "finished": self.merged is not None,
            "base": self.base,
            "parts": dict(PARTS),
            "settings": dict(SETTINGS),
            "scores": {s: {part: asdict(found) for part, found in parts.items()} for s, parts in self.scores.items()},
            "training": dict(self.metrics),
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "merge": certificate,
            "answers": {setting: {part: list(found) for part, found in parts.items()} for setting, parts in self.answers.items()},
        }


def write(result: Result) -> Path:
    """Write ``quickstart.json`` into the run's directory."""
    return atomic_write_text(result.directory / FILE, to_json(result.to_dict()))


def read_before(directory: Path) -> tuple[dict[str, Answers], bool]:
    """(answers given before training, whether the quickstart has finished); nothing and False where there is no file.

    Raises ConfigError for a file that is not ours or does not fit the rows.
    """
    file = directory / FILE
    if not file.is_file():
        return {}, False
    values = read_json(file, error=ConfigError)
    try:
        stored = values["answers"]
        found: dict[str, Answers] = {
            s: {part: tuple(map(str, stored[s][part])) for part in PARTS} for s in SETTINGS if s in stored and s != "after"
        }
        finished = bool(values["finished"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not what a quickstart writes: {error!r}", "--overwrite starts anew") from error
    if any(len(found[s][part]) != len(read(part)) for s in found for part in PARTS):
        raise ConfigError(f"{file} was written for other rows than those of this version", "--overwrite starts anew")
    return found, finished
