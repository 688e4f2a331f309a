"""An attached model trains under transformers' Trainer and TRL's SFTTrainer as it does in our own loop: same gradients, same updates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import byway
from byway.core.slots import slots
from byway.data.collate import pad_batch
from byway.data.encode import Example
from byway.engine.loss.tokens import token_loss
from byway.recipe.sections import Train
from byway.train import train
from byway.train.optim import Optimizer, Schedule
from tests import tiny

ROWS_PER_STEP, MICRO, STEPS = 4, 2, 3
RATE = 1e-2
CLIP = 0.02
"""Small enough that every step is clipped, so that the norm is compared too."""
EPSILON = 1e-4
"""AdamW divides a gradient by its own size: with 1e-8 the rounding of the smallest ones would come out as large as a real difference."""
METHOD = byway.LoRA(rank=4, alpha=8, targets="all-linear")

pytestmark = pytest.mark.filterwarnings(
    # what torch, accelerate and trl say of themselves
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
)


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums in one order; and no GPU, whose sums have another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rows(seed: int) -> list[Example]:
    """Rows of different lengths with different numbers of learned tokens, so that a mean of means would show."""
    found = []
    for index in range(ROWS_PER_STEP * STEPS):
        length = int(torch.randint(5, 24, ()))
        ids = torch.randint(3, tiny.VOCABULARY, (length,)).tolist()
        learned = int(torch.randint(1, length, ()))
        found.append(Example(ids, [-100] * (length - learned) + ids[length - learned :], f"row {index}"))
    return found


def attached(start: int = 3, **changes: Any) -> tuple[Any, byway.Adapter]:
    model: Any = tiny.build("llama")
    adapter = byway.attach(model, METHOD if not changes else byway.LoRA(rank=4, alpha=8, **changes))
    tiny.randomize(adapter.named_parameters(), seed=start)
    return model, adapter


@dataclass
class Seen:
    """What a training did to an adapter."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    """At the first update, after clipping."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: byway.Adapter) -> Seen:
        return cls(start=copies(adapter))


def copies(adapter: byway.Adapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def gradients(adapter: byway.Adapter) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in adapter.named_parameters() if p.grad is not None}


def in_our_loop(rows: Sequence[Example]) -> Seen:
    """The arithmetic of byway.train: summed losses over the number of labels, clipping, AdamW."""
    model, adapter = attached()
    model.train()
    seen = Seen.of(adapter)
    settings = Train(
        learning_rate=RATE, max_grad_norm=CLIP, adam_epsilon=EPSILON, rows_per_step=ROWS_PER_STEP, schedule="constant", warmup_steps=0
    )
    optimizer = Optimizer([adapter], settings, Schedule("constant", 0, STEPS))
    for step in range(STEPS):
        group = rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        batches = [pad_batch(group[i : i + MICRO], 0) for i in range(0, ROWS_PER_STEP, MICRO)]
        labels = sum(int((b["labels"] != -100).sum()) for b in batches)
        for batch in batches:
            loss, _ = token_loss(model, batch, labels_only=True)
            optimizer.backward(loss / labels)
        assert optimizer.norm() > CLIP
        seen.gradients = seen.gradients or gradients(adapter)
        optimizer.update(step)
    seen.parameters = copies(adapter)
    return seen


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """The same hyper-parameters under transformers' names."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ROWS_PER_STEP // MICRO,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "optim": "adamw_torch",
        "adam_epsilon": EPSILON,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    } | changes


def recorder(adapter: byway.Adapter, seen: Seen) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.gradients = seen.gradients or gradients(adapter)

    return Recorder()


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    return pad_batch(examples, 0)


def with_trainer(model: Any, adapter: byway.Adapter, rows: Sequence[Example], folder: Path, **changes: Any) -> tuple[Any, Seen]:
    from transformers import Trainer, TrainingArguments

    seen = Seen.of(adapter)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, remove_unused_columns=False, **changes)),
        train_dataset=list(rows),  # pyright: ignore[reportArgumentType]
        eval_dataset=list(rows[:3]),  # pyright: ignore[reportArgumentType]
        data_collator=collate,  # pyright: ignore[reportArgumentType]
        callbacks=[recorder(adapter, seen)],
    )
    return trainer, seen


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, tiny.VOCABULARY))]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def with_sft(model: Any, adapter: byway.Adapter, rows: Sequence[Example], folder: Path, **changes: Any) -> tuple[Any, Seen]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    seen = Seen.of(adapter)
    masks = [[int(label != -100) for label in row.labels] for row in rows]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(folder, completion_only_loss=True, **changes)),
        train_dataset=Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "completion_mask": masks}),
        processing_class=tokenizer(),
        callbacks=[recorder(adapter, seen)],
    )
    return trainer, seen


Maker = Callable[..., tuple[Any, Seen]]
TRAINERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "Trainer": (with_trainer, {}),
    "Trainer with gradient checkpointing": (with_trainer, {"gradient_checkpointing": True}),
    "SFTTrainer as it comes": (with_sft, {}),
    "SFTTrainer without checkpointing": (with_sft, {"gradient_checkpointing": False}),
}


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ‖a − b‖ / ‖b‖ over the tensors."""
    assert got.keys() == expected.keys()
    return max(float((got[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def moved(seen: Seen) -> dict[str, Tensor]:
    return {name: seen.parameters[name] - seen.start[name] for name in seen.start}


@pytest.mark.parametrize(("make", "changes"), TRAINERS.values(), ids=TRAINERS.keys())
def test_gradients_and_updates_are_those_of_our_loop(make: Maker, changes: dict[str, Any], rows: list[Example], tmp_path: Path) -> None:
    expected = in_our_loop(rows)
    model, adapter = attached()
    before = {name: tensor.clone() for name, tensor in byway.base_state_dict(model).items()}
    trainer, seen = make(model, adapter, rows, tmp_path, **changes)
    trainer.train()
    seen.parameters = copies(adapter)
    assert trainer.state.global_step == STEPS
    assert len(seen.gradients) == len(expected.gradients) == 2 * 7 * tiny.LAYERS
    assert difference(seen.gradients, expected.gradients) <= 1e-6
    assert difference(seen.parameters, expected.parameters) <= 1e-6
    assert difference(moved(seen), moved(expected)) <= 1e-5
    assert all(float(change.abs().max()) > RATE / 10 for change in moved(expected).values()), "every tensor must have been updated"
    after = byway.base_state_dict(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_run_of_byway_train_and_one_of_trainer_give_the_same_adapter(rows: list[Example], tmp_path: Path) -> None:
    """The whole product on one side: recipe, packing, labelled rows only. Each step sees all rows, so their order is no part of it."""
    four = rows[:ROWS_PER_STEP]
    tiny.build("llama").save_pretrained(tmp_path / "base")
    lines = [json.dumps({"input_ids": row.input_ids, "labels": row.labels}) for row in four]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = train(
        {
            "base": {"model": str(tmp_path / "base"), "dtype": "fp32"},
            "method": {"name": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "task": "text", "format": "tokens", "max_length": 64},
            "train": {
                **{"max_steps": STEPS, "rows_per_step": ROWS_PER_STEP, "learning_rate": RATE, "max_grad_norm": CLIP},
                **{"adam_epsilon": EPSILON, "schedule": "constant", "warmup_steps": 0, "seed": 5},
            },
            "output": str(tmp_path / "run"),
        }
    )
    assert isinstance(run.adapter, byway.Adapter)
    torch.manual_seed(5)
    model: Any = tiny.build("llama")
    torch.manual_seed(5)
    adapter = byway.attach(model, METHOD)
    trainer, _ = with_trainer(model, adapter, four * STEPS, tmp_path / "trainer")
    trainer.train()
    theirs, ours = copies(adapter), copies(run.adapter)
    assert all(float(theirs[name].abs().max()) > 0 for name in theirs)
    assert difference(theirs, ours) <= 1e-5


def test_a_checkpoint_of_trainer_is_resumed_bit_for_bit(rows: list[Example], tmp_path: Path) -> None:
    model, adapter = attached()
    trainer, _ = with_trainer(model, adapter, rows, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    resumed, again = attached(start=99)
    other, _ = with_trainer(resumed, again, rows, tmp_path / "other")
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.state.global_step == STEPS
    expected, got = copies(adapter), copies(again)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_evaluating_between_steps_changes_no_bit(rows: list[Example], tmp_path: Path) -> None:
    found = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model, adapter = attached()
        trainer, _ = with_trainer(model, adapter, rows, tmp_path, **changes)
        trainer.train()
        found.append(copies(adapter))
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_after_trainer_detach_leaves_the_base_as_it_was(changes: dict[str, Any], rows: list[Example], tmp_path: Path) -> None:
    untouched: Any = tiny.build("llama")
    model, adapter = attached()
    trainer, _ = with_trainer(model, adapter, rows, tmp_path, **changes)
    trainer.train()
    path = adapter.save(tmp_path / "adapter")
    ids = torch.tensor([rows[0].input_ids])
    model.eval()
    trained = model(ids, use_cache=False).logits
    byway.detach(model)
    assert not list(slots(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in untouched.named_parameters()}
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert torch.equal(model(ids, use_cache=False).logits, untouched(ids, use_cache=False).logits)
    byway.load(untouched, path)
    assert (untouched(ids, use_cache=False).logits - trained).abs().max() <= 1e-5


def test_an_adapter_on_a_head_that_sft_reads_directly_is_an_error_that_names_it(rows: list[Example], tmp_path: Path) -> None:
    """trl's default loss multiplies with the head's weight and never calls the module: the adapter would silently not be trained."""
    model, adapter = attached(targets=["q_proj", "lm_head"])
    trainer, _ = with_sft(model, adapter, rows, tmp_path)
    with pytest.raises(byway.TargetError, match=r"'lm_head' is never called"):
        trainer.train()


def test_with_trainer_an_adapter_on_the_head_is_trained(rows: list[Example], tmp_path: Path) -> None:
    model, adapter = attached(targets=["q_proj", "lm_head"])
    trainer, seen = with_trainer(model, adapter, rows, tmp_path)
    trainer.train()
    change = copies(adapter)["lm_head.byway.default.lora_A"] - seen.start["lm_head.byway.default.lora_A"]
    assert float(change.abs().max()) > RATE / 10
