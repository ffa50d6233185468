"""Write the parts of the README that come from files: the settings table, and the figures under experiments/results/.

    python experiments/readme_numbers.py           # rewrite the README
    python experiments/readme_numbers.py --check   # exit 1 if it would change
"""
import argparse
import json
import re
import sys

from common import PROJECT, RESULTS

import config


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = PROJECT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = old
    for name, make in (("TREE", tree), ("SETTINGS", settings_table), ("MEASURED", measured)):
        block = f"<!-- {name.lower()}: written by experiments/readme_numbers.py -->\n{make()}\n<!-- end -->"
        new = re.sub(rf"@@{name}@@|<!-- {name.lower()}: .*?<!-- end -->", lambda _, block=block: block, new, flags=re.S)
    if args.check:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


def result(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def settings_table():
    lines = ["| setting | default | file | meaning |", "|---|---|---|---|"]
    for file in ("config.py", *config.STAGES):
        for name, setting in config.read_settings(PROJECT / file).items():
            default = setting["value"] if setting["has_value"] else config.PRESETS["demo"][name]
            text = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            origin = f"`{file}`" + ("" if setting["has_value"] else ", by preset")
            comment = setting["comment"].replace("|", "or")
            lines.append(f"| `{name}` | {text} | {origin} | {comment} |")
    return "\n".join(lines)


def tree():
    sizes = result("demo")["bytes"]

    def size(name):
        n = next(value for path, value in sizes.items() if path.endswith(name))
        return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB" if n >= 1e3 else f"{n} B"

    checkpoint = next(path for path in sizes if path.endswith(".pt"))
    entries = [("activations/", ""), ("├── activations_layer12.npz", size(".npz") + "   residual stream of every token"),
               ("└── activations_layer12.json", size("layer12.json") + "   speed, norms"), ("checkpoints/cognitive_actions/", ""),
               (f"├── {checkpoint.split('/')[-1]}", size(".pt") + "   the autoencoder"),
               ("├── metrics.json", size("metrics.json") + "   how good it is"),
               ("└── metrics.jsonl", size("metrics.jsonl") + "   each epoch"),
               ("interpretations.csv", size(".csv") + "   one row per feature"),
               ("interpretations.jsonl", size("interpretations.jsonl") + "   the same, exact")]
    if any(path.endswith(".html") for path in sizes):
        entries.append(("interpretations.html", size(".html") + "   the report: open it in a browser"))
    return "```\n" + "\n".join(f"{name:<54}{text}".rstrip() for name, text in entries) + "\n```"


def measured():
    parts = []
    for name, what in (("demo", "Demo"), ("demo_cognitive_500", "500 texts of another cognitive-action set")):
        if (r := result(name)) is None:
            continue
        t, e, i = r["training"], r["extraction"], r["interpretation"]
        s = r["seconds"]
        parts.append(
            f"**{what}** (`results/{name}.json`, {r['machine']['device']}, {r['machine']['threads']} threads): stages 1, 2, 3 in "
            f"{s['extract_activations.py']:.0f}, {s['train_sae.py']:.0f} and {s['interpret_sae.py']:.0f} s, a second run in "
            f"{s['run_pipeline.py, nothing changed']:.0f} s; extraction {e['tokens_per_second']:,.0f} tokens/s ({e['compute_dtype']}), "
            f"training {t['tokens_per_second']:,.0f} tokens/s; normalised MSE {t['normalized_mse']:.3f}, L0 {t['l0']:.1f}, "
            f"{100 * t['dead_fraction']:.1f} % dead; {i['n_above_auc_bound']} features with category AUC above {i['auc_bound']}, against "
            f"{i['n_above_auc_bound_shuffled']:.1f} under shuffled labels.")
    if (r := result("compare_cognitive_500")) is not None:
        ours, theirs = r["mean"]["ours"], r["mean"]["hypothesaes"]
        parts.append(
            f"**Against HypotheSAEs' `fit`** on the same tokens, split and hyperparameters (`results/compare_cognitive_500.json`, "
            f"{len(r['runs'])} seeds): normalised MSE {ours['normalized_mse']:.4f} against {theirs['normalized_mse']:.4f}, in "
            f"{ours['seconds']:.0f} s against {theirs['seconds']:.0f} s (median ratio {r['hypothesaes_seconds_over_ours_median']:.1f}).")
    if (r := result("bench_extract")) is not None:
        parts.append(extraction_speed(r))
    parts += interpretation()
    return "\n\n".join(parts)


def extraction_speed(r):
    def line(dtype):
        s, ratio = r[dtype]["tokens_per_second"], r[dtype]["ratios"]
        return (f"{dtype} {s['ours']:,.0f} tokens/s: {ratio['ours_over_seeds_loop']:.1f} times a loop over single texts through the whole "
                f"model, {ratio['ours_over_padded_batches_of_16']:.1f} times padded batches of 16, "
                f"{ratio['ours_over_one_at_a_time_cut']:.1f} times one at a time up to the layer; "
                f"{100 * ratio['ours_share_of_gemm_limit']:.0f} % of what the blocks' matrix products alone would allow for all tokens "
                f"({100 * r[dtype]['share_of_tokens_computed']:.0f} % of them are computed, the rest is the shared prefix)")

    memory = r.get("peak_memory_mb")
    text = (f"**Extraction** (`results/bench_extract.json`, layer {r['settings']['layer']}, {r['machine']['device']}, "
            f"{r['machine']['threads']} threads): {line('float32')}; {line('bfloat16')}.")
    return text + (f" Peak memory of stage 1: {memory['dataset_x1']:,.0f} MB, and {memory['dataset_x10']:,.0f} MB for ten times the data."
                   if memory else "")


def interpretation():
    """What stage 3's benchmark and its run with a real model gave."""
    parts = []
    if (r := result("bench_interpret")) is not None:
        small, large, memory = (r["parts"][name] for name in ("speed_256", "speed_4608", "memory_32768"))
        parts.append(
            f"**Feature statistics** in one pass (`results/bench_interpret.json`, {r['machine']['threads']} threads): "
            f"{small['tokens_per_second']:,} tokens/s at M = 256 and {large['tokens_per_second']:,} at M = 4,608, "
            f"{small['times_faster']:.1f} and {large['times_faster']:.1f} times HypotheSAEs' `get_activations` with numpy; "
            "at M = 32,768 the peak is "
            f"{memory['peak_memory_above_inputs_mib']} MiB above the activations.")
    if (r := result("llm_end_to_end")) is not None:
        parts.append(
            f"**A real model as interpreter** (`results/llm_end_to_end.json`, {r['settings']['model']} behind HTTP): {r['labelled']} "
            f"features labelled, {r['scored']} scored and {r['validated']} validated in {r['calls']} calls, killed after "
            f"{r['calls_before_kill']} and continued; {r['repeated_calls']} calls were made twice, the {r['in_flight_at_kill']} in flight. "
            "So small a model is no judge.")
    return parts


if __name__ == "__main__":
    sys.exit(main())
