"""The peers, used as their documentation shows: peft with a plain torch loop, and TRL's SFTTrainer.

Both start from the same adapter (a peft directory), see the same rows in the same order, and use AdamW with the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chats import BATCH, load_rows
from harness import Gate, Loop

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRID", "each_step", "peft_loop", "trl"]

GRID: Mapping[str, Mapping[str, Any]] = {
    "packing, fp32": {"packing": True, "bf16": False, "per_device_train_batch_size": 1},
    "packing, fp32, 2 packs": {"packing": True, "bf16": False, "per_device_train_batch_size": 2},
    "packing, bf16 weights": {"packing": True, "weights": "bf16", "per_device_train_batch_size": 1},
    "packing, bf16 autocast": {"packing": True, "per_device_train_batch_size": 1},
    "padding-free, fp32": {"padding_free": True, "bf16": False, "max_length": None},
    "padded, fp32": {"bf16": False},
    "padded, bf16 weights": {"weights": "bf16"},
    "grouped by length, fp32": {"bf16": False, "train_sampling_strategy": "group_by_length"},
}
"""TRL's settings that are tried for its best, all without gradient checkpointing (its default); ``weights``: the dtype the base is loaded
in; bf16, where it is not named, is TRL's default: autocast. Everything else is as in :func:`trl`."""


def _base(settings: Mapping[str, Any], weights: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype, local_files_only=True)
    return model.to(settings["device"])


def _adapted(model: Any, settings: Mapping[str, Any]) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True)


def collate(rows: Any, pad_id: int) -> dict[str, Tensor]:
    """Right-padded, as transformers' collators do it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {"input_ids": (pad_id, "input_ids"), "labels": (-100, "labels")}
    batch = {
        name: pad_sequence([torch.tensor(vars(row)[key]) for row in rows], batch_first=True, padding_value=fill)
        for name, (fill, key) in columns.items()
    }
    lengths = torch.tensor([row.tokens for row in rows])
    return batch | {"attention_mask": (torch.arange(batch["input_ids"].shape[1])[None] < lengths[:, None]).long()}


def peft_loop(gate: Gate, settings: Mapping[str, Any]) -> None:
    """``loss = model(**batch).loss; loss.backward(); clip; step``, the loop of peft's and transformers' examples."""
    import torch

    torch.set_num_threads(int(settings["threads"]))
    torch.manual_seed(int(settings["seed"]))
    rows = load_rows(Path(settings["rows"]))
    model = _adapted(_base(settings, settings["dtype"]), settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0)
    model.train()
    loop = Loop(gate, warmup=settings["warmup"], steps=settings["steps"], facts={"trained": sum(p.numel() for p in trained)})
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        batch = {name: tensor.to(settings["device"]) for name, tensor in collate(chosen, 0).items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loop.stepped(float(loss), sum(row.tokens for row in chosen))
    raise RuntimeError("the rows were used up before the repetitions were over")


def trl(gate: Gate, settings: Mapping[str, Any]) -> None:
    """SFTTrainer on the same rows, tokenized beforehand; ``settings["trl"]`` is what differs from its defaults beside the common ones.

    Common: the same adapter, batch of 4, AdamW's learning rate, no decay, no schedule, nothing saved or reported, rows in their order.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.set_num_threads(int(settings["threads"]))
    own = dict(settings["trl"])
    weights = own.pop("weights", "fp32")
    model = _adapted(_base(settings, weights), settings)
    arguments: dict[str, Any] = {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": BATCH,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_length": settings["max_length"],
        "max_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "use_cpu": settings["device"] == "cpu",
        "seed": settings["seed"],
    }
    rows = load_rows(Path(settings["rows"]))
    data = Dataset.from_dict({"input_ids": [list(r.input_ids) for r in rows], "labels": [list(r.labels) for r in rows]})
    tokenizer = AutoTokenizer.from_pretrained(settings["base"], local_files_only=True)
    config = SFTConfig(**(arguments | own))
    shown = ("packing", "padding_free", "bf16", "gradient_checkpointing", "per_device_train_batch_size", "optim", "train_sampling_strategy")
    chosen = {key: str(vars(config)[key]) for key in shown} | {"weights": weights}
    facts = {"settings": chosen, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    loop = Loop(gate, warmup=settings["warmup"], tokens=settings["tokens"], facts=facts)

    class Timed(SFTTrainer):
        """Counts the real tokens of each batch; the step is over when the optimizer has made it."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask = inputs.get("attention_mask")
            self.seen = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            self.last = super().training_step(model, inputs, num_items_in_batch)
            return self.last

    trainer = Timed(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(each_step(lambda: loop.stepped(float(trainer.last), trainer.seen)))
    trainer.train()
    raise RuntimeError("the rows were used up before the repetitions were over")


def each_step(act: Any) -> Any:
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            act()

    return Told()
