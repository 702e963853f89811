"""Charts as inline SVG: no script, colours from the page's style sheet, hints as <title>.

Every chart is drawn for a width of 360 units, about the width of a telephone, so that its text
is as large on a small screen as on a wide one, where charts stand side by side.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 38


class Axes:
    """A frame with ticks; turns values into positions. Logarithmic where asked."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        height: int = 230,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self.height, self.log_x, self.log_y = height, log_x, log_y
        self.low_x, self.high_x = _widened(x, log_x)
        self.low_y, self.high_y = _widened(y, log_y)

    def x(self, value: float) -> float:
        """Horizontal position of a value."""
        share = _share(value, self.low_x, self.high_x, self.log_x)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        share = _share(value, self.low_y, self.high_y, self.log_y)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def frame(self, x_label: str, y_label: str) -> list[str]:
        """Ticks, grid lines and labels."""
        out = []
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        for value in ticks(self.low_y, self.high_y, self.log_y, 5):
            at = self.y(value)
            out.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            out.append(text(LEFT - 5, at + 3.5, number(value), "end"))
        for value in ticks(self.low_x, self.high_x, self.log_x, 5):
            at = self.x(value)
            out.append(
                f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            )
            out.append(text(at, bottom + 15, number(value), "middle"))
        out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        out.append(text((LEFT + right) / 2, self.height - 5, x_label, "middle", "label"))
        middle = (TOP + bottom) / 2
        out.append(
            f'<text class="label" transform="translate(11 {middle:.1f}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )
        return out


def svg(name: str, title: str, height: float, parts: Iterable[str]) -> str:
    """A complete chart. ``name`` identifies it in the page, ``title`` is read aloud."""
    return (
        f'<svg class="chart" data-chart="{escape(name)}" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(parts)
        + "</svg>"
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "tick") -> str:
    """A piece of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'  # noqa: E501


def scatter(
    name: str,
    points: Sequence[tuple[str, float, float, bool]],
    x_label: str,
    y_label: str,
) -> str:
    """Named points (name, x, y, on the front), the front joined by a line."""
    axes = Axes(_span(p[1] for p in points), _span(p[2] for p in points))
    parts = axes.frame(x_label, y_label)
    front = sorted((p for p in points if p[3]), key=lambda p: p[1])
    if len(front) > 1:
        path = " ".join(f"{axes.x(p[1]):.1f},{axes.y(p[2]):.1f}" for p in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    placed: list[tuple[float, float, float]] = []
    for label, x, y, on_front in sorted(points, key=lambda p: (p[1], p[2])):
        at_x, at_y = axes.x(x), axes.y(y)
        kind = "point on-front" if on_front else "point"
        hint = f"<title>{escape(label)}: {number(x)}, {number(y)}</title>"
        parts.append(
            f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5">{hint}</circle>'
        )
        width = 5.6 * len(label)
        left = at_x + 7 if at_x + 7 + width < WIDTH else at_x - 7 - width
        line = at_y - (9 if left < at_x else 5)
        while any(abs(line - b) < 11 and left < c and a < left + width for a, b, c in placed):
            line += 11 if line < axes.height - BOTTOM - 12 else -33
        placed.append((left, line, left + width))
        parts.append(text(left, line, label))
    return svg(name, f"{y_label} against {x_label}", axes.height, parts)


def heat_map(
    name: str, rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float],
    what: str,
) -> str:  # fmt: skip
    """A cell per (row, column), on a logarithmic scale of one colour."""
    present = [value for value in values.values() if value > 0]
    low, high = (min(present), max(present)) if present else (1e-6, 1.0)
    top, left = 66, 34
    side = 13 if len(rows) <= 40 else 9
    width = (WIDTH - left - 26) / max(len(columns), 1)
    parts = []
    for index, column in enumerate(columns):
        at = left + (index + 0.5) * width
        parts.append(
            f'<text class="tick" transform="translate({at:.1f} {top - 5}) rotate(-52)">'
            f"{escape(column)}</text>"
        )
    every = 1 if side > 10 and len(rows) <= 16 else 5
    for line, row in enumerate(rows):
        y = top + line * side
        if line % every == 0:
            parts.append(text(left - 5, y + side - 3, row, "end"))
        for index, column in enumerate(columns):
            value = values.get((row, column))
            box = (
                f'x="{left + index * width:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                f'height="{side - 1}"'
            )
            if value is None:
                parts.append(f'<rect class="none" {box}/>')
                continue
            share = _share(max(value, low), low, high, True) if high > low else 0.5
            hint = f"<title>layer {escape(row)} {escape(column)}: {number(value)}</title>"
            style = f'class="cell" style="fill-opacity:{0.08 + 0.92 * share:.3f}"'
            parts.append(f"<rect {style} {box}>{hint}</rect>")
    y = top + len(rows) * side + 14
    for step in range(24):
        x = left + step * 5
        opacity = 0.08 + 0.92 * step / 23
        parts.append(
            f'<rect class="cell" style="fill-opacity:{opacity:.3f}" x="{x}" y="{y}" width="5" '
            'height="9"/>'
        )
    parts.append(text(left, y + 22, number(low)))
    parts.append(text(left + 120, y + 22, number(high), "end"))
    parts.append(text(left + 130, y + 9, what, kind="label"))
    return svg(name, f"{what} per layer and kind of Linear", y + 28, parts)


def histogram(
    name: str,
    edges: Sequence[float],
    counts: Sequence[float],
    grid: Sequence[float],
    x_label: str,
) -> str:
    """Bars on a logarithmic scale, with a line at every value of the grid (a band if many)."""
    largest = max(*counts, 1.0)
    axes = Axes((edges[0], edges[-1]), (0.8, largest), log_y=True, height=210)
    parts = axes.frame(x_label, "values")
    bottom = axes.height - BOTTOM
    inside = [value for value in grid if edges[0] <= value <= edges[-1]]
    gap = min((axes.x(b) - axes.x(a) for a, b in pairwise(inside)), default=0.0)
    if inside and gap < 1.2:
        parts.append(
            f'<rect class="grid-band" x="{axes.x(inside[0]):.1f}" y="{TOP}" '
            f'width="{axes.x(inside[-1]) - axes.x(inside[0]):.1f}" height="{bottom - TOP}"/>'
        )
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count > 0:
            x, y = axes.x(low), axes.y(max(count, 0.8))
            parts.append(
                f'<rect class="bar" x="{x:.2f}" y="{y:.1f}" '
                f'width="{max(axes.x(high) - x - 0.3, 0.5):.2f}" height="{bottom - y:.1f}"/>'
            )
    if gap >= 1.2 or len(inside) == 1:
        for value in inside:
            x = axes.x(value)
            parts.append(
                f'<line class="grid-line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom + 4}">'
                f"<title>grid value {number(value)}</title></line>"
            )
    return svg(name, f"histogram of {x_label}", axes.height, parts)


def lines(
    name: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
) -> str:
    """One line per series, at most six in different colours, with a legend."""
    points = [p for _, line in series for p in line]
    if log_y:
        positive = [p[1] for p in points if p[1] > 0] or [1.0]
        span = (min(positive) / 1.2, max(positive) * 1.2)
    else:
        span = (0.0, _span(p[1] for p in points)[1])
    axes = Axes(_span(p[0] for p in points), span, log_y=log_y)
    legend = 14 * math.ceil(len(series) / 2) if len(series) > 1 else 0
    parts = axes.frame(x_label, y_label)
    for index, (label, line) in enumerate(series):
        shown = [(a, b) for a, b in line if b > 0 or not log_y]
        path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in shown)
        hue = f"line hue-{index % 6}"
        parts.append(
            f'<polyline class="{hue}" points="{path}"><title>{escape(label)}</title></polyline>'
        )
        if len(line) == 1:
            a, b = line[0]
            parts.append(f'<circle class="{hue}" cx="{axes.x(a):.1f}" cy="{axes.y(b):.1f}" r="3"/>')
        if legend:
            x = LEFT + (index % 2) * 155
            y = axes.height + 12 + 14 * (index // 2)
            parts.append(f'<line class="{hue}" x1="{x}" x2="{x + 14}" y1="{y - 4}" y2="{y - 4}"/>')
            parts.append(text(x + 18, y, label))
    return svg(name, f"{y_label} by {x_label}", axes.height + legend + 4, parts)


def bars(name: str, values: Sequence[tuple[str, float]], x_label: str, y_label: str) -> str:
    """A bar for each value, in order."""
    axes = Axes((0, len(values)), (0.0, max(v for _, v in values) or 1.0), height=200)
    bottom = axes.height - BOTTOM
    parts = axes.frame(x_label, y_label)
    for index, (label, value) in enumerate(values):
        x, y = axes.x(index), axes.y(value)
        hint = f"<title>{escape(label)}: {number(value)}</title>"
        width = max(axes.x(index + 1) - x - 1, 0.5)
        box = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{bottom - y:.1f}"'
        parts.append(f'<rect class="bar" {box}>{hint}</rect>')
    return svg(name, f"{y_label} by {x_label}", axes.height, parts)


def number(value: float) -> str:
    """A short form: three significant digits, thousands as k, M, G."""
    size = abs(value)
    if size >= 1e4:
        for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= limit:
                return f"{value / limit:.3g}{letter}"
    if size != 0 and size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}"


def ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round values between two limits."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        every = max(1, math.ceil((last - first + 1) / most))
        found = [10.0**power for power in range(first, last + 1, every)]
        if len(found) > 2:
            return found
        many = [m * 10.0**power for power in range(first - 1, last + 2) for m in (1, 2, 5)]
        finer = [value for value in many if low * 0.999 <= value <= high * 1.001]
        return finer if len(finer) > 1 else [low, high]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _span(values: Iterable[float]) -> tuple[float, float]:
    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = (high - low) * 0.08
    return low - margin, high + margin


def _widened(limits: tuple[float, float], log: bool) -> tuple[float, float]:
    low, high = limits
    if log:
        low = max(low, 1e-12)
        return (low, high) if high > low * 1.01 else (low / 2, low * 2)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.1, low + (abs(low) or 1) * 0.1)
