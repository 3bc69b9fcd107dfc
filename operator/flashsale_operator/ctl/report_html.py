"""Reports of sales as one HTML file, without scripts and without requests to any host."""

from collections.abc import Sequence
from html import escape
from typing import Final

from flashsale_operator.ctl.report import Report
from flashsale_operator.ctl.report_text import MAX_NOTES, charts, facts, title, versions

_HEIGHT: Final = 160
_BAR: Final = 8
_GAP: Final = 2

# The policy forbids scripts and requests, even if an escape were missing.
_HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #57606a;
  --line: #d0d7de; --bar: #1f6feb; --good: #1a7f37; --bad: #cf222e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e6edf3; --back: #0d1117; --soft: #9198a1;
  --line: #3d444d; --bar: #58a6ff; --good: #3fb950; --bad: #ff7b72; }} }}
body {{ margin: 2rem auto; padding: 0 1rem; max-width: 50rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }}
th {{ width: 11rem; font-weight: 600; }}
svg {{ width: 100%; height: auto; fill: var(--bar); border-bottom: 1px solid var(--line); }}
.soft {{ color: var(--soft); font-size: .875rem; }}
.good {{ color: var(--good); font-weight: 600; }}
.bad {{ color: var(--bad); font-weight: 600; }}
article + article {{ margin-top: 4rem; }}
</style>
</head>
<body>
"""


def html_of(reports: Sequence[Report]) -> str:
    """Returns the file. Every value in it is escaped."""
    name = f"Flash sale report: {', '.join(report.sale_id for report in reports)}"
    articles = "".join(map(_article, reports))
    return f"{_HEAD.format(title=escape(name))}{articles}</body>\n</html>\n"


def _article(report: Report) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n'
        for name, value in facts(report)
    )
    drawn = "".join(_chart(name, values, begin) for name, values, begin in charts(report))
    kind = "bad" if report.audit.verdict == "DISAGREES" else "good"
    kind = "soft" if report.audit.verdict == "not audited" else kind
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.audit.notes[:MAX_NOTES])
    return f"""<article>
<h1>{escape(title(report))}</h1>
<table>
{rows}</table>
{drawn}<h2>Audit</h2>
<p><span class="{kind}">{escape(report.audit.verdict)}</span>, at {escape(report.audit.at)}</p>
{f"<ul>{notes}</ul>" if notes else ""}
<p class="soft">Made at {escape(report.made_at)} with {escape(versions(report))}</p>
</article>
"""


def _chart(name: str, values: Sequence[int], begin: str) -> str:
    """Draws one bar per value. Its tooltip is the number of the bar and the value."""
    top = max(values)
    bars = []
    for number, value in enumerate(values):
        height = max(1, round(value * _HEIGHT / top)) if value else 0
        bars.append(
            f'<rect x="{number * (_BAR + _GAP)}" y="{_HEIGHT - height}" width="{_BAR}" '
            f'height="{height}"><title>{number + 1}: {value:,}</title></rect>'
        )
    width = 60 * (_BAR + _GAP) if len(values) <= 60 else len(values) * (_BAR + _GAP)
    label = f"{name}, at most {top:,}"
    return (
        f'<h2>{escape(name)}</h2>\n<svg viewBox="0 0 {width} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(bars)}</svg>\n'
        f'<p class="soft">At most {top:,}, {sum(values):,} together, from {escape(begin)}</p>\n'
    )
