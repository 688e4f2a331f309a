"""Loading from a directory: what lands, in which dtype and class, and what is refused, each with its name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from byway.base import load_base
from byway.errors import ConfigError


@pytest.fixture
def copy(llama_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_directory, tmp_path / "llama"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_directory_loads_bit_for_bit_in_eval_mode_without_network(llama, llama_directory: Path, no_network: None) -> None:
    model, tokenizer = load_base(llama_directory)
    assert tokenizer is None
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is type(llama)
    expected = llama.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.name_or_path == str(llama_directory)


def test_a_real_small_llama_gives_transformers_logits(data_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = data_dir / "stories260k" / "hf"
    model, tokenizer = load_base(str(path))
    assert tokenizer is not None
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(path)(ids).logits)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), (torch.float64, torch.float64)])
def test_the_dtype_asked_for_is_the_one_that_comes(llama_directory: Path, name: str | torch.dtype, dtype: torch.dtype) -> None:
    model, _ = load_base(llama_directory, dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_auto_is_the_dtype_of_the_file_even_where_config_json_says_another(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    edit_config(copy, dtype="float32")
    assert load_base(copy)[0].dtype is torch.bfloat16


def test_float16_on_a_cpu_is_refused_when_asked_for_and_widened_when_stored(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="fp16 on a CPU is refused") as caught:
        load_base(copy, dtype="fp16")
    assert "bf16" in caught.value.hint
    edit_weights(copy, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    model, _ = load_base(copy)
    assert model.dtype is torch.float32
    assert "stored in float16, loaded in float32" in capsys.readouterr().err


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_one_device_needs_no_accelerate_and_a_map_says_that_it_does(
    llama_directory: Path, device: str | torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else real(name, *rest))
    monkeypatch.setattr(transformers.integrations.accelerate, "is_accelerate_available", lambda *_: False)
    with pytest.raises(ValueError, match="accelerate"):  # as it is where only the package's own needs are installed
        transformers.AutoModelForCausalLM.from_pretrained(llama_directory, device_map="cpu")
    model, _ = load_base(llama_directory, device_map=device)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match="'auto' needs accelerate"):
        load_base(llama_directory, device_map="auto")


def test_a_device_that_does_not_exist_is_refused_by_name(llama_directory: Path) -> None:
    with pytest.raises(ConfigError, match="'gpu:0' is not a device"):
        load_base(llama_directory, device_map="gpu:0")


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_base("./nowhere", dtype="bf17", quantize="nf5", task="clasification", num_labels=0)
    wrong, near = ("'bf17'", "'nf5'", "'clasification'", "num_labels is 0", "./nowhere"), ("'bf16'", "'nf4'", "'classification'")
    for part in (*wrong, *near):
        assert part in caught.value.message


def test_shards_load_and_a_missing_one_is_named(llama, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_base(tmp_path / "sharded")[0].model.norm.weight, llama.model.norm.weight)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=shards[1].name):
        load_base(tmp_path / "sharded")


def test_an_index_that_points_outside_its_directory_is_refused(llama, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ConfigError, match=r"\.\./model-00001"):
        load_base(tmp_path / "sharded")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused_by_name(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated or damaged"):
        load_base(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "{}"])
def test_a_broken_configuration_is_refused_by_name(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_base(copy)


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"model_type": "no-such-model"}, "no-such-model"), ({"hidden_size": "wide"}, "hidden_size"), ({"hidden_size": 33}, "33")],
)
def test_a_configuration_that_transformers_refuses_is_one_clear_error(copy: Path, changes: dict[str, object], part: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ConfigError, match=part) as caught:
        load_base(copy)
    assert str(copy) in caught.value.message


def test_code_in_the_directory_is_not_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('code of the base was run')\n")
    edit_config(copy, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ConfigError, match="its configuration"):
        load_base(copy)


def test_pickled_weights_are_refused_unopened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin") as caught:
        load_base(copy)
    assert "save_pretrained" in caught.value.hint
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        load_base(copy)


def test_a_directory_that_is_no_base_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_base(tmp_path)
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="but a GGUF file"):
        load_base(tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match="directory of a run"):
        load_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an adapter, not a base"):
        load_base(tmp_path)


def test_an_adapter_beside_the_base_is_refused_rather_than_loaded_silently(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="a base and an adapter"):
        load_base(copy)


def test_every_tensor_must_land_and_each_problem_is_named(copy: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.byway.default.lora_A"] = torch.zeros(2, 32)
        tensors["model.norm.weight"] = torch.zeros(31)

    edit_weights(copy, damage)
    with pytest.raises(ConfigError) as caught:
        load_base(copy)
    assert "1 tensors are missing: model.layers.1.mlp.up_proj.weight" in caught.value.message
    assert "model.norm.weight is (31,), config.json says (32,)" in caught.value.message
    assert "q_proj.byway.default.lora_A" in caught.value.message


def test_fewer_layers_in_config_json_than_in_the_file_is_refused(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"have no place in a LlamaForCausalLM: model\.layers\.1"):
        load_base(copy)


def test_an_encoder_comes_as_the_class_it_was_saved_from(bert_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_base(bert_directory)
    assert type(model).__name__ == "BertForMaskedLM"
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="is not a decoder"):
        load_base(bert_directory, task="causal_lm")


def test_a_bare_decoder_trunk_comes_as_a_language_model_and_an_encoder_decoder_as_seq2seq(llama, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    llama.model.save_pretrained(tmp_path / "trunk")
    assert type(load_base(tmp_path / "trunk")[0]) is type(llama)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    edit_config(tmp_path / "t5", architectures=None)
    assert type(load_base(tmp_path / "t5")[0]) is T5ForConditionalGeneration


def test_a_new_head_is_drawn_from_the_seed_said_once_and_the_trunk_lands(
    bert_directory: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    def load(value: int) -> torch.nn.Module:
        torch.manual_seed(value)
        return load_base(bert_directory, task="classification", label_names=["bad", "good", "odd"])[0]

    capsys.readouterr()
    one = load(seed)
    said = capsys.readouterr().err
    assert said.count("new, untrained head") == 1
    assert "classifier.weight" in said
    assert "bert.pooler.dense.weight" in said
    assert "not used, weights of another head" in said
    assert len(said.splitlines()) == 2
    same, other = load(seed), load(seed + 1)
    assert one.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert one.classifier.weight.shape == (3, 32)
    assert one.classifier.weight.std() > 0
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    stored = load_file(bert_directory / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(one.get_parameter(name), stored[name])


def test_a_damaged_trunk_is_not_taken_for_a_new_head(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    with pytest.raises(ConfigError, match=r"input_layernorm\.weight"):
        load_base(copy, task="classification", num_labels=2)


def test_a_saved_classifier_keeps_its_head_and_another_number_of_labels_makes_a_new_one(
    llama, llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, _ = load_base(llama_directory, task="classification", num_labels=4)
    saved.save_pretrained(tmp_path / "classifier")
    capsys.readouterr()
    same, _ = load_base(tmp_path / "classifier", task="classification")
    assert torch.equal(same.score.weight, saved.score.weight)
    assert capsys.readouterr().err.count("new, untrained head") == 0
    other, _ = load_base(tmp_path / "classifier", task="classification", num_labels=2)
    assert other.score.weight.shape == (2, 32)
    assert capsys.readouterr().err.count("new, untrained head") == 1


def test_a_classifier_needs_to_know_its_labels(llama_directory: Path) -> None:
    with pytest.raises(ConfigError, match="how many labels"):
        load_base(llama_directory, task="classification")
    with pytest.raises(ConfigError, match="num_labels is 3, but label_names has 2"):
        load_base(llama_directory, task="classification", num_labels=3, label_names=["a", "b"])
    with pytest.raises(ConfigError, match="need task 'classification'"):
        load_base(llama_directory, num_labels=3)


def test_a_broken_tokenizer_is_an_error_and_none_is_none(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match="its tokenizer"):
        load_base(copy)


def test_transformers_log_level_and_bars_are_as_before(llama_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    logging.set_verbosity_info()
    try:
        load_base(llama_directory)
        with pytest.raises(ConfigError):
            load_base(llama_directory, task="classification")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert "Loading weights" not in capsys.readouterr().err
    finally:
        logging.set_verbosity_warning()
