"""``load_base``: a name -> (model, tokenizer). What can be wrong with the request or the files is found before a tensor is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base.architecture import Landing, judge, model_class
from byway.base.builtin.fetch import TITLE, built_in_directory
from byway.base.directory import Directory, check_directory
from byway.base.gguf import check_gguf, gguf_arguments, gguf_tokenizer
from byway.base.hub import from_hub
from byway.base.quantized.bitsandbytes import quantization_config, repair
from byway.base.quiet import quiet, say
from byway.base.request import Request, check_request
from byway.errors import BywayError, ConfigError, listed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_base"]


def load_base(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    quantize: str | None = None,
    *,
    task: str = "auto",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    device_map: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    compute: str = "same",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A base model in eval mode and its tokenizer (None where it has none); ``requires_grad`` is as transformers leaves it.

    name_or_path: ``smollm2-135m-instruct`` (built in, fetched once), a directory, a .gguf file, or a hub id (the hub's cache first).
    dtype: "auto" (as stored; float16 becomes float32 on a CPU), "fp32", "bf16", "fp16" (refused on a CPU) or a torch dtype.
    quantize: None, "int8" or "nf4" (bitsandbytes; heads keep their dtype).
    task: "auto" (the class it was saved from, else by its architecture), "causal_lm", or "classification" with `num_labels` or
    `label_names`; a head that the checkpoint lacks is drawn from torch's seed, and that is said.
    device_map: as in transformers; default the current GPU, else the CPU. cache_dir: instead of the usual cache.
    compute: "same" (in `dtype`), "fp32" (kept in 16 bits, multiplied in float32: as ``model.float()``, at half the memory), or "auto":
    "fp32" for bfloat16 on a CPU that has no instructions for it and multiplies it 5 to 40 times slower than float32. "int8": its
    layers' maps approximately, by whole numbers of 8 bits (byway.base.arithmetic.int8); never chosen by "auto".
    Raises ConfigError. The network is used for the built-in base on first use and for hub ids, and only when they are not cached.
    """
    from byway.base.arithmetic.float32 import widen
    from byway.base.arithmetic.int8 import multiply_in_int8

    request = check_request(name_or_path, dtype, quantize, compute, task, num_labels, label_names, device_map)
    source = request.source
    match source.kind:
        case "gguf":
            model, tokenizer = _from_gguf(request)
        case "directory":
            model, tokenizer = _from_directory(request, source.path)
        case "built-in":
            model, tokenizer = _from_directory(request, built_in_directory(cache_dir))
        case "hub":
            model, tokenizer = _from_directory(request, from_hub(source.name, None if cache_dir is None else os.fspath(cache_dir)))
    wide = request.widens(model.dtype)
    if wide:
        share = widen(model)
        if share > 0.2:
            say(f"{source.name}: {share:.0%} of its numbers are read past their modules (experts, say): kept as float32 themselves")
    elif request.compute == "int8":
        plain = multiply_in_int8(model)
        if plain:
            say(f"{source.name}: multiplied plainly, as their sizes are no multiples of 8: {listed(plain, 6)}")
    # where a cache lies on this machine must not end up in what is saved
    model.name_or_path = model.config.name_or_path = source.name
    if tokenizer is not None:
        tokenizer.name_or_path = source.name
    if source.kind == "built-in":
        say(f"{source.name}: {TITLE}, {_short(model.dtype)}{_computed(request, wide)}{_as_quantized(request)}, on {model.device}")
    return model, tokenizer


def _from_directory(request: Request, path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    import torch
    from transformers import AutoTokenizer

    directory = check_directory(path)
    name = request.source.name
    if request.quantize and "quantization_config" in directory.config:
        raise ConfigError(f"the base {name!r} is stored quantized already; quantize {request.quantize!r} cannot be added", "leave it out")
    config = _config(request, path, {})
    dtype = _chosen(request, directory)
    arguments: dict[str, Any] = {}
    cls = model_class(config, request.task, name)
    if request.quantize:
        computed = torch.float32 if request.widens(dtype) else dtype
        with _blaming(name, "its configuration"):
            arguments["quantization_config"] = quantization_config(request.quantize, computed, config, cls)
    tokenizer = None
    if directory.has_tokenizer:
        with _blaming(name, "its tokenizer"), quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = _load(request, path, config, cls, dtype if directory.stored_dtype or request.dtype else "auto", arguments)
    if request.quantize or _stored_by_bitsandbytes(directory):
        repair(model)
    return _with_padding(model, tokenizer, request), tokenizer


def _from_gguf(request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    file, name = request.source.path, request.source.name
    check_gguf(file)
    if request.quantize:
        raise ConfigError(
            f"{name!r} is a GGUF file, which is dequantized when loaded; quantize {request.quantize!r} is for safetensors",
            "save it once: model.save_pretrained(directory), then load the directory quantized",
        )
    arguments = gguf_arguments(file)
    config = _config(request, file.parent, {"gguf_file": file.name})
    with _blaming(name, "its tokenizer"):
        tokenizer = gguf_tokenizer(file, config)
    model = _load(request, file.parent, config, model_class(config, request.task, name), request.dtype or "auto", arguments)
    if request.dtype is None and request.on_cpu and model.dtype is torch.float16:
        say(f"{name}: float16 as stored, loaded as float32 on the CPU")
        model = model.float()
    return _with_padding(model, tokenizer, request), tokenizer


def _config(request: Request, path: Path, arguments: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _blaming(request.source.name, "its configuration"), quiet(stderr=bool(arguments)):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **arguments)
    if request.task != "classification":
        return config
    saved = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if request.label_names:
        config.id2label = dict(enumerate(request.label_names))
        config.label2id = {name: number for number, name in enumerate(request.label_names)}
    elif request.num_labels is not None and not (saved and config.num_labels == request.num_labels):
        config.num_labels = request.num_labels
    elif request.num_labels is None and not saved:
        raise ConfigError(f"the base {request.source.name!r} has no classifier yet: how many labels?", "give num_labels or label_names")
    return config


def _chosen(request: Request, directory: Directory) -> torch.dtype:
    """The dtype asked for, else the stored one, with float16 widened on a CPU."""
    import torch

    if request.dtype is not None:
        return request.dtype
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    dtype = stored.get(directory.stored_dtype, torch.float32)
    if dtype is torch.float16 and request.on_cpu:
        say(f"{request.source.name}: float16 as stored, loaded as float32 on the CPU")
        return torch.float32
    return dtype


def _load(
    request: Request, path: Path, config: PreTrainedConfig, cls: type[PreTrainedModel], dtype: Any, arguments: dict[str, Any]
) -> PreTrainedModel:
    """The model with every weight landed, in eval mode, on its device."""
    name = request.source.name
    # transformers needs accelerate for any device map; a single device needs none
    device = None if request.quantize else request.device
    with _blaming(name, "it"), quiet(stderr="gguf_file" in arguments):
        loaded: Any = cls.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=None if device is not None else request.device_map,
            local_files_only=True,
            use_safetensors=None if "gguf_file" in arguments else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # judge() names them all at once
            **arguments,
        )
    model, info = loaded
    _tell(judge(model, info, name=name, new_head=request.task == "classification"), name)
    if device is not None:
        model.to(device)
    return model.eval()


def _tell(landing: Landing, name: str) -> None:
    if landing.fresh:
        say(f"{name}: new, untrained head (torch's seed): {listed(landing.fresh, 6)}")
    if landing.unused:
        say(f"{name}: not used, the head of another task: {listed(landing.unused, 6)}")


def _with_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, request: Request) -> PreTrainedModel:
    """A classifier on a decoder reads its last real token, so it must know what padding is."""
    if request.task == "classification" and tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _stored_by_bitsandbytes(directory: Directory) -> bool:
    return directory.config.get("quantization_config", {}).get("quant_method") == "bitsandbytes"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _computed(request: Request, wide: bool) -> str:
    return ", computed in float32" if wide else ", int8 products" if request.compute == "int8" else ""


def _as_quantized(request: Request) -> str:
    return f", linears {request.quantize}" if request.quantize else ""


@contextlib.contextmanager
def _blaming(name: str, part: str) -> Iterator[None]:
    """What transformers raises about a base's files (it has no class for that) becomes a ConfigError that names the base."""
    try:
        yield
    except BywayError:
        raise
    except Exception as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ConfigError(f"the base {name!r} cannot be loaded: transformers refuses {part}: {reason[:400]}") from failure
