"""Data: rows → documents → tokens and labels → batches, and what the model will see.

::

    rows.py       read_rows: files, hub data sets and iterables as rows with an address ("chat.jsonl:17")
    tables.py     the readers behind it, one a kind of file
    documents.py  what a row can be: a conversation, a text, a completion, tokens, a labelled text
    formats.py    which keys make which document; detected over all rows, or named
    template.py   a conversation as the model's chat template writes it, and which characters of it are learned
    tokens.py     characters to token ids; control-token strings inside a row stay text
    encode.py     documents to examples, with a report of what was truncated, dropped and why
    labelled.py   the same for classification
    prepare.py    all of the above in one call
    batches.py    which rows go into which step; packed or padded micro-batches
    collate.py    examples to tensors
    preview.py    spans of text with "learned" marks, for people
"""
