"""Line charts as plain SVG, without a library."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Final

_WIDTH: Final = 720
_HEIGHT: Final = 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 96, 44, 44
_COLOURS: Final = ("#1b6ac9", "#c9541b", "#2e8b57", "#8b2e83")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(
    title: str,
    x_name: str,
    y_name: str,
    lines: Sequence[Line],
    spans: Sequence[tuple[str, float, float]] = (),
) -> str:
    """Return an SVG of the lines. Both axes begin at 0.

    `spans` are (name, begin, end) of parts of the x axis, which get a grey background.
    """
    x_top = max(x for line in lines for x, _ in line.points)
    y_step = _step(max(y for line in lines for _, y in line.points))
    y_top = y_step * ceil(max(y for line in lines for _, y in line.points) / y_step)

    def across(x: float) -> float:
        return _LEFT + x / x_top * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - y / y_top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 20, title),
        _text(_LEFT, _TOP - 8, y_name),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_name, anchor="middle"),
    ]
    for name, begin, end in spans:
        left, right = across(begin), across(min(end, x_top))
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}" fill="#eee"/>'
        )
        parts.append(_text(left + 4, _TOP + 14, name))
    for number in range(round(y_top / y_step) + 1):
        y = number * y_step
        parts.append(
            f'<path d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}" stroke="#ccc" stroke-width="0.5"/>'
        )
        parts.append(_text(_LEFT - 6, up(y) + 4, f"{y:g}", anchor="end"))
    x_step = _step(x_top)
    for number in range(int(x_top / x_step) + 1):
        x = number * x_step
        parts.append(_text(across(x), _HEIGHT - _BOTTOM + 16, f"{x:,g}", anchor="middle"))
    for line, colour in zip(lines, _COLOURS, strict=False):
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x, y = line.points[-1]
        parts.append(_text(across(x) + 6, up(y) + 4, line.name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _step(top: float) -> float:
    """Return a round number that divides the axis into about five parts."""
    power = 10.0 ** floor(log10(top / 5))
    return next(power * step for step in (1, 2, 5, 10) if power * step * 5 >= top)


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-family="sans-serif" '
        f'font-size="12" fill="{colour}">{text}</text>'
    )
