"""P-tuning: its encoders against torch's own modules and HF peft's, counts of the paper's settings, files, resume, learning in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import byway
from byway.errors import ConfigError
from byway.methods.p_tuning import PTuning
from byway.methods.virtual.sides import VirtualTokens
from tests.tiny import build, inputs, randomize

MAXIMUM = 1e-5  # reliability I23


def side_of(adapter: byway.Adapter) -> VirtualTokens:
    return next(side for _, side in adapter.side_paths() if isinstance(side, VirtualTokens))


def reference(side: VirtualTokens, width: int, hidden: int) -> Tensor:
    """BiLSTM, Linear, ReLU, Linear by torch's own modules, with the side path's tensors."""
    state = {key.removeprefix("encoder."): value for key, value in side.state_dict().items()}
    lstm = nn.LSTM(width, hidden, 2, bidirectional=True, batch_first=True).to(state["prompt_embeddings"].dtype)
    lstm.load_state_dict({key.removeprefix("0."): value for key, value in state.items() if key.startswith("0.")})
    out = lstm(state["prompt_embeddings"][None])[0][0]
    return torch.relu(out @ state["1.weight"].T + state["1.bias"]) @ state["3.weight"].T + state["3.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lstm_encoder_is_that_of_the_paper(dtype: torch.dtype, seed: int) -> None:
    model = build("llama").to(dtype)
    side = side_of(byway.attach(model, PTuning(num_virtual_tokens=3 + seed % 6)))
    assert side.vectors().dtype == dtype
    assert (side.vectors() - reference(side, 32, 16)).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(("encoder", "count"), [("lstm", 14 * 32**2 + 18 * 32), ("mlp", 2 * 32**2 + 2 * 32), ("mlp3", 3 * 32**2 + 3 * 32)])
def test_counts_are_those_of_the_formulas(encoder: Any, count: int) -> None:
    assert byway.attach(build("llama"), PTuning(num_virtual_tokens=9, encoder=encoder)).num_parameters == 9 * 32 + count


@pytest.mark.parametrize(("encoder", "theirs"), [("mlp3", "MLP"), ("lstm", "LSTM")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "opt", "qwen2"])
def test_outputs_and_gradients_are_those_of_pefts_encoder(family: str, encoder: Any, theirs: str, seed: int) -> None:
    count, hidden = 2 + seed % 5, 6 + seed % 7
    model, x = build(family), inputs(family)
    adapter = byway.attach(model, PTuning(num_virtual_tokens=count, encoder=encoder, hidden_size=hidden))
    randomize(adapter.named_parameters(), scale=0.5)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=count,
        num_transformer_submodules=1,
        encoder_hidden_size=hidden,
        encoder_reparameterization_type=theirs,
    )
    other = peft.get_peft_model(build(family), config)
    encoder_of: Any = other.prompt_encoder["default"]
    state = side_of(adapter).state_dict()
    names = {"embedding.weight": "prompt_embeddings"}
    for name, _ in encoder_of.named_parameters():
        if name.startswith("lstm_head."):
            names[name] = name.replace("lstm_head.", "encoder.0.")
        elif name.startswith("mlp_head."):
            place = int(name.split(".")[1])
            names[name] = f"encoder.{place + (theirs == 'LSTM')}.{name.split('.')[2]}"
    encoder_of.load_state_dict({name: state[ours] for name, ours in names.items()})
    out, expected = model(**x).logits, other(**x).logits
    expected = expected if family == "t5" else expected[:, count:]
    assert (out - expected).abs().max() < MAXIMUM
    for logits in (out, expected):
        logits.pow(2).mean().backward()
    ours = dict(side_of(adapter).named_parameters())
    for name, parameter in encoder_of.named_parameters():
        assert (ours[names[name]].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "opt", "qwen2"])
def test_peft_loads_the_folded_vectors_and_we_load_pefts(family: str, tmp_path: Path) -> None:
    model, x = build(family), inputs(family)
    adapter = byway.attach(model, PTuning(num_virtual_tokens=4))
    randomize(adapter.named_parameters(), scale=0.5)
    adapter.save(tmp_path / "ours")
    out = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")(**x).logits
    assert ((out if family == "t5" else out[:, 4:]) - model(**x).logits).abs().max() < MAXIMUM
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=8)
    fresh = peft.get_peft_model(build(family), config).eval()
    fresh.save_pretrained(tmp_path / "theirs")
    expected = fresh(**x).logits
    other = build(family)
    loaded = byway.load(other, tmp_path / "theirs", trainable=True)
    assert isinstance(loaded.method, PTuning) and loaded.num_parameters == 3 * 32
    assert (other(**x).logits - (expected if family == "t5" else expected[:, 3:])).abs().max() < MAXIMUM


def test_a_template_keeps_its_encoder_in_byways_own_file(tmp_path: Path) -> None:
    model, x = build("bert"), inputs("bert")
    adapter = byway.attach(model, PTuning(template="<T*3> {text} <T*3>", encoder="mlp"))
    randomize(adapter.named_parameters())
    adapter.save(tmp_path / "a")
    other = build("bert")
    again = byway.load(other, tmp_path / "a", trainable=True)
    assert again.num_parameters == adapter.num_parameters
    assert torch.equal(other(**x).logits, model(**x).logits)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"encoder": "gru"}, "encoder is 'gru'"),
        ({"encoder": "mlp", "lstm_layers": 3}, "need encoder: lstm"),
        ({"hidden_size": 0, "dropout": 1.0}, "(?s)hidden_size is 0.*dropout is 1.0"),
    ],
)
def test_wrong_fields_are_all_reported(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PTuning(**fields)
