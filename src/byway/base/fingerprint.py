"""Identify the base an adapter was trained on, independent of dtype, quantization and rows added to the vocabulary.

A fingerprint contains
  * the architecture fields of the config (sizes, activations, position scheme; not dtype, quantization, versions, token
    ids, vocabulary),
  * for every matrix its shape, its dtype or quantization, and 8 entries as float32 at positions fixed by the shape
    alone, in the first 32 rows, so that rows added at a vocabulary's end change nothing; of matrices kept in 8 or 4
    bits only 8 are dequantized and sampled,
  * the same for every vector (biases, the scales of norms), which records of earlier versions lack,
  * hashes of the tokenizer (vocabulary, added tokens, and the tokens of a fixed text, which depend on the merges) and
    of the chat template.

Entries are compared within the tolerance for the dtypes of both sides, never by hash. A vector is often constant, all
ones or zeros, which every dtype holds exactly: that does not show that its base was rounded; its matrices do.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core.slots import base_modules
from byway.core.weights import dense, is_embedding, is_quantized
from byway.errors import AdapterError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Fingerprint", "Matrix", "Verdict", "compare", "fingerprint"]

ENTRIES = 8
FRONT_ROWS = 32
QUANTIZED_SAMPLES = 8
TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "float16": 2.0**-9, "bfloat16": 2.0**-7}
"""Largest |a − b| / max(|a|, |b|) of one entry, by the coarser side: two to four times a rounding error."""
COARSE = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TWICE_ROUNDED = 0.25
"""Largest share of a base's vector entries that may fall on another value of their dtype: where a base was rounded to
float16 and then to bfloat16, 1 in 16 does."""
QUANTIZED_TOLERANCE = {"int8": 0.15, "4bit": 0.5}
"""Largest ‖a − b‖ / ‖a‖ over all sampled entries (measured: 0.01 in int8, 0.1 in nf4; 1.4 for an unrelated matrix)."""
LARGEST = torch.finfo(torch.float32).max
FLOOR = 1e-7  # half of float16's smallest step, rounded up: relative errors below it mean nothing

_MAY_DIFFER = (
    "dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path", "name_or_path", "architectures", "auto_map",
    "vocab_size", "text_vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens", "id2label",
    "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "use_return_dict", "torchscript", "tie_word_embeddings", "gradient_checkpointing",
    "attn_implementation", "_attn_implementation", "experts_implementation", "chunk_size_feed_forward", "pruned_heads",
    "tokenizer_class", "prefix", "generation_config",
)  # fmt: skip
NOT_ARCHITECTURE = frozenset(_MAY_DIFFER)
"""Config fields that may differ for the same base; so may fields with "dropout" in their name."""

PROBE = (
    "The quick brown fox's 1,234.56 jumps\tover\n\n  it -- naïve café ÅÄÖ, 你好，世界。 こんにちは Привет мир! def f(x): return x**2 "
    "# http://a.b/c?d=e&f <html> {json: [1, 2]} 🙂 antidisestablishmentarianism 000111222"
)


@dataclass(frozen=True)
class Matrix:
    """One matrix or vector of a base: shape, a dtype or ``int8`` or ``4bit``, and the sampled entries as float32."""

    shape: tuple[int, ...]
    kind: str
    entries: tuple[float | None, ...] = ()
    vocabulary: bool = False
    """True if its rows belong to the vocabulary (or to positions), so that rows may be added at the end."""


@dataclass(frozen=True)
class Fingerprint:
    """The record of a base, made by :func:`fingerprint`."""

    architecture: Mapping[str, Any] = field(default_factory=dict)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    vectors: Mapping[str, Matrix] | None = None
    """Parameters with fewer than two dimensions; None in the record of an earlier version, which has none."""
    tokenizer: str | None = None
    chat_template: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values; a matrix or vector is ``[shape, kind, entries, vocabulary]``."""
        return {
            "architecture": dict(self.architecture),
            "matrices": _written(self.matrices),
            "vectors": None if self.vectors is None else _written(self.vectors),
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "the fingerprint") -> Fingerprint:
        """Invert :meth:`to_dict`. Raises an AdapterError that begins with `where` if `content` is malformed."""
        try:
            matrices, vectors = _read(content["matrices"]), content.get("vectors")
            architecture, hashes = content["architecture"], (content["tokenizer"], content["chat_template"])
            if not isinstance(architecture, dict) or not all(text is None or isinstance(text, str) for text in hashes):
                raise TypeError("'architecture' must be an object, 'tokenizer' and 'chat_template' strings or null")
            return cls(architecture, matrices, None if vectors is None else _read(vectors), *hashes)
        except (KeyError, TypeError, ValueError, AttributeError) as failure:
            raise AdapterError(f"{where} is malformed: {failure!r}", "load with check_base=False to ignore it") from failure


def _written(tensors: Mapping[str, Matrix]) -> dict[str, list[Any]]:
    return {name: [list(m.shape), m.kind, list(m.entries), m.vocabulary] for name, m in tensors.items()}


def _read(written: Mapping[str, Any]) -> dict[str, Matrix]:
    """Invert :func:`_written`; KeyError, TypeError, ValueError or AttributeError if it is malformed."""
    tensors: dict[str, Matrix] = {}
    for name, (shape, kind, entries, vocabulary) in written.items():
        if not all(type(size) is int and 0 <= size < 2**63 for size in shape) or not isinstance(kind, str):
            raise ValueError(f"{name} has the shape {shape!r} and the dtype {kind!r}")
        numbers = [entry for entry in entries if entry is not None]
        if not all(type(number) in (int, float) and abs(number) <= LARGEST for number in numbers):
            raise ValueError(f"{name} has entries that no float32 holds")
        tensors[name] = Matrix(tuple(shape), kind, tuple(e if e is None else float(e) for e in entries), bool(vocabulary))
    return tensors


@dataclass(frozen=True)
class Verdict:
    """The result of :func:`compare`. `notes`: harmless differences. `differences`: those that make it another base."""

    same: bool
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, without: Collection[str] = ()) -> Fingerprint:
    """Return the fingerprint of the base in `model`, any nn.Module; side paths are left out.

    `without`: paths of modules that are left out, with all below them: those initialized anew at each loading (a task
    head), or replaced by the adapter.
    """
    template = None if tokenizer is None or not tokenizer.chat_template else _digest(tokenizer.chat_template)
    transformers = sys.modules.get("transformers")  # an object with a transformers config exists only if it was imported
    config: Any = vars(model).get("config")
    known = transformers is not None and isinstance(config, transformers.PretrainedConfig)
    architecture = _fields(json.loads(json.dumps(config.to_dict(), default=str), parse_constant=str)) if known else {}
    digest = None
    if tokenizer is not None:
        added = sorted((index, str(token), token.special) for index, token in tokenizer.added_tokens_decoder.items())
        digest = _digest([sorted(tokenizer.get_vocab().items()), added, tokenizer.encode(PROBE, add_special_tokens=False)])
    return Fingerprint(architecture, *_tensors(model, without), digest, template)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in NOT_ARCHITECTURE and "dropout" not in name}
    return {name: _fields(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _tensors(model: nn.Module, without: Collection[str]) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Return (matrices, vectors) by their names."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        if any(path == out or path.startswith(f"{out}.") for out in without):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))  # a tied tensor counts once
            found[f"{path}.{name}" if path else name] = (module, parameter)
    quantized = [name for name, (module, _) in found.items() if is_quantized(module) and name.endswith("weight")]
    chosen = {quantized[i * (len(quantized) - 1) // (QUANTIZED_SAMPLES - 1)] for i in range(QUANTIZED_SAMPLES)} if quantized else set()
    rows = {module.weight.shape[0] for module, _ in found.values() if isinstance(module, nn.Embedding)}
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Matrix] = {}
    for name, (module, parameter) in found.items():
        kind = str(parameter.dtype).removeprefix("torch.")
        if name in quantized:
            if not isinstance(module, nn.Linear):
                raise AdapterError(f"a quantized {type(module).__name__} is not supported")
            kind = "int8" if parameter.dtype == torch.int8 else "4bit"
            shape = (module.out_features, module.in_features)
            matrices[name] = Matrix(shape, kind, _sample(dense(module)) if name in chosen else (), shape[0] in rows)
        elif parameter.ndim >= 2:
            vocabulary = is_embedding(module) or parameter.shape[0] in rows
            matrices[name] = Matrix(tuple(parameter.shape), kind, _sample(parameter), vocabulary)
        else:
            entries = _sample(parameter.reshape(-1)[:FRONT_ROWS, None].T)
            vectors[name] = Matrix(tuple(parameter.shape), kind, entries, parameter.numel() in rows)
    return matrices, vectors


def _sample(matrix: Tensor) -> tuple[float | None, ...]:
    """Return `ENTRIES` entries as float32 at low-discrepancy positions: in the first `FRONT_ROWS` rows, any column."""
    if matrix.is_meta or matrix.numel() == 0:
        return ()
    rows = min(matrix.shape[0], FRONT_ROWS)
    width = math.prod(matrix.shape[1:])
    # fractions of the golden ratio and of √2 are evenly spread for any number of entries
    row = [int(rows * ((i * 0.6180339887498949) % 1)) for i in range(ENTRIES)]
    column = [int(width * ((i * 0.41421356237309503 + 0.5) % 1)) for i in range(ENTRIES)]
    places = torch.unravel_index(torch.tensor(column), matrix.shape[1:])
    values = matrix.detach()[(torch.tensor(row), *places)].to(device="cpu", dtype=torch.float32).tolist()
    return tuple(float(f"{value:.9g}") if math.isfinite(value) else None for value in values)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def compare(saved: Fingerprint, current: Fingerprint) -> Verdict:
    """Compare `current` with the base that `saved` was taken from; dtype, quantization and vocabulary tail may differ.

    Another tokenizer or chat template is a note. If a side has no config, the two must have the same matrices.
    """
    notes: list[str] = []
    differences = _compare_fields(saved.architecture, current.architecture)
    common = [name for name in saved.matrices if name in current.matrices]
    if saved.matrices and not common:
        differences.append(f"it has none of the {len(saved.matrices)} recorded matrices (the first is {next(iter(saved.matrices))})")
    if not saved.architecture or not current.architecture:
        missing = saved.matrices.keys() - current.matrices.keys()
        surplus = current.matrices.keys() - saved.matrices.keys()
        differences += [f"it lacks {listed(missing, 5)}"] if missing and common else []
        differences += [f"it has in addition {listed(surplus, 5)}"] if surplus and common else []
    pairs = {name: (saved.matrices[name], current.matrices[name]) for name in common}
    for old, new in sorted({(old.kind, new.kind) for old, new in pairs.values()}):
        if old != new:
            notes.append(f"the same base, stored as {new} instead of {old}")
    for name, (old, new) in pairs.items():
        if old.shape == new.shape:
            continue
        if old.shape[1:] == new.shape[1:] and (old.vocabulary or new.vocabulary):
            notes.append(f"{name} has {new.shape[0]} rows instead of {old.shape[0]}: the same base with a resized vocabulary")
        else:
            differences.append(f"{name} has shape {list(new.shape)}, it was {list(old.shape)}")
    differences += _compare_entries({name: (old, new) for name, (old, new) in pairs.items() if old.shape[1:] == new.shape[1:]})
    if saved.vectors is not None and current.vectors is not None:
        in_16_bits = [set(COARSE).intersection(*map(_holding, side.matrices.values())) for side in (saved, current)]
        owners = {name.rpartition(".")[0] for name in common}
        differences += _compare_vectors(saved.vectors, current.vectors, in_16_bits, owners)
    if saved.tokenizer and current.tokenizer and saved.tokenizer != current.tokenizer:
        notes.append("the tokenizer is not the one it was trained with")
    if saved.tokenizer and current.tokenizer and saved.chat_template != current.chat_template:
        notes.append("the chat template is not the one it was trained with")
    return Verdict(not differences, tuple(notes), tuple(differences))


def _compare_fields(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in sorted(saved.keys() & current.keys()):
        old, new = saved[name], current[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _compare_fields(old, new, f"{prefix}{name}.")
        elif old != new and old is not None and new is not None:  # None: a default that one version writes and another leaves out
            found.append(f"config {prefix}{name} is {new!r}, it was {old!r}")
    return found


def _compare_entries(matrices: Mapping[str, tuple[Matrix, Matrix]]) -> list[str]:
    """Return the differences between the sampled entries of matrices that have the same columns."""
    other: list[str] = []
    errors: dict[str, list[float]] = {}  # quantization -> (‖a − b‖ / ‖a‖)² of each matrix
    for name, (old, new) in matrices.items():
        if not old.entries or not new.entries:
            continue
        quantized = "4bit" if "4bit" in (old.kind, new.kind) else "int8" if "int8" in (old.kind, new.kind) else None
        pairs = [(a, b) for a, b in zip(old.entries, new.entries, strict=False) if a is not None and b is not None]
        if quantized is not None:
            norm = sum(a * a for a, _ in pairs) or 1.0
            errors.setdefault(quantized, []).append(sum((a - b) ** 2 for a, b in pairs) / norm)
            continue
        tolerance = max(_tolerance(old), _tolerance(new))
        if not all(_close(a, b, tolerance) for a, b in pairs):
            other.append(name)
    differences: list[str] = []
    for quantized, found in errors.items():
        error = math.sqrt(sum(found) / len(found))
        if error > QUANTIZED_TOLERANCE[quantized]:
            differences.append(f"the sampled weights differ by {error:.0%}, more than {quantized} rounding explains")
    if other:
        differences.append(f"the weights of {len(other)} of {len(matrices)} matrices differ: {listed(other, 5)}")
    return differences


def _compare_vectors(
    saved: Mapping[str, Matrix], current: Mapping[str, Matrix], in_16_bits: Sequence[set[str]], owners: Collection[str]
) -> list[str]:
    """Return the differences between vectors.

    Args:
        in_16_bits: the dtypes that hold every matrix of the saved base, and of the current one, exactly.
        owners: the modules whose matrices both have; a bias that only one side has there is a difference.
    """
    differences: list[str] = []
    for one, other, text in ((saved, current, "it lacks"), (current, saved, "it has in addition")):
        alone = [name for name in one if name not in other and any(one[name].entries) and name.rpartition(".")[0] in owners]
        differences += [f"{text} {listed(alone, 5)}"] if alone else []
    unlike: list[str] = []
    moved: list[bool] = []  # of each entry: whether the two differ by more than one rounding
    for name in sorted(saved.keys() & current.keys()):
        old, new = saved[name], current[name]
        if old.shape != new.shape and not (old.vocabulary or new.vocabulary):
            differences.append(f"{name} has shape {list(new.shape)}, it was {list(old.shape)}")
            continue
        kinds = {kind for vector, held in zip((old, new), in_16_bits, strict=True) for kind in held & _holding(vector) or {vector.kind}}
        coarsest = max(kinds, key=lambda kind: TOLERANCE.get(kind, 0.0))
        pairs = {(a, b) for a, b in zip(old.entries, new.entries, strict=False) if a is not None and b is not None}
        apart = [(a, b) for a, b in pairs if not _close(a, b, TOLERANCE["float32"])]
        if not all(_close(a, b, TOLERANCE.get(coarsest, 0.0)) for a, b in apart):
            unlike.append(name)
        moved += [coarsest not in COARSE or _round(a, coarsest) != _round(b, coarsest) for a, b in apart]
        moved += [False] * (len(pairs) - len(apart))
    if unlike:
        differences.append(f"the values of {len(unlike)} of {len(saved)} vectors differ: {listed(unlike, 5)}")
    elif sum(moved) > TWICE_ROUNDED * len(moved):
        differences.append(f"{sum(moved)} of {len(moved)} sampled entries of vectors differ by more than rounding explains")
    return differences


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b)) + FLOOR


def _holding(matrix: Matrix) -> set[str]:
    """Return the 16-bit dtype that a tensor is stored in or, if in float32, those that hold its entries exactly."""
    if matrix.kind in COARSE:
        return {matrix.kind}
    if matrix.kind != "float32":
        return set(COARSE) if matrix.kind in QUANTIZED_TOLERANCE else set()
    values = torch.tensor([entry for entry in matrix.entries if entry is not None])
    return {kind for kind, dtype in COARSE.items() if torch.equal(values.to(dtype).float(), values)}


def _round(value: float, kind: str) -> float:
    return float(torch.tensor(value).to(COARSE[kind]))


def _tolerance(matrix: Matrix) -> float:
    """Return the tolerance of the dtype, or of the 16-bit dtype that a float32 base was converted from."""
    return max((TOLERANCE[kind] for kind in _holding(matrix)), default=TOLERANCE.get(matrix.kind, TOLERANCE["bfloat16"]))
