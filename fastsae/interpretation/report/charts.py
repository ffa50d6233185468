"""Small charts for the report's Run page: bars, bars on a logarithmic axis, and curves.

Here is where everything in a chart stands. `charts.svg.j2` writes it as inline SVG, which the
report's style sheet colours.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

# of a chart in SVG units: the plot, the room at its left for figures and below it for labels
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 170, 40, 22
TOP = 20  # room above the highest value


@dataclass(frozen=True)
class Text:
    """A text at (x, y); `anchor` is start, middle or end; key: in the colour of figures."""

    x: float
    y: float
    content: object
    anchor: str = "middle"
    key: bool = False
    tag: ClassVar[str] = "text"


@dataclass(frozen=True)
class Line:
    """A straight line of the style sheet's class `kind`: axis or guide."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = "axis"
    tag: ClassVar[str] = "line"


@dataclass(frozen=True)
class Bar:
    """A bar with (x, y) at its upper left; cool: in the second colour."""

    x: float
    y: float
    width: float
    height: float
    cool: bool = False
    tag: ClassVar[str] = "rect"


@dataclass(frozen=True)
class Path:
    """A line through `points` [(x, y)], of the class `kind`: line, line second, or guide."""

    points: Sequence[tuple[float, float]]
    kind: str = "line"
    tag: ClassVar[str] = "polyline"


Mark = Text | Line | Bar | Path


@dataclass(frozen=True)
class Chart:
    """What the Run page shows as one figure: `marks` in the order in which they are drawn."""

    title: str
    note: str  # what is counted, in a sentence
    marks: Sequence[Mark]
    width: int = WIDTH
    height: int = HEIGHT + BOTTOM


def compact(value: float) -> str:
    """A number in few characters: 1,200 -> 1.2k, 0.01234 -> 0.012."""
    if value and abs(value) >= 1000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{letter}"
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.3g}"


def bars(
    title: str,
    note: str,
    counts: Sequence[float],
    labels: Sequence[str | None],
    *,
    shown: Sequence[str] | None = None,
    cool: Collection[int] = (),
    outline: Sequence[float] = (),
) -> Chart:
    """One bar per count; `labels` under them (None = no label), `shown` above them; numbers in
    `cool` take the second colour.

    `outline`: other counts to compare with, drawn as dashed steps.
    """
    top = max([*counts, *outline, 1e-12])
    marks = _bar_marks(counts, labels, top, compact(top), shown=shown, cool=cool)
    if len(outline):
        step = (WIDTH - LEFT) / len(counts)
        steps = [
            (LEFT + (i + side) * step, _y(count, top))
            for i, count in enumerate(outline)
            for side in (0, 1)
        ]
        marks.append(Path(steps, "guide"))
    return Chart(title, note, marks)


def log_bars(
    title: str, note: str, values: Any, *, guide: float | None = None, guide_name: str = ""
) -> Chart | None:
    """A histogram of positive values on a logarithmic axis; `guide` is a value marked by a dashed
    line, bars beyond it stand out. None without positive values."""
    import numpy as np

    values = np.asarray(values, float)
    values = values[values > 0]
    if not len(values):
        return None
    low = math.floor(4 * math.log10(values.min())) / 4
    high = math.ceil(4 * math.log10(values.max()) + 1e-9) / 4
    high = max(high, low + 0.25)
    edges = np.logspace(low, high, 41)
    counts = np.histogram(values, edges)[0]
    labels: list[str | None] = [None] * len(counts)
    for power in range(math.ceil(low), math.floor(high) + 1):
        labels[min(int((power - low) / (high - low) * 40), 39)] = compact(10.0**power)
    if sum(label is not None for label in labels) < 2:
        labels[0], labels[-1] = compact(10**low), compact(10**high)
    # a root keeps the few attention sinks visible beside many thousand others
    heights = np.sqrt(counts)
    marks = _bar_marks(
        heights.tolist(),
        labels,
        float(heights.max()),
        compact(int(counts.max())),
        cool={i for i in range(40) if guide and edges[i] >= guide},
    )
    if guide and low <= math.log10(guide) <= high:
        x = LEFT + (WIDTH - LEFT) * (math.log10(guide) - low) / (high - low)
        marks += [Line(x, 14, x, HEIGHT, "guide"), Text(x - 4, 12, guide_name, "end")]
    return Chart(title, note, marks)


def curves(title: str, note: str, series: Sequence[tuple[str, Sequence[float]]]) -> Chart:
    """Lines over epochs: series [(name, [values])], the first two coloured; y begins at 0."""
    n = max(len(values) for _, values in series)
    top = max(max(values) for _, values in series) * 1.05
    marks: list[Mark] = [
        Line(LEFT, HEIGHT, WIDTH, HEIGHT),
        Text(LEFT, HEIGHT + 15, "1"),
        Text(WIDTH, HEIGHT + 15, f"epoch {n}", "end"),
    ]
    for part in (0.5, 1):
        y = _y(part, 1)
        marks += [Line(LEFT, y, WIDTH, y), Text(LEFT - 6, y + 4, compact(top * part), "end")]
    for i, (name, values) in enumerate(series):
        points = [
            (LEFT + (WIDTH - LEFT) * j / max(n - 1, 1), _y(value, top))
            for j, value in enumerate(values)
        ]
        marks.append(Path(points, "line second" if i else "line"))
        x, y = points[-1]
        highest = values[-1] >= max(other[-1] for _, other in series)
        name_y = y - 8 if highest else y + 16
        marks.append(Text(x, name_y, f"{name} {compact(values[-1])}", "end", key=True))
    return Chart(title, note, marks)


ROW, THIN = 34, 9  # heights of a row of `intervals` and of its bar


def intervals(
    title: str,
    note: str,
    rows: Sequence[tuple[str, float, float, float]],
    *,
    start: float,
    end: float,
    cool: Collection[int] = (),
) -> Chart:
    """A lying bar for each (name, value, low, high) from `start`, which ends at the value, with a
    line from low to high; the axis reaches to `end`. Rows in `cool` take the second colour."""

    def x(value: float) -> float:
        inside = min(max(value, start), end)
        return (WIDTH - 2) * (inside - start) / (end - start)

    marks: list[Mark] = []
    for i, (name, value, low, high) in enumerate(rows):
        y = i * ROW + 14
        marks.append(Text(0, y, name, "start"))
        marks.append(Text(WIDTH - 2, y, f"{value:.2f}", "end", key=True))
        marks.append(Bar(0, y + 5, max(x(value), 1.5), THIN, i in cool))
        middle = y + 5 + THIN / 2
        marks.append(Line(x(low), middle, x(high), middle, "guide"))
    bottom = len(rows) * ROW + 4
    marks += [
        Line(0, bottom, WIDTH - 2, bottom),
        Text(0, bottom + 15, compact(start), "start"),
        Text(WIDTH - 2, bottom + 15, compact(end), "end"),
    ]
    return Chart(title, note, marks, height=bottom + BOTTOM)


def _y(value: float, top: float) -> float:
    """The height at which `value` stands, where `top` is the highest value of the plot."""
    return HEIGHT - (HEIGHT - TOP) * value / top


def _bar_marks(
    counts: Sequence[float],
    labels: Sequence[str | None],
    top: float,
    top_name: str,
    *,
    shown: Sequence[str] | None = None,
    cool: Collection[int] = (),
) -> list[Mark]:
    """An axis, `top_name` at the height of `top`, and the bars with what stands under and above
    them."""
    step = (WIDTH - LEFT) / len(counts)
    marks: list[Mark] = [Line(LEFT, HEIGHT, WIDTH, HEIGHT), Text(LEFT - 6, 18, top_name, "end")]
    for i, count in enumerate(counts):
        x = LEFT + i * step
        # a count that is not 0 is seen, however small
        height = max((HEIGHT - TOP) * count / top, 1.5) if count else 0
        marks.append(Bar(x + step * 0.08, HEIGHT - height, step * 0.84, height, i in cool))
        if labels[i] is not None:
            marks.append(Text(x + step / 2, HEIGHT + 15, labels[i]))
        if shown and count:
            marks.append(Text(x + step / 2, HEIGHT - height - 5, shown[i], key=True))
    return marks
