"""Save and restore every random generator a step may draw from, so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor

__all__ = ["preserved", "problem", "restore", "seed", "snapshot"]

_TORCH, _CUDA, _NUMPY = "torch", "cuda.", "numpy"
_NUMPY_WORDS = 624


def seed(value: int) -> None:
    """Seed every generator: torch on all devices, Python's `random`, and numpy's if numpy is imported."""
    torch.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(value % 2**32)


def snapshot() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, plain values): torch on CPU and every GPU, Python's `random`, and numpy's if it is imported."""
    tensors = {_TORCH: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"{_CUDA}{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    plain: dict[str, Any] = {"python": {"version": version, "words": list(words), "gauss": gauss}}
    if "numpy" in sys.modules:
        import numpy as np

        state: Any = np.random.get_state(legacy=False)
        tensors[_NUMPY] = torch.from_numpy(state["state"]["key"].astype("int64"))
        plain["numpy"] = {"position": int(state["state"]["pos"]), "has_gauss": int(state["has_gauss"]), "gauss": float(state["gauss"])}
    return tensors, plain


def restore(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Restore what :func:`snapshot` returned; GPUs that no longer exist are skipped."""
    torch.set_rng_state(tensors[_TORCH])
    for name, state in tensors.items():
        if name.startswith(_CUDA) and torch.cuda.is_available() and int(name.removeprefix(_CUDA)) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name.removeprefix(_CUDA)))
    own = plain["python"]
    random.setstate((own["version"], tuple(own["words"]), own["gauss"]))
    if "numpy" in plain:
        import numpy as np

        numpy = plain["numpy"]
        key = tensors[_NUMPY].numpy().astype("uint32")
        np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["gauss"]))


def problem(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> str:
    """Say why this is no state of these generators, or return ``""``. A state is one if restoring it gives it back."""
    own, own_plain = snapshot()
    kinds = own.keys() | own_plain.keys()
    given = {name for name in tensors.keys() | plain.keys() if not name.startswith(_CUDA)}
    if wrong := sorted(given ^ {name for name in kinds if not name.startswith(_CUDA)}):
        return f"{', '.join(wrong)}: {'missing' if wrong[0] in kinds else 'not a generator of this version'}"
    # numpy and Python accept these as they are, and fail, or read foreign memory, at a later draw
    python, numpy = plain["python"], plain.get("numpy", {"position": 0, "has_gauss": 0, "gauss": 0.0})
    try:
        sound = isinstance(python["gauss"], (float, NoneType)) and type(numpy["gauss"]) is float
        sound = sound and 0 <= numpy["position"] <= _NUMPY_WORDS and numpy["has_gauss"] in (0, 1)
        with preserved():
            restore(tensors, plain)
            again, again_plain = snapshot()
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        return str(error) or repr(error)
    known = [name for name in tensors if name in again]
    same = all(tensors[name].dtype == again[name].dtype and torch.equal(tensors[name], again[name]) for name in known)
    return "" if sound and same and again_plain == dict(plain) else "it cannot be restored as it is"


@contextmanager
def preserved() -> Iterator[None]:
    """Within this context draws leave no trace: afterwards every generator continues from where it was."""
    tensors, plain = snapshot()
    try:
        yield
    finally:
        restore(tensors, plain)
