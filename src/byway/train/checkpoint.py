"""``checkpoints/step-N/``: the full state of a run, written completely or not at all; safetensors and JSON, no pickle.

::

    adapter.safetensors     every trainable tensor and persistent buffer, by its full name in the model, exact
    best.safetensors        the same at the best evaluation so far, if that was an earlier step
    optimizer.safetensors   AdamW's moments and counts, NAME/KEY
    random.safetensors      states of the random generators
    state.json              progress, what must not change (essentials), plain parts of the above
    adapter/                the adapter as other programs read it
    complete.json           size and SHA-256 of each file, written last

The complete checkpoint with the highest number is used; incomplete ones are skipped with a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from byway.base.tokenizer import save_tokenizer
from byway.core.disk.atomic import beside, is_temporary, remove
from byway.core.disk.files import SEAL, atomic_directory, read_json, read_safetensors, seal, to_json, verify_seal, write_safetensors
from byway.core.fields import from_json
from byway.errors import ConfigError, RunError, listed
from byway.train import randomness
from byway.train.state import Essentials, Progress, Scaling, State, check_possible, differences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.core.adapter import Adapter
    from byway.train.optim import Optimizer
    from byway.train.order import Order

__all__ = [
    "FOLDER", "Progress", "Saved", "check_fits", "complete", "load_adapters", "newest", "read", "remove_leftovers", "save_adapters",
    "write",
]  # fmt: skip

FOLDER = "checkpoints"
FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read."""

    path: Path
    progress: Progress
    essentials: dict[str, Any]
    adapter: dict[str, Tensor]
    best: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    plain: dict[str, Any]


def save_adapters(adapters: Sequence[Adapter], path: Path, tokenizer: PreTrainedTokenizerBase | None, whole: bool = True) -> None:
    """Save into `path` (one adapter) or ``path/<name>/`` (several), each with the tokenizer it was trained with.

    `whole`: False: of the tokenizer's files only the chat template; the others are those of the base.
    """
    for adapter in adapters:
        place = path if len(adapters) == 1 else path / adapter.name
        adapter.save(place, tokenizer)
        if tokenizer is not None:
            save_tokenizer(tokenizer, place, whole=whole)


def write(
    folder: Path,
    progress: Progress,
    essentials: Mapping[str, Any],
    adapters: Sequence[Adapter],
    optimizer: Optimizer,
    best: Mapping[str, Tensor] | None,
    keep: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write ``folder/step-N`` atomically, verify it on disk, then remove all but the newest `keep` checkpoints.

    Raises:
        RunError: it cannot be written; existing checkpoints are intact.
    """
    path = folder / f"step-{progress.step}"
    moments, plain = optimizer.state()
    generators, random_plain = randomness.snapshot()
    state = {"format": FORMAT, "progress": asdict(progress), "essentials": dict(essentials), "optimizer": plain, "random": random_plain}
    # a directory with a checkpoint's name inside a run is a checkpoint, finished or not
    with atomic_directory(path, replace=lambda existing: True, error=RunError) as temporary:
        write_safetensors(temporary / "adapter.safetensors", state_of(adapters))
        if best is not None:
            write_safetensors(temporary / "best.safetensors", best)
        write_safetensors(temporary / "optimizer.safetensors", moments)
        write_safetensors(temporary / "random.safetensors", generators)
        (temporary / "state.json").write_text(to_json(state), encoding="utf-8")
        save_adapters(adapters, temporary / "adapter", tokenizer, False)
        seal(temporary)
    problem = verify_seal(path)
    if problem:
        raise RunError(f"the checkpoint just written cannot be read back: {problem}", "is the disk failing? older checkpoints are intact")
    for _, old in complete(folder)[keep:]:
        with suppress(OSError):  # renamed first: an interrupted removal must not look like a checkpoint
            os.replace(old, beside(old))
    with suppress(OSError):  # the next checkpoint and the next start try again
        remove_leftovers(folder)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted write or removal left in `folder`; nothing else may be writing there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(entry):
            remove(entry)
    for _, path in numbered(folder):
        if not (path / SEAL).is_file():
            remove(path)


def state_of(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the state of all adapters, by full tensor names."""
    return {name: tensor for adapter in adapters for name, tensor in adapter.state_dict().items()}


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of everything named like a checkpoint, highest number first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[1]), entry) for entry in entries if entry.is_dir() and (match := _NAME.fullmatch(entry.name))]
    return sorted(found, reverse=True)


def complete(folder: Path) -> list[tuple[int, Path]]:
    """Return those of :func:`numbered` that have a completeness marker (checksums are not verified here)."""
    return [(step, path) for step, path in numbered(folder) if (path / SEAL).is_file()]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return (the newest checkpoint whose files are all as written, the problems of newer ones)."""
    problems: list[str] = []
    for _, path in numbered(folder):
        problem = verify_seal(path)
        if not problem:
            return path, problems
        problems.append(f"{path} is skipped: {problem}")
    return None, problems


def read(path: Path) -> Saved:
    """Read a complete checkpoint.

    Raises:
        ConfigError: a file cannot be read, or holds something that this version does not write; the message names it.
    """
    where = str(path / "state.json")
    state = read_json(path / "state.json", error=ConfigError)
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {state.get('format')!r}; this version of Byway reads format {FORMAT}")
    parts = from_json(State, state, where)
    essentials = asdict(from_json(Essentials, parts.essentials, f"{where}: essentials"))

    def tensors(name: str) -> dict[str, Tensor]:
        return read_safetensors(path / f"{name}.safetensors", error=ConfigError)[0]

    random = tensors("random")
    if problem := randomness.problem(random, parts.random):
        raise ConfigError(f"{path}: the state of the random generators does not fit: {problem}", "resume from an older checkpoint")
    return Saved(
        path=path,
        progress=from_json(Progress, parts.progress, f"{where}: progress"),
        essentials=essentials,
        adapter=tensors("adapter"),
        best=tensors("best") if (path / "best.safetensors").is_file() else None,
        optimizer=tensors("optimizer"),
        random=random,
        plain={"optimizer": asdict(from_json(Scaling, parts.optimizer, f"{where}: optimizer")), "random": parts.random},
    )


def check_fits(saved: Saved, adapters: Sequence[Adapter], optimizer: Optimizer, order: Order, criterion: str) -> None:
    """Check that the run can continue from `saved`, before anything is changed.

    Raises:
        ConfigError: tensors that do not belong to these adapters or their optimizer, or a state no run comes to.
    """
    progress = saved.progress
    check_possible(progress, order, criterion, has_best=saved.best is not None, where=str(saved.path))
    updates = progress.step - progress.skipped
    own = state_of(adapters)
    for name, problems in (
        ("adapter", differences(own, saved.adapter)),
        ("best", [] if saved.best is None else differences(own, saved.best)),
        ("optimizer", optimizer.misfits(saved.optimizer, saved.plain["optimizer"], updates)),
    ):
        if problems:
            raise _misfit(f"{saved.path / name}.safetensors", problems)


def load_adapters(adapters: Sequence[Adapter], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into the adapters. If a name, shape or dtype differs, raise ConfigError and change nothing."""
    own = state_of(adapters)
    if problems := differences(own, tensors):
        raise _misfit(where, problems)
    for name, mine in own.items():
        mine.data.copy_(tensors[name])


def _misfit(where: str, problems: Sequence[str]) -> ConfigError:
    return ConfigError(f"{where} does not fit the run: {listed(problems, 5)}", "resume from an older checkpoint")
