"""Writes the figures into docs/performance.md, into charts, and into a JSON file.

The text of the page is written by hand. The figures of a section stand between
`<!-- figures NAME -->` and `<!-- end -->`. Only they are replaced.
"""

import re
from pathlib import Path
from statistics import median

import msgspec

from bench import figures, redis_figures
from bench.chart import Line, chart
from bench.goals import goals
from bench.requests import PERCENTS
from bench.results import Findings

PAGE = "performance.md"


def write(findings: Findings, docs: Path) -> None:
    """Write the page, the charts and the JSON file into the folder `docs`."""
    sections = _sections(findings)
    page = docs / PAGE
    text = page.read_text()
    for name, section in sections.items():
        marked = re.compile(rf"(<!-- figures {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not (place := marked.search(text)):
            raise SystemExit(f"{page} has no markers for the figures of {name}")
        text = text[: place.end(1)] + section + text[place.start(2) :]
    page.write_text(text)
    made = msgspec.json.format(msgspec.json.encode(findings), indent=1)
    (docs / "performance.json").write_bytes(made + b"\n")
    (docs / "performance-open-loop.svg").write_text(_open_loop_chart(findings))
    (docs / "performance-outages.svg").write_text(_outage_chart(findings))
    if findings.backlogs.found:
        (docs / "performance-backlogs.svg").write_text(_backlog_chart(findings))
        (docs / "performance-backlogs-left.svg").write_text(_left_chart(findings))


def summary(findings: Findings) -> str:
    """Return the figures for a terminal."""
    return "\n".join(_sections(findings).values())


def _sections(found: Findings) -> dict[str, str]:
    return {
        "run": _run(found),
        "goals": goals(found),
        "reserve": figures.reserve(found.reserve),
        "bounds": figures.bounds(found.bounds),
        "parts": figures.parts(found),
        "open-loop": figures.open_loop(found),
        "redis": redis_figures.redis(found),
        "cluster": redis_figures.cluster(found.cluster),
        "calls": redis_figures.calls(found.cluster.calls),
        "scale": redis_figures.scale(found),
        "recording": figures.recording(found),
        "outages": figures.outages(found),
        "backlogs": figures.backlogs(found.backlogs),
        "holds": figures.holds(found),
        "growth": figures.growth(found),
    }


def _run(found: Findings) -> str:
    lines = [f"- {name}: {description}" for name, description in found.machine.items()]
    lines.append(
        f"- run: `{found.command}`, {found.when}, {found.minutes:.0f} min, rounds: "
        f"{found.rounds} of {found.seconds:g} s, after a warm-up of {found.warm_up_seconds:g} s"
    )
    lines.append(f"- other load: {found.background}")
    return "\n".join(lines) + "\n"


def _open_loop_chart(found: Findings) -> str:
    lines = []
    for name in ("p99", "p95", "p50"):
        points = []
        for percent in PERCENTS:
            rounds = [one for one in found.open_loop if one.percent == percent]
            value = median(getattr(one.round.tally, name) for one in rounds)
            points.append((rounds[0].rate, value))
        lines.append(Line(name.upper(), points))
    return chart("POST /reserve at a constant arrival rate", "requests/s", "ms", lines)


def _outage_chart(found: Findings) -> str:
    points = list(enumerate(found.outages.each_second))
    return chart(
        f"P95 of each second at {found.outages.rate:,.0f} requests/s",
        "seconds",
        "ms",
        [Line("P95", points)],
        found.outages.spans,
    )


def _backlog_chart(found: Findings) -> str:
    lines = [Line(one.name, list(enumerate(one.each_second))) for one in found.backlogs.found]
    return chart("P95 of each second while a backlog is worked off", "seconds", "ms", lines)


def _left_chart(found: Findings) -> str:
    lines = [
        Line(one.name, [(at, size / max(one.left) * 100) for at, size in enumerate(one.left)])
        for one in found.backlogs.found
    ]
    return chart("The remaining part of the backlog", "seconds", "%", lines)
