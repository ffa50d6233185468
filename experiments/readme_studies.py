"""The README's paragraphs on the studies, one function each, from their files under experiments/results/."""
import json

from common import RESULTS
from readme_fast import fast_vs_block, pareto


def sentences():
    """[Markdown paragraph] of the studies that have a result."""
    found = [(study, RESULTS / f"{study.__name__}.json") for study in (fast_vs_block, loss_recovered, pareto, steer, layers)]
    return [study(json.loads(path.read_text())) for study, path in found if path.exists()]


def loss_recovered(r):
    """What the model loses when its stream is replaced by reconstructions."""
    parts = []
    for row in r["autoencoders"].values():
        usable, every = row["kinds"]["all"], row["kinds_every_token_replaced"]["all"]
        ce, zero, mean = usable["ce"], usable["loss_recovered_zero"], usable["loss_recovered_mean"]
        low, high = (100 * q for q in zero["interval"])
        parts.append(
            f"M = {row['m']:,}, K = {row['k']} (normalised MSE {row['normalized_mse']:.3f}): the loss rises from {ce['clean']:.2f} to "
            f"{ce['spliced']:.2f} nats a token, KL {usable['kl']['spliced']:.2f}; {100 * zero['value']:.1f} % [{low:.1f}, {high:.1f}] "
            f"of the loss is recovered against zeros, {100 * mean['value']:.1f} % against the mean; with every token replaced "
            f"{100 * every['loss_recovered_zero']['value']:.1f} %")
    row = next(iter(r["autoencoders"].values()))
    kinds = {name: 100 * row["kinds"][name]["loss_recovered_zero"]["value"] for name in ("content", "template") if name in row["kinds"]}
    return (f"**Loss recovered** ([table](experiments/results/loss_recovered.json), [figure](experiments/results/loss_recovered.png); "
            f"layer {row['layer']}, {row['n_examples']} held-out examples, 95 % intervals over examples). {'. '.join(parts)}. The first "
            "figures leave the shared prefix and attention sinks as they are, as training does: an autoencoder that never saw them "
            f"reconstructs them wrongly, and every later token attends to them. By token predicted, for the first: "
            f"{', '.join(f'{name} {value:.1f} %' for name, value in kinds.items())}.")


def steer(r):
    """What steering did, beside what FAST reports."""
    alphas, over = r["alphas"], dict(zip(r["alphas"], r["alphas_over_mean_norm"]))
    feature = next(t for t in r["targets"] if t["feature"] is not None)
    random = [t for t in r["targets"] if t["feature"] is None]
    lines = []
    for alpha, p in zip(alphas, feature["curves"]):
        i = alphas.index(alpha)
        others = [t["curves"][i]["perplexity"] for t in random]
        words = "" if p["expected_word"] is None else f"{100 * p['expected_word']:.0f} %"
        lines.append(f"| {alpha:g} | {over[alpha]:.2f} | {100 * p['changed']:.0f} % | {p['perplexity']:.1f} | "
                     f"{', '.join(f'{v:.1f}' for v in others)} | {100 * p['repetition']:.0f} % | {words} |")
    base = r["unsteered"]["expected_word"]
    better = [alpha for alpha, p in zip(alphas, feature["curves"]) if alpha and base is not None and p["expected_word"] > base]
    verdict = (f"More answers than without steering hold the expected word at alpha {', '.join(f'{a:g}' for a in better)}." if better else
               "At no alpha do more answers hold the expected word than without steering: that moderate steering improves answers "
               "did not replicate on this model and these questions.")
    limits, harmless = r["settings"], feature["harmless_up_to_alpha"]
    same = "gives the unsteered answers token for token" if feature["alpha_0_equals_unsteered"] else "DIFFERS from the unsteered answers"
    bounds = ", ".join("none" if t["harmless_up_to_alpha"] is None else f"{t['harmless_up_to_alpha']:g}" for t in random)
    effect = f" {ablated(r['ablation'])}" if "ablation" in r else ""
    return "\n".join([
        f"**Steering** ([answers](experiments/results/steer.md), [table](experiments/results/steer.json), "
        f"[figure](experiments/results/steer.png); layer {r['autoencoder']['layer']}, {r['n_prompts']} questions, mean norm of the stream "
        f"{r['mean_norm']:.0f}). {feature['name'].capitalize()} is the strongest on `{limits['SPECIAL_TOKEN']}` in {r['n_dialogues']} "
        f"dialogues, found as in FAST ({feature['how'].split(' on ')[0]}). alpha = 0 {same}.",
        "", "| alpha | over the norm | answers changed | perplexity | of random directions | repetition | expected word |",
        "|---:|---:|---:|---:|---:|---:|---:|", *lines, "",
        (f"By the rule of `steer.py` (perplexity below {limits['PERPLEXITY_LIMIT']:g} times and repetition within "
         f"{limits['REPETITION_LIMIT']:g} of the unsteered answers') it is harmless up to alpha {harmless:g}" if harmless is not None else
         "It is harmless at no alpha") + f"; random directions of the same length up to {bounds}. FAST reports 25 to 100 as useful for "
        f"Qwen2.5-7B. {verdict}{effect}"])


def ablated(r):
    """One sentence on the ablation of the steered feature and of others."""
    own, others = [f for f in r["features"] if not f["by_lot"]], [f for f in r["features"] if f["by_lot"]]
    low, high = own[0]["interval"] or (float("nan"),) * 2
    elsewhere = {f["change_elsewhere"] for f in r["features"]} - {None}
    changes = sorted(f["change_where_it_fires"] for f in others)
    return (f"**Ablation**: without feature {own[0]['feature']} the loss changes by {own[0]['change_where_it_fires']:+.4f} nats a token "
            f"[{low:+.4f}, {high:+.4f}] in the examples where it fires ({100 * own[0]['share_of_examples']:.0f} %); without one of "
            f"{len(others)} features by lot by {changes[0]:+.4f} to {changes[-1]:+.4f}; elsewhere by "
            f"{'exactly 0' if elsewhere <= {0} else max(elsewhere, key=abs)}.")


def layers(r):
    """The table "which layer?"."""
    rows, s = r["layers"], r["settings"]
    lines = [f"| {x['layer']} | {x['median_norm']:.0f} | {x['n_sinks']} | {x['normalized_mse']:.3f} | "
             f"{x['n_above_auc_bound']:.1f} ({x['n_above_auc_bound_shuffled']:.1f}) | {x['median_category_auc']:.3f} | "
             f"{x['mean_token_purity']:.3f} |" for x in rows]
    most, purest = max(rows, key=lambda x: x["n_above_auc_bound"]), max(rows, key=lambda x: x["mean_token_purity"])
    best, worst = min(rows, key=lambda x: x["normalized_mse"]), max(rows, key=lambda x: x["normalized_mse"])
    return "\n".join([
        f"**Which layer** ([table](experiments/results/layers.json), [figure](experiments/results/layers.png); one extraction pass, "
        f"M = {s['M']}, K = {s['K']}, {s['N_SEEDS']} seeds a layer):", "",
        "| layer | median norm | sinks | normalised MSE | features with AUC > 0.8 (shuffled labels) | median AUC | token purity |",
        "|---:|---:|---:|---:|---:|---:|---:|", *lines, "",
        f"Most features that separate a category are at layer {most['layer']} ({most['n_above_auc_bound']:.1f} of {s['M']}); features are "
        f"most tied to single tokens at layer {purest['layer']} (purity {purest['mean_token_purity']:.2f}). Normalised MSE is lowest at "
        f"layer {best['layer']} and highest at {worst['layer']}"
        + (": it does not say which layer is worth reading." if best["layer"] != most["layer"] else ".")])
