"""The three figures of docs/fast.md, from experiments/results/fast_factors.json.

python -m experiments.pages.fast_figures
"""

import sys

import numpy as np

from experiments.pages import fast_page
from experiments.pages.fast_page import (
    BOTH,
    COMPARED,
    MSE_ST,
    MSE_ST_CLEAN,
    MSE_ST_ORDINARY,
    NORMALISED,
    PAPERS,
    STEP_NAMES,
    Run,
)
from experiments.shared.fast_measures import ATTENTION, ON
from experiments.shared.provenance import RESULTS, write_figure

COLOURS = {"alone": "#2a6fbb", "apart": "#5aa36f", "whole": "#d98a29"}
STEP_COLOURS = ("#5aa36f", "#d98a29", "#8d6cab", "#8a8a8a")
MARKS = {(0, 0): "o", (0, 1): "s", (1, 0): "^", (1, 1): "D"}  # (openings, sinks) kept
MARK_NAMES = {
    (0, 0): "openings and sinks dropped",
    (0, 1): "sinks kept",
    (1, 0): "openings kept",
    (1, 1): "both kept",
}
GAP_ROWS = (
    (PAPERS, MSE_ST, "alone"),
    (PAPERS, MSE_ST_CLEAN, "alone"),
    (PAPERS, NORMALISED, "alone"),
    (PAPERS, NORMALISED, "whole"),
    (BOTH, MSE_ST_ORDINARY, "alone"),
    (BOTH, NORMALISED, "alone"),
    (BOTH, NORMALISED, "whole"),
)
PART_COLOURS = ("#2a6fbb", "#d98a29", "#5aa36f", "#8d6cab", "#c8553d", "#b8860b", "#8a8a8a")


def main() -> int:
    """Draw them; 1 where there is no result yet."""
    runs = fast_page.read()
    if runs is None:
        print("error: experiments/results/fast_factors.json is not there yet. run the study first.")
        return 1
    found = fast_page.main_runs(runs)
    for name, draw in (("cells", draw_cells), ("gaps", draw_gaps), ("shares", draw_shares)):
        write_figure(RESULTS / f"fast_{name}.png", draw(found))
    return 0


def figure_of(found: dict[str, Run], height: float):
    """(figure, an axis for each dataset)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(found), height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, len(found)))


def draw_cells(found: dict[str, Run]):
    """Every cell of the middle layer: its error on dialogues alone against that in blocks."""
    figure, axes = figure_of(found, 4.6)
    for axis, (name, run) in zip(axes, found.items()):
        layers = run["settings"]["LAYERS"]
        middle = layers[len(layers) // 2]
        for cell in run["cells"]:
            if cell["layer"] != middle or cell["source"] not in ATTENTION:
                continue
            errors = cell["measures"][NORMALISED]
            x, y = (2 ** errors[on]["value"] for on in ON)
            spread = [
                np.abs(2 ** np.array(errors[on]["interval"]) - 2 ** errors[on]["value"])[:, None]
                for on in ON
            ]
            axis.errorbar(
                x,
                y,
                spread[1],
                spread[0],
                fmt=MARKS[cell["openings"], cell["sinks"]],
                color=COLOURS[cell["source"]],
                ecolor="#cccccc",
                elinewidth=0.6,
                markersize=7,
            )
        axis.set_title(f"{name}, layer {middle}", fontsize=10)
        axis.set_xlabel("normalised MSE of held-out dialogues read alone")
        axis.set_ylabel("in whole blocks")
        axis.grid(alpha=0.3)
    for source, colour in COLOURS.items():
        axes[0].plot([], [], "o", color=colour, label=f"trained {source}")
    for key, mark in MARKS.items():
        axes[0].plot([], [], mark, color="#444444", label=MARK_NAMES[key])
    axes[0].legend(fontsize=7)
    return figure


def draw_gaps(found: dict[str, Run]):
    """The gap of each measure as a row of steps, on dialogues alone and in blocks."""
    figure, axes = figure_of(found, 4.2)
    for axis, (name, run) in zip(axes, found.items()):
        for place, (gap_name, measure, on) in enumerate(reversed(GAP_ROWS)):
            gap = fast_page.gap_of(run, fast_page.mean_layer(run), measure, gap_name, on)
            assert gap is not None  # of every run
            ends = {1: 0.0, -1: 0.0}
            for step in gap["steps"]:
                side = 1 if step["value"] > 0 else -1
                colour = STEP_COLOURS[list(STEP_NAMES).index((step["factor"], step["from"]))]
                axis.barh(place, step["value"], left=ends[side], color=colour, height=0.6)
                ends[side] += step["value"]
            low, high = gap["total"]["interval"]
            axis.plot([low, high], [place, place], color="black", lw=1)
            axis.plot(gap["total"]["value"], place, "|", color="black", markersize=12)
        axis.set_yticks(
            range(len(GAP_ROWS)), [row_name(*r) for r in reversed(GAP_ROWS)], fontsize=7
        )
        axis.axvline(0, color="black", lw=0.6)
        axis.set_title(f"{name}: log2 of BT(F) / FAST", fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    for label, colour in zip(STEP_NAMES.values(), STEP_COLOURS):
        axes[-1].barh(0, 0, color=colour, label=label)
    axes[-1].legend(fontsize=7, loc="lower right")
    return figure


def row_name(gap: str, measure: str, on: str) -> str:
    """What a row of the gaps is called."""
    kept = {PAPERS: "all kept", BOTH: "FAST: dropped, BT(F): kept"}[gap]
    tokens = "" if measure == MSE_ST else f" ({fast_page.short(measure).partition(', ')[2]})"
    read = {"alone": "alone", "whole": "in blocks"}[on]
    return f"{measure.partition(',')[0]}{tokens}\n{kept}; {read}"


def draw_shares(found: dict[str, Run]):
    """What the largest factors and interactions have of the sum of squares."""
    figure, axes = figure_of(found, 3.2)
    for axis, (name, run) in zip(axes, found.items()):
        columns = [
            (measure, {tuple(p["factors"]): p["share"] for p in row["shares"]})
            for measure in COMPARED
            for row in run["shares"]
            if (row["measure"], row["layer"]) == (measure, fast_page.mean_layer(run))
        ]
        keys = sorted(columns[0][1], key=lambda key: -sum(c[key] for _, c in columns))
        shown = keys[: len(PART_COLOURS) - 1]
        for place, (_, parts) in enumerate(columns):
            left = 0.0
            for key, colour in zip(shown, PART_COLOURS):
                axis.barh(place, parts[key], left=left, color=colour, height=0.6)
                left += parts[key]
            axis.barh(place, 1 - left, left=left, color=PART_COLOURS[-1], height=0.6)
        for key, colour in zip([*shown, ("all others",)], PART_COLOURS):
            axis.barh(0, 0, color=colour, label=" with ".join(key))
        names = [fast_page.short(measure).replace(", ", ",\n") for measure, _ in columns]
        axis.set_yticks(range(len(columns)), names, fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_title(f"{name}: share of the sum of squares", fontsize=10)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return figure


if __name__ == "__main__":
    sys.exit(main())
