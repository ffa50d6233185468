"""The tables of docs/measured.md and docs/training.md on how autoencoders are best trained, from
the results of studies/objectives.py and studies/sparsity.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.shared.objective_steps import DEFAULT

# figures of a dataset: what a table calls them, and whether more is better
ON_DATA = {
    "normalized_mse": ("normalised MSE", False),
    "loss_recovered": ("loss recovered", True),
    "probe 1": ("AUC, 1 column", True),
    "probe 16": ("AUC, 16 columns", True),
    "stability": ("stability", True),
}
ON_PLANTED = {"mcc": ("MCC", True), "f1": ("F1", True), "absorbed": ("absorbed", False)}
DIGITS = 3


def objectives(r: Mapping[str, Any]) -> str:
    """Every objective beside the default: on the datasets, on planted tokens, and which won."""
    parts = [
        f"**Objectives** (`results/objectives.json`; M = 256, K = 8, {n_steps(r)}, 4 "
        "seeds; batchtopk's threshold set for exactly K, standard read off at an L0 of K): the "
        "mean, in brackets the change from the default's seed by seed with its 95 % interval. Loss "
        f"recovered is of {n_examples(r)} test examples, AUCs are of k-sparse probes on held-out "
        "halves, stability is the mean cosine of features matched with another seed's. Aligned, "
        "orthogonal, annealed K and temporal pairs alone are the default with that added.",
        "",
        *table(ON_DATA, {name: found["objectives"] for name, found in r["datasets"].items()}),
    ]
    if r["planted"]:
        kinds = {kind: rows for kind, rows in r["planted"].items() if kind != "settings"}
        parts += [
            "",
            "The same on planted tokens, whose 96 directions are known "
            f"({r['planted']['settings']['steps']:,} steps). Correlated: active together in "
            "groups of 6; hierarchical: children of a parent without which they are never active. "
            "MCC is the mean cosine of the best one-to-one matching, F1 is of where matched "
            "features fire; absorbed is by how much less often a parent's feature fires where a "
            "child is active.",
            "",
            *table(ON_PLANTED, kinds),
        ]
    parts += ["", verdict(r)]
    return "\n".join(parts)


def n_steps(r: Mapping[str, Any]) -> str:
    """How many steps all autoencoders of a dataset have."""
    counts = (
        f"{found['settings']['STEPS']:,} steps on {name}" for name, found in r["datasets"].items()
    )
    return " and ".join(counts)


def n_examples(r: Mapping[str, Any]) -> str:
    """How many examples loss recovered is of."""
    counts = {str(found["settings"]["N_LOSS_EXAMPLES"]) for found in r["datasets"].values()}
    return " or ".join(sorted(counts))


def table(
    figures: Mapping[str, tuple[str, bool]], groups: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The lines of a table with a row for each group and objective; a figure that no row of it has
    is left out."""
    figures = {
        name: about
        for name, about in figures.items()
        if any(name in row for rows in groups.values() for row in rows.values())
    }
    lines = ["| | | " + " | ".join(about[0] for about in figures.values()) + " |"]
    lines.append("|---|---|" + "---:|" * len(figures))
    for group, rows in groups.items():
        for name, row in rows.items():
            shown = [figure_text(row.get(figure)) for figure in figures]
            lines.append(f"| {group} | {name} | " + " | ".join(shown) + " |")
    return lines


def figure_text(figure: Mapping[str, Any] | None) -> str:
    """'0.361 (-0.004 ±0.002)' of a figure with its change; '' for none."""
    if figure is None:
        return ""
    text = f"{figure['mean']:.{DIGITS}f}"
    if figure.get("change_interval"):
        half = figure["change_interval"][1] - figure["change"]
        text += f" ({figure['change']:+.{DIGITS}f} ±{half:.{DIGITS}f})"
    return text


def outcome(figure: Mapping[str, Any] | None, more_is_better: bool) -> int:
    """1 if the interval of a change says better, -1 if worse, 0 if it holds 0."""
    if not figure or not figure.get("change_interval"):
        return 0
    low, high = figure["change_interval"]
    sign = (low > 0) - (high < 0)
    return sign if more_is_better else -sign


def outcomes(r: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """{objective: {"better": figures that are so wherever they were measured, "worse": those that
    are worse somewhere}}."""
    groups = [(ON_DATA, found["objectives"]) for found in r["datasets"].values()]
    groups += [(ON_PLANTED, r["planted"][kind]) for kind in r["planted"] if kind != "settings"]
    result = {}
    for name in dict.fromkeys(name for _, rows in groups for name in rows if name != DEFAULT):
        found: dict[str, list[int]] = {}
        for figures, rows in groups:
            for figure, (title, more) in figures.items():
                if figure in rows.get(name, {}):
                    found.setdefault(title, []).append(outcome(rows[name][figure], more))
        result[name] = {
            "better": [title for title, all_of in found.items() if min(all_of) > 0],
            "worse": [title for title, all_of in found.items() if min(all_of) < 0],
        }
    return result


def verdict(r: Mapping[str, Any]) -> str:
    """A sentence for each objective: what it is better at in every group, and worse in one."""
    said = []
    for name, found in outcomes(r).items():
        better = f"better wherever measured in {', '.join(found['better'])}"
        better = better if found["better"] else ""
        worse = f"worse somewhere in {', '.join(found['worse'])}" if found["worse"] else ""
        both = " and ".join(filter(None, (better, worse)))
        said.append(f"{name}: {both or 'no difference that can be told'}.")
    return "Beyond the intervals of the seeds: " + " ".join(said)


def sizes(r: Mapping[str, Any]) -> str:
    """Error, probes and dead features by tokens, M and K, and the K that is recommended."""
    lines = [
        "Measured (`experiments/results/sparsity.json`, layer 12 of the demo's model, "
        f"{steps(r)} steps each): normalised MSE of test examples, and the mean AUC with which 16 "
        "features tell a category of held-out examples.",
        "",
        "| data | tokens | M | K | normalised MSE | AUC | dead |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for dataset, found in r["datasets"].items():
        for cell in averaged(found["cells"]):
            auc = f"{cell['probe 16']:.3f}" if "probe 16" in cell else ""
            lines.append(
                f"| {dataset} | {cell['n_tokens']:,.0f} | {cell['m']:,.0f} | {cell['k']:.0f} | "
                f"{cell['normalized_mse']:.3f} | {auc} | {100 * cell['dead_fraction']:.0f} % |"
            )
    return "\n".join(lines)


def steps(r: Mapping[str, Any]) -> str:
    """How many steps the autoencoders of the sweep were trained."""
    counts = {f"{found['settings']['STEPS']:,}" for found in r["datasets"].values()}
    return " or ".join(sorted(counts))


def averaged(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The means over seeds of cells of equal size, by tokens, M and K."""
    groups: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["n_tokens"], cell["m"], cell["k"]), []).append(cell)
    return [
        {name: sum(each[name] for each in group) / len(group) for name in group[0]}
        for _, group in sorted(groups.items())
    ]


def recommended(r: Mapping[str, Any]) -> str:
    """Which K each statistic recommends, where it is known and on the data."""
    names = ("projection", "cosine", "probe 1", "probe 5", "probe 16")
    head = "| | true L0 | " + " | ".join((*names[:2], "best F1", *names[2:])) + " |"
    lines = [head, "|---|" + "---:|" * 7]
    for world in (r["planted"] or {"worlds": []})["worlds"]:
        shown = [k_text(world["recommended"].get(name)) for name in (*names[:2], "best f1")]
        how = "at right angles" if world["orthonormal"] else "at random"
        about = f"| planted {how}, {world['objective']} | {world['true_l0']:.1f} | "
        lines.append(f"{about}{' | '.join(shown)} | | | |")
    for dataset, found in r["datasets"].items():
        for m, advice in found["recommended"].items():
            shown = [k_text(advice.get(name)) for name in names]
            shown.insert(2, "")
            lines.append(f"| {dataset}, M = {int(m):,} | | {' | '.join(shown)} |")
    return "\n".join(
        [
            "**A recommended K** (`results/sparsity.json`): where two statistics of the decoder "
            "that arXiv 2508.16560 proposes are least, and where probes with 1, 5 and 16 columns "
            "are best, with the 95 % interval of the seeds. Of planted tokens, whose directions "
            "are active together in groups, it is known how many are (true L0), and at which K "
            "features fire most nearly where directions are active (F1). An edge: in a seed the "
            "best K is the smallest or the largest that was tried.",
            "",
            *lines,
        ]
    )


def k_text(found: Mapping[str, Any] | None) -> str:
    """'11.2 [10.8, 11.6]' of a recommendation, '(edge)' behind it where it lies at one."""
    if found is None:
        return ""
    text = f"{found['k']:.1f}"
    if found.get("at_the_edge"):
        return f"{text} (edge)"
    if found.get("interval"):
        low, high = found["interval"]
        text += f" [{low:.1f}, {high:.1f}]"
    return text
