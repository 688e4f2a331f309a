"""Record what the `adapters` library does, for tests/methods/test_adapters_library.py. That library pins transformers 4.57, so it has an
environment of its own; this file is run by hand, once, and its results are kept in ``tests/golden/adapters``:

    python3 -m venv /tmp/adapters_env
    /tmp/adapters_env/bin/pip install torch==2.13.0
    /tmp/adapters_env/bin/pip install adapters==1.3.0                            # brings transformers 4.57.6
    /tmp/adapters_env/bin/python tests/golden/record_adapters.py record          # models, adapters and outputs, from the seeds below
    python tests/golden/record_adapters.py write                                 # Byway, in its own environment, writes the same adapters
    /tmp/adapters_env/bin/python tests/golden/record_adapters.py read            # the library loads Byway's files and compares outputs

``record`` makes, for each tiny model (hidden 16): ``<model>/config.json``, ``model.safetensors``, ``reference.safetensors`` (inputs as
``in.*``, the outputs of the bare model as ``out.base``, with each adapter as ``out.<adapter>``), and ``<model>/<adapter>/`` as the library
saved it. ``write`` makes ``<model>/ours.json``: a SHA-256 of the content of each file that Byway writes.
``read`` adds the largest difference between
the library's outputs with Byway's files and those recorded, as ``versions.json`` → ``read``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "adapters"
WRITTEN = Path("/tmp/byway_written_adapters")

_TEXT = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0}
_SIZES = {"hidden_size": 16, "intermediate_size": 24}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**_TEXT, **_SIZES, "num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, **_SIZES, "num_labels": 3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, **_SIZES, "num_key_value_heads": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_SIZES, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "double_seq_bn": ("DoubleSeqBnConfig", {"reduction_factor": 4}),
    "seq_bn": ("SeqBnConfig", {"reduction_factor": 4}),
    "par_bn": ("ParBnConfig", {"reduction_factor": 4}),
    "par_learned": ("ParBnConfig", {"reduction_factor": 5, "scaling": "learned", "leave_out": [0], "ln_after": True}),
    "attention_only": (
        "BnConfig",
        {
            "mh_adapter": True,
            "output_adapter": False,
            "reduction_factor": 3,
            "non_linearity": "gelu_new",
            "original_ln_before": True,
            "scaling": 0.5,
            "dropout": 0.1,
        },
    ),
    "double_cross": ("DoubleSeqBnConfig", {"reduction_factor": 4, "non_linearity": "gelu", "cross_adapter": True, "leave_out": [1, 2]}),
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Arguments of one forward."""
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=g)}
    ids = torch.randint(3, 40, (2, 5), generator=g)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4].contiguous()} if name == "t5" else {"input_ids": ids}


def build(name: str) -> Any:
    """The tiny model of that name in eval mode, weights from a fixed seed, biases and norms not at 0 and 1."""
    torch.manual_seed(0)
    model_class, config_class, config = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model: Any, name: str) -> torch.Tensor:
    """The output for :func:`inputs`."""
    with torch.no_grad():
        return model(**inputs(name)).logits


def wanted(name: str, adapter: str) -> bool:
    """Whether the adapter says something about this model: cross-attention is T5's alone."""
    return adapter != "double_cross" or name == "t5"


def record() -> None:
    """Everything but ``ours.json``, with the library."""
    import adapters

    for name in MODELS:
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        build(name).save_pretrained(directory)
        reference = {f"in.{key}": value for key, value in inputs(name).items()}
        reference["out.base"] = logits(build(name), name)
        for position, adapter in enumerate(key for key in ADAPTERS if wanted(name, key)):
            config_class, options = ADAPTERS[adapter]
            model = build(name)
            adapters.init(model)
            model.add_adapter("task", config=getattr(adapters, config_class)(**options))
            model.set_active_adapters("task")
            g = torch.Generator().manual_seed(10 + position)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if ".task." in key:
                        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g))
                if adapter == "double_seq_bn" and name in ("bert", "roberta", "vit"):  # a head trained with the adapter
                    for parameter in model.classifier.parameters():
                        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g))
            model.eval()
            reference[f"out.{adapter}"] = logits(model, name)
            with_head = adapter == "double_seq_bn"
            model.save_adapter(str(directory / adapter), "task", with_head=with_head, use_safetensors=True)
        save_file(reference, directory / "reference.safetensors")
        (directory / "generation_config.json").unlink(missing_ok=True)
    versions = {package: version(package) for package in ("adapters", "transformers", "torch", "safetensors")}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def load(name: str) -> Any:
    """The recorded base."""
    return getattr(transformers, MODELS[name][0]).from_pretrained(HERE / name).eval()


def content(directory: Path) -> dict[str, str]:
    """File → SHA-256 of what it says: tensors by name, and JSON without ``model_name``, which is where the base happened to lie."""
    found: dict[str, str] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            text = json.dumps({key: value for key, value in values.items() if key != "model_name"}, sort_keys=True)
            found[path.name] = hashlib.sha256(text.encode()).hexdigest()
        elif path.suffix == ".safetensors":
            total = hashlib.sha256()
            for key, tensor in sorted(load_file(path).items()):
                total.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
                total.update(tensor.contiguous().numpy().tobytes())
            found[path.name] = total.hexdigest()
    return found


def write() -> None:
    """Byway loads each recorded adapter and saves it again; the hashes are kept, the files go to ``WRITTEN`` for ``read``."""
    import byway

    shutil.rmtree(WRITTEN, ignore_errors=True)
    for name in MODELS:
        hashes = {}
        for adapter in (key for key in ADAPTERS if wanted(name, key)):
            target = WRITTEN / name / adapter
            target.parent.mkdir(parents=True, exist_ok=True)
            byway.load(load(name), HERE / name / adapter, "task").save(target)
            hashes[adapter] = content(target)
        (HERE / name / "ours.json").write_text(json.dumps(hashes, indent=1) + "\n")


def read() -> None:
    """The library loads what Byway wrote; the largest difference of outputs goes into ``versions.json``."""
    import adapters

    differences = {}
    for name in MODELS:
        reference = load_file(HERE / name / "reference.safetensors")
        hashes = json.loads((HERE / name / "ours.json").read_text())
        for adapter in (key for key in ADAPTERS if wanted(name, key)):
            directory = WRITTEN / name / adapter
            if content(directory) != hashes[adapter]:
                raise SystemExit(f"{directory} is not what ours.json lists: run write again")
            model = load(name)
            adapters.init(model)
            info: dict[str, Any] = {}
            with_head = (directory / "head_config.json").exists()
            model.load_adapter(
                str(directory), load_as="other", set_active=True, loading_info=info, with_head=with_head, use_safetensors=True
            )
            if info.get("missing_keys") or info.get("unexpected_keys"):
                raise SystemExit(f"{name} {adapter}: {info}")
            model.eval()
            differences[f"{name}/{adapter}"] = (logits(model, name) - reference[f"out.{adapter}"]).abs().max().item()
            print(f"{name:8} {adapter:15} largest difference {differences[f'{name}/{adapter}']:.1e}")
    versions = json.loads((HERE / "versions.json").read_text())
    (HERE / "versions.json").write_text(json.dumps(versions | {"read": differences}, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"record": record, "write": write, "read": read}[sys.argv[1]]()
