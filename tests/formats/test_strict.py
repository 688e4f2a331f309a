"""Adapter files that must be refused: one clear message that names the file, and a model that is as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import byway
from byway.core.fields import shown
from byway.errors import AdapterError

Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def llama(seed: int = 3, hidden: int = 32, layers: int = 2, vocabulary: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A good adapter on q_proj and v_proj, rank 4."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    adapter = byway.attach(llama(), byway.LoRA(rank=4, targets=["q_proj", "v_proj"]))
    for _, parameter in adapter.named_parameters():
        nn.init.normal_(parameter)
    return adapter.save(folder)


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def foreign(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the tensors as another program would, without our record."""
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, *said: str, model: nn.Module | None = None, **options: object) -> None:
    """Loading fails with a message that contains every word of `said`; the model is byte-identical and has no trace."""
    model = llama() if model is None else model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(AdapterError) as caught:
        byway.load(model, folder, **options)  # pyright: ignore
    for word in said:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert caught.value.exit_code == 2
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(random, torch.get_rng_state())


def test_the_good_adapter_loads(adapter):
    model = llama()
    bare = model(torch.arange(8)[None]).logits
    loaded = byway.load(model, adapter)
    assert loaded.notes == () and not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(model(torch.arange(8)[None]).logits, bare)


# ------------------------------------------------------------ configuration


def test_a_missing_configuration_says_what_is_there(adapter):
    (adapter / "adapter_config.json").unlink()
    refused(adapter, "adapter_config.json", "adapter_model.safetensors")


def test_an_adapter_one_folder_below_is_pointed_at(adapter):
    refused(adapter.parent, str(adapter))


def test_a_missing_directory_names_its_neighbours(adapter):
    refused(adapter.parent / "adaptor", "no such directory", "adapter")


@pytest.mark.parametrize("name", ["adapter.zip", "adapter.tar.gz", "adapter_model.safetensors"])
def test_a_file_in_place_of_a_directory_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    refused(tmp_path / name, name, "directory")


def test_an_empty_configuration_names_the_missing_key(adapter):
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "adapter_config.json", "peft_type")


def test_an_unknown_peft_type_lists_the_known_ones(adapter):
    configure(adapter, peft_type="LORRA")
    refused(adapter, "LORRA", "did you mean 'LORA'")


def test_fields_of_a_newer_peft_are_refused_unless_off_or_allowed(adapter):
    configure(adapter, new_feature={"strength": 2}, idle_feature=None, peft_version="0.99.0")
    refused(adapter, "new_feature", "0.99.0", "0.21")
    notes = byway.load(llama(), adapter, allow_unknown_fields=True).notes
    assert any("new_feature" in note and "idle_feature" in note for note in notes)
    configure(adapter, new_feature=None)
    assert byway.load(llama(), adapter).notes


@pytest.mark.parametrize("field", ["use_bdlora", "alora_invocation_tokens", "layer_replication"])
def test_variants_that_change_the_tensors_meaning_are_refused(adapter, field):
    configure(adapter, **{field: [1, 2]} if field != "use_bdlora" else {field: True})
    refused(adapter, "adapter_config.json", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", "4"), ("r", 0), ("r", True), ("r", None), ("lora_alpha", None), ("target_modules", 3), ("bias", "some"), ("rank_pattern", [1])],
)
def test_values_of_a_wrong_kind_name_the_field(adapter, field, value):
    configure(adapter, **{field: value})
    refused(adapter, "adapter_config.json", repr(field), shown(value))


def test_an_expression_that_cannot_be_used_leaves_the_choice_to_the_tensors(adapter):
    configure(adapter, target_modules="(.*_proj" + "x?" * 600)
    model = llama()
    notes = byway.load(model, adapter).notes
    assert any("tensors decide" in note for note in notes)
    assert {site.path for site, _, _ in byway.side_paths(model)} == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}


def test_entries_of_another_program_that_match_nothing_are_noted(adapter):
    configure(adapter, target_modules=["q_proj", "v_proj", "query"], modules_to_save=["score"], rank_pattern={"gate": 2})
    notes = " ".join(byway.load(llama(), adapter).notes)
    assert "query" in notes and "score" in notes and "gate" in notes


# ------------------------------------------------------------ tensors


def test_pickles_are_never_opened(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    refused(adapter, "adapter_model.bin", "pickle")
    assert not Path("owned").exists()


def test_a_pickle_beside_safetensors_is_ignored(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"garbage")
    byway.load(llama(), adapter)


def test_a_cut_file_is_named(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(adapter, "adapter_model.safetensors", "truncated")


def test_a_flipped_value_is_noticed(adapter):
    file = adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    refused(adapter, "adapter_model.safetensors", "hash")


def test_a_tensor_too_many_or_too_few_beside_our_record_is_named(adapter):
    file = adapter / "adapter_model.safetensors"
    with safe_open(file, "pt") as content:
        record = content.metadata()
    tensors = load_file(file)
    save_file(tensors | {"stray.weight": torch.ones(2)}, file, record)
    refused(adapter, "adapter_model.safetensors", "not among them: stray.weight")
    del tensors[Q.format(1, "A")]
    save_file(tensors, file, record)
    refused(adapter, "adapter_model.safetensors", f"missing: {Q.format(1, 'A')}")


def test_other_ranks_and_transposed_factors_name_tensor_and_shapes(adapter):
    configure(adapter, r=8)
    refused(adapter, Q.format(0, "A"), "[4, 32]", "[8, 32]")
    configure(adapter, r=4)
    foreign(adapter, lambda t: t | {Q.format(0, "A"): t[Q.format(0, "A")].T.contiguous()})
    refused(adapter, Q.format(0, "A"), "[32, 4]", "[4, 32]")


def test_no_tensor_found_is_counted(adapter):
    foreign(adapter, lambda t: {})
    refused(adapter, "0 of 8 tensors found")
    foreign(adapter, lambda t: {"a": torch.ones(2)})
    refused(adapter, "0 of 8 tensors found")


def test_renamed_keys_are_counted(adapter):
    foreign(adapter, lambda t: {f"model.{key}": value for key, value in t.items()})
    refused(adapter, "0 of 8 tensors found", "8 others")


def test_a_missing_tensor_is_named(adapter):
    foreign(adapter, lambda t: {key: value for key, value in t.items() if key != Q.format(1, "B")})
    refused(adapter, "1 of 8 tensors are missing", Q.format(1, "B"))


def test_tensors_of_the_base_are_not_let_in(adapter):
    smuggled = {
        "base_model.model.model.norm.weight": torch.ones(32),
        "base_model.model.model.layers.0.self_attn.k_proj.weight": torch.ones(32, 32),
    }
    foreign(adapter, lambda t: t | smuggled)
    refused(adapter, *smuggled)


def test_a_base_layer_that_is_no_vocabulary_is_not_let_in(adapter):
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    foreign(adapter, lambda t: t | {key: torch.ones(32, 32)})
    refused(adapter, key)


def test_more_tensors_than_the_configuration_lists_are_refused(adapter):
    configure(adapter, target_modules=["q_proj"])
    refused(adapter, "4 tensors do not belong", "v_proj")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_what_is_not_floating_point_is_refused(adapter, dtype):
    foreign(adapter, lambda t: t | {Q.format(0, "A"): t[Q.format(0, "A")].to(dtype)})
    refused(adapter, Q.format(0, "A"), str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_converted_and_noted(adapter, dtype):
    foreign(adapter, lambda t: {key: value.to(dtype) for key, value in t.items()})
    loaded = byway.load(llama(), adapter)
    assert any(str(dtype).removeprefix("torch.") in note for note in loaded.notes)
    stored = load_file(adapter / "adapter_model.safetensors")[Q.format(0, "A")]
    assert torch.equal(dict(loaded.named_parameters())["model.layers.0.self_attn.q_proj.byway.default.lora_A"], stored.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(adapter, value):
    foreign(adapter, lambda t: t | {Q.format(1, "B"): t[Q.format(1, "B")].index_fill(0, torch.tensor([3]), value)})
    refused(adapter, "NaN or infinity", Q.format(1, "B"))


# ------------------------------------------------------------ the base


@pytest.mark.parametrize("changes", [{"layers": 3}, {"layers": 1}, {"hidden": 64}], ids=["more layers", "fewer layers", "other size"])
def test_another_architecture_is_refused_with_and_without_a_record(adapter, changes):
    refused(adapter, "another base", next(iter(changes)), model=llama(**changes))
    refused(adapter, "adapter_model.safetensors", model=llama(**changes), check_base=False)
    foreign(adapter, lambda t: t)
    refused(adapter, "adapter_model.safetensors", model=llama(**changes))


def test_other_weights_of_the_same_shape_are_refused_unless_asked_for(adapter):
    refused(adapter, "another base", "the weights of", model=llama(seed=4))
    byway.load(llama(seed=4), adapter, check_base=False)


def test_a_file_without_a_record_loads_on_any_base_of_the_shape(adapter):
    foreign(adapter, lambda t: t)
    byway.load(llama(seed=4), adapter)


def test_the_same_base_in_bfloat16_is_recognized_and_said(adapter):
    assert any("bfloat16 instead of float32" in note for note in byway.load(llama().to(torch.bfloat16), adapter).notes)


def test_a_resized_vocabulary_is_recognized_and_said(adapter):
    model = llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert any("70 rows instead of 64" in note for note in byway.load(model, adapter).notes)


def test_an_adapter_is_known_again_beside_another_one(adapter):
    model = llama()
    byway.load(model, adapter, "one")
    byway.load(model, adapter, "two")
    assert list(byway.adapters(model)) == ["one", "two"]


# ------------------------------------------------------------ saving


def test_saving_over_an_adapter_replaces_it_and_over_anything_else_is_refused(adapter):
    model = llama()
    loaded = byway.load(model, adapter, trainable=True)
    for _, parameter in loaded.named_parameters():
        nn.init.ones_(parameter)
    loaded.save(adapter)
    assert sorted(entry.name for entry in adapter.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")[Q.format(0, "A")], torch.ones(4, 32))
    (adapter / "optimizer.pt").write_text("x")
    with pytest.raises(AdapterError, match=r"optimizer\.pt"):
        loaded.save(adapter)


def test_an_adapter_with_nan_does_not_replace_a_good_file(adapter):
    loaded = byway.load(llama(), adapter)
    before = (adapter / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(loaded.named_parameters())[1].fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        loaded.save(adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_", "q_proj", "0", "default", "train"])
def test_any_allowed_name_makes_the_round_trip(saved, tmp_path, name):
    loaded = byway.load(llama(), saved, name)
    loaded.save(tmp_path / name)
    assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == (saved / "adapter_model.safetensors").read_bytes()


def test_names_that_end_alike_are_told_apart(tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.block = nn.Module()
            self.block.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block.fc(self.fc(x))

    torch.manual_seed(0)
    model, twin = Nested(), Nested()
    twin.load_state_dict(model.state_dict())
    adapter = byway.attach(model, byway.LoRA(rank=2, targets=r"fc", modules_to_save="none"))
    for _, parameter in adapter.named_parameters():
        nn.init.normal_(parameter)
    adapter.save(tmp_path / "a")
    byway.load(twin, tmp_path / "a")
    assert [site.path for site, _, _ in byway.side_paths(twin)] == ["fc"]
    import peft

    third = Nested()
    third.load_state_dict(byway.base_state_dict(model))
    x = torch.ones(1, 4)
    assert torch.allclose(peft.PeftModel.from_pretrained(third, str(tmp_path / "a"))(x), model(x), atol=1e-6)
    assert torch.equal(twin(x), model(x))
