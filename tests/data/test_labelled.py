from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from byway.data.documents import Labelled
from byway.data.labelled import encode_labelled
from byway.data.prepare import read_documents
from byway.errors import DataError


def rows(*pairs: tuple[Any, int | str]) -> list[Labelled]:
    return [
        Labelled(where=f"row {number}", texts=texts if isinstance(texts, tuple) else (texts,), label=label)
        for number, (texts, label) in enumerate(pairs, start=1)
    ]


def test_texts_and_pairs_are_what_the_tokenizer_itself_writes(wordpiece: PreTrainedTokenizerFast) -> None:
    single = encode_labelled(rows(("Hello there", "b"), ("How are you", "a")), wordpiece, 64)
    own = wordpiece("Hello there")
    assert single.names == ("a", "b") and [example.label for example in single.examples] == [1, 0]
    assert single.examples[0].input_ids == own["input_ids"] and single.examples[0].token_type_ids == own["token_type_ids"]
    pair = encode_labelled(rows((("Hello there", "one two"), 1), (("a", "b"), 0)), wordpiece, 64)
    own = wordpiece("Hello there", "one two")
    assert pair.examples[0].input_ids == own["input_ids"] and pair.examples[0].token_type_ids == own["token_type_ids"]
    assert 1 in own["token_type_ids"] and pair.names == ("0", "1")


def test_long_rows_are_cut_with_their_special_tokens_kept(wordpiece: PreTrainedTokenizerFast) -> None:
    encoded = encode_labelled(rows(("one two " * 50, 0), ("a", 1)), wordpiece, 16)
    ids = encoded.examples[0].input_ids
    assert len(ids) == 16 and ids[0] == wordpiece.cls_token_id and ids[-1] == wordpiece.sep_token_id
    assert encoded.report.truncated == 1 and encoded.report.longest > 16


def test_separators_in_a_text_stay_text(wordpiece: PreTrainedTokenizerFast) -> None:
    encoded = encode_labelled(rows(("Hello [SEP] there", 0), ("one", 1)), wordpiece, 64)
    assert encoded.examples[0].input_ids.count(wordpiece.sep_token_id) == 1
    assert encoded.examples[1].input_ids == wordpiece("one")["input_ids"]


def test_names_are_those_of_the_training_set_or_derived_in_order(wordpiece: PreTrainedTokenizerFast) -> None:
    digits = encode_labelled(rows(("a", "10"), ("b", "9"), ("c", "2")), wordpiece, 64)
    assert digits.names == ("2", "9", "10")
    assert encode_labelled(rows(("a", 2)), wordpiece, 64).names == ("0", "1", "2")
    held_out = encode_labelled(rows(("a", "ham")), wordpiece, 64, ["ham", "spam"])
    assert held_out.names == ("ham", "spam") and held_out.examples[0].label == 0
    with pytest.raises(DataError, match="row 2: has the label 'spm'; did you mean 'spam'"):
        encode_labelled(rows(("a", "ham"), ("b", "spm")), wordpiece, 64, ["ham", "spam"])
    with pytest.raises(DataError, match="row 1: has the label -1"):
        encode_labelled(rows(("a", -1), ("b", 1)), wordpiece, 64)
    with pytest.raises(DataError, match="names and numbers: row 1 has 'x', row 2 has 3"):
        encode_labelled(rows(("a", "x"), ("b", 3)), wordpiece, 64)
    skipped = encode_labelled(rows(("a", -1), ("b", 1), ("", 1)), wordpiece, 64, skip_bad=True)
    assert (skipped.report.used, skipped.report.bad_count, skipped.report.dropped[0].count) == (1, 1, 1)


def test_real_sentences_and_pairs(wordpiece: PreTrainedTokenizerFast, data_dir: Path) -> None:
    for name, names in (("glue-sst2/validation.jsonl", ("0", "1")), ("trec/test.jsonl", ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"))):
        encoded = encode_labelled(read_documents(data_dir / name, among=("classification",)), wordpiece, 128)
        assert encoded.names == names and encoded.report.used == encoded.report.rows
    with pytest.raises(DataError, match="no class"):
        read_documents(data_dir / "glue-stsb" / "validation.jsonl", among=("classification",))
