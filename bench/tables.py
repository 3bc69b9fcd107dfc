"""Markdown tables, and cells that sum up several rounds."""

from collections.abc import Iterable, Sequence
from statistics import median

from bench.results import Round


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def spread(values: Iterable[float], digits: int = 0) -> str:
    """Return the median, with the least and the most in brackets."""
    ordered = sorted(values)
    least, middle, most = (
        f"{value:,.{digits}f}" for value in (ordered[0], median(ordered), ordered[-1])
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def cpu(rounds: Sequence[Round], names: Sequence[str]) -> list[str]:
    """Return a cell for each process: its CPU seconds per 10,000 requests."""
    return [spread((one.cpu[name] for one in rounds), 2) for name in names]


def middle_rps(rounds: Sequence[Round]) -> float:
    """Return the median of the requests per second."""
    return median(one.tally.rps for one in rounds)


def middle_cpu(rounds: Sequence[Round]) -> float:
    """Return the median of the API's CPU seconds per 10,000 requests."""
    return median(one.cpu["API"] for one in rounds)
