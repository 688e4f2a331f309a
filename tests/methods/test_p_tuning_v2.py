"""P-tuning v2: deep prompts beside a trained head, against the cache route and HF peft; several tasks over one base."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DynamicCache,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

import byway
from byway import PTuningV2
from byway.core.copies import TrainedCopy
from byway.methods.prefix.sides import Prefix
from tests.tiny import LAYERS, VOCABULARY, inputs, randomize
from tests.train.conftest import bert_dir, picture, quick_picture  # noqa: F401 - fixtures

FP32 = 1e-5


def model_of(kind: Any, labels: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config: Any = RobertaConfig if "Roberta" in kind.__name__ else BertConfig
    settings = config(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, num_labels=labels, **sizes)
    return kind(settings).eval()


def weight_of(adapter: Any) -> Any:
    return next(side.table("encoder").weight for _, side in adapter.side_paths() if isinstance(side, Prefix))


def scores(out: Any) -> Tensor:
    return torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits


def padded(seed: int) -> dict[str, Tensor]:
    x = inputs("bert", seed)
    mask = torch.ones_like(x["input_ids"])
    mask[0, -2:] = 0
    return {**x, "attention_mask": mask}


def test_the_defaults_are_those_of_the_paper_s_code() -> None:
    method = PTuningV2()
    assert (method.num_virtual_tokens, method.hidden_size, method.dropout, method.init) == (4, None, 0.1, "normal")


def test_the_head_reads_the_real_first_token(seed: int) -> None:
    count = random.Random(seed).randint(1, 6)
    model, x = model_of(BertForSequenceClassification, seed=seed), padded(seed)
    adapter = byway.attach(model, PTuningV2(num_virtual_tokens=count))
    head = next(side for _, side in adapter.side_paths() if isinstance(side, TrainedCopy))
    randomize(adapter.named_parameters(), scale=0.7)
    found = model(**x).logits
    weight = weight_of(adapter).detach()
    byway.detach(model)
    states = weight.reshape(count, 2 * LAYERS, 4, 8).permute(1, 2, 0, 3)
    cache = DynamicCache()
    for i in range(LAYERS):
        cache.update(states[2 * i].expand(2, -1, -1, -1), states[2 * i + 1].expand(2, -1, -1, -1), i)
    wide = torch.cat([torch.ones(2, count, dtype=torch.long), x["attention_mask"]], dim=1)
    hidden = model.bert(input_ids=x["input_ids"], attention_mask=wide, past_key_values=cache).last_hidden_state
    assert hidden.shape[1] == 7
    assert (head.copy(model.bert.pooler(hidden)) - found).abs().max() < FP32


CASES = {
    "SEQ_CLS": (BertForSequenceClassification, RobertaForSequenceClassification),
    "TOKEN_CLS": (BertForTokenClassification, RobertaForTokenClassification),
    "QUESTION_ANS": (BertForQuestionAnswering,),
}
PAIRS = [(task, kind) for task, kinds in CASES.items() for kind in kinds]


@pytest.mark.parametrize(("task", "kind"), PAIRS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_peft_and_we_compute_and_differentiate_the_same_and_read_each_other(task: str, kind: Any, seed: int, tmp_path: Path) -> None:
    labels = 2 if task == "QUESTION_ANS" else 3
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=random.Random(seed).randint(1, 6))
    theirs: Any = peft.get_peft_model(model_of(kind, labels), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    x = padded(seed)
    real = x["attention_mask"].bool() if task != "SEQ_CLS" else torch.ones(2, dtype=torch.bool)
    expected = scores(theirs(**x))[real]
    expected.pow(2).mean().backward()
    model = model_of(kind, labels)
    adapter = byway.load(model, tmp_path / "theirs", trainable=True)
    assert isinstance(adapter.method, PTuningV2) and adapter.method.dropout == 0.0
    found = scores(model(**x))[real]
    found.pow(2).mean().backward()
    assert (found - expected).abs().max() < FP32
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad
    own = weight_of(adapter).grad
    assert own is not None and (own - gradient).norm() < 1e-5 * gradient.norm()
    randomize(adapter.named_parameters(), scale=0.5)
    adapter.save(tmp_path / "ours")
    names = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert names["task_type"] == task
    back = peft.PeftModel.from_pretrained(model_of(kind, labels, seed=0), str(tmp_path / "ours")).eval()
    changed = scores(model(**x))[real]
    assert not torch.allclose(changed, expected, atol=1e-3)
    assert (scores(back(**x))[real] - changed).abs().max() < FP32
    again = model_of(kind, labels)
    byway.load(again, tmp_path / "ours")
    assert torch.equal(scores(again(**x))[real], changed)


def test_several_tasks_over_one_base_are_switched_and_each_is_what_it_is_alone(tmp_path: Path) -> None:
    x = padded(1)
    alone = []
    for seed in (1, 2):
        model = model_of(BertForSequenceClassification)
        adapter = byway.attach(model, PTuningV2(num_virtual_tokens=seed + 2))
        randomize(adapter.named_parameters(), seed=seed, scale=0.7)
        adapter.save(tmp_path / str(seed))
        alone.append(model(**x).logits)
    base = model_of(BertForSequenceClassification)
    bare = base(**x).logits
    before = {p.data_ptr() for p in base.parameters()}
    size = sum(p.numel() for p in base.parameters())
    byway.load(base, tmp_path / "1", name="one")
    byway.activate(base, [])
    byway.load(base, tmp_path / "2", name="two")
    for name, expected in (("one", alone[0]), ("two", alone[1]), ("one", alone[0])):
        byway.activate(base, name)
        assert torch.equal(base(**x).logits, expected)
    byway.activate(base, [])
    assert (base(**x).logits - bare).abs().max() < 1e-6
    assert before <= {p.data_ptr() for p in base.parameters()}
    added = sum(p.numel() for p in base.parameters()) - size
    assert added == sum(2 * LAYERS * 32 * count for count in (3, 4)) + 2 * (32 * 3 + 3)
    with pytest.raises(byway.AdapterError, match="both replace the output of 'classifier'"):
        byway.activate(base, ["one", "two"])


def test_dropout_is_each_row_s_own_and_only_in_training() -> None:
    model = model_of(BertForSequenceClassification)
    byway.attach(model, PTuningV2(num_virtual_tokens=6, dropout=0.5, modules_to_save="none"))
    ids = inputs("bert")["input_ids"][:1].expand(2, -1)
    same = model(input_ids=ids).logits
    assert (same[0] - same[1]).abs().max() < 1e-6
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.0
    rows = model(input_ids=ids).logits
    assert (rows[0] - rows[1]).abs().max() > 1e-4


def test_parameter_counts_of_the_paper_from_shapes_alone() -> None:
    with torch.device("meta"):
        sizes: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        model = RobertaForSequenceClassification(RobertaConfig(**sizes))
    direct = byway.attach(model, PTuningV2(num_virtual_tokens=128, modules_to_save="none"), name="direct")
    assert direct.num_parameters == 6_291_456
    made = byway.attach(model, PTuningV2(num_virtual_tokens=20, hidden_size=512, modules_to_save="none"), name="made")
    assert made.num_parameters == 20 * 1024 + 1024 * 512 + 512 + 2 * 24 * 1024 * 512 + 2 * 24 * 1024


def test_a_recipe_classifies(bert_dir: Path, tmp_path: Path, quick_picture: None) -> None:  # noqa: F811
    from byway.train import train

    draw = random.Random(0)
    rows = [{"text": f"w{draw.randrange(50)} w{1 + i % 2} w{draw.randrange(50)}", "label": ["no", "yes"][i % 2]} for i in range(32)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "base": {"model": str(bert_dir), "device": "cpu"},
        "method": {"name": "p_tuning_v2", "num_virtual_tokens": 4},
        "data": {"train": str(path), "eval": str(path), "task": "classification", "max_length": 32},
        "train": {"epochs": 2, "learning_rate": 1e-2, "rows_per_step": 8, "threads": 1},
        "output": str(tmp_path / "run"),
    }
    run: Any = train(recipe)
    assert run.metrics["step"] == 8
    assert (run.directory / "adapter" / "adapter_config.json").exists()
    assert any("classifier" in name for name, _ in run.adapter.named_parameters())
