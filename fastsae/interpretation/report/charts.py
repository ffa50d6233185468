"""Small inline SVG charts for the report's run page, coloured by its style sheet. Texts in them are
escaped."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 170, 40, 22


def chart(title: str, note: str, body: Sequence[str]) -> dict[str, Any]:
    """{title, note, svg} of SVG elements."""
    return {
        "title": title,
        "note": note,
        "svg": Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, HEIGHT + BOTTOM, title, Markup("".join(body))
        ),
    }


def text(x: float, y: float, content: object, anchor: str = "middle", key: bool = False) -> str:
    """An SVG text at (x, y), escaped; key: in the colour of figures."""
    kind = ' class="key"' if key else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    """An SVG line of the style sheet's class `kind`."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


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
) -> dict[str, Any]:
    """One bar per count; `labels` under them (None = no label), `shown` above them; numbers in
    `cool` take the second colour.

    `outline`: other counts to compare with, drawn as dashed steps.
    """
    top, step = max([*counts, *outline, 1e-12]), (WIDTH - LEFT) / len(counts)
    body = [line(LEFT, HEIGHT, WIDTH, HEIGHT), text(LEFT - 6, 18, compact(top), "end")]
    for i, count in enumerate(counts):
        x, height = LEFT + i * step, (HEIGHT - 20) * count / top
        height = max(height, 1.5) if count else 0
        kind = "bar cool" if i in cool else "bar"
        body.append(
            f'<rect class="{kind}" x="{x + step * 0.08:.1f}" y="{HEIGHT - height:.1f}" '
            f'width="{step * 0.84:.1f}" height="{height:.1f}" rx="1.5"/>'
        )
        if labels[i] is not None:
            body.append(text(x + step / 2, HEIGHT + 15, labels[i]))
        if shown and count:
            body.append(text(x + step / 2, HEIGHT - height - 5, shown[i], key=True))
    if len(outline):
        heights = [HEIGHT - (HEIGHT - 20) * count / top for count in outline]
        points = " ".join(
            f"{LEFT + (i + side) * step:.1f},{y:.1f}"
            for i, y in enumerate(heights)
            for side in (0, 1)
        )
        body.append(f'<polyline class="guide" fill="none" points="{points}"/>')
    return chart(title, note, body)


def log_bars(
    title: str, note: str, values: Any, *, guide: float | None = None, guide_name: str = ""
) -> dict[str, Any] | None:
    """A histogram of positive values on a logarithmic axis; `guide` is a value marked by a dashed
    line, bars beyond it stand out."""
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
    result = bars(
        title,
        note,
        heights.tolist(),
        labels,
        cool={i for i in range(40) if guide and edges[i] >= guide},
    )
    result["svg"] = Markup(
        str(result["svg"]).replace(
            f">{compact(heights.max())}</text>", f">{compact(int(counts.max()))}</text>", 1
        )
    )
    if guide and low <= math.log10(guide) <= high:
        x = LEFT + (WIDTH - LEFT) * (math.log10(guide) - low) / (high - low)
        extra = line(x, 14, x, HEIGHT, "guide") + text(x - 4, 12, guide_name, "end")
        result["svg"] = Markup(str(result["svg"]).replace("</svg>", extra + "</svg>"))
    return result


def curves(title: str, note: str, series: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Any]:
    """Lines over epochs: series [(name, [values])], the first two coloured; y begins at 0."""
    n = max(len(values) for _, values in series)
    top = max(max(values) for _, values in series) * 1.05
    body = [
        line(LEFT, HEIGHT, WIDTH, HEIGHT),
        text(LEFT, HEIGHT + 15, "1"),
        text(WIDTH, HEIGHT + 15, f"epoch {n}", "end"),
    ]
    for part in (0.5, 1):
        y = HEIGHT - (HEIGHT - 20) * part
        body += [line(LEFT, y, WIDTH, y), text(LEFT - 6, y + 4, compact(top * part), "end")]
    for i, (name, values) in enumerate(series):
        points = [
            (LEFT + (WIDTH - LEFT) * j / max(n - 1, 1), HEIGHT - (HEIGHT - 20) * v / top)
            for j, v in enumerate(values)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline class="line{" second" if i else ""}" points="{path}"/>')
        x, y = points[-1]
        highest = values[-1] >= max(other[-1] for _, other in series)
        body.append(
            text(x, y - 8 if highest else y + 16, f"{name} {compact(values[-1])}", "end", key=True)
        )
    return chart(title, note, body)
