"""Count rows while they are encoded, and report what became of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from byway.data.bad_rows import Bad, BadRow, BadRows
from byway.errors import DataError, counted

__all__ = ["DataReport", "Dropped", "Tally"]


@dataclass(frozen=True)
class Dropped:
    """Rows left out for one reason; ``where``: the addresses of the first three."""

    reason: str
    count: int
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.count:,} dropped: {self.reason} ({', '.join(self.where)}{', …' if self.count > len(self.where) else ''})"


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts over one source."""

    source: str
    format: str
    rows: int
    """Rows read, including bad ones."""
    used: int
    """Rows that gave at least one example."""
    examples: int
    truncated: int
    """Examples cut to `max_length`."""
    tokens: int
    in_loss: int
    """Tokens in the loss; 0 for classification."""
    longest: int
    """Tokens of the longest row, before cutting."""
    duplicates: int
    """Examples equal to an earlier one."""
    max_length: int
    dropped: tuple[Dropped, ...]
    bad: tuple[Bad, ...]
    """The first of the `bad_count` bad rows that were skipped."""
    bad_count: int
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as text, one fact per line."""
        in_loss = f", {self.in_loss:,} in the loss ({self.in_loss / self.tokens:.0%})" if self.in_loss else ""
        lines = [
            f"{self.source}: {self.used:,} of {counted(self.rows, 'row')} used ({self.format})",
            f"{counted(self.examples, 'example')}, {counted(self.tokens, 'token')}{in_loss}; longest row {counted(self.longest, 'token')}",
        ]
        if self.truncated:
            lines.append(f"{self.truncated:,} truncated to max_length {self.max_length:,}")
        lines += [str(entry) for entry in self.dropped]
        if self.bad_count:
            lines.append(f"{counted(self.bad_count, 'bad row')} skipped: {self.bad[0].where} {self.bad[0].reason}")
        if self.duplicates:
            lines.append(f"{counted(self.duplicates, 'duplicate')} of earlier rows, kept")
        return lines + [f"note: {note}" for note in self.notes]


@dataclass
class Tally:
    """Counts of one source while its rows are encoded; the fields are those of :class:`DataReport`."""

    source: str
    format: str
    max_length: int
    bad: BadRows
    rows: int = 0
    used: int = 0
    examples: int = 0
    truncated: int = 0
    tokens: int = 0
    in_loss: int = 0
    longest: int = 0
    too_long: bool = False
    """True if a row was dropped because of its length."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    keys: Counter[int] = field(default_factory=Counter)
    """Hashes of the contents of the examples."""
    ignored: Counter[str] = field(default_factory=Counter)
    """What rows hold that the chat template does not read, with the number of times."""
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.dropped.setdefault(reason, []).append(where)

    def refuse(self, where: str, error: BadRow) -> None:
        """Count a bad row, which is not one of :attr:`rows`."""
        self.rows -= 1
        self.bad.add(where, str(error))

    def note(self, text: str) -> None:
        """Add a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def report(self) -> DataReport:
        """Return the finished counts; :class:`DataError` with the reasons if no row is usable."""
        dropped = tuple(Dropped(reason, len(where), tuple(where[:3])) for reason, where in self.dropped.items())
        if not self.examples:
            reasons = [*map(str, dropped), *(f"{bad.where} {bad.reason}" for bad in self.bad.first[:3])]
            raise DataError(
                "\n".join([f"{self.source}: 0 usable rows of {self.rows + self.bad.count}", *reasons]),
                hint=f"raise data.max_length: rows have up to {self.longest:,} tokens"
                if self.too_long
                else "see above why rows are left out",
            )
        if self.ignored:
            unread = ", ".join(f"{what} ({count:,})" for what, count in self.ignored.most_common(8))
            self.note(f"the chat template does not read these keys: {unread}{', …' if len(self.ignored) > 8 else ''}")
        return DataReport(
            source=self.source,
            format=self.format,
            rows=self.rows + self.bad.count,
            used=self.used,
            examples=self.examples,
            truncated=self.truncated,
            tokens=self.tokens,
            in_loss=self.in_loss,
            longest=self.longest,
            duplicates=self.keys.total() - len(self.keys),
            max_length=self.max_length,
            dropped=dropped,
            bad=tuple(self.bad.first),
            bad_count=self.bad.count,
            notes=tuple(self.notes),
        )
