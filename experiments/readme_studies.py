"""The README's words on the studies, each a function that makes Markdown lines from its file under experiments/results/."""
import json

from common import RESULTS


def read(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def modular_arithmetic():
    """Which directions of a transformer that adds modulo p are found, by autoencoders, principal components and at random."""
    if (r := read("modular_arithmetic")) is None:
        return []
    s, t = r["settings"], r["transformer"]
    lines = [
        f"**Ground truth: modular addition** (`results/modular_arithmetic.json`, [figure](experiments/results/modular_arithmetic.png)): a "
        f"transformer of one block learns a + b modulo {s['P']} from {100 * s['TRAIN_FRACTION']:.0f} % of the pairs; "
        f"{100 * t['test_accuracy']:.2f} % of its answers to the other {t['n_test_pairs']:,} are right. {len(r['key_frequencies'])} key "
        f"frequencies ({', '.join(map(str, r['key_frequencies']))}) hold {100 * s['KEY_SHARE']:.0f} % of the variance of its embedding. "
        "MCC of the directions of their cosines and sines (Hungarian matching, |cosine|); in brackets how much of the matched directions "
        f"lies in the right planes, which does not depend on phases. Mean of {len(s['SEEDS'])} seeds.", "",
        "| | embedding | normalised MSE | answer | normalised MSE |", "|---|---|---|---|---|"]
    for part in ("autoencoders", "baselines"):
        for name in r["sites"]["embedding"][part]:
            cells = []
            for site in r["sites"].values():
                row = site[part][name]["mean"] if part == "autoencoders" else site[part][name]
                cells += [f"{row['mcc']:.3f} ({row['plane_mcc']:.3f})", f"{row['normalized_mse']:.3f}" if "normalized_mse" in row else ""]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *(against_pca(name, site) for name, site in r["sites"].items()), *why(r)]


def against_pca(name, site):
    runs = [run for rows in site["autoencoders"].values() for run in rows["runs"]]
    best, pca = max(run["mcc"] for run in runs), site["baselines"]["principal components"]["mcc"]
    word = "does better than" if best > pca else "does not reach"
    return f"- {name}: the best autoencoder of {len(runs)} has an MCC of {best:.3f} and {word} principal components ({pca:.3f})."


def why(r):
    """Why principal components win, if they do."""
    sites = r["sites"].values()
    if any(run["mcc"] > site["baselines"]["principal components"]["mcc"] for site in sites for rows in site["autoencoders"].values()
           for run in rows["runs"]):
        return []
    rows = [row["mean"] for site in sites for row in site["autoencoders"].values()]
    lengths, shares = ([row[name] for row in rows] for name in ("mean_length_in_best_plane", "share_of_numbers"))
    variance = 100 * min(site["variance_in_known_directions"] for site in sites)
    return [f"- Why: every number uses every frequency, so nothing here is sparse. The known directions are a few nearly orthogonal planes "
            f"of unequal variance with {variance:.0f} % of it or more, which is what principal components are made for. Features mix the "
            f"planes ({min(lengths):.2f} to {max(lengths):.2f} of a feature's length lies in its best one) and fire for groups of numbers "
            f"({100 * min(shares):.0f} to {100 * max(shares):.0f} % of them) rather than along a wave."]


def planted():
    """How well known directions are found again, by architecture."""
    if (r := read("planted")) is None:
        return []
    large, small, s = r["large"][0], r["active"][0], r["settings"]
    lines = [
        f"**Ground truth: planted directions** (`results/planted.json`, [figure](experiments/results/planted.png)): tokens are sums of "
        f"{large['active']} of {large['directions']:,} directions in {large['dimensions']} dimensions, noise {large['noise']:g}. Mean max "
        "cosine: " + ", ".join(f"{name} {row['mean']['mean_max_cosine']:.3f}" for name, row in large["methods"].items())
        + f" ({len(s['SEEDS'])} seed{'s' * (len(s['SEEDS']) > 1)}). {bar(large)} MCC with {small['directions']} directions in "
        f"{small['dimensions']} dimensions, against the number active and against the noise:", "",
        "| | " + " | ".join([*(f"{case['active']} active" for case in r["active"]), *(f"noise {case['noise']:g}" for case in r["noise"])])
        + " |",
        "|---|" + "---|" * len(r["active"] + r["noise"])]
    return lines + [f"| {name} | " + " | ".join(f"{case['methods'][name]['mean']['mcc']:.3f}" for case in r["active"] + r["noise"]) + " |"
                    for name in small["methods"]]


def bar(large):
    reached = {name: min(run["mean_max_cosine"] for run in row["runs"]) > 0.95 for name, row in large["methods"].items()
               if "l0" in row["mean"]}
    missed = [name for name, good in reached.items() if not good]
    return (f"Above 0.95 in every seed: {', '.join(name for name, good in reached.items() if good) or 'none'}"
            + (f"; not: {', '.join(missed)}" if missed else "") + ".")


def stability():
    """How far autoencoders that differ in their seed agree."""
    if (r := read("stability")) is None:
        return []
    s = r["settings"]
    lines = [
        f"**Stability** (`results/stability.json`, [figure](experiments/results/stability.png)): {s['ARCHITECTURE']} autoencoders of "
        f"the demo's activations that differ in their first weights only, {len(s['SEEDS'])} seeds. Cosines of decoder directions of two "
        "seeds: mean of the largest, and under the best one-to-one matching; share of features that all seeds have (cosine above "
        f"{s['THRESHOLD']:g}). Tokens by lot are as many activations less their mean.", "",
        "| M | K | mean max cosine | matched | found by all | random directions, matched | tokens by lot, matched | normalised MSE |",
        "|---|---|---|---|---|---|---|---|"]
    for row in r["runs"]:
        base = r["baselines"][str(row["m"])]
        lines.append(f"| {row['m']:,} | {row['k']} | {row['mean_max_cosine']:.3f} | {row['mcc']:.3f} | {100 * row['found_by_all']:.0f} % | "
                     f"{base['random']['mcc']:.3f} | {base['tokens']['mcc']:.3f} | {row['normalized_mse']:.3f} |")
    first, last = min(r["runs"], key=lambda row: row["found_by_all"]), max(r["runs"], key=lambda row: row["found_by_all"])
    return [*lines, "", f"Between {100 * first['found_by_all']:.0f} % (M = {first['m']:,}, K = {first['k']}) and "
            f"{100 * last['found_by_all']:.0f} % (M = {last['m']:,}, K = {last['k']}) of the features are found by every seed: the others "
            "are one choice of many, so check a feature that matters under another seed (`train_sae.py --seeds 0,1,2`)."]
