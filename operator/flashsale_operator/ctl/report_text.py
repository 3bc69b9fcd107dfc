"""A sale's report as plain text, and the facts that text and HTML show."""

from collections.abc import Iterator, Sequence
from typing import Final

from flashsale_operator.ctl.report import Report

_BARS: Final = "▁▂▃▄▅▆▇█"
MAX_NOTES: Final = 20


def text_of(report: Report) -> str:
    """Returns the report of one sale, as lines for a terminal."""
    lines = [title(report), ""]
    lines += [f"{name:18}{value}" for name, value in facts(report)]
    for name, values, first in charts(report):
        lines += ["", f"{name}, at most {max(values):,}:", f"  {_spark(values)}", f"  from {first}"]
    lines += ["", f"Audit at {report.audit.at}: {report.audit.verdict}"]
    lines += [f"  {note}" for note in report.audit.notes[:MAX_NOTES]]
    lines += [f"Versions: {versions(report)}", f"Made at {report.made_at}"]
    return "\n".join(lines)


def title(report: Report) -> str:
    """Returns the names of the sale."""
    shown = f"{report.display_name} ({report.item_id})" if report.display_name else report.item_id
    return f"Sale {report.sale_id} of {shown}"


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yields the figures of the sale, with their names."""
    yield "Stock", _counted(report.stock, "unit")
    for state, count in report.counts.items():
        reservations = _counted(count.reservations, "reservation")
        yield state.capitalize(), f"{_counted(count.units, 'unit')} in {reservations}"
    yield "Lost", _counted(report.lost, "unit")
    yield "Buyers", f"{report.buyers:,} with units, of {_counted(report.users, 'user')}"
    yield "Opened", _opened(report)
    yield "First reservation", report.first_reserved_at or "none"
    yield "Last reservation", report.last_reserved_at or "none"
    yield "All reserved", _after(report.all_reserved_seconds)
    yield "All confirmed", _after(report.all_confirmed_seconds)
    yield "Reserved to row", _to_row(report)


def charts(report: Report) -> Iterator[tuple[str, list[int], str]]:
    """Yields the name of each chart, its values, and the time of its first value."""
    rate = report.rate
    if rate is None:
        return
    yield "Reservations per second of the first minute", rate.first_minute, rate.begins_at
    if rate.later:
        minutes = rate.bar_seconds // 60
        per = "minute" if minutes == 1 else f"{minutes} minutes"
        yield f"Reservations per {per} after it", rate.later, rate.later_begins_at


def versions(report: Report) -> str:
    """Returns the versions of the servers and of the engine."""
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _opened(report: Report) -> str:
    if report.opened_at is None:
        return "no reservation yet"
    if report.opened_at == report.starts_at:
        return f"{report.opened_at}, the sale's start"
    return f"{report.opened_at}, the first reservation"


def _after(seconds: float | None) -> str:
    return "not yet" if seconds is None else f"{seconds:,.3f} s after the opening"


def _to_row(report: Report) -> str:
    row = report.to_row
    if row is None:
        return "not known: no reservation stayed as it was recorded first"
    return (
        f"P50 {row.p50_ms:,.1f} ms, P95 {row.p95_ms:,.1f} ms, P99 {row.p99_ms:,.1f} ms, "
        f"max {row.max_ms:,.1f} ms ({_counted(row.rows, 'row')})"
    )


def _spark(values: Sequence[int]) -> str:
    """Returns a bar per value. Only 0 is an empty place."""
    top = max(values)
    return "".join(_BARS[(value * len(_BARS) - 1) // top] if value else " " for value in values)
