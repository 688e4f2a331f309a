"""Make ``import peft`` import ``byway.compat.peft``, to run HF peft's own tests against it.

Names that Byway does not have become :class:`Foreign` classes, so that peft's test files can be imported. Tests that
use them are left out. The real peft is never imported, even if it is installed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

VERSION = "0.21.2"


class ForeignType(type):
    """The class of all names that Byway does not have."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Foreign

    def __contains__(cls, item: Any) -> bool:
        return False


class Foreign(metaclass=ForeignType):
    """Stand-in for a class that Byway does not have: it can be subclassed and instantiated, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kwargs = kwargs


def foreign(name: str) -> type[Foreign]:
    """Return a Foreign class of that name."""
    return ForeignType(name, (Foreign,), {"__module__": "peft"})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = foreign(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolve ``peft`` and its submodules (and diffusers, which peft's test helpers import)."""

    def __init__(self, contents: dict[str, dict[str, Any]]) -> None:
        self.contents = contents

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ("peft", "diffusers"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name, value in self.contents.get(module.__name__, {}).items():
            setattr(module, name, value)


def _kind_of(check: Any, name: str) -> type:
    """Return a class whose instances are the objects that satisfy `check`, to recognize modules as peft's wrappers."""
    meta = type("Meta", (ForeignType,), {"__instancecheck__": lambda cls, module: check(module)})
    return meta(name, (Foreign,), {})


def contents() -> dict[str, dict[str, Any]]:
    """Return module name → its names and their values."""
    from torch import nn

    import byway.compat.peft as ours
    from byway.compat.peft.layers import AdaptedLayer, AuxiliaryWrapper
    from byway.compat.peft.session import Session
    from byway.core.copies import TrainedCopy
    from byway.core.slots import Slot, slot_of
    from byway.core.token_rows import TrainedRows
    from byway.methods.lowrank.sides import LowRank

    def sides(module: Any, *kinds: type) -> bool:
        slot = slot_of(module) if isinstance(module, nn.Module) else None
        return slot is not None and any(isinstance(side, kinds) for _, side in slot.sides())

    def submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
        """Return (parent, target, name) of a module below the peft model."""
        parent, _, name = key.rpartition(".")
        return model.get_submodule(parent), model.get_submodule(key), name

    tuner_layer = _kind_of(lambda m: isinstance(m, AdaptedLayer) and not isinstance(m, AuxiliaryWrapper), "BaseTunerLayer")
    lora_layer = _kind_of(lambda m: isinstance(m, AdaptedLayer) and sides(m, LowRank), "LoraLayer")
    auxiliary = _kind_of(lambda m: isinstance(m, AuxiliaryWrapper), "AuxiliaryTrainingWrapper")
    copies = _kind_of(lambda m: isinstance(m, AuxiliaryWrapper) and sides(m, TrainedCopy), "ModulesToSaveWrapper")
    rows = _kind_of(lambda m: isinstance(m, AuxiliaryWrapper) and sides(m, TrainedRows), "TrainableTokensWrapper")
    buffers = _kind_of(lambda m: isinstance(m, Slot), "BufferDict")
    # peft looks adapters up in its containers by name; ours are the slots
    Slot.__contains__ = lambda self, name: any(own == name for own, _ in self.sides())  # pyright: ignore[reportAttributeAccessIssue]
    utils = {
        "AuxiliaryTrainingWrapper": auxiliary,
        "ModulesToSaveWrapper": copies,
        "TrainableTokensWrapper": rows,
        "_get_submodules": submodules,
        "infer_device": lambda: "cpu",
        "get_peft_model_state_dict": ours.get_peft_model_state_dict,
        "prepare_model_for_kbit_training": ours.prepare_model_for_kbit_training,
        "WEIGHTS_NAME": "adapter_model.bin",
        "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
    }
    missing = ("aqlm", "auto_gptq", "eetq", "gptqmodel", "hqq", "optimum", "torchao", "inc", "bnb", "bnb_4bit")
    checks = {f"is_{name}_available": lambda: False for name in missing}
    public = {name: getattr(ours, name) for name in ours.__all__}
    return {
        "peft": {**public, "__version__": VERSION, "PeftWarning": UserWarning},
        "peft.import_utils": {**checks, "is_transformers_ge_v5": True},
        "peft.utils": utils,
        "peft.utils.other": utils,
        "peft.utils.save_and_load": {k: public[k] for k in ("get_peft_model_state_dict", "set_peft_model_state_dict")},
        "peft.peft_model": {k: v for k, v in public.items() if "PeftModel" in k},
        "peft.optimizers": {"create_loraplus_optimizer": ours.create_loraplus_optimizer},
        "peft.mapping": {"PEFT_TYPE_TO_PREFIX_MAPPING": {"LORA": "lora_", "IA3": "ia3_", "ADALORA": "lora_"}},
        "peft.tuners": {"PrefixTuningConfig": ours.PrefixTuningConfig},
        "peft.tuners.tuners_utils": {"BaseTunerLayer": tuner_layer, "BaseTuner": Session},
        "peft.tuners.lora": {"LoraLayer": lora_layer},
        "peft.tuners.lora.layer": {"LoraLayer": lora_layer},
        "peft.tuners._buffer_dict": {"BufferDict": buffers},
    }


def install() -> None:
    """Install the shim. Call this before transformers is imported."""
    if "peft" in sys.modules:
        raise RuntimeError("peft has been imported already")
    sys.meta_path.insert(0, _Finder(contents()))
