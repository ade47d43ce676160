"""Small figures as SVG: bars with intervals, stacked shares, scatters and lines.

Each figure is one SVG document that stands alone as a file and sits in a page as it is. Text is
escaped; there are no scripts. Colours differ in hue and brightness for every common colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ..text import printable

COLOURS = ("#1c4f96", "#d8513f", "#2a8f83", "#c98a1b", "#7a4fa3", "#5b5e68")
_INK, _SOFT, _LINE = "#1b1c20", "#5b5e68", "#e3e4e9"
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"


@dataclass(frozen=True)
class Point:
    """A point of a scatter or line.

    Attributes:
        x: Horizontal value.
        y: Vertical value.
        title: Its tooltip.
        low: Lower end of its interval, if it has one.
        high: Upper end.
    """

    x: float
    y: float
    title: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        name: Its name in the legend; "" for none.
        points: The points.
        colour: Its colour; "" for the next of ``COLOURS``.
        width: Width of its line in pixels.
        opacity: Opacity of the line.
        dots: Whether each point of a line has a dot.
    """

    name: str
    points: Sequence[Point]
    colour: str = ""
    width: float = 2.0
    opacity: float = 1.0
    dots: bool = True


@dataclass(frozen=True)
class Bar:
    """A bar with its interval.

    Attributes:
        value: Its length; None for a missing bar.
        low: Lower end of its interval, if it has one.
        high: Upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick's number, with a true minus."""
    return f"{value:g}".replace("-", "\u2212")


@dataclass(frozen=True)
class _Frame:
    """The inner rectangle of a figure, and its two scales."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(self.left + share * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 2)


def _text(x: float, y: float, words: str, **attributes: str) -> str:
    more = "".join(f' {k.replace("_", "-")}="{escape(v)}"' for k, v in attributes.items())
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(printable(words))}</text>'


def _document(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    name = escape(printable(title))
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}" '
        f'font-family="{_FONT}" font-size="12" fill="{_INK}"><title>{name}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _y_axis(
    frame: _Frame, label: str, numbers: Sequence[float], percent: bool = False
) -> list[str]:
    parts = []
    for value in numbers:
        y = frame.y(value)
        strong = value == 0 and frame.y_low < 0
        parts.append(
            f'<line x1="{frame.left:g}" x2="{frame.width - frame.right:g}" y1="{y}" y2="{y}" '
            f'stroke="{_SOFT if strong else _LINE}"/>'
        )
        words = f"{100 * value:g} %" if percent else tick_text(value)
        parts.append(_text(frame.left - 6, y + 4, words, text_anchor="end", fill=_SOFT))
    middle = (frame.top + frame.height - frame.bottom) / 2
    parts.append(
        f'<g transform="translate(14 {middle:g}) rotate(-90)">'
        + _text(0, 0, label, text_anchor="middle", fill=_SOFT)
        + "</g>"
    )
    return parts


def _legend(names: Sequence[tuple[str, str]], left: float, y: float, width: float) -> list[str]:
    parts, x = [], left
    for name, colour in names:
        room = 22 + 6.8 * len(name)
        if x + room > width and x > left:
            x, y = left, y + 17
        parts.append(
            f'<rect x="{x:g}" y="{y - 9:g}" width="11" height="11" rx="2" fill="{colour}"/>'
        )
        parts.append(_text(x + 16, y, name))
        x += room + 8
    return parts


def _padded(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.06 * (high - low) or 1.0
    return (
        low - room if low < 0 or not zero else low,
        high + room if high > 0 or not zero else high,
    )


def _interval(x: float, low: float, high: float, colour: str = _INK) -> str:
    return (
        f'<path d="M{x:g} {low:g}V{high:g}M{x - 3:g} {low:g}h6M{x - 3:g} {high:g}h6" '
        f'stroke="{colour}" stroke-width="1.2" fill="none"/>'
    )


def grouped_bars(
    title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[Bar]]], label: str
) -> Markup:
    """Groups of bars side by side, with whiskers for intervals.

    Args:
        title: What it shows.
        groups: Names of the groups, left to right.
        series: Name and one bar for each group; one colour each.
        label: What the vertical axis measures.

    Returns:
        The SVG document.
    """
    ends = [v for _, bars in series for bar in bars for v in (bar.value, bar.low, bar.high)]
    low, high = _padded([v for v in ends if v is not None], zero=True)
    width, height = max(440.0, 90 + len(groups) * (26 + 24 * len(series))), 300.0
    names = [(name, COLOURS[i % len(COLOURS)]) for i, (name, _) in enumerate(series)]
    rows = 1 + sum(22 + 6.8 * len(n) + 8 for n, _ in names) // (width - 70)
    frame = _Frame(width, height, 62, 14 + 18 * rows, 12, 34, 0, len(groups), low, high)
    parts = _legend(names, frame.left, 16, width - 12)
    parts += _y_axis(frame, label, ticks(low, high))
    slot = frame.x(1) - frame.x(0)
    wide = min(34.0, 0.8 * slot / max(len(series), 1))
    for g, group in enumerate(groups):
        middle = frame.x(g + 0.5)
        for s, (name, bars) in enumerate(series):
            bar = bars[g]
            if bar.value is None:
                continue
            x = middle + (s - len(series) / 2) * wide
            top, base = frame.y(max(bar.value, 0)), frame.y(min(bar.value, 0))
            words = escape(printable(f"{group}, {name}: {tick_text(float(f'{bar.value:.4g}'))}"))
            parts.append(
                f'<rect x="{x + 1:.2f}" y="{top:g}" width="{wide - 2:.2f}" '
                f'height="{max(base - top, 0.5):.2f}" fill="{COLOURS[s % len(COLOURS)]}">'
                f"<title>{words}</title></rect>"
            )
            if bar.low is not None and bar.high is not None:
                parts.append(_interval(x + wide / 2, frame.y(bar.low), frame.y(bar.high)))
        parts.append(_text(middle, height - 14, group, text_anchor="middle"))
    return _document(width, height, title, parts)


def stacked_shares(
    title: str, rows: Sequence[tuple[str, Sequence[int]]], names: Sequence[str]
) -> Markup:
    """Horizontal bars, each divided into shares of its total, with counts.

    Args:
        title: What it shows.
        rows: A row's name, and its count for each of ``names``.
        names: What the parts are.

    Returns:
        The SVG document.
    """
    room = 16 + 6.6 * max((len(name) for name, _ in rows), default=0)
    width, high = room + 440, 26
    height = 34.0 + high * len(rows)
    tones = ("#1c4f96", "#8fc1e6", "#d9dae0", "#f39d7c")
    parts = _legend([(n, tones[i % 4]) for i, n in enumerate(names)], room, 16, width)
    for r, (name, counts) in enumerate(rows):
        y, x, total = 28.0 + high * r, room, sum(counts)
        parts.append(_text(room - 8, y + 15, name, text_anchor="end"))
        if not total:
            parts.append(_text(room + 2, y + 15, "none", fill=_SOFT))
        for i, count in enumerate(counts):
            wide = 430 * count / total if total else 0
            if not count:
                continue
            words = escape(printable(f"{name}, {names[i]}: {count} of {total}"))
            parts.append(
                f'<rect x="{x:.2f}" y="{y:g}" width="{wide:.2f}" height="21" fill="{tones[i % 4]}" '
                f'stroke="#fff"><title>{words}</title></rect>'
            )
            if wide > 22:
                ink = "#fff" if i == 0 else _INK
                parts.append(
                    _text(x + wide / 2, y + 15, str(count), text_anchor="middle", fill=ink)
                )
            x += wide
    return _document(width, height, title, parts)


def scatter(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    areas: Sequence[tuple[str, float, float]] = (),
) -> Markup:
    """Points and the line y = x, on one scale for both axes.

    Args:
        title: What it shows.
        series: The points.
        x_label: What the horizontal axis measures.
        y_label: What the vertical axis measures.
        areas: Name, lower x and limit of y of areas to shade: y above a positive limit, below a
            negative one.

    Returns:
        The SVG document.
    """
    points = [point for one in series for point in one.points]
    low, high = _padded([v for p in points for v in (p.x, p.y)] + [0.0], zero=False)
    width, height = 460.0, 440.0
    frame = _Frame(width, height, 58, 34, 14, 48, low, high, low, high)
    parts = []
    for name, x, limit in areas:
        top, base = (high, limit) if limit > 0 else (limit, low)
        if x >= high or top <= base:
            continue
        parts.append(
            f'<rect x="{frame.x(x)}" y="{frame.y(top)}" width="{frame.x(high) - frame.x(x):.2f}" '
            f'height="{frame.y(base) - frame.y(top):.2f}" fill="#f3f4f7"/>'
        )
        at = frame.y(top) + 14 if limit > 0 else frame.y(base) - 6
        parts.append(_text(frame.x(high) - 5, at, name, text_anchor="end", fill=_SOFT))
    colour = [one.colour or COLOURS[i % len(COLOURS)] for i, one in enumerate(series)]
    named = [(one.name, tone) for one, tone in zip(series, colour, strict=True) if one.name]
    parts += _legend(named, frame.left, 18, width)
    parts += _y_axis(frame, y_label, ticks(low, high))
    for value in ticks(low, high):
        x = frame.x(value)
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{frame.top:g}" y2="{height - frame.bottom:g}" '
            f'stroke="{_SOFT if value == 0 else _LINE}"/>'
        )
        parts.append(_text(x, height - 30, tick_text(value), text_anchor="middle", fill=_SOFT))
    middle = (frame.left + width - frame.right) / 2
    parts.append(_text(middle, height - 10, x_label, text_anchor="middle", fill=_SOFT))
    parts.append(
        f'<line x1="{frame.x(low)}" y1="{frame.y(low)}" x2="{frame.x(high)}" '
        f'y2="{frame.y(high)}" stroke="{_SOFT}" stroke-dasharray="5 4"/>'
    )
    for one, tone in zip(series, colour, strict=True):
        for p in one.points:
            words = escape(printable(p.title))
            parts.append(
                f'<circle cx="{frame.x(p.x)}" cy="{frame.y(p.y)}" r="4" fill="{tone}" '
                f'fill-opacity=".72" stroke="#fff" stroke-width=".7">'
                f"<title>{words}</title></circle>"
            )
    return _document(width, height, title, parts)


def lines(
    title: str,
    series: Sequence[Series],
    x_names: Sequence[tuple[float, str]],
    y_label: str,
    x_label: str = "",
    *,
    percent: bool = False,
) -> Markup:
    """Lines over an axis with named places.

    Args:
        title: What it shows.
        series: The lines, drawn in this order; those with a name are in the legend.
        x_names: Where the horizontal axis has names, and which.
        y_label: What the vertical axis measures.
        x_label: What the horizontal axis measures.
        percent: Whether values are shares, shown as percentages from 0 to 100.

    Returns:
        The SVG document.
    """
    values = [v for one in series for p in one.points for v in (p.y, p.low, p.high)]
    low, high = _padded([v for v in values if v is not None], zero=True)
    if percent:
        low, high = 0.0, 1.0
    xs = [x for x, _ in x_names] or [0.0]
    edge = 0.04 * (max(xs) - min(xs)) or 0.5
    # Names that do not fit beside each other slant.
    longest = 6.8 * max((len(name) for _, name in x_names), default=0)
    slanted = longest > 540 / max(len(x_names), 1)
    deep = min(0.6 * longest, 110.0) if slanted else 0.0
    width, height = 620.0, 330.0 + deep
    left = 62 + (max(0.0, 0.8 * longest - 50) if slanted else 0.0)
    frame = _Frame(
        width, height, left, 34, 16, 52 + deep, min(xs) - edge, max(xs) + edge, low, high
    )
    colour = [one.colour or COLOURS[i % len(COLOURS)] for i, one in enumerate(series)]
    named = [(one.name, tone) for one, tone in zip(series, colour, strict=True) if one.name]
    parts = _legend(named, frame.left, 18, width)
    parts += _y_axis(frame, y_label, ticks(low, high), percent)
    for x, name in x_names:
        if slanted:
            parts.append(
                f'<g transform="translate({frame.x(x)} {height - deep - 36:g}) rotate(-36)">'
                + _text(0, 0, name, text_anchor="end", fill=_SOFT)
                + "</g>"
            )
        else:
            parts.append(_text(frame.x(x), height - 34, name, text_anchor="middle", fill=_SOFT))
    middle = (frame.left + width - frame.right) / 2
    parts.append(_text(middle, height - 12, x_label, text_anchor="middle", fill=_SOFT))
    for one, tone in zip(series, colour, strict=True):
        path = "L".join(f"{frame.x(p.x)} {frame.y(p.y)}" for p in one.points)
        if path:
            parts.append(
                f'<path d="M{path}" fill="none" stroke="{tone}" stroke-width="{one.width:g}" '
                f'stroke-opacity="{one.opacity:g}"/>'
            )
        for p in one.points:
            if p.low is not None and p.high is not None:
                parts.append(_interval(frame.x(p.x), frame.y(p.low), frame.y(p.high), tone))
            if one.dots:
                words = escape(printable(p.title))
                parts.append(
                    f'<circle cx="{frame.x(p.x)}" cy="{frame.y(p.y)}" r="3.2" fill="{tone}">'
                    f"<title>{words}</title></circle>"
                )
    return _document(width, height, title, parts)
