"""``load_base``: a name -> (model, tokenizer). Options and files are checked before a tensor is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base.architecture import judge, model_class
from byway.base.blame import blaming
from byway.base.builtin.fetch import TITLE, built_in_directory
from byway.base.directory import check_directory
from byway.base.gguf import check_gguf, gguf_arguments, gguf_tokenizer
from byway.base.hub import from_hub
from byway.base.new_tokens import add_to_model, add_to_tokenizer
from byway.base.padding import agree, forget_impossible
from byway.base.quantized.bitsandbytes import check_weights, quantization_config, repair
from byway.base.quiet import quiet, say
from byway.base.read_tokenizer import read_tokenizer
from byway.base.request import Request, check_request
from byway.base.source import Source
from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["base_directory", "load_base"]


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
    add_tokens: Sequence[str] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a base model, in evaluation mode, and its tokenizer (None if it has none); ``requires_grad`` is unchanged.

    The network is used only for the built-in base on first use and for hub ids, and only if they are not cached.

    Args:
        name_or_path: ``smollm2-135m-instruct`` (built in), a directory, a .gguf file, or a hub id.
        dtype: "auto" (as stored; float16 becomes float32 on a CPU), "fp32", "bf16", "fp16" (refused on a CPU) or a
            torch dtype.
        quantize: None, "int8" or "nf4" (bitsandbytes; output heads keep their dtype).
        task: "auto" (the class it was saved from, else by its architecture), "causal_lm" or "classification". A
            classification head that the checkpoint lacks is drawn from torch's seed, with a message.
        num_labels: number of classes of a classifier.
        label_names: the names of its classes, instead of `num_labels`.
        device_map: as in transformers; default: the current GPU, else the CPU.
        cache_dir: instead of the usual cache.
        compute: "same": multiply in `dtype`. "fp32": keep 16 bits, multiply in float32, with the results of
            ``model.float()`` at half the memory. "auto": "fp32" for bfloat16 on a CPU without bfloat16 instructions,
            where it is 5 to 40 times slower than float32; else "same". "int8": approximate the linear maps of the
            layers by 8-bit integers (byway.base.arithmetic.int8); "auto" never selects it.
        add_tokens: tokens to add to the vocabulary. The rows of a new one start as the mean of those that it was split
            into, in the embedding and in the head.

    Raises:
        ConfigError: an option is invalid, the base cannot be found or fetched, or its files do not fit together.
    """
    from byway.base.arithmetic.float32 import widen
    from byway.base.arithmetic.int8 import multiply_in_int8

    _initialize_vector_math()
    request = check_request(name_or_path, dtype, quantize, compute, task, num_labels, label_names, device_map)
    source = request.source
    if source.kind == "gguf":
        model, tokenizer = _from_gguf(request)
    else:
        model, tokenizer = _from_directory(request, base_directory(source, cache_dir))
    with blaming(f"the base {source.name!r}", "more tokens"):
        add_to_model(model, add_to_tokenizer(tokenizer, add_tokens, source.name))
    if tokenizer is not None and (conflict := agree(model, tokenizer)):
        say(f"{source.name}: {conflict}")
    wide = request.widens(model.dtype)
    if wide:
        share = widen(model)
        if share > 0.2:
            say(f"{source.name}: {share:.0%} of the weights (experts, say) are not read through their modules and are kept in float32")
    elif request.compute == "int8":
        plain = multiply_in_int8(model)
        if plain:
            say(f"{source.name}: not multiplied in int8, as their sizes are not multiples of 8: {listed(plain, 6)}")
    # the path of a cache on this machine must not end up in saved files
    model.name_or_path = model.config.name_or_path = source.name
    if tokenizer is not None:
        tokenizer.name_or_path = source.name
    if source.kind == "built-in":
        computed = ", computed in float32" if wide else ", int8 products" if request.compute == "int8" else ""
        quantized = f", linears {request.quantize}" if request.quantize else ""
        say(f"{source.name}: {TITLE}, {str(model.dtype).removeprefix('torch.')}{computed}{quantized}, on {model.device}")
    return model, tokenizer


def base_directory(source: Source, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory of a base that is not a GGUF file; it is fetched if need be. Raises ConfigError."""
    if source.kind == "directory":
        return source.path
    if source.kind == "built-in":
        return built_in_directory(cache_dir)
    return from_hub(source.name, None if cache_dir is None else os.fspath(cache_dir))


def _from_directory(request: Request, path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    import torch

    directory = check_directory(path)
    name = request.source.name
    stored_quantization = directory.config.get("quantization_config") is not None
    if request.quantize and stored_quantization:
        raise ConfigError(
            f"the base {name!r} is stored quantized already, so quantize {request.quantize!r} cannot be applied", "leave it out"
        )
    config = _config(request, path, {})
    dtype = request.dtype or getattr(torch, directory.stored_dtype or "float32")
    if request.dtype is None and dtype is torch.float16 and request.on_cpu:
        say(f"{name}: stored in float16, loaded in float32 on the CPU")
        dtype = torch.float32
    arguments: dict[str, Any] = {}
    cls = model_class(config, request.task, name)
    if request.quantize:
        computed = torch.float32 if request.widens(dtype) else dtype
        with blaming(f"the base {name!r}", "its configuration"):
            arguments["quantization_config"] = quantization_config(request.quantize, computed, config, cls)
    tokenizer = None
    if directory.has_tokenizer:
        tokenizer = read_tokenizer(path, f"the base {name!r}")
    model = _load(request, path, config, cls, dtype if directory.stored_dtype or request.dtype else "auto", arguments)
    if (request.quantize or stored_quantization) and "bitsandbytes" in sys.modules:
        check_weights(model, path / "config.json")
        repair(model)
    return model, tokenizer


def _from_gguf(request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    file, name = request.source.path, request.source.name
    check_gguf(file)
    if request.quantize:
        raise ConfigError(
            f"{name!r} is a GGUF file, which is dequantized when loaded; quantize {request.quantize!r} needs safetensors",
            "save it once with model.save_pretrained(directory), then load the directory quantized",
        )
    arguments = gguf_arguments(file)
    config = _config(request, file.parent, {"gguf_file": file.name})
    with blaming(f"the base {name!r}", "its tokenizer"):
        tokenizer = gguf_tokenizer(file, config)
    model = _load(request, file.parent, config, model_class(config, request.task, name), request.dtype or "auto", arguments)
    if request.dtype is None and request.on_cpu and model.dtype is torch.float16:
        say(f"{name}: stored in float16, loaded in float32 on the CPU")
        model = model.float()
    return model, tokenizer


def _config(request: Request, path: Path, arguments: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    with blaming(f"the base {request.source.name!r}", "its configuration"), quiet(stderr=bool(arguments)):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **arguments)
    forget_impossible(config)
    head = request.head
    if head is None or not head.labels:
        return config
    saved = any(name.endswith(head.endings) for name in config.architectures or ())
    if request.label_names:
        config.id2label = dict(enumerate(request.label_names))
        config.label2id = {name: number for number, name in enumerate(request.label_names)}
        if len(request.label_names) > 1:
            config.problem_type = "single_label_classification"  # the base's may have been of another kind
    elif request.num_labels is not None and not (saved and config.num_labels == request.num_labels):
        config.num_labels = request.num_labels
    elif request.num_labels is None and not saved:
        raise ConfigError(f"the base {request.source.name!r} has no classifier yet: how many labels?", "set num_labels or label_names")
    return config


def _load(
    request: Request, path: Path, config: PreTrainedConfig, cls: type[PreTrainedModel], dtype: Any, arguments: dict[str, Any]
) -> PreTrainedModel:
    """Return the model with every weight loaded, in evaluation mode, on its device."""
    name = request.source.name
    # transformers needs accelerate for any device map; a single device needs none
    device = None if request.quantize else request.device
    with blaming(f"the base {name!r}", "it"), quiet(stderr="gguf_file" in arguments):
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
    fresh, unused = judge(model, info, name=name, new_head=request.fresh_head)
    if fresh:
        say(f"{name}: new, untrained head (drawn from torch's seed): {listed(fresh, 6)}")
    if unused:
        say(f"{name}: not used, weights of another head: {listed(unused, 6)}")
    if device is not None:
        model.to(device)
    return model.eval()


def _initialize_vector_math() -> None:
    """Compute a cosine and a sine in this thread alone.

    On some CPUs the first ones of a process, if several threads compute them, are now and then off by 5e-5: those of
    rotary positions, and with them all outputs of the first forward pass.
    """
    import torch

    few = torch.ones(1)
    few.cos()
    few.sin()
