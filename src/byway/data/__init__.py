"""Data: rows → documents → tokens and labels → batches.

::

    rows.py       read_rows: files, hub datasets and iterables as rows with an address ("chat.jsonl:17")
    tables.py     the readers, one per kind of file
    documents.py  the kinds of documents: a conversation, a text, a completion, tokens, a labelled text
    formats.py    keys → documents; the format is detected from all rows, or named
    template.py   a conversation as the model's chat template writes it, and which characters are in the loss
    tokens.py     characters → token ids; control-token strings inside a row stay text
    encode.py     documents → examples for next-token prediction
    labelled.py   documents → examples for classification
    report.py     counts of rows: used, truncated, dropped, and why
    batches.py    which rows go into which step, as packed or padded micro-batches
    collate.py    examples → tensors
    preview.py    examples as text for display
"""
