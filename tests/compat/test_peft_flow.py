"""The flows of peft's examples, unchanged but for the import, give the same numbers as peft itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft as theirs
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import byway.compat.peft as ours
from tests import tiny

Flow = Callable[[ModuleType, Any, Path, dict[str, Tensor] | None], dict[str, Any]]
STEPS = 4


def tokens(rows: int = 4, length: int = 9) -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def without_dropout(model: Any) -> Any:
    """Return the model with dropout off, so that two runs compute the same numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    return model.eval()


def start_alike(peft: ModuleType, model: Any, initial: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the adapter's initial tensors; they are set to `initial` if given, so that both libraries start alike."""
    if initial is not None:
        peft.set_peft_model_state_dict(model, {k: v.clone() for k, v in initial.items()})
    return {k: v.detach().clone() for k, v in peft.get_peft_model_state_dict(model).items()}


def causal_lm(peft: ModuleType, base: Any, folder: Path, initial: dict[str, Tensor] | None) -> dict[str, Any]:
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, inference_mode=False, r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    untouched = copy.deepcopy(base)
    model = peft.get_peft_model(base, config)
    model.print_trainable_parameters()
    started = start_alike(peft, model, initial)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(4, 9, dtype=torch.long), "labels": tokens()}
    losses = []
    model.train()
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    model.save_pretrained(folder)
    loaded_config = peft.PeftConfig.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(untouched, folder)
    with torch.no_grad():
        logits = model(input_ids=tokens(2)).logits
        again = loaded(input_ids=tokens(2)).logits
        generated = loaded.generate(input_ids=tokens(2), max_new_tokens=6, do_sample=False)
        with loaded.disable_adapter():
            bare = loaded(input_ids=tokens(2)).logits
        merged = loaded.merge_and_unload()(input_ids=tokens(2)).logits
    return {
        "started": started,
        "numbers": model.get_nb_trainable_parameters(),
        "config": (str(loaded_config.peft_type.value), loaded_config.r, sorted(loaded_config.target_modules)),
        "tensors": [torch.tensor(losses), logits, again, bare, merged, generated.float()],
    }


def seq2seq(peft: ModuleType, base: Any, folder: Path, initial: dict[str, Tensor] | None) -> dict[str, Any]:
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, lora_dropout=0.0)
    untouched = copy.deepcopy(base)
    model = peft.get_peft_model(base, config)
    started = start_alike(peft, model, initial)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=tokens(), labels=tokens(4, 5)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(untouched, folder, is_trainable=False).eval()
    with torch.no_grad():
        logits = loaded(input_ids=tokens(2), decoder_input_ids=tokens(2, 4)).logits
        generated = loaded.generate(input_ids=tokens(2), max_new_tokens=6, do_sample=False)
        merged = loaded.merge_and_unload()
    return {
        "started": started,
        "numbers": model.get_nb_trainable_parameters(),
        "config": sorted(loaded.peft_config["default"].target_modules) if peft is theirs else None,
        "tensors": [logits, generated.float(), merged(input_ids=tokens(2), decoder_input_ids=tokens(2, 4)).logits],
    }


def sequence_classification(peft: ModuleType, base: Any, folder: Path, initial: dict[str, Tensor] | None) -> dict[str, Any]:
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.0)
    untouched = copy.deepcopy(base)
    model = peft.get_peft_model(base, config)
    model.print_trainable_parameters()
    started = start_alike(peft, model, initial)
    rows = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(tokens(8))]
    arguments = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    model.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(untouched, folder / "adapter")
    with torch.no_grad():
        model.eval()
        logits, again = model(input_ids=tokens()).logits, loaded(input_ids=tokens()).logits
        merged = loaded.merge_and_unload()(input_ids=tokens()).logits
    return {
        "started": started,
        "numbers": model.get_nb_trainable_parameters(),
        "config": None,
        "tensors": [torch.tensor(evaluated), logits, again, merged],
    }


@pytest.mark.parametrize(
    ("flow", "base"),
    [
        pytest.param(causal_lm, tiny.llama, id="causal LM, tied head"),
        pytest.param(causal_lm, tiny.opt, id="causal LM, OPT"),
        pytest.param(seq2seq, tiny.t5, id="seq2seq"),
        pytest.param(sequence_classification, tiny.bert, id="sequence classification, Trainer"),
    ],
)
def test_a_public_flow_gives_pefts_numbers(
    flow: Flow, base: Callable[[], Any], tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without_dropout(base())
    capsys.readouterr()
    expected = flow(theirs, copy.deepcopy(model), tmp_path / "theirs", None)
    said = [line for line in capsys.readouterr().out.splitlines() if "trainable" in line]
    found = flow(ours, copy.deepcopy(model), tmp_path / "ours", expected["started"])
    assert [line for line in capsys.readouterr().out.splitlines() if "trainable" in line] == said
    assert found["started"].keys() == expected["started"].keys()
    assert found["numbers"] == expected["numbers"]
    if found["config"] is not None:
        assert found["config"] == expected["config"]
    for own, their in zip(found["tensors"], expected["tensors"], strict=True):
        torch.testing.assert_close(own, their, atol=1e-5, rtol=1e-5)


CASES: dict[str, tuple[Callable[[], Any], Callable[[ModuleType], Any]]] = {
    "DoRA": (tiny.llama, lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules="all-linear")),
    "rsLoRA, patterns": (
        tiny.llama,
        lambda peft: peft.LoraConfig(
            task_type="CAUSAL_LM",
            use_rslora=True,
            target_modules=r".*\.(q_proj|down_proj)",
            rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 3},
        ),
    ),
    "two layers, trained biases": (
        tiny.opt,
        lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["fc1"], layers_to_transform=[0, 2], bias="lora_only"),
    ),
    "all biases": (
        tiny.gpt2,
        lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    ),
    "embedding and head": (tiny.opt, lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"])),
    "IA3": (tiny.llama, lambda peft: peft.IA3Config(task_type="CAUSAL_LM")),
    "IA3, chosen": (
        tiny.t5,
        lambda peft: peft.IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
    ),
    "layer norms": (tiny.llama, lambda peft: peft.LNTuningConfig(task_type="CAUSAL_LM")),
    "AdaLoRA": (tiny.llama, lambda peft: peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["q_proj", "v_proj"])),
    "prompt tuning": (tiny.llama, lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prefix tuning": (tiny.llama, lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "P-tuning": (
        tiny.llama,
        lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    ),
}


def trained(peft: ModuleType, base: Any, make: Callable[[ModuleType], Any]) -> Any:
    """Return a model with the configured adapter, its trainable tensors perturbed."""
    model = peft.get_peft_model(base, make(peft)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def outputs(model: Any, base_type: Callable[[], Any]) -> Tensor:
    """Return the logits of the real tokens; with a prompt, peft returns some for the virtual tokens too."""
    extra = {"decoder_input_ids": tokens(2, 4)} if base_type is tiny.t5 else {}
    length = 4 if extra else 9
    with torch.no_grad():
        return model(input_ids=tokens(2), attention_mask=torch.ones(2, 9, dtype=torch.long), **extra).logits[:, -length:]


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of tied weights
@pytest.mark.parametrize("case", CASES)
def test_each_configuration_gives_pefts_outputs_and_files(case: str, tmp_path: Path, seed: int) -> None:
    base, make = CASES[case]
    original = base().eval()
    reference = trained(theirs, copy.deepcopy(original), make)
    expected = outputs(reference, base)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = ours.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "theirs")
    torch.testing.assert_close(outputs(loaded, base), expected, atol=1e-5, rtol=1e-5)
    assert (expected - outputs(original, base)).abs().max() > 1e-3
    loaded.save_pretrained(tmp_path / "ours")
    back = theirs.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(back, base), expected, atol=1e-5, rtol=1e-5)
    fresh = ours.get_peft_model(copy.deepcopy(original), make(ours))
    if case != "P-tuning":  # peft trains the table that its files do not hold
        assert fresh.get_nb_trainable_parameters()[0] == reference.get_nb_trainable_parameters()[0]
    own = trained(ours, copy.deepcopy(original), make)
    own.save_pretrained(tmp_path / "own")
    torch.testing.assert_close(
        outputs(theirs.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "own").eval(), base),
        outputs(own, base),
        atol=1e-5,
        rtol=1e-5,
    )
