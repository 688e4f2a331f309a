from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byway.data.collate import pack_batch, pack_labelled, pad_batch, pad_labelled, pad_token_id
from byway.data.encode import Example
from byway.data.labelled import LabelledExample
from byway.errors import ConfigError

EXAMPLES = [
    Example([5, 6, 7, 8], [-100, 6, 7, 8], "row 1"),
    Example([9, 10], [9, 10], "row 2"),
    Example([11, 12, 13], [-100, -100, 13], "row 3"),
]


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).double().eval()


def summed(model: LlamaForCausalLM, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def test_a_pack_states_where_documents_begin() -> None:
    batch = pack_batch(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, -100, 10, -100, -100, 13]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == [0, 4, 6, 9] and batch[name].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert EXAMPLES[1].labels == [9, 10]


def test_packed_padded_and_single_rows_have_one_summed_loss(seed: int) -> None:
    model = llama()
    alone = sum(summed(model, pad_batch([example], 0)) for example in EXAMPLES)
    batch = pad_batch(EXAMPLES, 0)
    assert batch["input_ids"].shape == (3, 4)
    torch.testing.assert_close(summed(model, batch), alone, rtol=1e-10, atol=0)
    packed = pack_batch(EXAMPLES)
    bounds = packed["cu_seq_lens_q"].tolist()
    segment = torch.tensor([[index for index in range(3) for _ in range(bounds[index + 1] - bounds[index])]])
    length = bounds[-1]
    visible = (segment[0, :, None] == segment[0, None]) & torch.ones(length, length).tril().bool()
    whole = summed(model, {**packed, "attention_mask": visible[None, None]})
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=0)


def test_padding_is_never_a_label_even_when_it_is_the_end_token() -> None:
    end = 2
    examples = [Example([5, 6, end], [-100, 6, end], "row 1"), Example([5, 6, 7, 8, end], [-100, -100, -100, 8, end], "row 2")]
    batch = pad_batch(examples, end)
    assert batch["input_ids"][0].tolist() == [5, 6, 2, 2, 2]
    assert batch["labels"][0].tolist() == [-100, 6, 2, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert "position_ids" not in batch


def test_labelled_rows_keep_types_and_classes() -> None:
    batch = pad_labelled([LabelledExample([2, 5, 3, 6, 3], 1, "a", [0, 0, 0, 1, 1]), LabelledExample([2, 3], 0, "b", [0, 0])], 0)
    assert batch["labels"].tolist() == [1, 0] and batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert "token_type_ids" not in pad_labelled([LabelledExample([2, 3], 0, "b")], 0)


def test_packed_rows_are_the_padded_ones_with_their_bounds() -> None:
    rows = [LabelledExample([2, 5, 3, 6, 3], 1, "a", [0, 0, 0, 1, 1]), LabelledExample([2, 3], 0, "b", [0, 0])]
    packed, padded = pack_labelled(rows, 9), pad_labelled(rows, 9)
    assert packed.keys() - padded.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert all(torch.equal(packed[name], padded[name]) for name in padded)
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 5, 7] and packed["max_length_k"] == 5


def test_a_batch_of_nothing_is_refused_and_a_missing_padding_token_replaced() -> None:
    collates = (
        pack_batch,
        lambda rows: pad_batch(rows, 0),
        lambda rows: pad_labelled(rows, 0),
        lambda rows: pack_labelled(rows, 0),
    )
    for collate in collates:
        with pytest.raises(ConfigError):
            collate([])
    assert pad_token_id(None) == 0


def test_the_padding_token_falls_back_to_the_end_token(chatml: Any, wordpiece: Any) -> None:
    tokenizer = chatml()
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None and pad_token_id(tokenizer) == tokenizer.eos_token_id
    assert pad_token_id(wordpiece) == wordpiece.pad_token_id
