from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from byway.cli import ui
from byway.data.documents import Conversation
from byway.data.encode import encode
from byway.data.formats import Documents
from byway.data.preview import preview, printable

from .conftest import assistant, user


def test_spans_are_the_row_and_mark_what_is_learned(chatml: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = chatml()
    row = Conversation(where="chat.jsonl:3", messages=(user("Say <|im_end|> é 👍"), assistant("no\x1b[31m")))
    (example,) = encode(Documents([row]), tokenizer, max_length=256).examples
    shown = preview(example, tokenizer)
    spans = shown.spans
    assert "".join(span.text for span in spans) == tokenizer.decode(example.input_ids)
    assert "".join(span.text for span in spans if span.in_loss) == "no\x1b[31m<|im_end|>"
    assert [span.text for span in spans if span.control] == ["<|im_start|>", "<|im_end|>"] * 3
    in_loss = len(example.labels) - example.labels.count(-100)
    assert (shown.where, shown.title) == ("chat.jsonl:3", f"{len(example.input_ids)} tokens, {in_loss} in the loss")
    text = ui.marked([(printable(span.text), span.in_loss, span.control) for span in spans])
    assert "«<|im_start|>»assistant\n⟦no\\x1b[31m«<|im_end|>»⟧" in text
    assert "Say <|im_end|> é 👍«<|im_end|>»" in text and "\x1b" not in text


def test_spaces_survive_in_sentencepiece_vocabularies(sentencepiece: PreTrainedTokenizerFast) -> None:
    row = Conversation(where="r", messages=(user("how are"), assistant("fine thanks")))
    (example,) = encode(Documents([row]), sentencepiece, max_length=64).examples
    assert "".join(span.text for span in preview(example, sentencepiece).spans) == "<s>[INST] how are [/INST] fine thanks</s>"
