"""A base in a directory: find what is wrong with it before transformers loads it.

Only ``config.json``, the headers of the safetensors files and the names of other files are read; no tensor is read and
nothing is executed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    import torch

    from byway.core.disk.shards import Stored

__all__ = ["INDEX", "SINGLE", "Directory", "check_directory", "check_templates", "stored_dtype", "stored_files"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
LARGEST_TEMPLATE = 2**18
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A checked base directory. ``stored_dtype``: that of most elements; ``""`` if it is not one of torch's floats."""

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    stored_dtype: str
    has_tokenizer: bool


def check_directory(path: Path) -> Directory:
    """Check a base before loading; pickled weights are refused. Raises ConfigError with the name of the file."""
    from byway.core.disk.files import read_json

    config_file = path / "config.json"
    if not config_file.is_file():
        raise _not_a_base(path)
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} contains a base and an adapter (adapter_config.json); transformers would load both",
            "move adapter_config.json and adapter_model.safetensors to another directory",
        )
    config = read_json(config_file, error=ConfigError)
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{config_file} has no model_type, so it is not the configuration of a transformers model")
    weights = _weight_files(path)
    sizes: Counter[str] = Counter()
    for file in weights:
        sizes.update(_elements_per_dtype(file))
    most = sizes.most_common(1)[0][0]
    check_templates(path)
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
    return Directory(path=path, config=config, weights=weights, stored_dtype=FLOATS.get(most, ""), has_tokenizer=has_tokenizer)


def check_templates(path: Path) -> None:
    """Raise ConfigError for a chat template that is too large to be one; transformers would read all of it."""
    for file in (path / "chat_template.jinja", *path.glob("additional_chat_templates/*.jinja")):
        if file.is_file() and file.stat().st_size > LARGEST_TEMPLATE:
            raise ConfigError(f"{file} has {file.stat().st_size:,} bytes; a chat template has a few thousand", "copy or download it again")


def _not_a_base(path: Path) -> ConfigError:
    """Return the error for a directory without config.json, by what it contains instead."""
    if (path / "adapter_config.json").is_file():
        return ConfigError(f"{path} contains an adapter, not a base", "load its base, then call byway.load(model, path)")
    if (path / "adapter").is_dir():
        return ConfigError(f"{path} is the directory of a run, not a base", f"its adapter is {path / 'adapter'}")
    if files := sorted(path.glob("*.gguf")):
        return ConfigError(f"{path} has no config.json, but a GGUF file", f"use the file itself: {str(files[0])!r}")
    below = [entry.parent.name for entry in path.glob("*/config.json")]
    return ConfigError(
        f"{path} has no config.json, so it is not a model directory", f"there is one in: {listed(below, 5)}" if below else ""
    )


def _weight_files(path: Path) -> tuple[Path, ...]:
    """Return the safetensors file, or the shards that the index names; all of them exist."""
    from byway.core.disk.files import read_json

    if (path / SINGLE).is_file():
        return (path / SINGLE,)
    index = path / INDEX
    if not index.is_file():
        if pickles := [entry.name for entry in path.iterdir() if entry.suffix in PICKLES]:
            raise ConfigError(
                f"{path} has its weights only as {listed(pickles, 5)}; such files can run code when opened and are not read",
                "if you trust them, convert them once with transformers: AutoModel...from_pretrained(path).save_pretrained(new)",
            )
        others = [entry.name for entry in path.glob("*.safetensors")]
        raise ConfigError(f"{path} has no weights: neither {SINGLE} nor {INDEX}", f"there are: {listed(others, 5)}" if others else "")
    names = read_json(index, error=ConfigError).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{index} has no weight_map from tensors to files")
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ConfigError(f"{index} names files that are not safetensors files in its directory: {listed(outside, 5)}")
    if missing := [name for name in files if not (path / name).is_file()]:
        raise ConfigError(
            f"{path} lacks {len(missing)} of the {len(files)} weight files named in {INDEX}: {listed(missing, 5)}",
            "copy or download them",
        )
    return tuple(path / name for name in files)


def _elements_per_dtype(file: Path) -> Counter[str]:
    """Count the elements per safetensors dtype; ConfigError if a file's header does not fit its size."""
    from safetensors import SafetensorError, safe_open

    sizes: Counter[str] = Counter()
    try:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                view = stream.get_slice(name)
                sizes[str(view.get_dtype())] += math.prod(view.get_shape())
    except (SafetensorError, OSError) as failure:
        raise ConfigError(f"{file} is truncated or damaged: {failure}", "copy or download it again") from failure
    if not sizes:
        raise ConfigError(f"{file} contains no tensor")
    return sizes


def stored_files(directory: Path | None) -> dict[str, Stored]:
    """Return every tensor of a model directory, after checking it; none for None."""
    from byway.core.disk.shards import stored_tensors

    return {} if directory is None else stored_tensors(check_directory(directory).weights)


def stored_dtype(directory: Path | None) -> torch.dtype | str:
    """Return the dtype in which loading a directory copies nothing; ``"auto"`` if there is none (float16)."""
    import torch

    name = "" if directory is None else check_directory(directory).stored_dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.get(name, "auto")
