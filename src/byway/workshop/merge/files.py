"""Merge files: base directory + adapter directory → a plain model directory with a certificate.

Plan, check everything, write next to the target, read back and compare, rename. Tensors that the adapter does not
change are copied as bytes. The others are folded one at a time in float32 and rounded once, so the model is never held
in memory. A merge that fails its certificate is discarded.
"""

from __future__ import annotations

import math
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byway.base.builtin.fetch import built_in_directory
from byway.base.directory import stored_dtype, stored_files
from byway.base.fingerprint import PROBE
from byway.base.hub import from_hub
from byway.base.quiet import quiet
from byway.base.source import locate
from byway.base.tokenizer import save_tokenizer
from byway.core.adapter import adapters
from byway.core.disk.files import atomic_directory, read_json, to_json
from byway.core.disk.shards import SINGLE, Entry, Stored, code_of, dtype_of, read, write_file, write_index
from byway.core.merge import merge
from byway.core.weights import dense
from byway.data.template import stop_tokens
from byway.errors import ConfigError, NotMergeable, RunError
from byway.inference.runs import Found, find
from byway.inference.settings import structure
from byway.workshop.merge import decisions
from byway.workshop.merge.certificate import Certificate, certify, prompt_ids
from byway.workshop.merge.plan import Plan, Unplannable, folds, plan_files

__all__ = ["CERTIFICATE", "FileMerge", "merge_files", "merge_found"]

CERTIFICATE = "certificate.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_SIDE_FILE = 200 * 2**20
_NOT_COPIED = {"README.md", "config.json", "adapter_config.json", "complete.json", CERTIFICATE, "certificate.md"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class FileMerge:
    """Result of a file merge."""

    directory: Path
    merged: tuple[str, ...]
    """Paths of the modules into whose weights the adapter was merged."""
    skipped: dict[str, str]
    """Path → why the module was left unchanged."""
    certificate: Certificate
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.directory}: {len(self.merged)} modules merged", *self.certificate.lines()]
        return "\n".join([*lines, *self.notes])


def merge_files(
    base_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    prompts: Sequence[str] | None = None,
    samples: int = 8,
    overwrite: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
    allow_import: bool = False,
) -> FileMerge:
    """Merge an adapter (or all adapters of a run) into its base and write a model directory that needs neither.

    Args:
        base_dir: a directory, the built-in name, a hub id, or a .gguf file (merged in memory).
        adapter_dir: directory of an adapter or a run.
        out_dir: must not exist or be empty.
        dtype: ``fp32``, ``bf16`` or ``fp16`` for every floating-point tensor; default: as the base is stored.
        quantize: ``int8`` or ``nf4`` if the adapter was trained on a base quantized that way and its files do not say
            so. The adapter is folded into the dequantized weights, since it was trained on those.
        prompts: texts to compare outputs on; default: the run's held-out rows, else built-in sentences.
        samples: number of prompts to compare.
        overwrite: replace the result of an earlier merge in `out_dir`.
        on_tensor: called with the name of each tensor written and the total number of tensors.
        allow_import: import classes that the run names by import path, which runs code.

    Raises:
        ConfigError, AdapterError, NotMergeable: found before anything is written.
        RunError: the certificate did not pass, or writing failed; `out_dir` is unchanged.
    """
    found = find(adapter_dir, base=base_dir, allow_import=allow_import)
    if quantize is not None:
        found = replace(found, quantize=quantize)
    return merge_found(found, out_dir, dtype=dtype, prompts=prompts, samples=samples, overwrite=overwrite, on_tensor=on_tensor)


def merge_found(
    found: Found,
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    prompts: Sequence[str] | None = None,
    samples: int = 8,
    overwrite: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
) -> FileMerge:
    """Do :func:`merge_files` for a result of :func:`byway.inference.runs.find`."""
    out = Path(out_dir)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}", "omit it to keep the base's dtype")
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"samples is {samples!r}; it must be at least 1", "every merge is checked on at least one prompt")
    if not found.base:
        raise ConfigError(f"{found.path} does not name its base model", "pass --base: a directory, a .gguf file or a hub id")
    for place in (*found.adapters.values(), Path(found.base)):
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"the output {out} is inside {place}, which the merge reads", "choose another output directory")
    wanted = None if dtype is None else _DTYPES[dtype]
    directory = _base_directory(found)
    stored = stored_files(directory)
    model, tokenizer = found.load_base(stored_dtype(directory))
    notes = list(dict.fromkeys(note for adapter in found.attach(model, tokenizer) for note in adapter.notes))
    ids, source = prompt_ids(found, tokenizer, model, prompts, samples)
    plan: Plan | None = None
    try:
        plan = plan_files(model, stored)
        notes += plan.notes
    except Unplannable as reason:
        if found.quantize:
            raise NotMergeable(
                f"a base quantized as {found.quantize} cannot be merged if its files cannot be rewritten tensor by tensor: {reason}",
                "convert the base to a safetensors directory first",
            ) from None
        folds(model)
        notes.append(f"merged in memory, not file to file: {reason}")
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    need = _size(plan, stored, model, wanted)
    free = shutil.disk_usage(parent).free
    if need > free:
        raise ConfigError(f"{out} needs about {need / 1e6:,.0f} MB and {parent} has {free / 1e6:,.0f} MB free", "choose another disk")
    with atomic_directory(out, replace=lambda existing: overwrite and (existing / CERTIFICATE).is_file(), error=ConfigError) as new:
        if plan is None or directory is None:
            merged, skipped = _in_memory(model, tokenizer, new, wanted)
        else:
            _stream(plan, stored, new, wanted, on_tensor)
            _side_files(model, tokenizer, directory, new, unties=plan.unties, dtype=wanted)
            merged, skipped = tuple(fold.site.path for fold in plan.folds), plan.skipped
        _text_files(model, tokenizer, new)
        del model, plan
        certificate = certify(new, found, ids, source, stored_in=directory)
        (new / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
        (new / "certificate.md").write_text(certificate.to_markdown(), encoding="utf-8")
        if not certificate.passed:
            problems = "; ".join(certificate.problems)
            raise RunError(f"the merged model does not equal base + adapter: {problems}; {out} was not written", certificate.hint)
    return FileMerge(out, merged, skipped, certificate, tuple(notes))


def _base_directory(found: Found) -> Path | None:
    """Return the directory of the base's safetensors files; None for a .gguf file."""
    source = locate(found.base)
    if source.kind == "directory":
        return source.path
    if source.kind == "built-in":
        return built_in_directory(None)
    return Path(from_hub(source.name, None)) if source.kind == "hub" else None


def _size(plan: Plan | None, stored: dict[str, Stored], model: nn.Module, wanted: torch.dtype | None) -> int:
    """Return the bytes of the merged model's tensors."""
    if plan is None:
        tensors = [*model.parameters(), *model.buffers()]
        return sum(tensor.numel() * _stored_as(tensor.dtype, wanted).itemsize for tensor in tensors)
    names = (*plan.copies, *plan.changed, *plan.dequantized)
    old = [stored[place] for name in names if (place := plan.copies.get(name) or plan.replaces.get(name)) is not None]
    return sum(math.prod(entry.shape) * _stored_as(dtype_of(entry.code), wanted).itemsize for entry in old)


def _stored_as(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype


# ---------------------------------------------------------------- writing


def _stream(
    plan: Plan, stored: dict[str, Stored], new: Path, wanted: torch.dtype | None, on_tensor: Callable[[str, int], None] | None
) -> None:
    """Write the shards in the base's layout; new tensors go into the last one."""
    files: dict[str, list[Entry]] = {entry.file.name: [] for entry in stored.values()} or {SINGLE: []}
    last = list(files)[-1]
    names = [*plan.copies, *plan.changed, *plan.dequantized]
    for name in names:
        old = plan.copies.get(name) or plan.replaces.get(name)
        home = last if old is None else stored[old].file.name
        files[home].append(_entry(name, plan, stored, None if old is None else stored[old], wanted))
    for file, entries in files.items():
        write_file(new / file, entries, None if on_tensor is None else lambda name: on_tensor(name, len(names)))
    write_index(new, files)


def _entry(name: str, plan: Plan, stored: dict[str, Stored], old: Stored | None, wanted: torch.dtype | None) -> Entry:
    """Return the tensor to write under `name`. `old`: the stored tensor whose place it takes."""
    if old is None:  # a new head, or the other end of a former tie: the dtype of the base's first floating-point tensor
        dtype = next((d for s in stored.values() if (d := dtype_of(s.code)).is_floating_point), torch.float32)
    else:
        dtype = dtype_of(old.code)
    target = _stored_as(dtype, wanted)
    if old is not None and name in plan.copies and target == dtype:
        return Entry(name, old.code, old.shape, old)
    value = _value(name, plan, stored)
    return Entry(name, code_of(target), tuple(value().shape) if old is None else old.shape, lambda: value().to(target))


def _value(name: str, plan: Plan, stored: dict[str, Stored]) -> Callable[[], Tensor]:
    if name in plan.changed:
        fold, key = plan.changed[name]
        return lambda: fold.after()[key].detach()
    if name in plan.dequantized:
        return lambda: dense(plan.dequantized[name])
    return lambda: read(stored, plan.copies[name])


def _side_files(model: Any, tokenizer: Any, directory: Path, new: Path, *, unties: bool, dtype: torch.dtype | None) -> None:
    """Write config.json for the merged model, and copy tokenizer, chat template and generation settings."""
    config = read_json(directory / "config.json", error=ConfigError)
    config["architectures"] = [type(model).__name__]
    decisions.write(model.config, config, directory)
    if unties:
        config["tie_word_embeddings"] = False
        text = config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    (new / "config.json").write_text(to_json(config), encoding="utf-8")
    for entry in sorted(directory.iterdir()):
        skip = entry.name in _NOT_COPIED or entry.name.startswith(".") or entry.name.endswith(_WEIGHTS)
        if entry.is_file() and not skip and entry.stat().st_size <= _LARGEST_SIDE_FILE:
            shutil.copyfile(entry, new / entry.name)
    if tokenizer is not None:
        decisions.write_padding(tokenizer, new)


def _text_files(model: Any, tokenizer: Any, new: Path) -> None:
    """Write what the adapter was trained with: tokenizer, chat template, and the tokens that end an answer."""
    if tokenizer is None:
        return
    from transformers import AutoTokenizer

    copied: Any = None
    if (new / "tokenizer_config.json").is_file():
        with quiet():  # as other programs read it
            copied = AutoTokenizer.from_pretrained(new, local_files_only=True)
    if copied is None or not _same_text(copied, tokenizer):
        save_tokenizer(tokenizer, new)
    if not model.can_generate():
        return
    file = new / "generation_config.json"
    settings = read_json(file, error=ConfigError) if file.is_file() else structure(model)
    own = settings.get("eos_token_id")
    known = [own] if isinstance(own, int) else list(own or ())
    ends = [*known, *(token for token in stop_tokens(model, tokenizer) if token not in known)]
    if ends != known:
        file.write_text(to_json(settings | {"eos_token_id": ends}), encoding="utf-8")


def _same_text(one: Any, other: Any) -> bool:
    """Return whether two tokenizers read and write the same."""
    return all(
        of(one) == of(other)
        for of in (
            lambda tokenizer: tokenizer.chat_template,
            lambda tokenizer: tokenizer.special_tokens_map,
            lambda tokenizer: tokenizer.get_vocab(),
            lambda tokenizer: tokenizer(PROBE).input_ids,
        )
    )


def _in_memory(model: Any, tokenizer: Any, new: Path, wanted: torch.dtype | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Merge the whole model in memory and save it; for bases that cannot be rewritten tensor by tensor."""
    merged: dict[str, None] = {}
    skipped: dict[str, str] = {}
    for name in list(adapters(model)):
        report = merge(model, name)
        merged |= dict.fromkeys(report.merged)
        skipped |= report.skipped
    if wanted is not None:
        model.to(wanted)
    with quiet():
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    mode = stat.S_IMODE((new / "config.json").stat().st_mode)  # by the umask; safetensors creates files with mode 0600
    for entry in new.iterdir():
        if entry.is_file():
            entry.chmod(mode)
    return tuple(merged), {path: why for path, why in skipped.items() if path not in merged}
