from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from byway.data.documents import Completion, Conversation, Document, Labelled, Text, Tokens
from byway.data.formats import Documents, read_documents
from byway.errors import ConfigError, DataError

from .conftest import assistant, user

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def convert(*rows: Mapping[str, Any], **options: Any) -> Documents:
    return read_documents(list(rows), **options)


def one(row: Mapping[str, Any], **options: Any) -> Document:
    return convert(row, **options).items[0]


def test_each_format_becomes_its_document() -> None:
    where = "row 1"
    assert one({"text": "a"}) == Text(where=where, text="a")
    assert one({"prompt": "a", "completion": "b"}) == Completion(where=where, prompt="a", completion="b")
    assert one({"messages": [user("a"), assistant("b")]}) == Conversation(where=where, messages=(user("a"), assistant("b")))
    assert one({"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 0]}) == Tokens(
        where=where, input_ids=(1, 2), labels=(-100, 2)
    )
    assert one({"text": "a", "label": "x"}) == Labelled(where=where, texts=("a",), label="x")
    assert one({"sentence1": "a", "sentence2": "b", "label": True}) == Labelled(where=where, texts=("a", "b"), label=1)
    assert one({"prompt": [user("a")], "completion": [assistant("b")]}) == Conversation(
        where=where, messages=(user("a"), assistant("b")), context=1
    )


def test_alpaca_input_system_and_history_find_their_places() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief.", "history": [["hi", "hello"]]}
    found = one(row)
    assert isinstance(found, Conversation)
    assert found.messages == (
        {"role": "system", "content": "Be brief."},
        user("hi"),
        assistant("hello"),
        user("Add.\n\n1 and 2"),
        assistant("3"),
    )


def test_sharegpt_roles_calls_and_tools_are_translated() -> None:
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    found = one({"conversations": turns, "system": "s", "tools": '[{"name": "add", "parameters": {}}]'})
    assert isinstance(found, Conversation)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def test_messages_take_parts_calls_as_text_and_weights() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "function", "name": "add", "content": "2"},
        {**assistant("x"), "weight": 0},
        user("r"),
        assistant("y"),
    ]
    found = one({"messages": messages})
    assert isinstance(found, Conversation)
    assert found.messages[0] == {"role": "system", "content": "ab"}
    assert found.messages[2]["tool_calls"] == [{"id": "1", **CALL}]
    assert found.messages[3]["role"] == "tool"
    assert found.unweighted == {4} and found.answers() == [2, 6] and "weight" not in found.messages[4]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "usr", "content": "a"}]}, "'usr'; did you mean 'user'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"content is 3, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "not text"),
        ({"messages": ["a"]}, "not an object"),
        ({"messages": "a"}, "not JSON"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "without a name"),
        ({"conversations": [{"from": "humna", "value": "a"}]}, "did you mean 'human'"),
        ({"conversations": [{"from": "human"}]}, "lacks from or value"),
        ({"conversations": [{"from": "function_call", "value": "not json"}]}, "not JSON"),
        ({"instruction": ["a"], "output": "b"}, "instruction is"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "pairs"),
        ({"prompt": "a", "completion": [assistant("b")]}, "neither both"),
        ({"text": 3}, "text is 3"),
        ({"text": "a", "label": 2.5}, "2.5"),
        ({"input_ids": [1, "2"]}, "list of integers"),
        ({"input_ids": [1, True]}, "list of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2"),
        ({"messages": [user("a"), assistant("b")], "tools": [{"description": "x"}]}, "no name"),
    ],
)
def test_a_row_of_wrong_values_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        convert(row)
    assert caught.value.message.startswith("row 1: ")


def test_the_format_is_one_that_every_row_fits() -> None:
    assert convert({"text": "a", "label": 1}, {"text": "b", "label": 0}).format == "classification"
    assert convert({"text": "a", "label": 1}, {"text": "b"}).format == "text"
    assert convert({"text": "a", "label": 1}, among=("text",)).format == "text"
    with pytest.raises(DataError, match=r"rows of different formats: row 1 is text \(text\), row 3 is alpaca"):
        convert({"text": "a"}, {"text": "b"}, {"instruction": "a", "output": "b"})
    with pytest.raises(DataError, match=r"row 2 fits no format(?s:.*)did you mean 'messages'"):
        convert({"messages": []}, {"mesages": []})
    with pytest.raises(DataError, match="row 1 fits no format"):
        convert({"question": "a", "answer": "b"})
    skipped = convert({"text": "a"}, {"txt": "b"}, skip_bad=True)
    assert len(skipped.items) == 1 and skipped.bad.first[0].where == "row 2"


def test_columns_rename_keys_and_their_typos_are_named() -> None:
    row = {"question": "a", "answer": "b", "prompt": "not this"}
    assert one(row, columns={"prompt": "question", "completion": "answer"}) == Completion(where="row 1", prompt="a", completion="b")
    with pytest.raises(ConfigError, match="no row has the key 'anwser'; did you mean 'answer'"):
        one(row, columns={"prompt": "question", "completion": "anwser"})
    with pytest.raises(ConfigError, match="'promt' is not a key of prompt_completion; did you mean 'prompt'"):
        one({"prompt": "a", "completion": "b"}, columns={"promt": "prompt"}, format="prompt_completion")
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        one(row, format="alpacca")
    with pytest.raises(DataError, match="row 1: is not alpaca: its keys are answer, prompt, question"):
        one(row, format="alpaca")


def test_rows_from_which_nothing_can_be_learned_say_why() -> None:
    system = {"role": "system", "content": "s"}
    cases = [
        ([], "no messages"),
        ([system], "only a system message"),
        ([system, system, user("a"), assistant("b")], "more than one system"),
        ([user("a")], "last turn is the user's"),
        ([assistant("a")], "no turn before"),
        ([user("a"), assistant(" ")], "last answer is empty"),
        ([user(""), assistant("b")], "question is empty"),
        ([user("a"), {**assistant("b"), "weight": 0}], "weight 0"),
    ]
    for messages, words in cases:
        assert words in one({"messages": messages}).unusable(), messages
    assert one({"messages": [user("a"), assistant("b")]}).unusable() == ""
    assert one({"text": " \n"}).unusable() and one({"prompt": "a", "completion": ""}).unusable()


def test_the_real_sets_are_recognized(data_dir: Path) -> None:
    expected = {
        "oasst1-chat/train.jsonl": "messages",
        "alpaca-en/alpaca_en_demo.json": "alpaca",
        "sharegpt-toolcall-en/glaive_toolcall_en_demo.json": "sharegpt",
        "sharegpt-vicuna-dummy/dummy_conversation.json": "sharegpt",
        "glue-sst2/validation.jsonl": "classification",
        "glue-mrpc/validation.jsonl": "classification",
        "text-wikipedia/wiki_demo.txt": "text",
    }
    for name, wanted in expected.items():
        assert read_documents(data_dir / name, limit=300).format == wanted, name
