"""Write the parts of the README that come from files: the settings table, and the figures under
experiments/results/.

Also writes experiments/results/STUDIES.md, what the studies found in full, and
fastsae/settings/shipped.json, the types and defaults of all settings, from which a constant that
lost its annotation is still read.

    python -m experiments.pages.numbers           # rewrite them
    python -m experiments.pages.numbers --check   # exit 1 if any would change
"""

import argparse
import json
import re
import sys

import config
from experiments.pages import fast_page, studies_page, studies_table, training_tables
from experiments.shared.provenance import PROJECT, RESULTS
from fastsae.interpretation import effects
from fastsae.interpretation.run_table import plus_minus
from fastsae.lm.names import described
from fastsae.settings import declarations
from fastsae.settings.help_page import markdown_table

LABELS = ("labels_demo", "labels_cognitive_1350", "labels_gsm8k")  # results of benchmarks/labels.py
NULLS = ("random tokens", "random directions")
# of studies.nulls and studies.target_methods, as they are shown
DATASETS = ("demo", "cognitive_actions_1350", "gsm8k_dialogues_1319")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    texts = {declarations.SHIPPED: shipped_settings()}
    if not args.check:  # first, since the pages read files that may have lost a setting
        declarations.SHIPPED.write_text(texts[declarations.SHIPPED], encoding="utf-8")
        declarations.shipped.cache_clear()
    texts |= {**pages(), RESULTS / "STUDIES.md": studies_page.whole()}
    if args.check:
        return int(
            any(
                not path.exists() or path.read_text(encoding="utf-8") != text
                for path, text in texts.items()
            )
        )
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


def shipped_settings():
    """The text of shipped.json for config.py, the scripts and the studies that have settings."""
    studies = [
        path
        for path in sorted((PROJECT / "experiments" / "studies").glob("*.py"))
        if re.search(r"config\.resolve\(.*__file__", path.read_text(encoding="utf-8"))
    ]
    return declarations.snapshot(
        [*(PROJECT / name for name in declarations.CORE), *studies], config.PRESETS["demo"]
    )


def pages():
    """{path: text} of the README and the pages under docs/ as they should be."""
    paths = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    return {path: written(path.read_text(encoding="utf-8")) for path in paths}


def written(text):
    """A page with its blocks filled."""
    for name, make in (
        ("TREE", tree),
        ("SETTINGS", settings_table),
        ("MEASURED", measured),
        ("STUDIES", studies_table.table),
        ("RESULT", demo_result),
        ("STREAM", stream_result),
        ("STORAGE", storage_result),
        ("DATASETS", datasets_table),
        ("SIZES", sizes_result),
        *fast_page.BLOCKS.items(),
    ):
        begin = f"<!-- {name.lower()}: written by experiments/pages/numbers.py -->"
        block = f"{begin}\n{make()}\n<!-- end -->"
        # re.sub would read a backslash in the block as an escape
        plain = block.replace("\\", r"\\")
        text = re.sub(rf"<!-- {name.lower()}: .*?<!-- end -->", plain, text, flags=re.S)
    return text


def datasets_table():
    """What reading a dataset took in each format."""
    r = result("datasets")
    if r is None:
        return "Not measured yet."
    lines = [
        f"Read row by row, {r['settings']['bytes_of_texts'] / 1e9:g} GB of texts in each "
        "(`experiments/results/datasets.json`):",
        "",
        "| format | file | seconds | memory of the process |",
        "|---|---|---|---|",
    ]
    for name, row in r["formats"].items():
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:,.0f} MB | {row['seconds']:.0f} "
            f"| {row['peak_bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def sizes_result():
    """Error and probes by tokens, M and K."""
    r = result("sparsity")
    return "Not measured yet." if r is None else training_tables.sizes(r)


def stream_result():
    """What a stream took beside extraction and training in turn."""
    r = result("stream")
    extract, train = r["stages"]["both"]
    load = r["load"]["both"]
    return (
        f"Measured with a model {r['settings']['model']}, {r['n_tokens']:,} tokens in "
        f"{r['n_parts']} parts and a budget of 5 %: at most "
        f"{r['peak_bytes']['both']['parts'] / 1e6:.1f} of {r['bytes_of_all_parts'] / 1e6:.0f} MB "
        f"of parts on the disk, {extract['peak_memory_mb']:,} and {train['peak_memory_mb']:,} MB "
        f"of memory; {r['seconds_at_once']:.0f} s at once and {r['seconds_in_turn']:.0f} s in turn "
        f"on two cores that did much other work (load {load:.0f}; {r['cpu_seconds_at_once']:.0f} "
        f"and {r['cpu_seconds_in_turn']:.0f} CPU seconds); the checkpoints have the same bytes "
        "(`experiments/results/stream.json`). "
        + mixing_result(result("stream_mixing"))
        + kill_result()
    )


def kill_result():
    """How many interruptions of a stream were tried and survived."""
    if (r := result("kill_stream")) is None:
        return ""
    trials = ", ".join(f"{each['survived']} {kind}" for kind, each in r["trials"].items())
    return (
        f" Interrupted at every operation of either side, all survived: {trials} "
        "(`experiments/results/kill_stream.json`)."
    )


def storage_result():
    """What 8 bits a value cost an autoencoder."""
    if (r := result("storage")) is None:
        return ""
    n_bytes, noise = r["bytes"], r["noise"]
    lines = [
        f"On {r['n_tokens_compared']:,} test tokens of the demo "
        "(`experiments/results/storage.json`) "
        f"the file has {n_bytes['int8'] / n_bytes['float16']:.2f} of float16's bytes, and a value "
        f"is off by {noise['root_mean_square_in_deviations']:.4f} standard deviations of its "
        f"dimension (root mean square). That is {noise['int8']:.1e} of the variance; with a scale "
        f"per row alone it would be {noise['row scale alone']:.1e}.",
        "",
        "| autoencoder | normalised MSE | given int8's tokens | trained on int8's tokens "
        "| seeds differ by | same active features |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in r["trainings"].items():
        cells = [
            f"{found['normalized_mse']:.4f}",
            f"{round(100 * found['given_int8_change'], 3) + 0.0:+.3f} %",
            f"{100 * found['trained_on_int8_change']:+.2f} %",
            f"{100 * found['seed_spread']:.2f} %",
            f"{100 * found['same_features']:.2f} %",
        ]
        lines.append(f"| {name}, {epochs_of(r, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def epochs_of(r, name):
    """How long a training of the storage benchmark was."""
    flags = r["settings"]["trainings"][name]
    if "--n-epochs" not in flags:
        return "as by default"
    return f"{flags[flags.index('--n-epochs') + 1]} epochs"


def mixing_result(r):
    """What the rounds of a stream lose beside one full shuffle of the same rows."""
    part = r["n_tokens"] // r["n_parts"]
    return (
        f"Mixing: on {r['n_tokens']:,} tokens of {r['settings']['model']}, layer "
        f"{r['settings']['layer']} ({r['bytes_of_all_parts'] / 1e9:.1f} GB), in parts of "
        f"{part:,}, the normalised MSE is "
        f"{r['normalized_mse']['train']:.4f}, and {r['normalized_mse']['shuffled']:.4f} after one "
        "full shuffle of the same rows (`experiments/results/stream_mixing.json`)."
    )


def result(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def threads(r):
    return f"{r['machine']['threads']} thread" + "s" * (r["machine"]["threads"] != 1)


def settings_table():
    declared = {
        name: setting
        for file in ("config.py", *config.STAGES)
        for name, setting in config.read_settings(PROJECT / file).items()
    }
    return markdown_table(declared, config.PRESETS["demo"])


def tree():
    sizes = result("demo")["bytes"]

    def size(name):
        n = next((value for path, value in sizes.items() if path.endswith(name)), None)
        return n and (
            f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB" if n >= 1e3 else f"{n} B"
        )

    checkpoint = next(path for path in sizes if path.endswith(".pt"))
    files = [
        ("activations/", ""),
        ("├── activations_layer12.npz", "residual stream of every token"),
        ("└── activations_layer12.json", "speed, norms"),
        ("checkpoints/cognitive_actions/", ""),
        (f"├── {checkpoint.split('/')[-1]}", "the autoencoder"),
        ("├── metrics.json", "how good it is"),
        ("├── metrics.jsonl", "each epoch"),
        ("├── training.png", "its curves"),
        ("└── README.md", "model card: figures, how to load it elsewhere"),
        ("interpretations.csv", "one row per feature"),
        ("interpretations.jsonl", "the same and more, unrounded"),
        ("interpretations.html", "the report: open it in a browser"),
    ]
    entries = [
        (name, f"{size(name.split()[-1]):9}{what}" if what else "")
        for name, what in files
        if not what or size(name.split()[-1])
    ]
    ends = [
        name[0] == "├" and not after.startswith(("├", "└"))
        for (name, _), (after, _) in zip(entries, [*entries[1:], ("", "")])
    ]
    entries = [
        (name.replace("├", "└") if end else name, text) for (name, text), end in zip(entries, ends)
    ]
    return "```\n" + "\n".join(f"{name:<54}{text}".rstrip() for name, text in entries) + "\n```"


def demo_result():
    """What the demo's figures are, as an example of a result."""
    r = result("demo")
    t = r["training"]
    said = (
        f"The demo ends with a normalised MSE of {t['normalized_mse']:.2f} (1 would be no better "
        "than the mean activation), "
        f"{t['l0']:.0f} active features per token and {100 * t['dead_fraction']:.0f} % dead ones "
        "(`experiments/results/demo.json`)."
    )
    return f"{said} {what_training_added()}".rstrip()


def what_training_added():
    """What the features of the demo, and of a larger dataset, tell beyond random tokens."""
    if (r := result("nulls")) is None:
        return ""
    demo, more, maths = (r["datasets"][name]["mean"] for name in DATASETS)

    def auc(found, source):
        return plus_minus(found["probing"]["sparse_probing"]["16"][source], digits=2)

    def added(found):
        return plus_minus(found["probing"]["added_by_training"]["random tokens"]["16"], digits=2)

    return (
        f"Its 16 best features for an action tell it on held-out texts with an AUC of "
        f"{auc(demo, 'features')}, as many of 256 random tokens with "
        f"{auc(demo, 'random tokens')}: training added {added(demo)}, which may be nothing. On "
        f"{more['probing']['n_examples']:,} texts of another set it added {added(more)}, on "
        f"{maths['probing']['n_examples']:,} dialogues about maths {added(maths)} "
        "(`experiments/results/nulls.json`, 95 % intervals)."
    )


def in_order(r):
    """(name, result) of each dataset of a study, in the order of DATASETS."""
    return sorted(r["datasets"].items(), key=lambda each: DATASETS.index(each[0]))


def nulls(r):
    """A table of what the features tell of the categories, beside what needs no training."""
    lines = [
        "**What training added**: mean AUC of probes of each category on held-out halves, 95 % "
        "intervals over half splits (`results/nulls.json`; mean pooling, 16 columns; gsm8k: the "
        "number of computations in the answer).",
        "",
        "| dataset | features | random tokens | random directions | stream | words "
        "| training added | the stream, all columns |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in in_order(r):
        p = found["mean"]["probing"]
        sources = ("features", *NULLS, "stream", "words")
        sparse = [plus_minus(p["sparse_probing"]["16"][source]) for source in sources]
        added = plus_minus(p["added_by_training"]["random tokens"]["16"], "+")
        dense = plus_minus(p["dense_probing"]["stream"])
        cells = [name, *sparse, added, dense]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "With the maximum over an example's tokens instead of the mean: "
        + "; ".join(
            f"{name} {plus_minus(found['max']['probing']['sparse_probing']['16']['features'])}"
            for name, found in in_order(r)
        )
        + ".",
    ]
    return "\n".join([*lines, "", *partly_trained(r)])


def partly_trained(r):
    """Lines of a table: autoencoders of which one part stays at random directions."""
    datasets = {name: d for name, d in in_order(r) if d["partly_trained"]}
    lines = [
        "Autoencoders of which one part stays where it was drawn at random (nearly frozen: within "
        "a cosine of 0.8 of it), otherwise trained alike, as in "
        "[arXiv 2602.14111](https://arxiv.org/abs/2602.14111): normalised MSE of test examples, "
        "AUC as above, and what training that part too added.",
        "",
        "| dataset | all trained | decoder frozen | decoder nearly frozen | encoder frozen |",
        "|---|---|---|---|---|",
    ]
    for name, found in datasets.items():
        p = found["mean"]["probing"]
        aucs, added = p["sparse_probing"]["16"], p["added_by_training"]
        cells = [f"{found['core']['normalized_mse']:.3f}; {plus_minus(aucs['features'])}"]
        cells += [
            f"{part['normalized_mse']:.3f}; {plus_minus(aucs[kind])}; "
            f"{plus_minus(added[kind]['16'], '+')}"
            for kind, part in found["partly_trained"].items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def measured():
    parts = []
    for name, what in (
        ("demo", "Demo"),
        ("demo_cognitive_500", "500 texts of another set, not part of the project"),
    ):
        if (r := result(name)) is None:
            continue
        t, e = r["training"], r["extraction"]
        s = r["seconds"]
        parts.append(
            f"**{what}** (`results/{name}.json`, {r['machine']['device']}, {threads(r)}): stages "
            "1, 2, 3 in "
            f"{s['extract_activations.py']:.0f}, {s['train_sae.py']:.0f} and "
            f"{s['interpret_sae.py']:.0f} s, a second run in "
            f"{s['run_pipeline.py, nothing changed']:.0f} s; extraction "
            f"{e['tokens_per_second']:,.0f} tokens/s "
            f"(computed in {e['compute_dtype']}), "
            f"training {t['tokens_per_second']:,.0f} tokens/s; normalised MSE "
            f"{t['normalized_mse']:.3f} "
            f"({t.get('measured_on', 'validation')} examples), L0 {t['l0']:.1f}, "
            f"{100 * t['dead_fraction']:.1f} % dead."
        )
        if done := effects.sentence(r.get("run_table", {}).get("effects")):
            parts[-1] += f" {done[:1].upper()}{done[1:]}."
    if (r := result("nulls")) is not None:
        parts.append(nulls(r))
    if (r := result("compare_cognitive_500")) is not None:
        ours, theirs = r["mean"]["ours"], r["mean"]["hypothesaes"]
        parts.append(
            "**Against HypotheSAEs' `fit`** on the same tokens, split and hyperparameters "
            "(`results/compare_cognitive_500.json`, "
            f"{len(r['runs'])} seeds): normalised MSE {ours['normalized_mse']:.4f} against "
            f"{theirs['normalized_mse']:.4f}, in "
            f"{ours['seconds']:.0f} s against {theirs['seconds']:.0f} s (median ratio "
            f"{r['hypothesaes_seconds_over_ours_median']:.1f})."
        )
    if (r := result("bench_extract")) is not None:
        parts.append(extraction_speed(r))
    if (r := result("busy")) is not None:
        parts.append(beside_a_busy_job(r))
    if (r := result("target_methods")) is not None:
        parts.append(target_methods(r))
    parts += labels() + training() + interpretation()
    return "\n\n".join(parts)


def beside_a_busy_job(r):
    """A table: the part of their speed that stages keep beside a busy job, by how threads wait."""
    rows = [
        f"| {name} | "
        + " | ".join(
            f"{100 * row['kept']:.0f} % | {100 * row['quiet_over_own']:.0f} %"
            for row in of_stages.values()
        )
        + " |"
        for name, of_stages in r["speed"].items()
    ]
    return "\n".join(
        [
            f"**Beside another busy job** (`results/busy.json`, {threads(r)}; medians of "
            f"{r['rounds']}): the part of its quiet speed that a stage keeps beside a loop in "
            "Python, and its quiet speed in parts of that with OpenMP's own setting."
            + not_alone(r),
            "",
            "| | stage 1 keeps | quiet | stage 2 keeps | quiet |",
            "|---|---:|---:|---:|---:|",
            *rows,
        ]
    )


def not_alone(r):
    """What is to be said where other work ran in the rounds that were to be quiet."""
    best = max(row["quiet_over_own"] for rows in r["speed"].values() for row in rows.values())
    if best < 1.1:
        return ""
    return " Others were at work in some of the quiet rounds too, hence more than 100 %."


def labels():
    """What the labels without a language model are worth on each dataset, and to a reader."""
    found = [r for name in LABELS if (r := result(name)) is not None]
    if not found:
        return []
    head = [
        "**Labels without a language model** (`results/labels_*.json`): mean F1 of each feature's "
        "rule on the half of the texts that it was not found on (0 without a rule), for “fires "
        "above 0.3 of its maximum”; what else such an F1 can be had with; and the mean AUC of "
        "five-shot detection, in brackets of how many features. The last two columns are of "
        "dictionaries of the same width that nobody trained: their directions have rules too.",
        "",
        "| | rules | four characteristic tokens | eight tokens by F1 | another feature's rule "
        "| random tokens | random directions |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        f1, null = r["f1"], r["untrained"]
        names = ("rules", "four tokens", "tokens by F1", "another's rule")
        cells = [f"{f1[name]['mean']:.2f}" for name in names]
        cells += [f"{null[kind]['rules']['mean']:.2f}" for kind in NULLS]
        head.append(f"| `{r['settings']['dataset']}`, F1 | {' | '.join(cells)} |")
        aucs = [r["detection"]["features"], *(null[kind]["detection"] for kind in NULLS)]
        shown = [f"{auc['mean']:.2f} ({auc['n']})" for auc in aucs]
        head.append(f"| five-shot detection | {shown[0]} | | | | {' | '.join(shown[1:])} |")
    after, before = result("label_sample"), result("label_sample_before")
    if after is None or before is None:
        return ["\n".join(head)]
    now, then = after["counts"], before["counts"]
    read = (
        f"Of {sum(now.values())} features of the demo drawn by a seed, "
        f"{after['settings'].get('reader', 'one reader')}, knowing both kinds of label, counted "
        f"{now['right']} rules as right, {now['partial']} as partly right and {now['useless']} as "
        f"useless; of the four tokens that were the labels before, {then['right']}, "
        f"{then['partial']} and {then['useless']} (`results/label_sample.json`, "
        "`results/label_sample_before.json`, with the texts and a reason each)."
    )
    return ["\n".join(head), read]


def target_methods(r):
    """A table of ways to choose features for a target, and what predicts it without them."""
    datasets = dict(in_order(r))
    lines = [
        "**What predicts a target** (`results/target_methods.json`, means over targets and "
        f"{r['settings']['seeds']} half splits): "
        "of the features chosen on one half, the correlation on the other of the first, the mean "
        "of the first 5, and what a ridge "
        f"regression on the first {r['settings']['n_selected']} predicts there. The first line is "
        "the default. The second table is what it gives for each target: the AUC of its first "
        "hypothesis on the other half (of numbers the correlation), and the ridge regression on "
        f"all {r['settings']['n_selected']} beside others. Brackets and ± are 95 % intervals, "
        "± over half splits.",
        "",
        "| features by | "
        + " | ".join(
            f"`{name.split(',')[0]}`: {d['n_targets']} targets" for name, d in datasets.items()
        )
        + " |",
        "|---" * (len(datasets) + 1) + "|",
    ]
    chosen = [[row for row in d["methods"] if row["least_support"]] for d in datasets.values()]
    default = ("correlation", "mean")
    for rows in sorted(
        zip(*chosen),
        key=lambda rows: (
            (rows[0]["method"], rows[0]["pooling"]) != default,
            rows[0]["pooling"] == "max",
        ),
    ):
        cells = [
            f"{row['first_1']:.2f}, {row['first_5']:.2f}; {d['measure']} {row['held_out']:.3f}"
            for row, d in zip(rows, datasets.values())
        ]
        lines.append(f"| {rows[0]['method']}, {rows[0]['pooling']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *hypotheses(datasets)])


def hypotheses(datasets):
    """Lines of a table: what predicts each target by default, and what does without features."""
    rows = [(name, *each) for name, d in datasets.items() for each in d["hypotheses"].items()]
    names = list(rows[0][2]["sources"])
    lines = [
        f"| target | first hypothesis | {' | '.join(names)} |",
        "|---|---" + "|---" * len(names) + "|",
    ]
    for dataset, target, found in rows:
        first = found["first"][0]
        value = first["held_out_auc"]
        value = first["held_out_correlation"] if value is None else value
        shown = f"{value:.2f} [{first['held_out_low']:.2f}, {first['held_out_high']:.2f}]"
        cells = [
            f"{found['measure']} {plus_minus({**each, 'value': each['held_out']}, digits=2)}"
            for each in found["sources"].values()
        ]
        lines.append(f"| {dataset}: {target.split(' = ')[-1]} | {shown} | {' | '.join(cells)} |")
    return lines


def extraction_speed(r):
    lines = []
    for dtype in ("float32", "bfloat16"):
        ratio = r[dtype]["ratios"]
        faster = " | ".join(
            f"{ratio[f'ours_over_{other}']:.1f}"
            for other in ("seeds_loop", "padded_batches_of_16", "one_at_a_time_cut")
        )
        lines.append(
            f"| {dtype} | {r[dtype]['tokens_per_second']['ours']:,.0f} | {faster} | "
            f"{100 * ratio['ours_share_of_gemm_limit']:.0f} % |"
        )
    memory, computed = r.get("peak_memory_mb"), 100 * r["float32"]["share_of_tokens_computed"]
    return "\n".join(
        [
            f"**Extraction** (`results/bench_extract.json`, layer {r['settings']['layer']}, "
            f"{r['machine']['device']}, {threads(r)}): how "
            "many times faster it is than the usual ways, and its share of the speed at which the "
            f"blocks' matrix products alone would run over all tokens ({computed:.0f} % of them "
            "are computed, the rest is the shared prefix)."
            + (
                f" Peak memory of stage 1: {memory['dataset_x1']:,.0f} MB, and "
                f"{memory['dataset_x10']:,.0f} MB for ten times the data."
                if memory
                else ""
            ),
            "",
            "| | tokens/s | loop over texts, whole model | padded batches of 16, whole model | one "
            "at a time, up to the layer | of the limit |",
            "|---|---:|---:|---:|---:|---:|",
            *lines,
        ]
    )


def training():
    """Speed and quality beside the peers, the architectures, and the claims of
    benchmarks/claims.py."""
    parts = []
    if (r := result("bench_train")) is not None:
        parts.append(training_speed(r))
    if (r := result("architectures")) is not None:
        parts.append(architectures(r))
    if (r := result("training_defaults")) is not None:
        parts.append(training_defaults(r))
    if (r := result("objectives")) is not None:
        parts.append(training_tables.objectives(r))
    if (r := result("sparsity")) is not None:
        parts.append(training_tables.recommended(r))
    claims = [
        claim(r)
        for name, claim in (
            ("memory", memory_claim),
            ("buffer", buffer_claim),
            ("dead", dead_claim),
            ("several", several_claim),
        )
        if (r := result(f"training_{name}")) is not None
    ]
    if claims:
        parts.append(f"**Claims of training** (`results/training_*.json`): {'; '.join(claims)}.")
    return parts


def architectures(r):
    """A table of the architectures on the demo."""
    rows = [
        f"| {name} | {row['normalized_mse']:.3f} | {row['l0']:.2f} | "
        f"{100 * row['dead_fraction']:.1f} % |"
        for name, row in r["runs"].items()
    ]
    return "\n".join(
        [
            "**Architectures** on the demo, M = 256, 10 epochs (`results/architectures.json`):",
            "",
            "| | normalised MSE | L0 | dead |",
            "|---|---:|---:|---:|",
            *rows,
        ]
    )


def training_defaults(r):
    """A table of the cases of studies/training_defaults.py, a row each."""
    rows = [
        f"| {entry} | {name} | {case['mean']:.4f}{around(case)} | {change(case)} | "
        f"{case['epochs']:.0f} | {100 * case['dead_fraction']:.1f} % |"
        for entry, run in r["runs"].items()
        for name, case in run["cases"].items()
    ]
    return "\n".join(
        [
            "**Defaults of training** (`results/training_defaults.json`): normalised MSE of test "
            "examples, mean over the seeds with the 95 % interval, and the change from today's "
            "default seed by seed. Former: 100 epochs at a constant rate of 0.0005.",
            "",
            "| | case | normalised MSE | beside the default | epochs | dead |",
            "|---|---|---:|---:|---:|---:|",
            *rows,
        ]
    )


def around(case):
    """The half width of the interval of a case's error, where it has one."""
    return f" ±{case['interval'][1] - case['mean']:.4f}" if case["interval"] else ""


def change(case):
    """What a case's error is beside the default's, in per cent with its interval."""
    if "percent_over_default" not in case:
        return ""
    low, high = case["percent_interval"] or (case["percent_over_default"],) * 2
    return f"{case['percent_over_default']:+.1f} % [{low:+.1f}, {high:+.1f}]"


def memory_claim(r):
    return (
        f"on a file of {r['file_gb']:.1f} GB with a buffer of "
        f"{r['settings']['buffer_tokens']:,} tokens the peak memory of "
        f"stage 2 is {r['peak_resident_gb']:.2f} GB"
    )


def buffer_claim(r):
    full, eighth = (r["runs"][name]["normalized_mse"] for name in ("full shuffle", "buffer of 1/8"))
    return (
        f"a mixing buffer of 1/8 of the data ends at a normalised MSE of {eighth:.4f} against "
        f"{full:.4f} with a full shuffle"
    )


def dead_claim(r):
    row = r["runs"]["4,608 features"]
    from_tokens = r["runs"]["4,608 features that start as tokens"]
    return (
        f"{100 * row['dead_fraction_training']:.1f} % of 4,608 features are dead after three "
        "epochs of the demo "
        f"({100 * row['dead_fraction']:.1f} % never fire on its "
        f"{row.get('measured_on', 'validation')} examples; "
        f"{100 * from_tokens['dead_fraction']:.1f} % if they start as tokens)"
    )


def several_claim(r):
    seconds = {name: row["seconds_with_start"] for name, row in r["runs"].items()}
    together = seconds.pop("seeds 0,1,2")
    return (
        f"three seeds in one pass take {together:.0f} s, one after the other "
        f"{sum(seconds.values()):.0f} s"
    )


def training_speed(r):
    """A table: tokens/s of each trainer, how many times faster ours is, normalised MSE after the
    same tokens."""
    shapes = {
        "256,8,prefixes": "M = 256, K = 8, prefixes",
        "256,8": "M = 256, K = 8",
        "4608,32": "M = 4,608, K = 32",
    }
    lines = [
        f"**Training** (`results/bench_train.json`, {r['machine']['device']}, {threads(r)}; the "
        "same rows, batch "
        f"size and learning rate; medians of {rounds_of(r['speed'])}): tokens/s, in brackets how "
        "many times faster ours is "
        "(float32 / bfloat16 selection), and normalised MSE on held-out examples after the same "
        "few tokens, each library with its own "
        "start and losses: SAELens' need more steps than these, and quality after long training is "
        "another question.",
        "",
        "| | " + " | ".join(shapes.values()) + " |",
        "|---|" + "---|" * len(shapes),
    ]
    lines += [
        f"| {name} | {' | '.join(speed_and_quality(r, shape, name) for shape in shapes)} |"
        for name in r["speed"]["256,8"]
        if not name.startswith("encoder")
    ]
    own, limit = (
        r["speed"]["4608,32"][name]["tokens_per_second"]
        for name in ("ours float32", "encoder product float32")
    )
    lines += [
        "",
        f"At M = 4,608 in float32 a step of ours takes {100 * limit / own:.0f} % of the time that "
        "PyTorch needs for the encoder's matrix product alone (ours computes it by oneDNN, which "
        "is faster on this processor). Others used the machine at times: compare ratios. "
        + dense_speed(r.get("dense", {}).get("4608,32", {})),
    ]
    if sentences := list(time_to_quality(r, shapes)):
        lines += [
            "",
            "Time to HypotheSAEs' own quality: its `fit` with its own rate, batch size and early "
            "stopping; ours with its defaults (rate, falling over its epochs) until it has the "
            f"same normalised MSE on held-out examples. {' '.join(sentences)}",
        ]
    return "\n".join(lines)


def rounds_of(shapes):
    """How many timings the medians of the shapes are of, in words."""
    counts = {len(each["all"]) for found in shapes.values() for each in found.values()}
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def dense_speed(found):
    """How many times SAELens' speed the architectures without a K have."""
    names = [name for name in found if "ours over it" in found[name]]
    ratios = ", ".join(f"{name} {found[name]['ours over it']:.1f}" for name in names)
    return f"The other architectures there, in times of SAELens' speed: {ratios}." if names else ""


def time_to_quality(r, shapes):
    """A sentence for each shape."""
    for shape, found in r.get("converged", {}).items():
        theirs = found["hypothesaes"]
        each = ", ".join(
            f"{name.removeprefix('ours ')} {one['seconds']:.1f} s after {one['epochs']:g} epochs "
            f"({one['hypothesaes_seconds_over_it']:.0f} times sooner)"
            if one["reached"]
            else f"{name.removeprefix('ours ')} not within {one['epochs']:g} epochs "
            f"(it ends at {one['normalized_mse']:.4f} after {one['seconds']:.1f} s)"
            for name, one in found.items()
            if name.startswith("ours")
        )
        yield (
            f"{shapes[shape]}, {found['n_train_tokens']:,} tokens: HypotheSAEs "
            f"{theirs['normalized_mse']:.4f} in {theirs['seconds']:.0f} s, {theirs['epochs']} "
            f"epochs; ours {each}."
        )


def speed_and_quality(r, shape, name):
    """A cell of the table; "" for a trainer that does not know the shape."""
    speed, quality = r["speed"][shape].get(name), r["quality"].get(shape, {}).get(name)
    if speed is None:
        return ""
    cell = f"{speed['tokens_per_second']:,}"
    if not name.startswith("ours"):
        cell += (
            f" ({speed['ours float32 over it']:.1f} / "
            f"{speed['ours bfloat16 selection over it']:.1f})"
        )
    return cell if quality is None else f"{cell}; {quality['normalized_mse']:.3f}"


def interpretation():
    """What stage 3's benchmark and its run with a real model gave."""
    parts = []
    if (r := result("bench_interpret")) is not None:
        small, large, memory = (
            r["parts"][name] for name in ("speed_256", "speed_4608", "memory_32768")
        )
        parts.append(
            f"**Feature statistics** in one pass (`results/bench_interpret.json`, {threads(r)}): "
            f"{small['tokens_per_second']:,} tokens/s at M = 256 and "
            f"{large['tokens_per_second']:,} at M = 4,608, "
            f"{small['times_faster']:.1f} and {large['times_faster']:.1f} times HypotheSAEs' "
            "`get_activations` with numpy; "
            "at M = 32,768 the peak is "
            f"{memory['peak_memory_above_inputs_mib']} MiB above the activations."
        )
    if (r := result("llm_end_to_end")) is not None:
        parts.append(
            "**A real model as interpreter** (`results/llm_end_to_end.json`, "
            f"{described(r['settings']['model'])}, "
            f"behind HTTP): {r['labelled']} "
            f"features labelled, {r['scored']} scored and {r['validated']} validated in "
            f"{r['calls']} calls, killed after "
            f"{r['calls_before_kill']} and continued; {r['repeated_calls']} calls were made twice, "
            f"the {r['in_flight_at_kill']} in flight. "
            "So small a model is no judge."
        )
    return parts


if __name__ == "__main__":
    sys.exit(main())
