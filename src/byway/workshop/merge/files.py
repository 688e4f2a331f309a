"""Merging between files: base directory + adapter directory → a plain model directory, with a certificate.

Plan → check everything → write beside the target → reload from the disk and compare → rename. Tensors that the adapter does not touch are
copied as bytes; the others are folded one at a time in float32 and rounded once, so that no model is held in memory for it. What a
certificate does not pass is not left in place.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.errors import AdapterError, ConfigError, NotMergeable, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from byway.disk.shards import Entry, Stored
    from byway.inference.runs import Found
    from byway.workshop.merge.certificate import Certificate
    from byway.workshop.merge.plan import Plan

__all__ = ["FileMerge", "merge_files", "merge_found"]

CERTIFICATE = "certificate.json"
_LARGEST_SIDE_FILE = 200 * 2**20
_NOT_COPIED = {"README.md", "config.json", "adapter_config.json", "complete.json", CERTIFICATE, "certificate.md"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class FileMerge:
    """What was written."""

    directory: Path
    merged: tuple[str, ...]
    """Paths of the modules whose weights now hold the adapter."""
    skipped: dict[str, str]
    """Path → why it was left alone."""
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
) -> FileMerge:
    """Merge an adapter (or a run's adapters) into its base and write a model directory that needs neither.

    Args:
        base_dir: a directory, the built-in name, a hub id, or a .gguf file (merged in memory).
        adapter_dir: an adapter's directory, or a run's.
        out_dir: must not exist or be empty.
        dtype: ``fp32``, ``bf16`` or ``fp16`` for every floating tensor; default as the base is stored.
        quantize: ``int8`` or ``nf4`` if the adapter was trained beside a base quantized like that and its files do not say so: the
            dequantized weights are what it was trained beside, so they are what it is folded into.
        prompts: texts to compare on; default the run's held-out rows, else built-in ones.
        samples: how many prompts are compared.
        overwrite: replace the result of an earlier merge in `out_dir`.
        on_tensor: hears the name of each tensor written, and how many there will be.

    Raises:
        ConfigError, AdapterError, NotMergeable: found before anything is written.
        RunError: the certificate did not pass, or the disk failed; `out_dir` is as it was.
    """
    from byway.inference.runs import find

    found = find(adapter_dir, base=base_dir)
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
    """:func:`merge_files` for what :func:`byway.inference.runs.find` found."""
    from byway.base.directory import stored_dtype, stored_files
    from byway.disk.files import atomic_directory
    from byway.workshop.merge.certificate import certify, prompt_ids
    from byway.workshop.merge.plan import Unplannable, plan_files

    out = Path(out_dir)
    wanted = _check_request(found, out, dtype, samples)
    directory = _base_directory(found)
    stored = stored_files(directory)
    model, tokenizer = found.load_base(stored_dtype(directory))
    notes = list(dict.fromkeys(note for adapter in found.attach(model, tokenizer) for note in adapter.notes))
    ids = prompt_ids(found, tokenizer, model, prompts, samples)
    plan: Plan | None = None
    try:
        plan = plan_files(model, stored)
        notes += plan.notes
    except Unplannable as reason:
        _check_in_memory(found, model)
        notes.append(f"merged in memory, not file to file: {reason}")
    _check_space(out, stored, wanted)
    with atomic_directory(out, replace=lambda existing: overwrite and (existing / CERTIFICATE).is_file(), error=ConfigError) as new:
        if plan is None:
            merged, skipped = _in_memory(model, tokenizer, new, wanted)
        else:
            _stream(plan, stored, new, wanted, on_tensor)
            _side_files(model, directory, new, unties=plan.unties, dtype=wanted)
            merged, skipped = tuple(fold.site.path for fold in plan.folds), plan.skipped
        del model, plan
        _modes(new)
        certificate = certify(new, found, ids, stored_in=directory)
        (new / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
        (new / "certificate.md").write_text(certificate.to_markdown(), encoding="utf-8")
        if not certificate.passed:
            raise RunError(
                f"the merged model is not the base with its adapter: {'; '.join(certificate.problems)}; {out} was not written",
                certificate.hint,
            )
    return FileMerge(out, merged, skipped, certificate, tuple(notes))


# ---------------------------------------------------------------- before anything is written


def _check_request(found: Found, out: Path, dtype: str | None, samples: int) -> torch.dtype | None:
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not known", f"it is one of {', '.join(known)}; leave it out to keep the base's")
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"samples is {samples!r}; at least 1 prompt is compared", "a merge that is not checked is not written")
    inside = [place for place in (*found.adapters.values(), Path(found.base)) if place.is_dir() and _within(out, place)]
    if inside:
        raise ConfigError(f"the output {out} lies inside {inside[0]}, which is read", "choose another output directory")
    return None if dtype is None else known[dtype]


def _within(path: Path, directory: Path) -> bool:
    return directory.resolve() in (path.resolve(), *path.resolve().parents)


def _base_directory(found: Found) -> Path | None:
    """Where the base's safetensors files lie; None for a .gguf file, which has none."""
    from byway.base.source import locate

    if not found.base:
        raise ConfigError(f"{found.path} does not say which base it was made on", "give --base: a directory, a .gguf file or a hub id")
    source = locate(found.base)
    if source.kind == "directory":
        return source.path
    if source.kind == "built-in":
        from byway.base.builtin.fetch import built_in_directory

        return built_in_directory(None)
    if source.kind == "hub":
        from byway.base.hub import from_hub

        return Path(from_hub(source.name, None))
    return None


def _check_in_memory(found: Found, model: Any) -> None:
    from byway.workshop.merge.plan import folds

    if found.quantize:
        raise NotMergeable(
            f"a base whose files cannot be rewritten tensor by tensor, quantized as {found.quantize}, cannot be merged",
            "convert the base to a safetensors directory first",
        )
    folds(model)


def _check_space(out: Path, stored: dict[str, Stored], wanted: torch.dtype | None) -> None:
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    need = sum(entry.size for entry in stored.values()) * (2 if wanted is not None and wanted.itemsize == 4 else 1)
    free = shutil.disk_usage(parent).free
    if need > free:
        raise ConfigError(f"{out} needs about {need / 1e6:,.0f} MB and {parent} has {free / 1e6:,.0f} MB free", "choose another disk")


# ---------------------------------------------------------------- writing


def _stream(
    plan: Plan, stored: dict[str, Stored], new: Path, wanted: torch.dtype | None, on_tensor: Callable[[str, int], None] | None
) -> None:
    """Write the shards in the base's own layout: what is new goes into the last one."""
    from byway.disk.shards import SINGLE, write_file, write_index

    files: dict[str, list[Entry]] = {entry.file.name: [] for entry in stored.values()} or {SINGLE: []}
    last = list(files)[-1]
    names = [*plan.copies, *plan.changed, *plan.dequantized]
    for name in names:
        entry, home = _entry(name, plan, stored, wanted)
        files[home or last].append(entry)
    hear = None if on_tensor is None else lambda name: on_tensor(name, len(names))
    for file, entries in files.items():
        write_file(new / file, entries, hear)
    write_index(new, files)


def _entry(name: str, plan: Plan, stored: dict[str, Stored], wanted: torch.dtype | None) -> tuple[Entry, str]:
    """(what to write under `name`, the shard it came from or ``""``)."""
    import torch

    from byway.disk.shards import Entry, code_of, dtype_of, read

    old = plan.copies.get(name) or plan.replaces.get(name)
    kept = None if old is None else dtype_of(stored[old].code)
    home = "" if old is None else stored[old].file.name
    if name in plan.copies and old is not None and kept is not None:
        if wanted is None or not kept.is_floating_point or kept == wanted:
            return Entry(name, stored[old].code, stored[old].shape, stored[old]), home
        return Entry(name, code_of(wanted), stored[old].shape, lambda: read(stored, old).to(wanted)), home
    if kept is None:  # a tensor the base's files do not have: a head, the other end of a former tie
        kept = next((dtype_of(s.code) for s in stored.values() if dtype_of(s.code).is_floating_point), torch.float32)
    target = wanted or kept
    value = _value(name, plan)
    shape = tuple(stored[old].shape) if old is not None else tuple(value().shape)
    return Entry(name, code_of(target), shape, lambda: value().to(target)), home


def _value(name: str, plan: Plan) -> Callable[[], Tensor]:
    from byway.core.weights import dense

    if name in plan.changed:
        fold, key = plan.changed[name]
        return lambda: fold.after()[key].detach()
    return lambda: dense(plan.dequantized[name])


def _side_files(model: Any, directory: Path | None, new: Path, *, unties: bool, dtype: torch.dtype | None) -> None:
    """config.json as the merged model needs it; tokenizer, template and generation settings as they are."""
    from byway.disk.files import read_json, to_json

    if directory is None:
        raise AdapterError("a base without a directory has no files to copy")
    config = read_json(directory / "config.json", error=ConfigError)
    saved = model.config.to_dict()
    if config.get("architectures") != [type(model).__name__]:
        config["architectures"] = [type(model).__name__]
        config |= {key: saved[key] for key in ("id2label", "label2id", "pad_token_id", "problem_type") if saved.get(key) is not None}
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


def _in_memory(model: Any, tokenizer: Any, new: Path, wanted: torch.dtype | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The whole model at once, for what cannot be rewritten tensor by tensor."""
    from byway.base.quiet import quiet
    from byway.core.adapter import adapters
    from byway.core.merge import merge

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
    return tuple(merged), {path: why for path, why in skipped.items() if path not in merged}


def _modes(directory: Path) -> None:
    """Modes by the umask (safetensors and some copies bring their own)."""
    probe = directory / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for entry in directory.iterdir():
        if entry.is_file():
            entry.chmod(mode)
