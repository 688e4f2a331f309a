from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from byway.data.documents import Conversation, Text
from byway.data.encode import encode
from byway.data.preview import as_plain_text, preview

from .conftest import assistant, user


def test_spans_are_the_row_and_mark_what_is_learned(chatml: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = chatml()
    row = Conversation(where="chat.jsonl:3", messages=(user("Say <|im_end|> é 👍"), assistant("no\x1b[31m")))
    encoded = encode([row, Text(text="x", where="t:1")], tokenizer, max_length=256)
    shown = preview(encoded, tokenizer, n=1)
    assert len(shown) == 1 and shown[0].where == "chat.jsonl:3"
    spans = shown[0].spans
    assert "".join(span.text for span in spans) == tokenizer.decode(encoded.examples[0].input_ids)
    assert "".join(span.text for span in spans if span.learned) == "no\x1b[31m<|im_end|>"
    assert [span.text for span in spans if span.control] == ["<|im_start|>", "<|im_end|>"] * 3
    assert (shown[0].tokens, shown[0].learned) == (
        len(encoded.examples[0].input_ids),
        encoded.examples[0].labels.__len__() - encoded.examples[0].labels.count(-100),
    )
    text = as_plain_text(shown[0])
    assert "«<|im_start|>»assistant\n⟦no\\x1b[31m«<|im_end|>»⟧" in text
    assert "Say <|im_end|> é 👍«<|im_end|>»" in text and "\x1b" not in text


def test_spaces_survive_in_sentencepiece_vocabularies(sentencepiece: PreTrainedTokenizerFast) -> None:
    row = Conversation(where="r", messages=(user("how are"), assistant("fine thanks")))
    encoded = encode([row], sentencepiece, max_length=64)
    assert "".join(span.text for span in preview(encoded, sentencepiece)[0].spans) == "<s>[INST] how are [/INST] fine thanks</s>"
