from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from byway.data.bad_rows import BadRows
from byway.data.documents import Labelled
from byway.data.encode import Encoded
from byway.data.formats import Documents, read_documents
from byway.data.labelled import LabelledExample, class_names, encode_labelled
from byway.errors import DataError


def rows(*pairs: tuple[Any, int | str]) -> list[Labelled]:
    return [
        Labelled(where=f"row {number}", texts=texts if isinstance(texts, tuple) else (texts,), label=label)
        for number, (texts, label) in enumerate(pairs, start=1)
    ]


def encoded_of(
    documents: list[Labelled], tokenizer: Any, max_length: int = 64, names: Any = None, skip_bad: bool = False
) -> Encoded[LabelledExample]:
    names = names or class_names([row for row in documents if not row.unusable()])
    return encode_labelled(Documents([*documents], bad=BadRows(skip=skip_bad)), tokenizer, max_length, names)


def test_texts_and_pairs_are_what_the_tokenizer_itself_writes(wordpiece: PreTrainedTokenizerFast) -> None:
    single = encoded_of(rows(("Hello there", "b"), ("How are you", "a")), wordpiece)
    own = wordpiece("Hello there")
    assert [example.label for example in single.examples] == [1, 0]
    assert single.examples[0].input_ids == own["input_ids"] and single.examples[0].token_type_ids == own["token_type_ids"]
    pair = encoded_of(rows((("Hello there", "one two"), 1), (("a", "b"), 0)), wordpiece)
    own = wordpiece("Hello there", "one two")
    assert pair.examples[0].input_ids == own["input_ids"] and pair.examples[0].token_type_ids == own["token_type_ids"]
    assert 1 in own["token_type_ids"]


def test_long_rows_are_cut_with_their_special_tokens_kept(wordpiece: PreTrainedTokenizerFast) -> None:
    encoded = encoded_of(rows(("one two " * 50, 0), ("a", 1)), wordpiece, 16)
    ids = encoded.examples[0].input_ids
    assert len(ids) == 16 and ids[0] == wordpiece.cls_token_id and ids[-1] == wordpiece.sep_token_id
    assert encoded.report.truncated == 1 and encoded.report.longest > 16


def test_separators_in_a_text_stay_text(wordpiece: PreTrainedTokenizerFast) -> None:
    encoded = encoded_of(rows(("Hello [SEP] there", 0), ("one", 1)), wordpiece)
    assert encoded.examples[0].input_ids.count(wordpiece.sep_token_id) == 1
    assert encoded.examples[1].input_ids == wordpiece("one")["input_ids"]


def test_names_are_those_of_the_training_set_or_derived_in_order(wordpiece: PreTrainedTokenizerFast) -> None:
    assert class_names(rows(("a", "10"), ("b", "9"), ("c", "2"))) == ("2", "9", "10")
    assert class_names(rows(("a", 2))) == ("0", "1", "2") and class_names(rows(("a", "y"), ("b", "x"))) == ("x", "y")
    held_out = encoded_of(rows(("a", "ham")), wordpiece, 64, ["ham", "spam"])
    assert held_out.examples[0].label == 0
    with pytest.raises(DataError, match="row 2: has the label 'spm'; did you mean 'spam'"):
        encoded_of(rows(("a", "ham"), ("b", "spm")), wordpiece, 64, ["ham", "spam"])
    with pytest.raises(DataError, match="row 1: has the label -1"):
        encoded_of(rows(("a", -1), ("b", 1)), wordpiece)
    with pytest.raises(DataError, match="both names and numbers: row 1 has 'x', row 2 has 3"):
        encoded_of(rows(("a", "x"), ("b", 3)), wordpiece)
    skipped = encoded_of(rows(("a", -1), ("b", 1), ("", 1)), wordpiece, 64, skip_bad=True)
    assert (skipped.report.used, skipped.report.bad_count, skipped.report.dropped[0].count) == (1, 1, 1)


def test_real_sentences_and_pairs(wordpiece: PreTrainedTokenizerFast, data_dir: Path) -> None:
    for name, names in (("glue-sst2/validation.jsonl", ("0", "1")), ("trec/test.jsonl", ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"))):
        documents = read_documents(data_dir / name, among=("classification",))
        assert class_names([row for row in documents.items if isinstance(row, Labelled)]) == names
        report = encode_labelled(documents, wordpiece, 128, names).report
        assert report.used == report.rows
    with pytest.raises(DataError, match="neither an integer nor a name"):
        read_documents(data_dir / "glue-stsb" / "validation.jsonl", among=("classification",))
