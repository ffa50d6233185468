"""What the labels of a finished run are worth: F1 of the rules beside token lists and nulls, and
five-shot detection.

    python -m experiments.benchmarks.labels --name labels_demo --output-dir results/demo
    python -m experiments.benchmarks.labels --name labels_topics --output-dir results/topics \\
        --dataset-path my_texts.jsonl --label-field topic

Reads a folder that run_pipeline.py has filled (the flags are those of that run) and writes
experiments/results/<name>.json. Every F1 is for "fires above 0.3 of its maximum" on the tokens of
the half of the texts that nothing was found on, 0 where there is no rule:
  rules               the labels of stage 3
  four tokens         the four most characteristic tokens, which were the labels before
  tokens by F1        up to eight tokens, chosen by F1 on the finding half
  another's rule      the rule of another feature
  shuffled            rules found for, and measured on, as many tokens drawn at random
Rules and detection are also found for dictionaries that nobody trained, of the same width.
"""

import argparse
import resource
import sys
import time
from types import SimpleNamespace

import numpy as np

import config
from experiments.shared.provenance import PROJECT, write_result
from experiments.shared.statistics import interval

N_TOKENS = 4  # that a label named before
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
N_BOOTSTRAP = 2000


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="labels_demo")
    args, flags = parser.parse_known_args()
    settings = config.resolve(PROJECT / "interpret_sae.py", argv=flags)
    features, seconds = collected(settings)
    held_out = f1_of_labels(features, settings.SEED)
    rows = features.rows
    detection = features.detection
    random = detection.random[np.isfinite(detection.random)]
    auc = detection.auc[np.isfinite(detection.auc)]
    alive = sum(row["status"] != "dead" for row in rows)
    write_result(
        args.name,
        {"dataset": str(settings.DATASET_PATH), "seed": settings.SEED},
        {
            "n_features_alive": alive,
            "n_without_rule": sum(row["rule"] is None and row["status"] != "dead" for row in rows),
            "cpu_seconds": seconds,
            "peak_memory_mb": peak_memory(),
            "f1": {name: described(values) for name, values in held_out.items()},
            "share_above_four_tokens": float(np.mean(held_out["rules"] > held_out["four tokens"])),
            "untrained": untrained(features, settings.SEED),
            "detection": {
                "features": described(auc),
                "random_directions": described(random),
                "share_above_0.9": float(np.mean(auc > 0.9)),
                "share_above_0.9_random": float(np.mean(random > 0.9)),
            },
        },
    )


def collected(settings):
    """(Features of the run, CPU seconds of its rules and of its detection)."""
    from fastsae.interpretation import inputs
    from fastsae.interpretation.features import Features

    seconds = {}

    class Timed(Features):
        def _add_rules(self):
            return timed(seconds, "rules", super()._add_rules)

        def _add_detection(self):
            return timed(seconds, "detection", super()._add_detection)

        def _run_table(self):
            return {}  # probes of categories, which take longest, say nothing of labels

    return Timed(settings, *inputs.chosen_sae(settings)), seconds


def timed(seconds, name, work):
    """What `work` returns; its CPU seconds go to `seconds[name]`."""
    started = time.process_time()
    result = work()
    seconds[name] = round(time.process_time() - started, 2)
    return result


def f1_of_labels(features, seed):
    """{kind of label: (n_features,) held-out F1} of the features that fire strongly in the testing
    half."""
    from fastsae.data.token_text import characteristic_tokens
    from fastsae.interpretation import rules
    from fastsae.interpretation.rule_labels import Halves
    from fastsae.interpretation.token_properties import ConditionTable

    s = features.evidence.statistics
    halves = Halves(features.evidence, features.firings, seed)
    named = characteristic_tokens(s.name_mass.sums, s.name_count, features.evidence.names, N_TOKENS)
    only = {"any": [[["token", []]]]}
    tokens, own = tokens_only(halves.find, ConditionTable), rules.own_conditions(halves.find)
    own_tokens = rules.own_conditions(tokens)
    draw = np.random.default_rng((seed, 12))
    found = {
        name: [] for name in ("rules", "four tokens", "tokens by F1", "another's rule", "shuffled")
    }
    for row in features.rows:
        if row["status"] == "dead" or not len(halves.strong(row["feature"])[1]):
            continue
        j = row["feature"]
        where, strong = halves.strong(j)
        found["rules"].append(row["label_f1"] or 0.0)
        found["another's rule"].append(np.nan_to_num(features.rule_labels.other[j]))
        only["any"][0][0][1] = [name for name, _ in named[j]]
        found["four tokens"].append(f1_on(halves.test, only, strong))
        best, _ = rules.find_rule(tokens, where, own_tokens)
        rule = rules.as_rule(tokens, best)
        found["tokens by F1"].append(f1_on(halves.test, rule, strong))
        lots = [
            np.sort(draw.permutation(len(half))[:n])
            for half, n in ((halves.find, len(where)), (halves.test, len(strong)))
        ]
        best, f1 = rules.find_rule(halves.find, lots[0], own)
        rule = rules.as_rule(halves.find, best)
        found["shuffled"].append(f1_on(halves.test, rule, lots[1]) if f1 >= rules.LEAST_F1 else 0.0)
    return {name: np.array(values, float) for name, values in found.items()}


def untrained(features, seed):
    """{kind of dictionary: what rules and detection say of its directions}, one draw of each."""
    from fastsae.interpretation.detection import add_detection
    from fastsae.interpretation.rule_labels import add_rules

    found = {}
    for dictionary in features.untrained.dictionaries:
        if dictionary.kind in found:
            continue
        evidence, firings = fired(dictionary, features.evidence, seed)
        alive = evidence.statistics.maximum > 0
        rows = [
            {"feature": j, "status": "ok" if alive[j] else "dead", "label": ""}
            for j in range(evidence.m)
        ]
        labels = add_rules(rows, evidence, firings, seed)
        auc = add_detection(rows, evidence, firings, seed).auc
        f1 = np.array([row["label_f1"] or 0.0 for row in rows if row["status"] == "ok"])
        found[dictionary.kind] = {
            "n_with_rule": int(np.isfinite(labels.f1).sum()),
            "rules": described(f1),
            "detection": described(auc[np.isfinite(auc)]),
        }
    return found


def fired(dictionary, evidence, seed):
    """(what rules and detection ask of Evidence, Firings) for a dictionary instead of the
    autoencoder."""
    import torch

    from fastsae.interpretation.firings import Firings
    from fastsae.interpretation.statistics import BLOCK_TOKENS, encode_rows

    m, statistics = dictionary.m_total_neurons, evidence.statistics
    firings = Firings(evidence.data["seq_lengths"], evidence.sae.k_active_neurons, seed)
    maximum = np.zeros(m, np.float32)
    kept = np.flatnonzero(statistics.kept)
    for rows in np.split(kept, range(BLOCK_TOKENS, len(kept), BLOCK_TOKENS)):
        x = torch.from_numpy(np.array(evidence.data["activations"][rows], np.float32))
        entries = encode_rows(dictionary, x)
        np.maximum.at(maximum, entries.indices, entries.data)
        firings.add(np.repeat(rows, np.diff(entries.indptr)), entries.indices, entries.data)
    like = SimpleNamespace(
        m=m,
        statistics=SimpleNamespace(m=m, maximum=maximum, kept=statistics.kept),
        **{
            name: getattr(evidence, name)
            for name in ("data", "offsets", "text_numbers", "examples", "tokenizer")
        },
    )
    return like, firings


def tokens_only(table, kind):
    """The table with the conditions on a token's own text alone."""
    chosen = np.array([name == "token" for name, _ in table.names])
    renumbered = np.cumsum(chosen) - 1
    keep = chosen[table.indices]
    lengths = np.add.reduceat(np.append(keep, False).astype(int), table.indptr[:-1])
    lengths[np.diff(table.indptr) == 0] = 0
    names = [name for name, use in zip(table.names, chosen) if use]
    return kind(names, renumbered[table.indices[keep]], np.concatenate([[0], np.cumsum(lengths)]))


def f1_on(table, rule, strong):
    """F1 of a rule on the tokens of a table; 0 where it fires nowhere."""
    from fastsae.interpretation import rules

    fires = np.flatnonzero(rules.fires(rule, table))
    both = np.isin(fires, strong, assume_unique=True).sum()
    return rules.score(int(both), len(fires), len(strong)).f1 or 0.0


def described(values):
    """Mean with its 95 % interval over features, and quantiles."""
    draw = np.random.default_rng(0)
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(N_BOOTSTRAP)]
    return {
        "n": len(values),
        "mean": round(float(values.mean()), 4),
        "interval": [round(end, 4) for end in interval(np.array(means))],
        "quantiles": {str(q): round(float(np.quantile(values, q)), 4) for q in QUANTILES},
    }


def peak_memory():
    """Megabytes of this process at its largest."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024 * 1024))


if __name__ == "__main__":
    main()
