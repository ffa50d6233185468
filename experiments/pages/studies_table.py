"""The README's table of the studies: what the paper says, and what came out here, from the files
under experiments/results/."""

import json

import numpy as np

from experiments.pages.studies_page import CLEAR_GAIN, best_by_m, middle_wins
from experiments.pages.studies_page_fast import (
    OPENINGS,
    PAPER_MSE_ST,
    PAPER_SCORED,
    SOURCES,
    clear_cases,
    count_orderings,
    l0_of,
    plain_text_of,
)
from experiments.shared.provenance import RESULTS
from fastsae.lm.names import described

# log2 MSE where PAPER_MSE_ST is
PAPER_MSE = {"standard": (1.3892, 1.4749, 2.0024), "jumprelu": (-9.1659, -6.8466, -6.5926)}
WITH, WITHOUT = "all tokens", "without prefix and sinks"
NO_TOPK = "no figure: the paper trains no topk"


def table():
    """The rows of the studies that have a result; "" if none has."""
    studies = (
        fast_vs_block,
        loss_recovered,
        steer,
        layers,
        pareto,
        stability,
        modular_arithmetic,
        planted,
    )
    rows = [row for study in studies if (r := read(study.__name__)) for row in study(r)]
    if not rows:
        return ""
    lines = [
        "| | paper | here | replicated? |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join([*lines, *(["", note] if (note := conditions()) else [])])


def conditions():
    """What the comparison with block training was made of, and how long the quick forms take."""
    parts = []
    if r := read("fast_vs_block"):
        s = r["settings"]
        parts.append(
            f"FAST against block training: {len(r['runs'])} autoencoders of "
            f"{described(s['MODEL_NAME'])} "
            f"(M = {s['M']}, K = {s['K']}, {len(s['SEEDS'])} seeds, layers "
            f"{', '.join(map(str, s['LAYERS']))}), "
            f"{r['train_tokens']:,} tokens each, {r['data']['held out']['examples']} held-out "
            f"dialogues of `{s['DATASET_PATH']}`. "
            f"{plain_text_of(s)} {OPENINGS}"
        )
    if r := read("quick_studies"):
        times = ", ".join(
            f"{name} {study['seconds'] / 60:.1f}" for name, study in r["studies"].items()
        )
        parts.append(
            f"Minutes that `--quick` takes from nothing on {r['machine']['cores']} cores "
            f"({r['machine']['device']}): {times}."
        )
    return " ".join(parts)


def read(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def triple(values, digits=2):
    return " / ".join(f"{value:.{digits}f}" for value in values)


def fast_vs_block(r):
    """FAST against block training: the errors, the part of the sinks, and the features."""
    layers = r["settings"]["LAYERS"]
    middle = layers[len(layers) // 2]
    here = {
        (c["architecture"], c["sinks_in_training"]): c
        for c in r["comparisons"]
        if c["layer"] == middle
    }
    with_sinks = [c for c in r["comparisons"] if c["sinks_in_training"]]
    rows = [*errors_beside_paper(r, here, middle), *errors_of_topk(r, here, middle)]
    if with_sinks:
        rows.append(ordinary_tokens(r))
    shares = [c["gap of BT(F) on sinks"]["share"] for c in with_sinks]
    shares = [100 * share for share in shares if share is not None]
    if shares:
        rows.append(
            (
                "gap BT(F) - FAST in MSE_st that lies on attention sinks",
                "not looked at",
                f"{np.median(shares):.0f} % (median; {min(shares):.0f} to {max(shares):.0f} %)",
                "-",
            )
        )
    return [*rows, *features(r, middle)]


def errors_beside_paper(r, here, layer):
    """Rows of the two errors of the architectures that the paper has figures of; here:
    {(architecture, sinks in training): comparison} at `layer`."""
    for what, title, paper in (
        ("mse_special", "log2 MSE_st", PAPER_MSE_ST),
        ("mse", "log2 MSE", PAPER_MSE),
    ):
        for architecture in paper:
            if (architecture, True) not in here:
                continue
            comparison, name = here[architecture, True], f"{what}, {WITH}"
            yield (
                f"{title}, {architecture}: FAST / BT(F) / BT(P)",
                f"{triple(paper[architecture])} (Qwen2.5-7B, layer 18)",
                errors_of_sources(comparison, name, layer),
                orderings_of(r, architecture, name, True),
            )


def errors_of_topk(r, here, layer):
    """Rows of the error on special tokens of topk, which the paper does not have."""
    for tokens, sinks, how in ((WITH, True, ""), (WITHOUT, False, ", without prefix and sinks")):
        if ("topk", sinks) in here:
            name = f"mse_special, {tokens}"
            yield (
                f"log2 MSE_st, topk{how}: FAST / BT(F) / BT(P)",
                NO_TOPK,
                errors_of_sources(here["topk", sinks], name, layer),
                f"the ordering holds {orderings_of(r, 'topk', name, sinks)}",
            )


def errors_of_sources(comparison, name, layer):
    """The three sources' errors, where they were measured and at which L0."""
    values = comparison[name]["log2"]
    return f"{triple(values[source] for source in SOURCES)} (layer {layer}, L0 {l0_of(comparison)})"


def orderings_of(r, architecture, name, sinks):
    """In how many comparisons of an architecture the paper's ordering holds."""
    of_architecture = [c for c in r["comparisons"] if c["architecture"] == architecture]
    return orderings(of_architecture, name, sinks)


def ordinary_tokens(r):
    """The row on what training with sinks gives on ordinary tokens, where the ordering mostly
    fails."""
    confirmed, refuted, unclear = count_orderings(r, f"mse, {WITHOUT}", True)
    return (
        "log2 MSE of ordinary tokens (no prefix, no sinks), trained with sinks as in the paper",
        "not measured",
        f"FAST < BT(F) < BT(P) in {confirmed} of {confirmed + refuted + unclear} cases",
        f"refuted in {refuted}" + (f", {unclear} open" if unclear else ""),
    )


def orderings(comparisons, name, sinks):
    """How often the ordering FAST < BT(F) < BT(P) holds, in words."""
    confirmed, refuted, unclear = count_orderings({"comparisons": comparisons}, name, sinks)
    n = confirmed + refuted + unclear
    rest = [f"{count} {word}" for count, word in ((refuted, "refuted"), (unclear, "open")) if count]
    return f"in {confirmed} of {n} layers" + "".join(f", {each}" for each in rest)


def features(r, middle):
    """The features' quality: the paper's scores by a language model, beside ours if there are any,
    and category AUC."""
    rows = [row for row in r["interpretability"] if not row["sinks_in_training"]]
    paper = f"{triple(PAPER_SCORED, 1)} % (Llama-3.2-3B, GPT-4o)"
    found = []
    for name, title, scale, theirs in (
        ("share_scored_4_or_5", "features scored 4 or 5", 100, paper),
        ("category_auc", "category AUC of features, topk", 1, "not looked at"),
    ):
        mine = {
            row["source"]: row[name]
            for row in rows
            if row["layer"] == middle and row["architecture"] == "topk" and name in row
        }
        if len(mine) == len(SOURCES):
            topk = [row for row in rows if row["architecture"] == "topk"]
            clear = {
                other: clear_cases([row for row in topk if row["source"] == other], name)
                for other in SOURCES[1:]
            }
            verdict = "; ".join(
                f"against {other} above in {above}, below in {below}"
                for other, (above, below) in clear.items()
            )
            values = triple(
                (scale * mine[source]["value"] for source in SOURCES), 1 if scale == 100 else 3
            )
            found.append(
                (
                    title,
                    theirs,
                    f"{values}{' %' * (scale == 100)} (layer {middle})",
                    f"of {len(topk) // len(SOURCES)} layers FAST clearly {verdict}",
                )
            )
        elif theirs == paper:
            found.append((title, theirs, "no language model at hand", "not tried"))
    return found


def loss_recovered(r):
    for row in r["autoencoders"].values():
        zero = row["kinds"]["all"]["loss_recovered_zero"]
        low, high = (100 * q for q in zero["interval"])
        yield (
            f"loss recovered, M = {row['m']:,}, K = {row['k']}",
            "-",
            f"{100 * zero['value']:.1f} % [{low:.1f}, {high:.1f}]",
            "-",
        )


def steer(r):
    feature = next(t for t in r["targets"] if t["feature"] is not None)
    alpha = feature["fluent_up_to_alpha"]
    here = (
        "at no alpha"
        if alpha is None
        else f"up to alpha {alpha:g}, {alpha / r['mean_norm']:.2f} of the stream's mean norm"
    )
    best, base = (
        max((p["expected_word"] or 0) for a, p in zip(r["alphas"], feature["curves"]) if a),
        r["unsteered"]["expected_word"] or 0,
    )
    by_chance = max(
        [
            p["expected_word"] or 0
            for t in r["targets"]
            if t["feature"] is None
            for a, p in zip(r["alphas"], t["curves"])
            if a
        ],
        default=0,
    )
    gain = round((best - max(base, by_chance)) * r["n_with_expected_word"])
    yield (
        "steering: fluent answers",
        "alpha 25 to 100 (Qwen2.5-7B, whose norms are others)",
        here,
        "not comparable",
    )
    yield (
        "steering: questions answered with the expected word, steered / unsteered / random "
        "direction",
        "better, by examples",
        f"{100 * best:.0f} / {100 * base:.0f} / {100 * by_chance:.0f} % of "
        f"{r['n_with_expected_word']}",
        "yes" if gain >= CLEAR_GAIN else "no",
    )


def layers(r):
    if "probe_auc" not in r["layers"][0]:
        return
    here = ", ".join(
        f"{x['probe_auc']:.2f} ({x['probe_auc_random_tokens']:.2f}) at {x['layer']}"
        for x in r["layers"]
    )
    yield (
        "AUC of probes of the categories on 16 features (of random tokens), by layer",
        "middle layers are the semantic ones (a tutorial's rule)",
        here,
        middle_wins(r),
    )


def pareto(r):
    s = r["settings"]
    l0 = str(s["AT_L0"][len(s["AT_L0"]) // 2])
    there = {
        name: cells[l0]["mean"]
        for name, cells in r["at_l0"]["normalized_mse"].items()
        if l0 in cells
    }
    yield (
        f"normalised MSE at L0 {l0}",
        "-",
        ", ".join(f"{name} {there[name]:.3f}" for name in sorted(there, key=there.__getitem__)),
        "-",
    )


def stability(r):
    shares = [100 * row["found_by_all"] for row in r["runs"]]
    n_seeds, n_epochs = len(r["settings"]["SEEDS"]), r["settings"]["N_EPOCHS"]
    yield (
        f"features that {n_seeds} seeds all find, after {n_epochs} epochs (the default trains "
        "longer)",
        "-",
        f"{min(shares):.0f} to {max(shares):.0f} %, by M and K",
        "-",
    )


def modular_arithmetic(r):
    site = r["sites"]["embedding"]
    found = ", ".join(
        f"{best:.3f} / {site['baselines'][f'principal components, M = {m}']['mcc']:.3f} (M = {m})"
        for m, best in best_by_m(site).items()
    )
    yield (
        "modular addition, Fourier directions of the embedding: MCC of the best autoencoder / "
        "principal components",
        "-",
        f"{found}; the model is right on {100 * r['transformer']['test_accuracy']:.2f} % of unseen "
        "pairs",
        "-",
    )


def planted(r):
    large = r["large"][0]
    found = ", ".join(
        f"{name} {row['mean']['mean_max_cosine']:.3f}" for name, row in large["methods"].items()
    )
    yield (
        f"{large['directions']:,} planted directions in {large['dimensions']}: mean max cosine",
        "-",
        found,
        "-",
    )
