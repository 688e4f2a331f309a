"""Scripts written for peft, with only the import changed, under Trainer and SFTTrainer: the numbers are peft's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft as theirs
import pytest
import torch
from torch import Tensor

import byway
import byway.compat.peft as ours
from tests import tiny
from tests.conftest import ROOT
from tests.ecosystem.test_trainers import tokenizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # what torch, accelerate, bitsandbytes and trl say of themselves

STEPS, SAVED = 4, 2
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.build("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def load(directory: Path, quantize: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {
        "fp32": {"dtype": torch.float32},
        "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "nf4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)},
    }
    return AutoModelForCausalLM.from_pretrained(directory, **options[quantize])


def dataset() -> Any:
    from datasets import Dataset

    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 20, (16,), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": [torch.randint(3, tiny.VOCABULARY, (n,), generator=draw).tolist() for n in lengths]})


class Run:
    """One training: the losses and gradient norms of its steps, and the model after it."""

    def __init__(self, make: Callable[[Any], Any], library: ModuleType, base: Any, folder: Path, trainer: str, **changes: Any) -> None:
        """make: base → model, or a configuration, which SFTTrainer then attaches itself."""
        from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed
        from trl import SFTConfig, SFTTrainer

        options: Options = {
            **{"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-2, "seed": 0},
            **{"logging_steps": 1, "save_strategy": "steps", "save_steps": SAVED, "report_to": "none", "lr_scheduler_type": "constant"},
            **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": True},
        }
        resume = changes.pop("resume", None)
        options |= changes
        if any(parameter.dtype in (torch.int8, torch.uint8) for parameter in base.parameters()):
            base = library.prepare_model_for_kbit_training(base, use_gradient_checkpointing=options["gradient_checkpointing"])
        set_seed(0)
        made = make(base)
        rows: Options = {"train_dataset": dataset(), "eval_dataset": dataset()}
        if trainer == "SFTTrainer":
            model, config = (made, None) if isinstance(made, torch.nn.Module) else (base, made)
            self.trainer: Any = SFTTrainer(model, SFTConfig(**options), processing_class=tokenizer(), peft_config=config, **rows)
        else:
            collate = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
            self.trainer = Trainer(made, TrainingArguments(**options), data_collator=collate, **rows)
        self.trainer.train(resume_from_checkpoint=resume)
        self.model: Any = self.trainer.model
        logged = self.trainer.state.log_history
        self.losses = [entry["loss"] for entry in logged if "loss" in entry]
        self.norms = [entry["grad_norm"] for entry in logged if "grad_norm" in entry]
        self.folder = folder


def trained(library: ModuleType, base: Any, folder: Path, how: str, options: Options | None = None, **changes: Any) -> Run:
    """how: ``SFTTrainer`` or ``Trainer`` on a model of ``get_peft_model``, or ``peft_config``."""
    config = library.LoraConfig(**LORA | (options or {}))
    if how == "peft_config":
        return Run(lambda _: config, library, base, folder, "SFTTrainer", **changes)
    return Run(lambda model: library.get_peft_model(model, config), library, base, folder, how, **changes)


def states(run: Run, library: ModuleType) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in library.get_peft_model_state_dict(run.model).items()}


def logits(model: Any) -> Tensor:
    ids = torch.tensor([[5, 9, 33, 7, 8]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


@pytest.mark.covering_sample
@pytest.mark.parametrize("quantize", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("how", ["Trainer", "SFTTrainer", "peft_config"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_losses_and_gradients_are_pefts_from_the_same_seed(
    quantize: str, how: str, checkpointing: bool, directory: Path, tmp_path: Path
) -> None:
    mixed = how != "Trainer" and quantize != "fp32"  # trl's default; it keeps the factors on a quantized base in bfloat16
    runs = {}
    for library in (theirs, ours):
        changes: Options = {"gradient_checkpointing": checkpointing, "bf16": mixed}
        runs[library] = trained(library, load(directory, quantize), tmp_path / library.__name__, how, **changes)
    expected, found = runs[theirs], runs[ours]
    assert isinstance(found.model, ours.PeftModel) and type(found.model).__module__.startswith("byway.")
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert len(found.losses) == STEPS and min(found.norms) > 1e-3
    own, their = states(found, ours), states(expected, theirs)
    assert own.keys() == their.keys()
    for key, tensor in their.items():
        torch.testing.assert_close(own[key], tensor, atol=1e-5, rtol=1e-5)


CASES: dict[str, Options] = {
    "all-linear": {},
    "dropout, rsLoRA, patterns": {"lora_dropout": 0.1, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "DoRA": {"use_dora": True, "lora_dropout": 0.1},
    "PiSSA": {"init_lora_weights": "pissa"},
    "a head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embedding trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "no task type": {"task_type": None},
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_configuration_trains_as_in_peft(name: str, untied: Path, tmp_path: Path) -> None:
    expected, found = (trained(lib, load(untied, "fp32"), tmp_path / lib.__name__, "peft_config", CASES[name]) for lib in (theirs, ours))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)


def test_rows_of_a_head_that_is_tied_to_an_embedding_are_trained_though_trl_never_calls_the_head(directory: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]}
    runs = [trained(ours, load(directory, "fp32"), tmp_path / how, how, options) for how in ("SFTTrainer", "Trainer")]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    own, same = (states(run, ours) for run in runs)
    for key, tensor in own.items():
        torch.testing.assert_close(tensor, same[key], atol=1e-4, rtol=1e-4)


@pytest.mark.covering_sample
@pytest.mark.parametrize("quantize", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("name", ["all-linear", "DoRA", "PiSSA"])
@pytest.mark.parametrize("how", ["Trainer", "peft_config"])
def test_resumed_from_a_checkpoint_it_ends_in_the_same_bits(quantize: str, name: str, how: str, directory: Path, tmp_path: Path) -> None:
    options = CASES[name]
    whole = trained(ours, load(directory, quantize), tmp_path / "whole", how, options)
    checkpoint = whole.folder / f"checkpoint-{SAVED}"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    again = trained(ours, load(directory, quantize), tmp_path / "again", how, options, resume=str(checkpoint))
    assert again.losses[-2:] == whole.losses[-2:]
    expected, found = states(whole, ours), states(again, ours)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("quantize", ["fp32", "int8", "nf4"])
def test_after_training_the_flow_ends_in_a_merged_model_in_a_pipeline(quantize: str, directory: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    best = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True}
    run = trained(ours, load(directory, quantize), tmp_path / "run", "peft_config", learning_rate=3e-2, **best)
    run.trainer.save_model(str(tmp_path / "adapter"))
    expected = logits(run.model)
    options: Options = {"dtype": torch.float32} if quantize == "fp32" else {"quantization_config": run.model.config.quantization_config}
    model = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (expected - logits(model)).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-2 if quantize == "int8" else 1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    said = pipeline("text-generation", str(tmp_path / "merged"), device="cpu")("w5 w9", max_new_tokens=3, do_sample=False)
    assert said[0]["generated_text"].startswith("w5 w9")
    # peft reads the checkpoint, too
    other = theirs.PeftModel.from_pretrained(load(directory, "fp32"), tmp_path / "adapter")
    assert (logits(other) - expected).abs().max() < (1e-5 if quantize == "fp32" else 0.3)


@pytest.mark.covering_sample
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_of_byway_attach_on_a_quantized_base_trains_and_resumes(
    quantize: str, trainer: str, checkpointing: bool, directory: Path, tmp_path: Path
) -> None:
    def attached(base: Any) -> Any:
        adapter = byway.attach(base, byway.LoRA(rank=8, alpha=16, targets="all-linear"))
        tiny.randomize(sorted(adapter.named_parameters()))
        return base

    def theirs_alike(base: Any) -> Any:
        model = theirs.get_peft_model(base, theirs.LoraConfig(**LORA))
        tiny.randomize(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad))
        return model

    options: Options = {"gradient_checkpointing": checkpointing, "bf16": trainer == "SFTTrainer"}
    whole = Run(attached, ours, load(directory, quantize), tmp_path / "whole", trainer, **options)
    expected = Run(theirs_alike, theirs, load(directory, quantize), tmp_path / "theirs", trainer, **options)
    assert whole.losses == pytest.approx(expected.losses, rel=1e-6)
    options["resume"] = str(tmp_path / "whole" / f"checkpoint-{SAVED}")
    again = Run(attached, ours, load(directory, quantize), tmp_path / "again", trainer, **options)
    parameters = dict(again.model.named_parameters())
    trainable = [(n, p) for n, p in whole.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * tiny.LAYERS and all(torch.equal(parameters[n], p) for n, p in trainable)
    byway.detach(whole.model)
    assert not {"save_pretrained", "_hf_peft_config_loaded"} & vars(whole.model).keys()


def test_the_objects_stay_what_they_are(directory: Path) -> None:
    """``isinstance`` accepts ours for peft's; types, copies, pickles and peft's own models are as before."""
    import copy
    import dataclasses
    import pickle

    config = ours.LoraConfig(**LORA)
    assert isinstance(config, theirs.LoraConfig) and isinstance(config, theirs.PeftConfig) and not isinstance(config, theirs.IA3Config)
    assert type(config) is ours.LoraConfig
    changed = dataclasses.replace(config, r=3)
    assert isinstance(changed, ours.LoraConfig) and changed.r == 3 and changed.lora_alpha == config.lora_alpha
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), pickle.loads(pickle.dumps(changed))):
        assert isinstance(twin, ours.LoraConfig) and twin.to_dict().keys() == config.to_dict().keys()
    model = ours.get_peft_model(load(directory, "fp32"), config)
    assert isinstance(model, theirs.PeftModelForCausalLM) and not isinstance(model, theirs.PeftModelForSeq2SeqLM)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is ours.PeftModelForCausalLM
        assert torch.equal(logits(twin), logits(model))
    assert type(theirs.get_peft_model(load(directory, "fp32"), theirs.LoraConfig(**LORA))) is theirs.PeftModelForCausalLM
    assert type(theirs.get_peft_model(load(directory, "fp32"), config)) is ours.PeftModelForCausalLM
    assert type(theirs.get_peft_model(load(directory, "fp32"), dataclasses.replace(config, task_type=None))) is ours.PeftModel


@pytest.mark.parametrize("name", ["DoRA", "a head trained whole", "no task type"])
def test_a_configuration_of_peft_itself_is_taken_too(name: str, untied: Path) -> None:
    made = []
    for config in (ours.LoraConfig(**LORA | CASES[name]), theirs.LoraConfig(**LORA | CASES[name])):
        torch.manual_seed(0)
        made.append(ours.get_peft_model(load(untied, "fp32"), config))  # pyright: ignore[reportArgumentType]
    assert type(made[0]) is type(made[1])
    states = [ours.get_peft_model_state_dict(model) for model in made]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with pytest.raises(ValueError, match="peft_config is a dict"):
        ours.get_peft_model(load(untied, "fp32"), {"r": 8})  # pyright: ignore[reportArgumentType]


def test_dpo_gives_pefts_numbers(directory: Path, tmp_path: Path) -> None:
    """Any trainer of trl: this one switches the adapter off to have a reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_dict({"prompt": ["w5 w6", "w7 w8"] * 4, "chosen": ["w9 w10", "w11"] * 4, "rejected": ["w20", "w21 w22"] * 4})
    losses = []
    for library in (theirs, ours):
        settings = DPOConfig(
            str(tmp_path), max_steps=2, learning_rate=1e-2, logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no"
        )
        options: Options = {"train_dataset": rows, "processing_class": tokenizer(), "peft_config": library.LoraConfig(**LORA)}
        trainer = DPOTrainer(load(directory, "fp32"), args=settings, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[1][0] != losses[1][1]


def test_without_peft_a_quantized_base_trains_under_trainer(directory: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(directory), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same bits" in done.stdout


SCRIPT = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import is_peft_available
from byway.compat.peft import LoraConfig, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
assert not is_peft_available()
base, folder = sys.argv[1:]
ids = torch.randint(3, 60, (16, 9), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row} for row in ids]
states = []
for resume in (None, folder + "/checkpoint-2"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(task_type="CAUSAL_LM"))
    arguments = TrainingArguments(folder, max_steps=3, save_steps=2, use_cpu=True, report_to="none", gradient_checkpointing=True)
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
    states.append(get_peft_model_state_dict(model))
assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())
print("the same bits")
"""
