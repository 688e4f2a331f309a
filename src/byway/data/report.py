"""What became of the rows: counted while they are encoded, shown afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

from byway.data.bad_rows import Bad, BadRows
from byway.errors import DataError

__all__ = ["DataReport", "Dropped", "Tally"]


@dataclass(frozen=True)
class Dropped:
    """Rows left out for one reason; ``where``: the addresses of the first three."""

    reason: str
    count: int
    where: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts over one source.

    ``rows``: read, bad ones included. ``used``: rows from which at least one example came. ``examples``: how many came. ``truncated``:
    examples cut to ``max_length``. ``tokens`` and ``learned`` (0 for classes) are over the examples; ``longest`` is before cutting.
    ``duplicates``: examples equal to an earlier one. ``bad``: the first of ``bad_count`` rows skipped. ``notes``: remarks.
    """

    source: str
    format: str
    rows: int
    used: int
    examples: int
    truncated: int
    tokens: int
    learned: int
    longest: int
    duplicates: int
    max_length: int
    dropped: tuple[Dropped, ...]
    bad: tuple[Bad, ...]
    bad_count: int
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        learned = f", {self.learned:,} of them learned ({self.learned / self.tokens:.0%})" if self.learned else ""
        lines = [
            f"{self.source}: {self.used:,} of {self.rows:,} rows used ({self.format})",
            f"{self.examples:,} examples, {self.tokens:,} tokens{learned}; longest row {self.longest:,} tokens",
        ]
        if self.truncated:
            lines.append(f"{self.truncated:,} cut to max_length {self.max_length:,}")
        lines += [f"{entry.count:,} dropped: {entry.reason} ({_first(entry.where, entry.count)})" for entry in self.dropped]
        if self.bad_count:
            lines.append(f"{self.bad_count:,} bad rows skipped: {self.bad[0].where} {self.bad[0].reason}")
        if self.duplicates:
            lines.append(f"{self.duplicates:,} duplicates of earlier rows, kept")
        return lines + [f"note: {note}" for note in self.notes]


def _first(where: tuple[str, ...], count: int) -> str:
    return ", ".join(where) + (", …" if count > len(where) else "")


@dataclass
class Tally:
    """Counts rows as they are encoded; :meth:`report` at the end."""

    source: str
    format: str
    max_length: int
    bad: BadRows
    rows: int = 0
    used: int = 0
    examples: int = 0
    truncated: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    drop_counts: dict[str, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str) -> None:
        """Count a row left out."""
        self.drop_counts[reason] = self.drop_counts.get(reason, 0) + 1
        first = self.dropped.setdefault(reason, [])
        if len(first) < 3:
            first.append(where)

    def note(self, text: str) -> None:
        """Remember a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def seen(self, key: int) -> None:
        """Count an example's content, for duplicates."""
        self.keys[key] = self.keys.get(key, 0) + 1

    def report(self) -> DataReport:
        """The finished counts; :class:`DataError` when no row is usable, with the reasons."""
        dropped = tuple(Dropped(reason, self.drop_counts[reason], tuple(where)) for reason, where in self.dropped.items())
        if not self.examples:
            reasons = [f"{entry.count} dropped: {entry.reason} ({_first(entry.where, entry.count)})" for entry in dropped]
            reasons += [f"{bad.where} {bad.reason}" for bad in self.bad.first[:3]]
            cut = any(entry.reason.startswith("no learned token is left") or entry.reason.startswith("longer than") for entry in dropped)
            hint = (
                f"raise data.max_length: rows have up to {self.longest:,} tokens" if cut else "see which rows are left out, and why, above"
            )
            raise DataError("\n".join([f"{self.source}: 0 usable rows of {self.rows + self.bad.count}", *reasons]), hint=hint)
        return DataReport(
            source=self.source,
            format=self.format,
            rows=self.rows + self.bad.count,
            used=self.used,
            examples=self.examples,
            truncated=self.truncated,
            tokens=self.tokens,
            learned=self.learned,
            longest=self.longest,
            duplicates=sum(count - 1 for count in self.keys.values()),
            max_length=self.max_length,
            dropped=dropped,
            bad=tuple(self.bad.first),
            bad_count=self.bad.count,
            notes=tuple(self.notes),
        )
