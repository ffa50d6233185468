"""What the studies found, one function each, from their files under experiments/results/, for
STUDIES.md beside them."""

import json

from experiments.pages.studies_page_fast import fast_vs_block, pareto
from experiments.shared.provenance import RESULTS


def whole():
    """STUDIES.md."""
    intro = (
        "Written by `experiments/pages/numbers.py` from the files here; each names its settings, "
        "seeds, commit and machine. "
        "docs/measured.md has the table that sets them beside the paper. The category AUCs of the "
        "study of FAST take the maximum of a feature over an example's tokens; stage 3's, and the "
        "probes of layers, take the mean."
    )
    figures = [f"![{name}]({name}.png)" for name in present()]
    return (
        "\n\n".join(
            [
                "# What the studies found",
                intro,
                *(part for pair in zip(sentences(), figures) for part in pair),
            ]
        )
        + "\n"
    )


# questions: five of five that change for the better have a chance of 3 % by a sign test
CLEAR_GAIN = 5


def sentences():
    """[Markdown paragraph] of the studies that have a result."""
    return [
        study(json.loads((RESULTS / f"{name}.json").read_text()))
        for name, study in present().items()
    ]


def present():
    """{name: function} of the studies that have a result."""
    studies = (
        fast_vs_block,
        loss_recovered,
        pareto,
        steer,
        layers,
        stability,
        modular_arithmetic,
        planted,
    )
    return {
        study.__name__: study for study in studies if (RESULTS / f"{study.__name__}.json").exists()
    }


def loss_recovered(r):
    """What the model loses when its stream is replaced by reconstructions."""
    parts = []
    for row in r["autoencoders"].values():
        usable, every = row["kinds"]["all"], row["kinds_every_token_replaced"]["all"]
        ce, zero, mean = usable["ce"], usable["loss_recovered_zero"], usable["loss_recovered_mean"]
        low, high = (100 * q for q in zero["interval"])
        parts.append(
            f"M = {row['m']:,}, K = {row['k']} (normalised MSE {row['normalized_mse']:.3f}): the "
            f"loss rises from {ce['clean']:.2f} to "
            f"{ce['spliced']:.2f} nats a token, KL {usable['kl']['spliced']:.2f}; "
            f"{100 * zero['value']:.1f} % [{low:.1f}, {high:.1f}] "
            f"of the loss is recovered against zeros, {100 * mean['value']:.1f} % against the "
            "mean; with every token replaced "
            f"{100 * every['loss_recovered_zero']['value']:.1f} %"
        )
    row = next(iter(r["autoencoders"].values()))
    kinds = {
        name: 100 * row["kinds"][name]["loss_recovered_zero"]["value"]
        for name in ("content", "template")
        if name in row["kinds"]
    }
    return (
        f"**Loss recovered** ([table](loss_recovered.json); "
        f"layer {row['layer']}, {row['n_examples']} held-out examples, 95 % intervals over "
        f"examples). {'. '.join(parts)}. The first "
        "figures leave the shared prefix and attention sinks as they are, as training does: an "
        "autoencoder that never saw them "
        "reconstructs them wrongly, and every later token attends to them. By token predicted, "
        "for the first: "
        f"{', '.join(f'{name} {value:.1f} %' for name, value in kinds.items())}."
    )


def steer(r):
    """What steering did, beside what FAST reports."""
    feature = next(t for t in r["targets"] if t["feature"] is not None)
    random = [t for t in r["targets"] if t["feature"] is None]
    same = {
        None: "was not tried",
        True: "gives the unsteered answers token for token",
        False: "DIFFERS from the unsteered answers",
    }
    effect = f" {ablated(r['ablation'])}" if "ablation" in r else ""
    return "\n".join(
        [
            f"**Steering** ([answers](steer.md), [table](steer.json); "
            f"layer {r['autoencoder']['layer']}, {r['n_prompts']} questions, mean norm of the "
            "stream "
            f"{r['mean_norm']:.0f}). {how_found(r, feature)}. alpha = 0 "
            f"{same[feature['alpha_0_equals_unsteered']]}.",
            "",
            "| alpha | over the norm | answers changed | tokens | repetition | perplexity (random) "
            "| expected word (random) |",
            "|---:|---:|---:|---:|---:|---:|---:|",
            *steered_rows(r, feature, random),
            "",
            f"{fluency(r['settings'], feature, random)}. "
            "FAST reports 25 to 100 as useful for "
            f"Qwen2.5-7B. {expected_words(r, feature, random)}{effect}",
        ]
    )


def how_found(r, feature):
    """The feature that was steered, and how it was chosen."""
    name, how = feature["name"].capitalize(), feature["how"].split(" on ")[0]
    if not how.startswith("average maximum"):
        return f"{name} ({how})"
    return (
        f"{name} is the strongest on `{r['settings']['SPECIAL_TOKEN']}` in {r['n_dialogues']} "
        f"dialogues, found as in FAST ({how})"
    )


def steered_rows(r, feature, random):
    """A line of the table for each alpha, of the feature and in brackets of random directions."""
    lines = []
    for i, alpha in enumerate(r["alphas"]):
        own, others = feature["curves"][i], [t["curves"][i] for t in random]
        word, *by_chance = (
            "" if c["expected_word"] is None else f"{100 * c['expected_word']:.0f} %"
            for c in (own, *others)
        )
        perplexities = ", ".join(f"{c['perplexity']:.1f}" for c in others)
        lines.append(
            f"| {alpha:g} | {r['alphas_over_mean_norm'][i]:.2f} | {100 * own['changed']:.0f} % | "
            f"{own['tokens']:.0f} | {100 * own['repetition']:.0f} % | "
            f"{own['perplexity']:.1f} ({perplexities}) | {word} ({', '.join(by_chance)}) |"
        )
    return lines


def fluency(settings, feature, random):
    """Up to which alpha answers stay fluent."""
    bounds = ", ".join(
        "none" if t["fluent_up_to_alpha"] is None else f"{t['fluent_up_to_alpha']:g}"
        for t in random
    )
    fluent = "Answers are fluent at no alpha"
    if feature["fluent_up_to_alpha"] is not None:
        fluent = (
            f"By the rule of `steer.py` (perplexity below {settings['PERPLEXITY_LIMIT']:g} times "
            f"and repetition within {settings['REPETITION_LIMIT']:g} of the unsteered answers') "
            f"answers stay fluent up to alpha {feature['fluent_up_to_alpha']:g}"
        )
    return f"{fluent}; random directions of the same length up to {bounds}"


def expected_words(r, feature, random):
    """Whether steering brings the words that answers should hold; nothing without such
    questions."""
    base = r["unsteered"]["expected_word"]
    if base is None:
        return ""

    def best_of(targets):
        """(share of the answers with the word, -alpha), the largest."""
        return max(
            (point["expected_word"], -alpha)
            for target in targets
            for alpha, point in zip(r["alphas"], target["curves"])
            if alpha
        )

    best, best_random = best_of([feature]), best_of(random or [feature])
    gain = round((best[0] - max(base, best_random[0])) * r["n_with_expected_word"])
    what = (
        f"a gain of {gain} questions, which is more than chance would give."
        if gain >= CLEAR_GAIN
        else "that moderate steering improves answers does not show on this model and "
        "these questions."
    )
    return (
        f"Of the {r['n_with_expected_word']} questions with an expected word the unsteered "
        f"model answers {100 * base:.0f} % "
        f"with it, the steered at best {100 * best[0]:.0f} % (alpha {-best[1]:g}), with a "
        "random direction "
        f"{100 * best_random[0]:.0f} % (alpha {-best_random[1]:g}): {what}"
    )


def ablated(r):
    """One sentence on the ablation of the steered feature and of others."""
    own, others = (
        [f for f in r["features"] if not f["by_lot"]],
        [f for f in r["features"] if f["by_lot"]],
    )
    low, high = own[0]["interval"] or (float("nan"),) * 2
    elsewhere = {f["change_elsewhere"] for f in r["features"]} - {None}
    changes = sorted(f["change_where_it_fires"] for f in others)
    if own[0]["change_where_it_fires"] is None:
        return (
            f"**Ablation**: feature {own[0]['feature']} fires in none of the "
            f"{r['n_examples']} examples."
        )
    at_random = (
        f"; without one of {len(others)} random features by {changes[0]:+.4f} to {changes[-1]:+.4f}"
        if others
        else ""
    )
    return (
        f"**Ablation**: without feature {own[0]['feature']} the loss changes by "
        f"{own[0]['change_where_it_fires']:+.4f} nats a token "
        f"[{low:+.4f}, {high:+.4f}] in the examples where it fires "
        f"({100 * own[0]['share_of_examples']:.0f} %){at_random}; elsewhere by "
        f"{'exactly 0' if elsewhere <= {0} else max(elsewhere, key=abs)}."
    )


def layers(r):
    """The table "which layer?"."""
    rows, s = r["layers"], r["settings"]
    labelled = "probe_auc" in rows[0]
    evidence = [
        f"{x['probe_auc']:.3f} | {x['probe_auc_random_tokens']:.3f} | {x['probe_auc_stream']:.3f}"
        if labelled
        else "- | - | -"
        for x in rows
    ]
    lines = [
        f"| {x['layer']} | {x['median_norm']:.0f} | {x['n_sinks']} | {x['normalized_mse']:.3f} | "
        f"{of_layer} | "
        f"{x['mean_token_purity']:.3f} |"
        for x, of_layer in zip(rows, evidence)
    ]
    best, worst = (
        min(rows, key=lambda x: x["normalized_mse"]),
        max(rows, key=lambda x: x["normalized_mse"]),
    )
    purity = [x["mean_token_purity"] for x in rows]
    examples = f"{s['MAX_EXAMPLES']} examples, " if s.get("MAX_EXAMPLES") else ""
    counts = ""
    if labelled:
        best_told = max(rows, key=lambda x: x["probe_auc"])
        added = [x["probe_auc"] - x["probe_auc_random_tokens"] for x in rows]
        verdict = {
            "yes": "agrees with these seeds",
            "no": "does not agree with these seeds",
            "open": "cannot be told by these seeds",
        }
        counts = (
            f" The categories are told best at layer {best_told['layer']} (AUC "
            f"{best_told['probe_auc']:.3f}, from {min(x['probe_auc'] for x in rows):.3f}); "
            f"training added {min(added):+.3f} to {max(added):+.3f} over random tokens. That "
            f"middle layers hold the most meaning {verdict[middle_wins(r)]}."
        )
    return "\n".join(
        [
            "**Which layer** ([table](layers.json); one extraction pass, "
            f"{examples}M = {s['M']}, K = {s['K']}, seeds per layer: {s['N_SEEDS']}):",
            "",
            "| layer | median norm | sinks | normalised MSE | AUC of probes on 16 features "
            "| on 16 of random tokens | on 16 dimensions of the stream | token purity |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
            *lines,
            "",
            f"Normalised MSE is lowest at layer {best['layer']} and highest at layer "
            f"{worst['layer']}; token purity is {min(purity):.2f} to "
            f"{max(purity):.2f}.{counts}",
        ]
    )


def middle_wins(r):
    """Do features of layers of the middle third tell the categories better than those of the
    others: "yes" if one does so in all its seeds, "no", or "open", as it is with one seed."""
    told = {x["layer"]: [seed["probe_auc"] for seed in x["seeds"]] for x in r["layers"]}
    middle = [
        values
        for layer, values in told.items()
        if r["n_blocks"] / 3 <= layer <= 2 * r["n_blocks"] / 3
    ]
    outer = [
        values
        for layer, values in told.items()
        if not r["n_blocks"] / 3 <= layer <= 2 * r["n_blocks"] / 3
    ]
    if not middle or not outer or min(map(len, told.values())) < 2:
        return "open"
    if max(min(values) for values in middle) > max(max(values) for values in outer):
        return "yes"
    return (
        "no"
        if max(min(values) for values in outer) > max(max(values) for values in middle)
        else "open"
    )


def modular_arithmetic(r):
    """Which directions of a transformer that adds modulo p are found, by autoencoders, principal
    components and at random."""
    s, t = r["settings"], r["transformer"]
    lines = [
        f"**Ground truth: modular addition** ([table](modular_arithmetic.json)): a "
        f"transformer of one block learns a + b modulo {s['P']} from "
        f"{100 * s['TRAIN_FRACTION']:.0f} % of the pairs; "
        f"{100 * t['test_accuracy']:.2f} % of its answers to the other {t['n_test_pairs']:,} are "
        "right. "
        f"{len(r['key_frequencies'])} key frequencies "
        f"({', '.join(map(str, r['key_frequencies']))}) hold at least "
        f"{100 * s['KEY_SHARE']:.0f} % of its embedding's variance. "
        "MCC of the directions of their cosines and sines (Hungarian matching, |cosine|); in "
        "brackets how much of the matched directions "
        f"lies in the right planes, which does not depend on phases. Mean of {len(s['SEEDS'])} "
        "seeds. Errors are on validation pairs, but "
        f"there are only {r['sites']['embedding']['n_distinct']} different embeddings, so all of "
        "these were seen in training.",
        "",
        "| | embedding | normalised MSE | answer | normalised MSE |",
        "|---|---|---|---|---|",
    ]
    for part in ("autoencoders", "baselines"):
        for name in r["sites"]["embedding"][part]:
            cells = []
            for site in r["sites"].values():
                row = site[part][name]["mean"] if part == "autoencoders" else site[part][name]
                cells += [
                    f"{row['mcc']:.3f} ({row['plane_mcc']:.3f})",
                    f"{row['normalized_mse']:.3f}" if "normalized_mse" in row else "",
                ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            *(line for name, site in r["sites"].items() for line in against_pca(name, site)),
            *why(r),
        ]
    )


def against_pca(name, site):
    """The best autoencoder beside the baselines with as many directions, for each M."""
    lines = []
    for m, best in best_by_m(site).items():
        pca, like = (
            site["baselines"][f"{baseline}, M = {m}"]["mcc"]
            for baseline in ("principal components", "random, covariance of the data")
        )
        word = "does better than" if best > pca else "does not reach"
        lines.append(
            f"- {name}, M = {m}: the best autoencoder has an MCC of {best:.3f} and {word} "
            f"principal components ({pca:.3f}); "
            "as many directions drawn with the data's covariance, which know nothing else of it, "
            f"have {like:.3f}."
        )
    return lines


def best_by_m(site):
    """{M: the largest MCC of an autoencoder of that size}."""
    found = {}
    for rows in site["autoencoders"].values():
        for run in rows["runs"]:
            found[run["variant"][1]] = max(run["mcc"], found.get(run["variant"][1], 0))
    return found


def why(r):
    """Why principal components win, if they do."""
    sites = r["sites"].values()
    if any(
        best > site["baselines"][f"principal components, M = {m}"]["mcc"]
        for site in sites
        for m, best in best_by_m(site).items()
    ):
        return []
    rows = [row["mean"] for site in sites for row in site["autoencoders"].values()]
    lengths, shares = (
        [row[name] for row in rows] for name in ("mean_length_in_best_plane", "share_of_numbers")
    )
    variance = 100 * min(site["variance_in_known_directions"] for site in sites)
    return [
        "- Why: every number uses every frequency, so nothing here is sparse. The known "
        "directions are a few nearly orthogonal planes "
        f"of unequal variance with {variance:.0f} % of it or more, which is what principal "
        "components are made for. Features mix the "
        f"planes ({min(lengths):.2f} to {max(lengths):.2f} of a feature's length lies in its best "
        "one): each fires for some of the "
        f"numbers ({100 * min(shares):.0f} to {100 * max(shares):.0f} %), along an arc of one "
        "circle that the others break up."
    ]


def planted(r):
    """How well known directions are found again, by architecture."""
    large, small, s = r["large"][0], r["active"][0], r["settings"]
    lines = [
        f"**Ground truth: planted directions** ([table](planted.json)): tokens are sums of "
        f"{large['active']} of {large['directions']:,} directions in {large['dimensions']} "
        f"dimensions, noise {large['noise']:g}. Mean max "
        "cosine: "
        + ", ".join(
            f"{name} {row['mean']['mean_max_cosine']:.3f}" for name, row in large["methods"].items()
        )
        + f" ({len(s['SEEDS'])} seed{'s' * (len(s['SEEDS']) > 1)}). {bar(large)} "
        f"MCC with {small['directions']} directions in "
        f"{small['dimensions']} dimensions, against the number active and against the noise:",
        "",
        "| | "
        + " | ".join(
            [
                *(f"{case['active']} active" for case in r["active"]),
                *(f"noise {case['noise']:g}" for case in r["noise"]),
            ]
        )
        + " |",
        "|---|" + "---|" * len(r["active"] + r["noise"]),
    ]
    return "\n".join(
        lines
        + [
            f"| {name}{at_most(name, small)} | "
            + " | ".join(
                f"{case['methods'][name]['mean']['mcc']:.3f}" for case in r["active"] + r["noise"]
            )
            + " |"
            for name in small["methods"]
        ]
    )


def at_most(name, case):
    """There are only as many principal components as dimensions, and directions without a partner
    count 0."""
    return (
        f" (at most {case['dimensions'] / case['directions']:.2f})"
        if name == "principal components"
        else ""
    )


def bar(large):
    reached = {
        name: min(run["mean_max_cosine"] for run in row["runs"]) > 0.95
        for name, row in large["methods"].items()
        if "l0" in row["mean"]
    }
    missed = [name for name, good in reached.items() if not good]
    return (
        "Above 0.95 in every seed: "
        f"{', '.join(name for name, good in reached.items() if good) or 'none'}"
        + (f"; not: {', '.join(missed)}" if missed else "")
        + "."
    )


def stability(r):
    """How far autoencoders that differ in their seed agree."""
    s = r["settings"]
    lines = [
        f"**Stability** ([table](stability.json)): {s['ARCHITECTURE']} autoencoders of "
        f"`{s['dataset']}` that differ in their first weights only, {len(s['SEEDS'])} seeds, "
        f"{s['N_EPOCHS']} epochs "
        "(the default of train_sae.py is longer). Cosines of "
        "decoder directions of two seeds: mean of the largest, and under the best one-to-one "
        "matching; share of features that all seeds "
        "have (cosine above "
        f"{s['THRESHOLD']:g}). Random tokens are as many activations, less their mean.",
        "",
        "| M | K | mean max cosine | random tokens | matched | random directions | random tokens | "
        "found by all | normalised MSE |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in r["runs"]:
        base = r["baselines"][str(row["m"])]
        lines.append(
            f"| {row['m']:,} | {row['k']} | {row['mean_max_cosine']:.3f} | "
            f"{base['tokens']['mean_max_cosine']:.3f} | "
            f"{row['mcc']:.3f} | {base['random']['mcc']:.3f} | {base['tokens']['mcc']:.3f} | "
            f"{100 * row['found_by_all']:.0f} % | {row['normalized_mse']:.3f} |"
        )
    first, last = (
        min(r["runs"], key=lambda row: row["found_by_all"]),
        max(r["runs"], key=lambda row: row["found_by_all"]),
    )
    below = [
        f"M = {row['m']:,}, K = {row['k']}"
        for row in r["runs"]
        if row["mean_max_cosine"]
        < 1.05 * r["baselines"][str(row["m"])]["tokens"]["mean_max_cosine"]
    ]
    doubt = (
        " By the mean of the largest cosines two seeds agree less, or hardly more, than two draws "
        f"of tokens at {'; '.join(below)}."
        if below
        else ""
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Between {100 * first['found_by_all']:.0f} % (M = {first['m']:,}, K = {first['k']}) "
            "and "
            f"{100 * last['found_by_all']:.0f} % (M = {last['m']:,}, K = {last['k']}) of the "
            "features are found by every seed: the others "
            "are one choice of many, so check a feature that matters under another seed "
            "(`train_sae.py --seed 0,1,2`)." + doubt,
        ]
    )
