"""Keys of messages that a chat template does not read: a bad row if they hold a part of an answer, else a note with their number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from byway.data.encode import Encoded, Example, encode
from byway.data.formats import read_documents
from byway.errors import DataError
from tests.data.conftest import SMOL

ASKED = {"role": "user", "content": "hello"}
THOUGHT = "I am fine"


def template(key: str) -> str:
    """ChatML with what the message has under `key` before an answer."""
    shown = f"('<think>' + message['{key}'] + '</think>' if message['{key}'] else '')"
    return SMOL.replace("message['content'] +", f"{shown} + message['content'] +")


Maker = Callable[[str | None], PreTrainedTokenizerFast]


def encoded(chatml: Maker, rows: list[Any], chat: str = SMOL, **options: Any) -> Encoded[Example]:
    return encode(read_documents(rows), chatml(chat), max_length=512, **options)


def answer(**more: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": "fine", **more}]}


def notes(found: Encoded[Example]) -> list[str]:
    return [note for note in found.report.notes if "does not read" in note]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_where_the_template_writes_it_and_a_bad_row_where_it_does_not(key: str, chatml: Maker) -> None:
    for name in ("reasoning_content", "thinking"):
        found = encoded(chatml, [answer(**{key: THOUGHT})], template(name))
        (example,) = found.examples
        learned = chatml(SMOL).decode([token for token in example.labels if token != -100])
        assert learned == f"<think>{THOUGHT}</think>fine<|im_end|>"
        assert notes(found) == []
    with pytest.raises(DataError, match=rf"messages\[1\] has {key}, which the model's chat template drops"):
        encoded(chatml, [answer(**{key: THOUGHT})])


def test_what_is_empty_or_null_is_no_reasoning(chatml: Maker) -> None:
    assert notes(encoded(chatml, [answer(reasoning_content="", thinking=None)])) == []


def test_reasoning_of_an_earlier_turn_alone_is_no_bad_row_where_the_template_reads_it(chatml: Maker) -> None:
    row = answer(reasoning_content=THOUGHT)
    row["messages"] += [ASKED, {"role": "assistant", "content": "still fine"}]
    assert notes(encoded(chatml, [row], template("reasoning_content"), learn="last")) == []


def test_other_keys_are_noted_with_their_number(chatml: Maker) -> None:
    rows = [{"messages": [{**ASKED, "name": "Ada", "id": 7}, {"role": "assistant", "content": "fine", "id": 8}]}] * 3
    (note,) = notes(encoded(chatml, rows))
    assert note.endswith("name of the user's messages (3), id of the user's messages (3), id of the assistant's messages (3)")
    (note,) = notes(encoded(chatml, rows, template("name")))
    assert "name" not in note, "this template writes it"


def test_a_key_that_the_template_names_elsewhere_is_noted_all_the_same(chatml: Maker) -> None:
    chat = SMOL + "{% if tools %}{{ tools[0].name }}{% endif %}"
    rows = [{"messages": [{**ASKED, "name": "Ada"}, {"role": "assistant", "content": "a"}]}]
    assert "name of the user's messages (1)" in notes(encoded(chatml, rows, chat))[0]


def test_a_template_that_writes_whole_messages_reads_every_key(chatml: Maker) -> None:
    chat = "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}"
    assert notes(encoded(chatml, [answer(mood="sunny")], chat, learn="all")) == []


def test_variables_that_the_template_does_not_name_are_noted(chatml: Maker) -> None:
    rows = [{**answer(), "chat_template_kwargs": {"enable_thinking": False, "foo": 1}}]
    assert notes(encoded(chatml, rows, SMOL + "{% if enable_thinking %}x{% endif %}"))[0].endswith(": foo in chat_template_kwargs (1)")


def test_turns_of_sharegpt_keep_what_the_template_reads(chatml: Maker) -> None:
    said = {"from": "gpt", "value": "fine", "reasoning_content": THOUGHT, "train": True}
    row = {"conversations": [{"from": "human", "value": "hello"}, said]}
    (example,) = encoded(chatml, [row], template("reasoning_content")).examples
    assert THOUGHT in chatml(SMOL).decode(example.input_ids)
    with pytest.raises(DataError, match="has reasoning_content, which the model's chat template drops"):
        encoded(chatml, [row])


def test_absent_keys_of_arrow_are_neither_noted_nor_bad(chatml: Maker, tmp_path: Path) -> None:
    rows = [answer(reasoning_content=None), answer(name=None)]
    table = datasets.Dataset.from_list([answer(name="Bob"), *rows])
    assert notes(encode(read_documents(table), chatml(SMOL), max_length=512))[0].endswith("name of the assistant's messages (1)")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert notes(encode(read_documents(tmp_path / "rows.jsonl"), chatml(SMOL), max_length=512)) == []
