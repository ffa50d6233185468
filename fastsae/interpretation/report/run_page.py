"""What the report says of the run as a whole: its story in a few sentences, charts, settings and
provenance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.formats.export import dataset_name
from fastsae.formats.load import architecture_text
from fastsae.interpretation import effects, run_table
from fastsae.interpretation.features import AUC_BOUND, Features
from fastsae.interpretation.report import charts
from fastsae.interpretation.report.overview import verdict
from fastsae.interpretation.significance import LEVEL
from fastsae.interpretation.tables import by_language_model
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import described, short_name
from fastsae.sae.metrics import measured_on

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence
    from fastsae.interpretation.statistics import Statistics

METRICS = (
    ("normalized_mse", "normalised MSE"),
    ("explained_variance", "explained variance"),
    ("mse", "MSE (FAST, eq. 7)"),
    ("mse_template_tokens", "MSE on the template's tokens"),
    ("cosine_similarity", "cosine similarity"),
    ("l0", "L0"),
    ("dead_fraction", "features that never fire there"),
    ("n_train_tokens", "training tokens"),
    ("n_validation_tokens", "validation tokens"),
    ("n_test_tokens", "test tokens"),
    ("epochs", "epochs"),
    ("best_epoch", "best epoch"),
)

MEASURED = {
    "test": "On test examples, which decided nothing: neither the weights nor the best epoch.",
    "validation": "On validation examples: "
    "it was not trained on them, but they chose the best epoch.",
}


def describe_run(
    features: Features,
    metadata: Mapping[str, Any],
    scored: Any,
    settings: Mapping[str, Any],
    n_shown: int,
) -> dict[str, Any]:
    """What `report.render` needs besides the features: title, story, charts and tables."""
    evidence = features.evidence
    sae_meta = features.sae_meta
    source = features.source
    rows = features.rows
    s, m = evidence.statistics, len(rows)
    n_alive = sum(row["status"] != "dead" for row in rows)
    model, layer = described(source["model_name"]), source["settings"]["LAYER_IDX"]
    dataset = source["dataset_path"].rsplit("/", 1)[-1]
    n_examples = len(evidence.examples)
    imported = "source" in sae_meta  # from another library: its training is not known here
    # measured: K is not how many fire in every kind
    l0 = sae_meta.get("metrics", {}).get("l0", s.count.sum() / max(s.n_kept, 1))
    who_learned = (
        f"from {sae_meta['source']['format']} writes" if imported else "then learned to write"
    )
    story = (
        f"Each of the {n_examples:,} examples of {dataset} went through {model}, alone. A sparse "
        f"autoencoder {who_learned} "
        f"the model's state after layer {layer} on every token as a sum of about "
        f"{l0:{',.0f' if l0 >= 1000 else '.3g'}} of "
        f"{m:,} features; {n_alive:,} of them fire on this dataset. The figures count {s.n_kept:,} "
        "tokens"
        f"{left_out(sae_meta, len(s.kept) - s.n_kept)}. "
        f"{who_labelled(rows, metadata['settings']['llm'])}"
    )
    notice = None
    if n_shown < n_alive:
        notice = (
            f"This report shows {n_shown:,} of {n_alive:,} features that fire: "
            "those with a language model's label and the highest category AUC or activation. "
            "interpretations.csv has all; N_REPORT_FEATURES sets how many are shown."
        )
    return {
        "title": f"{m:,} features of {model}",
        "subtitle": f"after layer {layer} · {n_examples:,} examples of {dataset} · "
        f"{s.n_kept:,} tokens · {m - n_alive:,} dead",
        "story": story,
        "verdict": verdict(sae_meta.get("metrics", {}), features.summary(), features.run_table),
        "notice": notice,
        "field": settings.get("LABEL_FIELD"),
        "table": features.run_table,
        "chance": features.category_chance(),
        "charts": [
            *worth_charts(features.run_table),
            *run_charts(
                evidence, sae_meta.get("history"), sae_meta["max_norm"], features.categories, scored
            ),
        ],
        "grids": worth_grids(features.run_table),
        "tables": run_tables(
            sae_meta, source, metadata, settings, features.comparison, features.summary()
        ),
    }


def left_out(sae_meta: Mapping[str, Any], n_tokens: int) -> str:
    """Which tokens the figures leave out, as the end of a sentence that counts the others."""
    settings = sae_meta["settings"]
    parts = [
        name
        for name, there in (
            ("the prefix that all examples share", settings["EXCLUDE_SHARED_PREFIX"]),
            ("attention sinks", sae_meta["max_norm"] is not None),
            ("the chat template", settings.get("USE_TOKENS") == "content"),
            ("all but the assistant's text", settings.get("USE_TOKENS") == "assistant"),
        )
        if there
    ]
    return (
        f"; {n_tokens:,} are left out, {' and '.join(', '.join(parts).rsplit(', ', 1))}"
        if n_tokens and parts
        else ""
    )


def who_labelled(rows: Sequence[Mapping[str, Any]], llm: Mapping[str, Any] | None) -> str:
    """A sentence on who wrote the labels; llm: the settings of the language model, None where none
    was asked."""
    n_llm = sum(map(by_language_model, rows))
    if n_llm:
        assert llm is not None  # or no label would be a language model's
        return (
            f"{n_llm} labels were written by {llm['INTERPRETER_MODEL']}, "
            "the others are rules, found on half of the texts and tested on the other."
        )
    asked = (
        f"{llm['INTERPRETER_MODEL']} was asked and gave no usable label"
        if llm
        else "No language model was asked"
    )
    return f"{asked}: every label is a rule, found on half of the texts and tested on the other."


def worth_charts(table: Mapping[str, Any]) -> list[charts.Chart]:
    """How well categories are read from the features, beside what nobody trained, as bars."""
    if "probing" not in table:
        return []
    probing = table["probing"]
    k, by_source = list(probing["sparse_probing"].items())[-1]
    rows = [
        (run_table.NAMES[name], found["value"], *found["interval"])
        for name, found in by_source.items()
        if found
    ]
    return [
        charts.intervals(
            "What training added",
            f"mean AUC of telling {probing['n_categories']} categories apart on held-out texts by "
            f"the {k} best columns of each; the lines are 95 % intervals. Two dictionaries of the "
            "same size that nobody trained, the model's own dimensions and the words say what the "
            f"features have to be compared with: {run_table.verdict(probing)}",
            rows,
            start=0.5,
            end=1,
            cool={0},
        )
    ]


def worth_grids(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{name, note, head, rows}]: tables of several columns, of what the run is worth."""
    grids = []
    if probing := table.get("probing"):
        head, rows = run_table.probing_rows(probing)
        counts = [
            [run_table.NAMES[name], run_table.plus_minus(found, digits=0)]
            for name, found in probing["n_above_auc_bound"].items()
        ]
        grids += [
            {
                "name": "What the features are worth",
                "note": run_table.probing_note(probing),
                "head": head,
                "rows": rows,
            },
            {
                "name": f"Columns with an AUC above {probing['auc_bound']} for a category",
                "note": "chosen on one half of the texts and measured on the other; those that are "
                "not above chance are not counted.",
                "head": ["", "columns"],
                "rows": counts,
            },
        ]
    if "recovered" in (loss := table.get("model_loss", {})):
        grids.append(
            {
                "name": "What the model loses",
                "note": run_table.sentence(run_table.model_loss_sentence(loss))
                + " Loss in nats, of the next token; KL divergence from the model as it is.",
                "head": ["in place of the stream", "loss", "KL"],
                "rows": [
                    [
                        name,
                        f"{loss['ce'][key]:.3f}",
                        "" if key == "clean" else f"{loss['kl'][key]:.3f}",
                    ]
                    for key, name in (
                        ("clean", "nothing"),
                        ("spliced", "the reconstruction"),
                        ("mean", "the mean"),
                        ("zero", "zeros"),
                    )
                ],
            }
        )
    if effects.REMOVED in (done := table.get("effects") or {}):
        grids.append(
            {
                "name": "What the features do",
                "note": run_table.sentence(effects.sentence(done))
                + f" Counted on {done['n_tokens']:,} tokens after one on which they fire, in their "
                "strongest examples; KL divergence from the model as it is and change of the loss "
                "in nats, in brackets those of pushes of the same length in random directions.",
                "head": ["", "KL", "loss", "times random", "beyond every random direction"],
                "rows": [
                    [
                        words,
                        f"{done[name]['kl']:.3f} ({done[name]['random_kl']:.3f})",
                        f"{done[name]['loss']:+.3f} ({done[name]['random_loss']:+.3f})",
                        effects.times_random(done[name]),
                        f"{done[name]['n_beyond']} of {done['n_features']}",
                    ]
                    for name, words in (
                        (effects.REMOVED, "taken out"),
                        (effects.ADDED, "added once more"),
                    )
                ],
            }
        )
    if stability := table.get("seed_stability"):
        grids.append(
            {
                "name": "Features that other seeds have too",
                "note": run_table.sentence(run_table.stability_sentence(stability)),
                "head": ["", "mean of the largest cosine", "in all, %"],
                "rows": [
                    [
                        run_table.NAMES[name],
                        f"{stability[name]['mean_max_cosine']:.3f}",
                        f"{100 * stability[name]['found_in_all']:.0f}",
                    ]
                    for name in run_table.NAMES
                    if name in stability
                ],
            }
        )
    return grids


def shown_with_interval(entry: Mapping[str, Any]) -> str:
    """'0.850 ±0.020' of a source of `target_features.compare`."""
    if entry["held_out"] is None or entry["interval"] is None:
        return "-" if entry["held_out"] is None else f"{entry['held_out']:.3f}"
    return run_table.plus_minus({"value": entry["held_out"], "interval": entry["interval"]})


def target_table(comparison: Mapping[str, Any]) -> tuple:
    """How well the target is predicted, with and without features, as a table of the run page."""
    note = (
        f"{comparison['measure']} of ridge regressions, fitted on {comparison['n_finding']:,} "
        f"examples and measured on {comparison['n_held_out']:,} others, over "
        f"{comparison['n_splits']} half splits with a 95 % interval. The features have to be "
        "compared with what needs none."
    )
    return (
        "What predicts the target",
        note,
        [
            (f"{name} ({entry['n_columns']:,} columns)", shown_with_interval(entry))
            for name, entry in comparison["sources"].items()
        ],
        True,
    )


def label_table(counts: Mapping[str, Any]) -> tuple:
    """What labels without a language model are worth, each figure beside its null, as a table of
    the run page."""
    note = (
        "Rules are found on half of the texts and tested on the other: F1 for “fires above 0.3 of "
        "its maximum”, 0 without a rule. Five-shot detection: among the same tokens, how well five "
        "examples tell where the feature fires; 0.5 is chance."
    )
    entries = [
        ("features with a rule", f"{counts['n_with_rule']:,} of {counts['n_rule_tested']:,}"),
        ("mean F1 of the rules", f"{counts['mean_label_f1']:.3f}"),
        ("mean F1 of another feature's rule", f"{counts['mean_label_f1_other_rule']:.3f}"),
    ]
    if "n_detection" in counts:
        entries += [
            (
                f"mean AUC of five-shot detection, {counts['n_detection']:,} features",
                f"{counts['mean_detection_auc']:.3f}",
            ),
            ("the same of random directions", f"{counts['mean_detection_auc_random']:.3f}"),
        ]
    return "What the labels are worth", note, entries, True


def run_tables(
    sae_meta: Mapping[str, Any],
    source: Mapping[str, Any],
    metadata: Mapping[str, Any],
    settings: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
    counts: Mapping[str, Any],
) -> list[tuple]:
    """[(name, note, [(key, value)], open)] of figures, provenance and settings; counts: of
    `Features.summary`."""
    metrics = sae_meta.get("metrics", {})
    figures = [
        (name, _shown(metrics[key])) for key, name in METRICS if metrics.get(key) is not None
    ]
    if "validation" in metrics and measured_on(metrics) == "test":
        figures.append(
            (
                "normalised MSE on validation, which chose the epoch",
                _shown(metrics["validation"]["normalized_mse"]),
            )
        )
    figures += [
        (f"normalised MSE from the first {end}", _shown(v))
        for end, v in metrics.get("prefix_normalized_mse", {}).items()
    ]
    every = [
        ("Settings of stage 1, extraction", source["settings"]),
        ("Settings of stage 2, training", sae_meta["settings"]),
        (
            "Settings of stage 3, interpretation",
            {name: named(value) for name, value in settings.items()},
        ),
    ]
    measured = (
        "On tokens of this dataset, drawn at random."
        if "source" in sae_meta
        else MEASURED[measured_on(metrics)]
    )
    return [
        ("How well the autoencoder reconstructs", measured, figures, True),
        *([label_table(counts)] if counts.get("n_rule_tested") else []),
        *([target_table(comparison)] if comparison else []),
        ("Where this comes from", "", provenance(sae_meta, source, metadata), True),
        *(
            (name, "", [(key, _shown(value)) for key, value in values.items()], False)
            for name, values in every
        ),
    ]


def where_read(source: Mapping[str, Any]) -> str:
    """The place in the model, in words."""
    point = HookPoint.of_activations(dict(source))
    if point.kind == "resid_post":
        return f"residual stream after {point.layer} blocks"
    return f"{point.text}, counted from 0 (layer {point.layer})"


def provenance(
    sae_meta: Mapping[str, Any], source: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """[(key, value)]: the model, the data, the files and the versions."""
    return [
        ("model", described(source["model_name"])),
        ("autoencoder", architecture_text(sae_meta["settings"])),
        ("revision", source.get("resolved_revision") or source.get("model_revision") or "as named"),
        ("layer", where_read(source)),
        ("dataset", dataset_name(source["dataset_path"])),
        ("dataset sha256", source["inputs"]["dataset"]),
        ("checkpoint", short_name(metadata["checkpoint"])),
        (
            "fingerprints",
            f"activations {source['fingerprint'][:16]}, autoencoder "
            f"{sae_meta['fingerprint'][:16]}, interpretation {metadata['fingerprint'][:16]}",
        ),
        (
            "device, type",
            f"{source.get('device', '')}, computed in {source.get('compute_dtype', '?')}",
        ),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in metadata["versions"].items()),
        ),
    ]


def named(value: Any) -> Any:
    """`value`; of a path on this machine only its last part: the report is made to be sent on, the
    tables' first line has it all."""
    return short_name(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _shown(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def run_charts(
    evidence: "Evidence", history: Any, max_norm: float | None, categories: Any, scored: Any
) -> list[charts.Chart | None]:
    """The charts of the run page; None, or nothing, where there are no data."""
    result = [_training_chart(history)] if history else []
    result += _token_charts(evidence.statistics, max_norm)
    if categories is not None:
        result.append(_category_chart(categories))
    if scored:
        result.append(_score_chart(scored))
    return result


def _training_chart(history: Any) -> charts.Chart | None:
    return charts.curves(
        "Training",
        "loss on training tokens and normalised MSE on held-out examples, by epoch",
        [
            (name, [line[key] for line in history])
            for name, key in (("normalised MSE", "normalized_mse"), ("loss", "loss"))
        ],
    )


def _token_charts(statistics: "Statistics", max_norm: float | None) -> list[charts.Chart | None]:
    """Norms of the tokens, and densities of the features on them."""
    beyond = max_norm is not None and bool((statistics.norms > max_norm).any())
    sinks = "; those beyond the line are attention sinks, left out" if beyond else ""
    return [
        charts.log_bars(
            "Token norms",
            f"tokens by the norm of their activation, heights as square roots{sinks}",
            statistics.norms,
            guide=max_norm if beyond else None,
            guide_name="bound",
        ),
        charts.log_bars(
            "Density",
            "features by the share of tokens on which they fire, heights as square roots",
            statistics.density,
        ),
    ]


def _category_chart(categories: Any) -> charts.Chart:
    """How well features separate their best category, beside shuffled labels."""
    aucs, shuffled, counts = categories.auc, categories.shuffled, categories.summary(AUC_BOUND)
    edges = np.linspace(0.3, 1, 15)
    found = np.histogram(aucs[~np.isnan(aucs)].clip(0.3, 1), edges)[0]
    chance = np.histogram(shuffled[~np.isnan(shuffled)].clip(0.3, 1), edges)[0] * (
        len(aucs) / max(shuffled.size, 1)
    )
    return charts.bars(
        "Category AUC",
        "features by the AUC of their best category, on examples not used to choose it; "
        "dashed: with shuffled labels. A category is named for the "
        f"{counts['n_with_category']} that are above chance, with a share of false ones "
        f"of {100 * LEVEL:.0f} % at most expected; how many are beyond {AUC_BOUND}, beside "
        "dictionaries that nobody trained, is in a table below",
        found.tolist(),
        [f"{edges[i]:.1f}" if i % 2 == 0 else None for i in range(14)],
        cool=set(range(10, 14)),
        outline=chance.tolist(),
    )


def _score_chart(scored: Any) -> charts.Chart:
    shares = [sum(score == value for score in scored) / len(scored) for value in range(1, 6)]
    return charts.bars(
        "Interpretability score",
        f"share of {len(scored)} features drawn at random, by the language model's score "
        "from 1 to 5",
        shares,
        list("12345"),
        shown=[f"{100 * share:.0f} %" for share in shares],
        cool={3, 4},
    )
