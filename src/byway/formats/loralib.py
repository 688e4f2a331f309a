"""Attach checkpoints written by loralib (``torch.save(lora.lora_state_dict(model))``) as a LoRA.

Such a file is a dictionary of tensors and nothing else: ``<module>.lora_A`` (r, in) and ``lora_B`` (out, r); for
``MergedLinear``, with k of n blocks enabled, (r·k, in) and (k·out/n, r); heads and biases under their own names. It
holds no alpha and does not say which blocks are enabled. It is a pickle, so it is only ever opened with
``weights_only=True``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.adapter import Adapter
from byway.core.attach import install, planned
from byway.core.disk.files import read_safetensors
from byway.core.families import checkpoint_names, facts
from byway.core.families.facts import inside
from byway.core.method import BuildContext
from byway.core.slots import base_modules
from byway.core.weights import dense, features, is_embedding, is_linear
from byway.errors import AdapterError, listed, nearest
from byway.formats.record import check_tensors, errors_in, fill, most
from byway.methods.lora import LoRA

__all__ = ["load_loralib"]

_FACTORS = ("lora_A", "lora_B")


def load_loralib(
    model: nn.Module,
    file: str | Path,
    *,
    alpha: float,
    blocks: Sequence[bool] | None = None,
    dropout: float = 0.0,
    name: str = "default",
    trainable: bool = False,
) -> Adapter:
    """Attach a loralib checkpoint to `model`, as a LoRA with its heads and biases, which can be saved in peft's format.

    Args:
        model: the base; not touched unless every tensor of the file fits.
        file: the file that ``torch.save`` wrote, or a safetensors file of the same tensors.
        alpha: loralib's ``lora_alpha``, which the file does not hold; its own default is 1, its GLUE examples use 16.
        blocks: loralib's ``enable_lora``, for ``MergedLinear`` layers of which not all blocks are enabled.
        dropout: for further training.
        name: the adapter's name on this model.
        trainable: if True, its tensors require gradients.

    Raises:
        AdapterError: the file is not such a dictionary, a tensor in it has no place, or one is missing.
    """
    path = Path(file)
    modules = dict(base_modules(model))
    tensors = _read(path)
    if all(key.startswith("module.") for key in tensors) and "module" not in modules:  # DataParallel's
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    # follow renames in transformers: today's module paths by the names in checkpoints
    inverse = {there: path for path, there in checkpoint_names(model).items() if there is not None}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        found[_key(owner if owner in modules else inverse.get(owner, owner), leaf)] = tensor
    layers = sorted({key.rpartition(".")[0] for key in found if key.rpartition(".")[2] in _FACTORS})
    if not layers:
        raise AdapterError(
            f"{path}: no tensor in it is called lora_A or lora_B (there are: {most(list(found))})", "is it a loralib checkpoint?"
        )
    rank, enabled = _layout(path, modules, found, layers, blocks)
    heads = [head for head in facts(model).task_heads if any(key.startswith(f"{head}.") and key.endswith(".weight") for key in found)]
    found = _without_base(path, modules, found, heads)
    owners = {key.rpartition(".")[0] for key in found if key.endswith(".bias")}
    beside = {owner for owner in owners if not any(inside(owner, head) for head in heads)}
    method = LoRA(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(layers),
        blocks=enabled,
        bias="none" if not beside else "lora_only" if beside <= set(layers) else "all",
        modules_to_save=tuple(heads) or "none",
    )
    with errors_in(path):
        plan, notes = planned(model, method, BuildContext(generator=torch.Generator()))
    expected = {_key(site.path, own): tensor for site, side in plan for own, tensor in side.state_dict().items()}
    check_tensors(expected, found, path)
    notes = (*notes, *fill(expected, found))
    return install(model, method, name, plan, notes=notes, trainable=trainable)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"there is no file {path}", "pass the file that torch.save wrote")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; an unreadable file is refused below
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as tensors alone ({str(error).splitlines()[0][:200]})",
            "a pickle that holds anything else can run code and is not opened here; save its state dict where you trust it",
        ) from error
    if not isinstance(content, Mapping):
        raise AdapterError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    for inner in ("state_dict", "model_state_dict"):  # as the NLG examples and many training loops save it
        if isinstance(content.get(inner), Mapping):
            content = content[inner]
    wrong = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise AdapterError(f"{path} holds more than tensors by name: {most(wrong)}")
    return dict(content)


def _key(path: str, own: str) -> str:
    """Return the file's key for a side path's tensor: a trained copy keeps its module's own names."""
    return f"{path}.{own.removeprefix('copy.')}" if path else own


def _layout(
    path: Path, modules: Mapping[str, nn.Module], found: Mapping[str, Tensor], layers: Sequence[str], blocks: Sequence[bool] | None
) -> tuple[int, tuple[bool, ...] | None]:
    """Return (rank, enabled blocks or None), which must be the same in every layer."""
    problems: list[str] = []
    misfits: list[str] = []
    kinds: set[tuple[int, int, int]] = set()
    """(rank, blocks, enabled blocks) of each layer."""
    for layer in layers:
        a, b = (found.get(f"{layer}.{factor}") for factor in _FACTORS)
        if a is None or b is None:
            problems.append(f"{layer} has only one of lora_A and lora_B")
        elif layer not in modules:
            problems.append(f"{layer} is not in the model" + (f" ({near})" if (near := nearest(layer, modules)) else ""))
        elif f"{layer}.conv" in modules or not (is_linear(modules[layer]) or is_embedding(modules[layer])):
            problems.append(f"{layer} is a {type(modules[layer]).__name__}: only linear maps and embeddings of loralib have an equal here")
        else:
            narrow, wide = features(modules[layer])
            r = b.shape[1] if b.ndim == 2 else 0
            on = a.shape[0] // r if r and a.ndim == 2 and a.shape[1] == narrow and a.shape[0] % r == 0 else 0
            size = b.shape[0] // on if on and b.shape[0] % on == 0 else 0  # the outputs of a block
            if size and wide % size == 0:
                kinds.add((r, wide // size, on))
            else:
                misfits.append(f"{layer}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a map from {narrow} to {wide}")
    problems += misfits
    if len(kinds) > 1:
        problems.append(f"its layers differ in (rank, blocks, enabled): {listed(map(str, kinds))}; attach them one by one")
    if problems:
        raise AdapterError(f"{path}: " + "; ".join(problems[:10]), "nothing was attached; the model is unchanged")
    rank, count, enabled = kinds.pop()
    if count == 1 and blocks is None:
        return rank, None
    if blocks is None and enabled == count:
        return rank, (True,) * count
    if blocks is None or len(blocks) != count or sum(blocks) != enabled:
        given = "" if blocks is None else f", not {list(blocks)}"
        raise AdapterError(
            f"{path}: {enabled} of {count} blocks of {layers[0]} were trained, and the file does not say which{given}",
            f"pass loralib's enable_lora as blocks=, {count} flags of which {enabled} are True",
        )
    return rank, tuple(blocks)


def _without_base(path: Path, modules: Mapping[str, nn.Module], found: dict[str, Tensor], heads: Sequence[str]) -> dict[str, Tensor]:
    """Return `found` without the base's weights, which a full checkpoint also holds; they must equal this base's."""
    kept: dict[str, Tensor] = {}
    other: list[str] = []
    for key, tensor in found.items():
        owner, _, leaf = key.rpartition(".")
        trained = leaf in _FACTORS or leaf == "bias" or any(inside(owner, head) for head in heads)
        module = modules.get(owner)
        if trained or module is None or leaf != "weight" or not isinstance(module._parameters.get("weight"), Tensor):
            kept[key] = tensor
        elif dense(module).shape != tensor.shape or not torch.equal(dense(module).cpu(), tensor.to(dense(module).dtype)):
            other.append(key)
    if other:
        raise AdapterError(
            f"{path} holds weights of another base than this one: {most(other)}",
            "load the base it was trained on; a checkpoint saved after eval() has its updates merged in: save it in training mode",
        )
    return kept
