"""Checks 35-46: rows."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.reliability.table import TEXTS, Action, Case, Later, World, check

GOOD = '{"text": "one two three"}'


def rows(*content: str | dict[str, Any] | bytes, says: tuple[str, ...], code: int = 2, options: tuple[str, ...] = (), **data: Any) -> Case:
    """``byway data`` on these lines: the reader and encoder of training, without the model."""

    def make(world: World) -> Action:
        lines = [
            line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode() for line in content
        ]
        world.write("rows.jsonl", b"\n".join(lines))
        return ["data", world.recipe(data={"train": "rows.jsonl", **data}), *options]

    return Case(make=make, code=code, says=says)


def trained(*content: dict[str, Any], says: tuple[str, ...], code: int = 2, overrides: tuple[str, ...] = ()) -> Case:
    """``byway train --dry-run`` on these rows."""
    return Case(
        make=lambda world: ["train", world.recipe(data={"train": world.rows(*content)}), "--dry-run", *overrides], code=code, says=says
    )


def begun(*content: dict[str, Any], says: tuple[str, ...], overrides: tuple[str, ...] = ()) -> Case:
    """``byway train`` on rows that must stop it before it writes anything."""
    return Case(make=lambda world: ["train", world.recipe(data={"train": world.rows(*content)}), *overrides], says=says)


def turns(*pairs: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, _, content in (pair.partition(":") for pair in pairs)]}


def many_short_rows(world: World) -> Action:
    """Four times the rows may take about four times as long, not sixteen times."""
    from byway.data.encode import encode
    from byway.data.formats import read_documents
    from tests.reliability.conftest import tokenizer

    own = tokenizer()

    def seconds(count: int) -> float:
        began = time.process_time()
        documents = read_documents([{"text": "a"} for _ in range(count)])
        assert len(encode(documents, own, max_length=8).examples) == count
        return time.process_time() - began

    def act() -> None:
        seconds(100)
        few, more = min(seconds(1000), seconds(1000)), seconds(4000)
        assert more < 8 * few + 0.2, (few, more)
        print("linear")

    return act


def shared_rows(world: World) -> Action:
    train = world.rows(*TEXTS, TEXTS[0], TEXTS[0])
    return ["data", world.recipe(data={"train": train, "eval": world.rows(TEXTS[1], {"text": "new"}, name="eval.jsonl")})]


def classes(*content: dict[str, Any], says: tuple[str, ...]) -> Case:
    return rows(*content, says=says, task="classification", labels=["no", "yes"])


LONG = "one two three four five six seven eight nine ten eleven twelve"
SHORT_CHAT, LONG_CHAT = turns("user:a", "assistant:b"), turns(f"user:{LONG}", "assistant:b")
CHAT: dict[str, Any] = {"task": "chat"}

CHECKS = [
    check(
        35,
        "a corrupt line in the middle; a last line that is cut",
        "tests/data/test_rows.py::test_a_bad_line_is_named_with_its_reason_and_can_be_skipped",
        "tests/train/test_command.py::test_bad_rows_stop_the_command_unless_they_are_to_be_skipped",
        middle=rows(GOOD, GOOD, GOOD, '{"text": "x" oops}', GOOD, says=("rows.jsonl:4:", "not JSON", "oops", "--skip-bad-rows")),
        cut=rows(GOOD, GOOD, '{"text": "one tw', says=("rows.jsonl:3:", "cut off")),
        skipped=rows(
            GOOD, '{"text": ', GOOD, says=("2 of 3 rows used", "1 bad row skipped", "rows.jsonl:2"), code=0, options=("--skip-bad-rows",)
        ),
        train=Case(
            make=lambda world: ["train", world.recipe(data={"train": world.rows(GOOD, "{oops")})], says=("rows.jsonl:2:", "not JSON")
        ),
    ),
    check(
        36,
        "a file without rows",
        "tests/data/test_rows.py::test_a_file_without_rows_is_an_error",
        empty=rows(says=("rows.jsonl: 0 usable rows",)),
        blank=rows("", "  ", "", says=("rows.jsonl: 0 usable rows",)),
        all_left_out=rows("{oops", says=("rows.jsonl: 0 usable rows", "rows.jsonl:1"), options=("--skip-bad-rows",)),
        all_dropped=rows({"text": ""}, {"text": " "}, says=("0 usable rows",)),
    ),
    check(
        37,
        "byte order mark, Windows line ends, a list in a .jsonl, NaN",
        "tests/data/test_rows.py::test_byte_order_mark_and_windows_line_ends_change_nothing",
        mark=rows(b"\xef\xbb\xbf" + GOOD.encode(), says=("1 of 1 row used",), code=0),
        crlf=rows(GOOD + "\r", GOOD + "\r", says=("2 of 2 rows used",), code=0),
        list=rows(f"[{GOOD}]", says=("rows.jsonl:1:", "list", ".json")),
        list_over_lines=rows("[", GOOD, "]", says=("rows.jsonl:1:", "rename it to rows.json")),
        nan=rows('{"text": "a", "weight": NaN}', says=("rows.jsonl:1:", "NaN", "not JSON")),
    ),
    check(
        38,
        "rows that are no text, or no object",
        "tests/data/test_rows.py::test_all_bad_rows_are_reported_at_once",
        utf8=rows(GOOD, b'{"text": "\xff"}', says=("rows.jsonl:2:", "0xff", "UTF-8")),
        surrogate=rows(GOOD, '{"text": "\\ud800"}', says=("rows.jsonl:2:", "ud800", "surrogate")),
        scalar=rows(GOOD, "5", says=("rows.jsonl:2:", "a number")),
        deep=rows(GOOD, '{"text": ' + "[" * 2000 + "]" * 2000 + "}", says=("rows.jsonl:2:", "nested")),
        huge_number=rows('{"text": "a", "n": ' + "9" * 5000 + "}", says=("rows.jsonl:1:",)),
    ),
    check(
        39,
        "emoji, right-to-left, combining marks, NUL, zero width",
        "tests/data/test_encode.py::test_any_unicode_survives_with_right_boundaries",
        "tests/data/test_preview.py::test_spans_are_the_row_and_mark_what_is_learned",
        shown=rows(
            *({"text": text} for text in ("👩‍👩‍👧 family", "שלום עולם", "e\u0301\u0323 marks", "nul \0 inside", "zero\u200bwidth")),
            says=("5 of 5 rows used", "👩", "עולם", "marks", "width"),
            code=0,
            options=("--rows", "5"),
        ),
        learned=trained({"text": "👩‍👩‍👧 שלום e\u0301 \0 \u200b"}, says=("1 step ",), code=0),
    ),
    check(
        40,
        "rows without anything to learn",
        "tests/data/test_formats.py::test_rows_from_which_nothing_can_be_learned_say_why",
        counted=rows(
            SHORT_CHAT,
            {"messages": []},
            turns("system:be kind"),
            turns("user:a", "assistant:b", "user:c"),
            turns("user:a", "assistant:"),
            says=("1 of 5 rows used", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5"),
            code=0,
            **CHAT,
        ),
        only_system=rows(turns("system:be kind"), says=("0 usable rows", "rows.jsonl:1"), **CHAT),
        no_answer=rows(turns("user:a"), says=("0 usable rows", "rows.jsonl:1"), **CHAT),
        no_turns=rows({"messages": []}, says=("0 usable rows", "rows.jsonl:1"), **CHAT),
    ),
    check(
        41,
        "every label is cut away",
        "tests/data/test_encode.py::test_rows_that_lose_every_label_are_dropped_counted_and_never_trained_on",
        all=begun(
            LONG_CHAT,
            LONG_CHAT,
            says=("0 usable rows of 2", "2 dropped", "data.max_length"),
            overrides=("data.task=chat", "data.max_length=16"),
        ),
        some=rows(SHORT_CHAT, LONG_CHAT, says=("1 of 2 rows used", "1 dropped", "rows.jsonl:2"), code=0, max_length=30, **CHAT),
    ),
    check(
        42,
        "padding is never learned, and changes no loss",
        "tests/data/test_collate.py::test_packed_padded_and_single_rows_have_one_summed_loss",
        "tests/data/test_collate.py::test_padding_is_never_a_label_even_when_it_is_the_end_token",
    ),
    check(
        43,
        "one row of 25 MB; very many of one token",
        "tests/data/test_rows.py::test_reading_a_very_long_row_takes_about_three_times_its_size",
        "tests/data/test_encode.py::test_only_as_much_of_a_huge_row_is_tokenized_as_can_be_kept",
        counted=rows({"text": LONG}, says=("1 truncated to max_length 8",), code=0, max_length=8),
        short=Case(make=many_short_rows, code=0, says=("linear",)),
    ),
    check(
        44,
        "a row that stands twice, or in both sets",
        "tests/data/test_encode.py::test_duplicates_and_rows_shared_with_a_held_out_set_are_counted",
        "tests/tasks/test_causal_lm.py::test_rows_that_are_in_both_sets_are_pointed_out",
        both=Case(
            make=shared_rows, code=0, says=("2 duplicates of earlier rows", "evaluation examples that are also training examples: 1")
        ),
    ),
    check(
        45,
        "a token, label or class that the model does not have",
        "tests/data/test_encode.py::test_token_rows_are_checked_against_the_vocabulary",
        token=begun({"input_ids": [1, 2]}, {"input_ids": [1, 999]}, says=("rows.jsonl:2", "999", "264")),
        label=begun({"input_ids": [1, 2], "labels": [1, 264]}, says=("rows.jsonl:1", "264")),
        negative=begun({"input_ids": [1, -3]}, says=("rows.jsonl:1", "-3")),
        unknown_class=classes({"text": "a", "label": "no"}, {"text": "b", "label": "maybe"}, says=("rows.jsonl:2", "'maybe'")),
        number_of_a_class=classes({"text": "a", "label": 0}, {"text": "b", "label": 2}, says=("rows.jsonl:2", "2")),
    ),
    check(
        46,
        "too few rows",
        "tests/data/test_batches.py::test_rows_per_step_is_exact_but_for_the_last",
        "tests/tasks/test_causal_lm.py::test_one_row_cannot_be_split",
        Later("ranks do not exist yet (--nproc is refused); the last, smaller step of an epoch is never dropped"),
        one_row=trained({"text": "one"}, says=("1 step ",), code=0),
        fewer_than_a_step=trained(*TEXTS, says=("1 step ",), code=0, overrides=("train.rows_per_step=64",)),
        split=begun({"text": "one two"}, says=("eval_fraction",), overrides=("data.eval_fraction=0.5",)),
        ranks=begun({"text": "one"}, says=("--nproc", "yet"), overrides=("--nproc", "2")),
    ),
]
