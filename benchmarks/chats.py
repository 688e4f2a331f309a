"""The rows of the training benchmarks: the first 200 chats of oasst1-chat in fixed steps of 4, or random tokens in rows as long.

Every repetition makes the same steps: those whose tokens, learned tokens and padding are nearest to the average of all. All variants see
the same rows in the same order; for Byway the file is written so that its own shuffle brings the rows into that order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BATCH", "Row", "for_byway", "load_rows", "make_rows", "padding", "representative", "save_rows", "sequence"]

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"
LENGTHS = HERE / "chat_lengths.json"
"""[tokens, learned tokens] of each of the 200 chats by SmolLM2's tokenizer: enough to time a random model where the chats are not."""
CHATS, BATCH, FIXED_LENGTH = 200, 4, 256


@dataclass(frozen=True)
class Row:
    """One example: token ids, and labels (-100: not learned; unshifted)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Labels that are predicted; nothing predicts the first token."""
        return sum(label != -100 for label in self.labels[1:])


Step = list[Row]


def make_rows(data: Path, model: str, max_length: int, *, fixed: bool, vocabulary: int) -> list[Row]:
    """200 rows. `model`: the built-in base reads the chats themselves; for another one (a random shape) tokens are drawn.

    `fixed`: the tokens one after the other, cut into rows of 256 that are learned whole.
    """
    rows = _chats(data, max_length) if model == "smollm2-135m-instruct" else _random(max_length, vocabulary)
    if not fixed:
        return rows
    stream = [token for row in rows for token in row.input_ids]
    blocks = [tuple(stream[i : i + FIXED_LENGTH]) for i in range(0, len(stream) - FIXED_LENGTH + 1, FIXED_LENGTH)]
    return [Row(block, block) for block in blocks[:CHATS]]


def _chats(data: Path, max_length: int) -> list[Row]:
    """The assistant's turns are learned, as in a chat recipe by default."""
    from transformers import AutoTokenizer

    from byway.base.builtin.fetch import built_in_directory
    from byway.data.encode import encode
    from byway.data.formats import read_documents
    from byway.tasks.chat import Chat

    path = data / "oasst1-chat" / "train.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: give --data DIR, or --model with a random shape, which needs no data")
    documents = read_documents(str(path), among=Chat.formats, limit=CHATS)
    tokenizer: Any = AutoTokenizer.from_pretrained(built_in_directory(), local_files_only=True)
    return [Row(tuple(e.input_ids), tuple(e.labels)) for e in encode(documents, tokenizer, max_length=max_length).examples]


def _random(max_length: int, vocabulary: int) -> list[Row]:
    """Rows as long as the chats, with as many learned tokens at their ends."""
    drawn = random.Random("byway benchmark tokens")
    rows: list[Row] = []
    for tokens, learned in json.loads(LENGTHS.read_text(encoding="utf-8")):
        length = min(tokens, max_length)
        ids = tuple(drawn.randrange(5, vocabulary) for _ in range(length))
        start = max(length - max(round(learned * length / tokens), 1), 1)
        rows.append(Row(ids, (*(-100,) * start, *ids[start:])))
    return rows


def padding(steps: Sequence[Step]) -> float:
    """Real tokens over positions when each step's rows are padded to its longest."""
    return sum(row.tokens for step in steps for row in step) / sum(len(step) * max(row.tokens for row in step) for step in steps)


def representative(rows: Sequence[Row], count: int) -> tuple[list[Step], dict[str, float]]:
    """(`count` steps in a row, what all steps are like on average and these): chosen by size, learned share and padding."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    steps = [[rows[i] for i in order[at : at + BATCH]] for at in range(0, len(order) - BATCH + 1, BATCH)]
    everything = _like(steps)

    def distance(start: int) -> float:
        here = _like(steps[start : start + count])
        return sum(abs(here[key] / everything[key] - 1.0) for key in everything)

    start = min(range(len(steps) - count + 1), key=distance)
    chosen = steps[start : start + count]
    described = {f"all_{key}": round(value, 4) for key, value in everything.items()} | {k: round(v, 4) for k, v in _like(chosen).items()}
    return chosen, described


def _like(steps: Sequence[Step]) -> dict[str, float]:
    tokens = sum(row.tokens for step in steps for row in step)
    return {
        "tokens_per_step": tokens / len(steps),
        "learned_share": sum(row.learned for step in steps for row in step) / tokens,
        "real_share_padded": padding(steps),
    }


def sequence(chosen: Sequence[Step], warmup: int, repetitions: int) -> list[Step]:
    """All steps of a run in order: `warmup` steps, the one with the widest padded batch first, then the chosen ones again and again."""
    widest = sorted(chosen, key=lambda step: -max(row.tokens for row in step) * len(step))
    return [*(widest[i % len(widest)] for i in range(warmup)), *(step for _ in range(repetitions) for step in chosen)]


def for_byway(rows: Sequence[Row], seed: int) -> list[Row]:
    """`rows` in such places that Byway's shuffle of the first epoch with this seed gives them back in their order."""
    from byway.data.batches import plan_epoch

    steps = plan_epoch([1] * len(rows), epoch=0, seed=seed, rows_per_step=1, micro_tokens=1, pack=False)
    placed: dict[int, Row] = {micro[0]: row for (micro,), row in zip(steps, rows, strict=True)}
    return [placed[i] for i in range(len(rows))]


def save_rows(path: Path, rows: Sequence[Row]) -> Path:
    """One JSON object a line."""
    lines = [json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def load_rows(path: Path) -> list[Row]:
    """What :func:`save_rows` wrote."""
    found: list[Mapping[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Row(tuple(row["input_ids"]), tuple(row["labels"])) for row in found]
