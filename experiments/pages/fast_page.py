"""The figures and sentences of docs/fast.md, from experiments/results/fast_factors.json.

A sentence's verdict follows from intervals by a rule that stands with it, so a new result changes
the page.
"""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from experiments.pages.studies_page import CLEAR_GAIN
from experiments.shared.fast_measures import GAPS, KEPT, MEASURES, ON
from experiments.shared.provenance import RESULTS

NORMALISED, MSE, ORDINARY, MSE_ST, MSE_ST_CLEAN, MSE_ST_ORDINARY = MEASURES
PAPERS, OURS, BOTH = (name for name, *_ in GAPS)
# what is said of each gap; autoencoders that saw no openings or sinks are compared without them
SHOWN = {
    PAPERS: (MSE_ST, MSE_ST_CLEAN, MSE, NORMALISED),
    OURS: (MSE_ST_ORDINARY, NORMALISED),
    BOTH: (MSE_ST_ORDINARY, NORMALISED),
}
GAP_NAMES = {
    PAPERS: "as the paper trains both",
    OURS: "as this project trains both",
    BOTH: "this project's FAST, the paper's BT(F)",
}
STEP_NAMES = {
    ("attention", "alone"): "cut at block ends",
    ("attention", "apart"): "seeing other dialogues",
    ("openings", "dropped"): "openings",
    ("sinks", "dropped"): "sinks",
}
COMPARED = (NORMALISED, MSE_ST_ORDINARY, MSE_ST)  # over all cells
LEAST_SHARE = 0.01  # of the sum of squares; smaller ones are added up
Run = dict[str, Any]
Rows = list[list[str]]


def read() -> dict[str, Run] | None:
    """{title: entry} of the study's result; None before there is one."""
    path = RESULTS / "fast_factors.json"
    return json.loads(path.read_text("utf-8"))["runs"] if path.exists() else None


def block(make: Callable[[dict[str, Run]], str]) -> str:
    """What `make` writes from the result, or that there is none yet, of topk."""
    runs = read()
    return make(runs) if runs and main_runs(runs) else "Not measured yet."


def main_runs(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs of the smallest topk autoencoders, one for each dataset, by the dataset's name."""
    found: dict[str, Run] = {}
    for run in sorted(runs.values(), key=lambda run: run["settings"]["M"]):
        if run["settings"]["ARCHITECTURE"] == "topk":
            found.setdefault(name_of(run), run)
    return dict(sorted(found.items()))


def name_of(run: Run) -> str:
    """The dataset of a run, as tables call it."""
    return run["settings"]["DATASET_PATH"].split("/")[-1].rpartition(".")[0].partition("_")[0]


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, and 0 without."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def with_interval(figure: dict[str, Any], digits: int = 2) -> str:
    """A difference with its 95 % interval."""
    low, high = figure["interval"]
    return f"{signed(figure['value'], digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(head)} |"]
    lines.append("|" + "---|" * (lines[0].count(" | ") + 1))
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def gap_of(run: Run, layer: Any, measure: str, gap: str, on: str) -> dict[str, Any] | None:
    """A gap of a run, None where the layer is not there."""
    wanted = {"layer": layer, "measure": measure, "gap": gap, "measured on": on}
    return next((g for g in run["gaps"] if wanted.items() <= g.items()), None)


def mean_layer(run: Run) -> Any:
    """What a run calls the mean of its layers: of one layer that layer."""
    layers = run["settings"]["LAYERS"]
    return "mean" if len(layers) > 1 else layers[0]


def is_above(figure: dict[str, Any]) -> bool:
    """Whether an interval is above 0."""
    return min(figure["interval"]) > 0


def is_below(figure: dict[str, Any]) -> bool:
    """Whether an interval is below 0."""
    return max(figure["interval"]) < 0


def answer(runs: dict[str, Run]) -> str:
    """What the gap is made of, in a few sentences for each set of dialogues."""
    parts = []
    for name, run in main_runs(runs).items():
        layer = mean_layer(run)
        st, clean, own, blocks = (
            gap_of(run, layer, *key)
            for key in (
                (MSE_ST, PAPERS, "alone"),
                (MSE_ST_CLEAN, PAPERS, "alone"),
                (NORMALISED, BOTH, "alone"),
                (NORMALISED, BOTH, "whole"),
            )
        )
        if not (st and clean and own and blocks):
            continue
        steps = ", ".join(
            f"{STEP_NAMES[s['factor'], s['from']]} {with_interval(s, 3)}" for s in own["steps"]
        )
        parts.append(
            f"- **{name}**, {in_layers(run)}: trained as in the paper, BT(F)'s MSE_st is "
            f"{2 ** st['total']['value']:.2g} times FAST's (log2 {with_interval(st['total'])}), "
            f"without sinks {2 ** clean['total']['value']:.2g} times (log2 "
            f"{with_interval(clean['total'])}). On ordinary tokens the normalised MSE of the "
            f"paper's BT(F) is {times(own)} that of this project's FAST (log2 "
            f"{with_interval(own['total'], 3)}): {steps}. Where the held-out dialogues are in "
            f"blocks too, it is {times(blocks)} (log2 {with_interval(blocks['total'], 3)})."
        )
    return "\n".join(parts)


def in_layers(run: Run) -> str:
    """The layers that a mean is over."""
    layers = run["settings"]["LAYERS"]
    named = ", ".join(map(str, layers))
    return f"mean of layers {named}" if len(layers) > 1 else f"layer {named}"


def times(gap: dict[str, Any]) -> str:
    """A gap in log2 as a ratio."""
    return f"{2 ** gap['total']['value']:.3f} times"


def setup(runs: dict[str, Run]) -> str:
    """What was trained and measured, run by run."""
    rows = []
    for title, run in runs.items():
        s, layer = run["settings"], str(run["settings"]["LAYERS"][0])
        held_out = run["data"][layer]["held out, alone"]
        n = len(s["LAYERS"]) * len(s["SEEDS"]) * 16
        rows.append(
            [
                title,
                ", ".join(map(str, s["LAYERS"])),
                f"{len(s['SEEDS'])}",
                f"{n}",
                f"{run['train_tokens']:,} x {s['N_EPOCHS']}",
                f"{held_out['dialogues']} ({held_out['tokens']:,})",
                f"{run['cpu_minutes']:.0f}",
                f"`{run['commit']}`",
            ]
        )
    head = ["dialogues, autoencoder", "layers", "seeds", "autoencoders"]
    head += ["training tokens x epochs", "held-out dialogues (tokens)", "CPU minutes", "commit"]
    return table(head, rows)


def cells(runs: dict[str, Run]) -> str:
    """The errors of all cells of the middle layer of the main runs."""
    parts = []
    for name, run in main_runs(runs).items():
        layers = run["settings"]["LAYERS"]
        layer = layers[len(layers) // 2]
        rows = []
        for cell in run["cells"]:
            if cell["layer"] != layer:
                continue
            measures = cell["measures"]
            rows.append(
                [
                    cell["source"],
                    KEPT[cell["openings"]]
                    if cell["source"] in ("alone", "apart", "whole")
                    else "-",
                    KEPT[cell["sinks"]],
                    *(f"{2 ** measures[NORMALISED][on]['value']:.3f}" for on in ("alone", "whole")),
                    *(f"{signed(measures[m]['alone']['value'])}" for m in (MSE, MSE_ST)),
                    f"{100 * cell['template_share']:.0f} %",
                ]
            )
        head = ["read in training", "openings", "sinks", "normalised MSE, alone", "in blocks"]
        head += ["log2 MSE", "log2 MSE_st", "features of the template"]
        parts += [f"{name}, layer {layer}:", "", table(head, rows), ""]
    return "\n".join(parts).rstrip()


def gaps(runs: dict[str, Run]) -> str:
    """Each gap and its steps, means over the layers."""
    rows: Rows = []
    for name, run in main_runs(runs).items():
        layer = mean_layer(run)
        for gap, measures in SHOWN.items():
            for measure in measures:
                found = gap_of(run, layer, measure, gap, "alone")
                if found is None:
                    continue
                steps = {(s["factor"], s["from"]): s for s in found["steps"]}
                rows.append(
                    [
                        f"{name}: {GAP_NAMES[gap]}",
                        short(measure),
                        with_interval(found["total"]),
                        *(with_interval(steps[key]) if key in steps else "-" for key in STEP_NAMES),
                    ]
                )
    return table(["gap BT(F) - FAST", "log2 of", "all of it", *STEP_NAMES.values()], rows)


def short(measure: str) -> str:
    """A measure's name in a table."""
    return measure.replace("without openings and sinks", "ordinary tokens")


def shares(runs: dict[str, Run]) -> str:
    """What factors and their interactions have of the sum of squares, means over the layers."""
    found: dict[str, dict[tuple, dict[str, Any]]] = {}
    for name, run in main_runs(runs).items():
        for row in run["shares"]:
            if row["layer"] == mean_layer(run) and row["measure"] in COMPARED:
                column = f"{name}: {short(row['measure'])}"
                found[column] = {tuple(part["factors"]): part for part in row["shares"]}
    keys = sorted(
        {key for column in found.values() for key in column},
        key=lambda key: -sum(column[key]["share"] for column in found.values()),
    )
    shown = [k for k in keys if any(c[k]["share"] >= LEAST_SHARE for c in found.values())]
    rows = []
    for key in shown:
        values = (column[key] for column in found.values())
        cells_of = [
            f"{100 * v['share']:.0f} [{100 * v['interval'][0]:.0f}, {100 * v['interval'][1]:.0f}]"
            for v in values
        ]
        rows.append([" with ".join(key), *cells_of])
    rest = [sum(c[k]["share"] for k in c if k not in shown) for c in found.values()]
    rows.append(["all others", *(f"{100 * value:.1f}" for value in rest)])
    return table(["per cent of the sum of squares", *found], rows)


def features(runs: dict[str, Run]) -> str:
    """The evidence on features: FAST's values, and by how much block training's are above those of
    FAST with the same tokens kept."""
    names = {
        "rule_f1": "rule F1",
        "detection_auc": "five-shot AUC",
        "probing_1": "probing, 1 feature",
        "probing_16": "probing, 16",
        "loss_recovered": "loss recovered",
    }
    shown = [
        ("alone", 0, 0, "FAST, openings and sinks dropped"),
        ("alone", 1, 1, "FAST, all kept"),
        ("whole", 0, 0, "BT(F), openings and sinks dropped"),
        ("whole", 1, 1, "BT(F), all kept"),
        ("own text", 1, 0, "BT(P), the dialogues' own text"),
        ("manual", 1, 0, "BT(P), Python's manual"),
    ]
    rows = []
    for name, run in main_runs(runs).items():
        by_cell = {(f["source"], f["openings"], f["sinks"]): f for f in run["features"]}
        for source, openings, sinks, title in shown:
            row = by_cell.get((source, openings, sinks))
            if row is None:
                continue
            values = []
            for figure in names:
                if row[figure] is None:
                    values.append("-")
                elif source == "alone":
                    values.append(f"{row[figure]['value']:.3f}")
                else:
                    values.append(above_fast(row[f"{figure}_above_fast"]))
            rows.append([f"{name}: {title}", *values])
    return table(["", *names.values()], rows) if rows else "Not measured yet."


def above_fast(figure: dict[str, Any] | None) -> str:
    """A difference to FAST, with its interval where there are several seeds."""
    if figure is None:
        return "-"
    if figure["interval"] is None:
        return signed(figure["value"], 3)
    return with_interval(figure, 3)


# The paper's sentences

SURVIVES, FAILS, UNCLEAR = "survives", "does not", "cannot tell"


class Claim(NamedTuple):
    """A sentence of the paper and what is left of it: in words, and in short."""

    sentence: str
    verdict: str
    here: str
    short: str


def all_claims(runs: dict[str, Run]) -> list[Claim]:
    """The sentences with their verdicts, each by the rule of its function."""
    found = main_runs(runs)
    claimed = [
        ordering(found, MSE_ST, "special tokens: FAST's MSE_st is below BT(F)'s"),
        ordering(found, MSE_ST_CLEAN, "the same without sinks"),
        ordering(found, MSE, "all tokens: FAST's MSE is below BT(F)'s"),
        ordering(found, ORDINARY, "the same without openings and sinks"),
        because_alone(found),
        plain_text(found),
        understood(found),
        steering(),
    ]
    return [claim for claim in claimed if claim]


def claims(runs: dict[str, Run]) -> str:
    """The table of docs/fast.md."""
    rows = ([c.sentence, c.verdict, c.here] for c in all_claims(runs))
    return table(["the paper says", "here", "because"], rows)


def summary(runs: dict[str, Run]) -> str:
    """The table of the README."""
    rows = ([c.sentence, c.verdict, c.short] for c in all_claims(runs))
    return table(["the paper says", "here", f"log2, {' / '.join(main_runs(runs))}"], rows)


def verdict(n_above: int, n_below: int, n: int) -> str:
    """survives: clearly so in every case; does not: more often clearly the other way than clearly
    so; else cannot tell."""
    if n and n_above == n:
        return SURVIVES
    return FAILS if n_below > n_above else UNCLEAR


def ordering(found: dict[str, Run], measure: str, sentence: str) -> Claim:
    """Whether BT(F)'s error is above FAST's, both trained as the paper trains them, on dialogues
    alone: in how many layers clearly."""
    totals = [
        gap["total"]
        for run in found.values()
        for layer in run["settings"]["LAYERS"]
        if (gap := gap_of(run, layer, measure, PAPERS, "alone"))
    ]
    above, below = sum(map(is_above, totals)), sum(map(is_below, totals))
    means = [
        gap["total"]
        for run in found.values()
        if (gap := gap_of(run, mean_layer(run), measure, PAPERS, "alone"))
    ]
    named = "; ".join(f"{name} {with_interval(mean)}" for name, mean in zip(found, means))
    said = f"clearly so in {above} of {len(totals)} cases, clearly not in {below}"
    short = " / ".join(signed(mean["value"]) for mean in means)
    return Claim(sentence, verdict(above, below, len(totals)), f"{said}; log2 {named}", short)


def because_alone(found: dict[str, Run]) -> Claim:
    """Whether the gap comes from reading each dialogue alone: then seeing other dialogues makes
    most of it, also where the held-out dialogues are in blocks. Ordinary tokens, mean over the
    layers, from this project's FAST to the paper's BT(F)."""
    parts, short, verdicts = [], [], []
    for name, run in found.items():
        gaps_here = [gap_of(run, mean_layer(run), NORMALISED, BOTH, on) for on in ON]
        if None in gaps_here:
            continue
        alone, whole = (gap for gap in gaps_here if gap)
        seeing, elsewhere = (step_of(gap, "attention", "apart") for gap in (alone, whole))
        most = is_above(seeing) and seeing["value"] > alone["total"]["value"] / 2
        if is_below(elsewhere) or (is_above(alone["total"]) and not most):
            verdicts.append(FAILS)
        else:
            verdicts.append(SURVIVES if most and is_above(elsewhere) else UNCLEAR)
        parts.append(
            f"{name}: seeing other dialogues is {with_interval(seeing, 3)} of "
            f"{with_interval(alone['total'], 3)} in log2 normalised MSE, and "
            f"{with_interval(elsewhere, 3)} of {with_interval(whole['total'], 3)} where the "
            "held-out dialogues are in blocks too"
        )
        short.append(f"{signed(seeing['value'])}, in blocks {signed(elsewhere['value'])}")
    same = verdicts[0] if len(set(verdicts)) == 1 else UNCLEAR
    sentence = "this comes from reading each dialogue alone"
    return Claim(sentence, same, "; ".join(parts), " / ".join(short))


def step_of(gap: dict[str, Any], factor: str, start: str) -> dict[str, Any]:
    """The step of a gap that a factor makes from a level."""
    return next(s for s in gap["steps"] if (s["factor"], s["from"]) == (factor, start))


def plain_text(found: dict[str, Run]) -> Claim:
    """Whether both texts' errors are above those of the dialogues' blocks; ordinary tokens, sinks
    dropped."""
    titles = {"manual": "Python's manual", "own text": "the dialogues' own text"}
    parts, every, short = [], [], []
    for text, title in titles.items():
        rows = [
            row
            for run in found.values()
            for row in run["texts"]
            if (row["text"], row["sinks"], row["measure"]) == (text, KEPT[0], NORMALISED)
        ]
        values = [row["value"] for row in rows]
        every += rows
        span = " to ".join(dict.fromkeys(signed(each(values)) for each in (min, max)))
        above, below = sum(map(is_above, rows)), sum(map(is_below, rows))
        parts.append(
            f"{title}: log2 normalised MSE {span}, clearly above in {above} of {len(rows)} cases, "
            f"below in {below}"
        )
        short.append(f"{title} {span}")
    said = verdict(sum(map(is_above, every)), sum(map(is_below, every)), len(every))
    return Claim("BT(P), plain text, is worse than BT(F)", said, "; ".join(parts), "; ".join(short))


def understood(found: dict[str, Run]) -> Claim:
    """Whether BT(F)'s features, openings and sinks kept in both, have clearly the lower rule F1 and
    detection AUC; an interval over so few seeds is wide."""
    parts, short, every = [], [], []
    for name, run in found.items():
        cells_of = {(f["source"], f["openings"], f["sinks"]): f for f in run["features"]}
        row = cells_of.get(("whole", 1, 1))
        if row is None:
            continue
        for figure, title in (("rule_f1", "rule F1"), ("detection_auc", "five-shot AUC")):
            difference = row[f"{figure}_above_fast"]
            if difference and difference["interval"]:
                every.append(difference)
                parts.append(f"{name} {title} {with_interval(difference, 3)}")
                short.append(f"{name} {title} {signed(difference['value'], 3)}")
    sentence = "FAST's features are easier to understand"
    if not every:
        few = any(run["features"] for run in found.values())
        why = "one seed only: no interval" if few else "not measured yet"
        return Claim(sentence, UNCLEAR, why, why)
    said = verdict(sum(map(is_below, every)), sum(map(is_above, every)), len(every))
    here = f"BT(F) - FAST: {'; '.join(parts)} (no language model judged them)"
    return Claim(sentence, said, here, "; ".join(short))


def steering() -> Claim | None:
    """Whether steering with the feature that is strongest on a special token answers more questions
    with the expected word than no steering and random directions of the same length."""
    path = RESULTS / "steer.json"
    if not path.exists():
        return None
    r = json.loads(path.read_text("utf-8"))

    def best(of_feature: bool) -> float:
        curves = [t["curves"] for t in r["targets"] if (t["feature"] is not None) == of_feature]
        words = [p["expected_word"] for c in curves for a, p in zip(r["alphas"], c) if a]
        return max((word for word in words if word is not None), default=0.0)

    feature = next(t for t in r["targets"] if t["feature"] is not None)
    others = [t["fluent_up_to_alpha"] or 0 for t in r["targets"] if t["feature"] is None]
    steered, by_chance, plain = best(True), best(False), r["unsteered"]["expected_word"]
    gain = (steered - max(by_chance, plain)) * r["n_with_expected_word"]
    fluent = feature["fluent_up_to_alpha"] or 0
    over_norm = fluent / r["mean_norm"]
    words = " / ".join(f"{100 * value:.0f}" for value in (steered, plain, by_chance))
    here = (
        f"answers stay fluent up to alpha {fluent:g}, {over_norm:.2f} of the stream's mean norm, "
        f"with random directions up to {' and '.join(f'{o:g}' for o in others)}; expected word "
        f"steered / not / random direction {words} % of {r['n_with_expected_word']}"
    )
    return Claim(
        "steering by alpha 25 to 100 is useful",
        SURVIVES if gain >= CLEAR_GAIN and fluent >= 25 else FAILS,
        here,
        f"fluent up to {over_norm:.2f} of the norm",
    )


BLOCKS: dict[str, Callable[[], str]] = {
    f"FAST_{make.__name__.upper()}": functools.partial(block, make)
    for make in (answer, setup, claims, summary, gaps, shares, cells, features)
}
