"""The options of :func:`byway.load_base`, checked before anything is looked up; all errors are reported at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from byway.base.heads import HEADS, Head
from byway.base.quantized.bitsandbytes import QUANTIZERS, check_quantizer
from byway.base.source import Source, locate
from byway.errors import BywayError, ConfigError, listed, nearest, together

if TYPE_CHECKING:
    import torch

__all__ = ["COMPUTES", "DTYPES", "TASKS", "Request", "check_request"]

DTYPES = ("auto", "fp32", "bf16", "fp16")
COMPUTES = ("auto", "same", "fp32", "int8")
TASKS = ("auto", *HEADS)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request. ``dtype`` None: as stored."""

    source: Source
    dtype: torch.dtype | None
    quantize: str | None
    compute: str
    task: str
    num_labels: int | None
    label_names: tuple[str, ...] | None
    device_map: Any
    on_cpu: bool

    @property
    def head(self) -> Head | None:
        """The requested head; None for task "auto"."""
        return HEADS.get(self.task)

    @property
    def fresh_head(self) -> bool:
        """True if the head may be a new one."""
        return self.head is not None and self.head.fresh

    @property
    def device(self) -> torch.device | None:
        """The one device of the whole model; None if a map distributes it."""
        import torch

        if self.device_map is None:
            return torch.device("cpu") if self.on_cpu else torch.device("cuda", torch.cuda.current_device())
        return None if _spreads(self.device_map) else torch.device(self.device_map)

    def widens(self, kept: torch.dtype) -> bool:
        """True if a base kept in the dtype `kept` is to be multiplied in float32."""
        import torch

        from byway.base.arithmetic.float32 import multiplies_bf16

        if self.compute == "auto":
            return kept is torch.bfloat16 and self.on_cpu and not multiplies_bf16()
        if self.compute == "fp32" and kept is torch.float64:
            raise ConfigError(f"the base {self.source.name!r} is kept in float64, so compute 'fp32' would lose precision", "leave it out")
        return self.compute == "fp32" and kept in (torch.bfloat16, torch.float16)


def check_request(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str,
    quantize: str | None,
    compute: str,
    task: str,
    num_labels: int | None,
    label_names: Sequence[str] | None,
    device_map: Any,
) -> Request:
    """Return the checked request; one ConfigError names every invalid option."""
    import torch

    problems: list[BywayError] = []
    places: Any = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    on_cpu = not torch.cuda.is_available() if device_map in (None, "auto") else all(str(place) == "cpu" for place in places)
    wanted: torch.dtype | None = None
    try:
        wanted = _dtype(dtype, on_cpu)
    except ConfigError as failure:
        problems.append(failure)
    known = {"quantize": (quantize, QUANTIZERS), "compute": (compute, COMPUTES), "task": (task, TASKS)}
    for option, (value, values) in known.items():
        if value not in values and not (option == "quantize" and value is None):
            hint = nearest(str(value), values) or f"it must be one of: {listed(values)}"
            problems.append(ConfigError(f"{option} {value!r} does not exist", hint))
    if compute == "int8" and quantize in QUANTIZERS:
        why = f"compute 'int8' and quantize {quantize!r} exclude each other: a quantized base has its own products"
        problems.append(ConfigError(why, "leave one of them out"))
    names = None if label_names is None else tuple(label_names)
    problems += _label_problems(task, num_labels, names)
    if wanted is torch.float64 and quantize:
        problems.append(ConfigError(f"dtype float64 and quantize {quantize!r} exclude each other"))
    try:
        if _spreads(device_map):
            if importlib.util.find_spec("accelerate") is None:
                hint = "pip install accelerate, or name one device"
                raise ConfigError(f"device_map {device_map!r} needs accelerate, which is not installed", hint)
        elif device_map is not None:
            torch.device(*places)  # the only one
        if quantize in QUANTIZERS:
            check_quantizer()
    except ConfigError as failure:
        problems.append(failure)
    except (RuntimeError, TypeError) as failure:
        problems.append(ConfigError(f"device_map {device_map!r} is not a device: {failure}", "use 'cpu', 'cuda:1', 'auto' or a map"))
    try:
        source = locate(name)
        if not problems:
            return Request(
                source=source,
                dtype=wanted,
                quantize=quantize,
                compute=compute,
                task=task,
                num_labels=len(names) if names else num_labels,
                label_names=names,
                device_map=device_map,
                on_cpu=on_cpu,
            )
    except ConfigError as failure:
        problems.append(failure)
    raise ConfigError(*together([(problem.message, problem.hint) for problem in problems]))


def _label_problems(task: str, num_labels: int | None, names: tuple[str, ...] | None) -> list[BywayError]:
    problems: list[BywayError] = []
    labelled = [head.name for head in HEADS.values() if head.labels]
    if task not in labelled and (num_labels is not None or names is not None):
        problems.append(ConfigError(f"num_labels and label_names need task {listed(map(repr, labelled))}"))
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        problems.append(ConfigError(f"num_labels is {num_labels!r}; it must be an integer above 0"))
    if names is not None and (not names or len(set(names)) != len(names)):
        problems.append(ConfigError(f"label_names {list(names)!r} must be at least one name, and all different"))
    if names and num_labels is not None and num_labels != len(names):
        problems.append(ConfigError(f"num_labels is {num_labels}, but label_names has {len(names)}"))
    return problems


def _spreads(device_map: Any) -> bool:
    """True if transformers (through accelerate) is to distribute the parts of the model."""
    return isinstance(device_map, Mapping) or device_map in ("auto", "balanced", "balanced_low_0", "sequential")


def _dtype(dtype: torch.dtype | str, on_cpu: bool) -> torch.dtype | None:
    import torch

    if dtype == "auto":
        return None
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} does not exist", nearest(dtype, DTYPES) or f"it must be one of: {listed(DTYPES)}")
        found = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    else:
        found = dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ConfigError(f"a base cannot be loaded in dtype {found!r}", "use float32, bfloat16, float16 or float64")
    if found is torch.float16 and on_cpu:
        raise ConfigError(
            "dtype fp16 on a CPU is refused: gradients below 6e-8 become zero there, and loss scaling needs a GPU",
            "use 'bf16' (same size, range of fp32) or 'fp32'",
        )
    return found
