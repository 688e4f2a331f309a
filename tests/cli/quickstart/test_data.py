"""The quickstart's rows are what their README says, and its measure counts what it says."""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable

import pytest

from byway.base.builtin.fetch import FOLDER
from byway.cli._quickstart import measure
from byway.cli._quickstart.measure import FIELDS, INTENTS, SPLITS, Row
from byway.core.disk.caches import cache_root
from byway.errors import DataError

LINES = {split: measure.path(split).read_text(encoding="utf-8").splitlines() for split in SPLITS}
ROWS = {split: measure.read(split) for split in SPLITS}
EVERYTHING = [row for split in SPLITS for row in ROWS[split]]
PAIRS = [("train", "held_out"), ("train", "hard"), ("held_out", "hard")]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def masked(row: Row) -> str:
    """The message with its own values replaced, so that unlike names do not hide like wording."""
    return row.message.replace(row.expected["name"], "NAME").replace(row.expected["order"], "NUMBER")


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def all_runs(rows: Iterable[Row], length: int) -> set[tuple[str, ...]]:
    return {run for row in rows for run in runs(masked(row), length)}


def numbers(rows: Iterable[Row]) -> set[str]:
    return {number for row in rows for number in re.findall(r"\d+", row.message)}


def name_words(rows: Iterable[Row]) -> set[str]:
    return {word for row in rows for word in words(row.expected["name"])}


def sentences(rows: Iterable[Row]) -> set[str]:
    return {part.strip().lower() for row in rows for part in re.split(r"[.!?:;,]+\s", masked(row)) if len(words(part)) > 3}


@pytest.mark.parametrize("split", SPLITS)
def test_each_row_is_one_system_turn_one_message_and_one_compact_json_answer(split: str) -> None:
    for line in LINES[split]:
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        answer = row["messages"][2]["content"]
        fields = json.loads(answer)
        assert tuple(fields) == FIELDS
        assert answer == json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def test_the_splits_have_the_stated_sizes_and_one_instruction() -> None:
    assert len(ROWS["train"]) == 312 <= 350
    assert len(ROWS["held_out"]) == len(ROWS["hard"]) == 40
    assert {row.instruction for row in EVERYTHING} == {"Reply with JSON: intent, order, name."}


def test_the_intents_are_balanced() -> None:
    counts = {split: collections.Counter(row.expected["intent"] for row in ROWS[split]) for split in SPLITS}
    assert counts["train"] == dict.fromkeys(INTENTS, 52)
    for split in ("held_out", "hard"):
        assert set(counts[split]) == set(INTENTS)
        assert sorted(counts[split].values()) == [6, 6, 7, 7, 7, 7]


def test_each_value_stands_in_its_message_exactly_once_as_it_is_to_be_copied() -> None:
    for row in EVERYTHING:
        assert re.fullmatch(r"\d{4,5}", row.expected["order"]), row
        assert re.findall(r"\d+", row.message).count(row.expected["order"]) == 1, row
        assert row.message.count(row.expected["name"]) == 1, row


def test_no_message_name_or_order_number_occurs_twice() -> None:
    for values in (
        [row.message.lower() for row in EVERYTHING],
        [row.expected["name"].lower() for row in EVERYTHING],
        [row.expected["order"] for row in EVERYTHING],
    ):
        assert [value for value, count in collections.Counter(values).items() if count > 1] == []


@pytest.mark.parametrize("text", [lambda row: row.message, masked], ids=["as-written", "values-masked"])
@pytest.mark.parametrize("split", SPLITS)
def test_no_six_words_in_a_row_are_shared_by_more_than_one_percent_of_the_rows(split: str, text) -> None:
    """The instruction is the same in each row by design; it does not count as wording, nor does the answer, which is made of values."""
    counts = collections.Counter(run for row in ROWS[split] for run in runs(text(row), 6))
    allowed = max(1, len(ROWS[split]) // 100)
    assert [(" ".join(run), count) for run, count in counts.items() if count > allowed] == []


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_splits_share_no_number_no_part_of_a_name_and_no_sentence(pair: tuple[str, str]) -> None:
    one, other = (ROWS[split] for split in pair)
    assert numbers(one) & numbers(other) == set()
    assert name_words(one) & name_words(other) == set()
    assert sentences(one) & sentences(other) == set()
    assert all_runs(one, 6) & all_runs(other, 6) == set()


def test_the_hard_rows_are_worded_and_opened_unlike_the_training_rows() -> None:
    assert all_runs(ROWS["hard"], 4) & all_runs(ROWS["train"], 4) == set()
    openings = {split: {tuple(words(masked(row))[:2]) for row in ROWS[split]} for split in SPLITS}
    assert openings["hard"] & openings["train"] == set()
    assert len(openings["hard"]) == 40


def test_a_row_is_short() -> None:
    """What keeps a row under 90 tokens, for machines that do not have the model."""
    for row in EVERYTHING:
        assert len(words(row.message)) <= 26, row
        assert len(row.message) <= 120, row
        assert len(row.answer) <= 64, row


def test_a_row_has_at_most_90_tokens_of_the_default_model() -> None:
    """The tokenizer is read from the cache of the default model; nothing is downloaded for it."""
    folder = cache_root() / "bases" / FOLDER
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the default model is not in the cache: load it once with byway.load_base('smollm2-135m-instruct')")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in EVERYTHING:
        turns = [*measure.prompt(row), {"role": "assistant", "content": row.answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 90, row


def test_answers_without_reading_or_without_copying_are_worth_little() -> None:
    """The floors in the README: always the first intent with perfect copying, and the right intent with nothing copied."""
    for split in ("held_out", "hard"):
        rows = ROWS[split]
        constant = [json.dumps(row.expected | {"intent": "track"}) for row in rows]
        nothing_copied = [json.dumps(row.expected | {"order": "", "name": ""}) for row in rows]
        one_answer = [rows[0].answer] * len(rows)
        assert measure.score(constant, rows).exact == 7 / 40
        assert measure.score(nothing_copied, rows).exact == 0
        assert measure.score(one_answer, rows).exact == 1 / 40


def test_word_counts_solve_the_seen_wording_and_not_the_unseen() -> None:
    """Naive Bayes over words for the intent and two regular expressions for the values: the README's third baseline."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in ROWS["train"]:
        counts[row.expected["intent"]].update(set(re.findall(r"[a-z']+", row.message.lower())))
    vocabulary = {word for counter in counts.values() for word in counter}

    def answer(row: Row) -> str:
        known = set(re.findall(r"[a-z']+", row.message.lower())) & vocabulary
        totals = {intent: sum(counter.values()) + 0.3 * len(vocabulary) for intent, counter in counts.items()}
        intent = max(counts, key=lambda k: sum(math.log((counts[k][w] + 0.3) / totals[k]) for w in known))
        named = re.findall(r"[A-ZÀ-Þ][\w-]+ [A-ZÀ-Þ][\w-]+", row.message) or [""]
        return json.dumps({"intent": intent, "order": re.findall(r"\b\d{4,6}\b", row.message)[0], "name": named[-1]})

    found = {split: measure.score([answer(row) for row in ROWS[split]], ROWS[split]).exact for split in ("held_out", "hard")}
    assert found["held_out"] == pytest.approx(0.95)
    assert found["hard"] == pytest.approx(0.325)


# --- the measure


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "track",
        "[]",
        "null",
        "NaN",
        "[" * 100_000,
        '{"intent":"track","order":"1"}',
        '{"intent":"track","order":"1","name":"A","city":"B"}',
        '{"intent":"track","order":1,"name":"A"}',
        '{"intent":"track","order":null,"name":"A"}',
        '{"intent":"track","intent":"cancel","order":"1","name":"A"}',
        '{"intent":"track","order":"1","name":{"a":"b"}}',
        '{"intent":"track","order":"1","name":"A"} Have a nice day!',
        '{"intent":"track","order":"1","name":"A"',
    ],
)
def test_an_answer_that_is_not_exactly_the_three_strings_is_invalid(answer: str) -> None:
    assert measure.parse(answer) is None


def test_spaces_and_the_order_of_keys_do_not_matter() -> None:
    assert measure.parse(' { "name": "A B",\n "order": "1", "intent": "track" }\n') == {"intent": "track", "order": "1", "name": "A B"}


def test_the_score_counts_fields_inside_talk_but_not_as_exact() -> None:
    rows = ROWS["held_out"][:4]
    right, talk, wrong_order, _silent = rows
    answers = [
        right.answer,
        f"Sure! {talk.answer} Anything else?",
        json.dumps(wrong_order.expected | {"order": "0"}),
        "I cannot help with that.",
    ]
    found = measure.score(answers, rows)
    assert found == measure.Score(rows=4, exact=0.25, valid=0.5, fields={"intent": 0.75, "order": 0.5, "name": 0.75})


def test_a_name_in_other_letters_is_not_exact() -> None:
    row = next(row for row in ROWS["held_out"] if row.expected["name"] == "Björn Falk")
    assert measure.score([row.answer.replace("ö", "o")], [row]).exact == 0
    assert measure.score([json.dumps(row.expected)], [row]).exact == 1  # an escape is another spelling of the same string


def test_the_prompt_shows_the_examples_as_earlier_turns_and_never_the_answer() -> None:
    row = ROWS["hard"][0]
    shown = measure.examples(2)
    turns = measure.prompt(row, shown)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns[-1]["content"] == row.message
    assert row.answer not in json.dumps(turns, ensure_ascii=False)
    assert measure.prompt(row) == [turns[0], turns[-1]]


def test_examples_have_different_intents_and_come_from_training() -> None:
    shown = measure.examples(6)
    assert {row.expected["intent"] for row in shown} == set(INTENTS)
    assert all(row in ROWS["train"] for row in shown)
    assert measure.examples(2) == shown[:2]


def test_wrong_calls_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="did you mean 'held_out'"):
        measure.path("heldout")
    with pytest.raises(DataError, match="39 answers for 40 rows"):
        measure.score([""] * 39, ROWS["hard"])
    with pytest.raises(DataError, match="0 answers for 0 rows"):
        measure.score([], [])
    with pytest.raises(DataError, match="7 examples"):
        measure.examples(7)
