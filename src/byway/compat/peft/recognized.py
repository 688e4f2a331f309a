"""Let ``isinstance(ours, peft.PeftModel)`` be true, so that transformers and trl treat our objects as peft's.

These libraries ask for peft's classes by ``isinstance``, and peft's classes cannot have virtual subclasses. But
``isinstance`` also accepts what an object names as its ``__class__``. Ours name a class that derives from their own and
from peft's class of the same name. The object's real type does not change, and none of peft's code runs. The class is
made when somebody asks, which needs peft in memory: nothing here imports peft, and without it the answer is the real
type.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

__all__ = ["Recognized", "loaded_peft"]


def loaded_peft() -> ModuleType | None:
    """Return peft if some library has imported it. It is never imported here."""
    return sys.modules.get("peft")


def _class(self: Recognized) -> type[Any]:
    peft, own = loaded_peft(), type(self)
    names = [c.__name__ for c in own.__mro__ if c.__module__.startswith(f"{__package__}.")]
    found = None if peft is None else next((vars(peft)[name] for name in names if name in vars(peft)), None)
    return own if found is None or issubclass(own, found) else _joined(own, found)


@cache
def _joined(own: type[Recognized], theirs: type[Any]) -> type[Any]:
    own.meet(theirs)
    return type(own.__name__, (own, theirs), {"__module__": own.__module__, "__doc__": own.__doc__, "own": own})


class Recognized:
    """Base of a class that has a counterpart of the same name in peft."""

    __class__ = property(_class)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    @classmethod
    def meet(cls, theirs: type[Any]) -> None:
        """Called once, when an object of `cls` is first taken for one of peft's class `theirs`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle would compare __class__ with the real type, and could not find a joined class
        real = type(self)
        return _new, (vars(real).get("own", real),), self.__getstate__()


def _new(cls: type[Any]) -> Any:
    return object.__new__(cls)
