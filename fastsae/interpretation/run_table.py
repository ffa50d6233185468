"""What a run is worth: how well the dataset's categories can be read from its features, beside the
same from dictionaries that nobody trained, from the model's own stream and from the words alone.

All figures are of held-out halves, with intervals over half splits (`probing.estimate`), on the
same examples for every source.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.interpretation import effects, probing
from fastsae.interpretation.categories import Matrix, category_above_chance, number_labels
from fastsae.interpretation.nulls import Untrained
from fastsae.interpretation.probing import KINDS, KS, estimate
from fastsae.interpretation.stability import SAME
from fastsae.interpretation.tables import with_interval
from fastsae.interpretation.target_features import word_counts

if TYPE_CHECKING:
    from fastsae.interpretation.statistics import Statistics

N_SPLITS = 5
COUNTED = 1024  # columns that are counted at most, drawn at random; they stand for all
FEATURES, STREAM, WORDS = "features", "stream", "words"
# what each source is called where people read it
NAMES = {
    FEATURES: "the features",
    KINDS[0]: "random tokens as a dictionary",
    KINDS[1]: "random directions as a dictionary",
    STREAM: "the model's stream",
    WORDS: "bag of words",
}


def core_figures(sae_meta: Mapping[str, Any], statistics: "Statistics") -> dict[str, Any]:
    """The figures of the reconstruction that its training measured (none of an autoencoder from
    elsewhere), and on the tokens examined here how many features fire and how many never do."""
    metrics = sae_meta.get("metrics", {})
    names = ("measured_on", "normalized_mse", "explained_variance")
    return {
        **{name: metrics[name] for name in names if metrics.get(name) is not None},
        "l0": float(statistics.count.sum() / max(statistics.n_kept, 1)),
        "dead_fraction": float((statistics.count == 0).mean()),
        "n_tokens": int(statistics.n_kept),
    }


class Probed:
    """The examples that are probed, their categories, and each source's columns for them.

    sources: {name: [(n, p) matrix of each draw]}; one where nothing is drawn. dictionaries: the
    names of those that the autoencoder is compared with.
    """

    def __init__(
        self,
        statistics: "Statistics",
        untrained: Untrained,
        labels: Sequence[str | None] | None,
        texts: np.ndarray,
        read_text: Callable[[int], str] | None,
        pooling: str,
    ) -> None:
        # the examples whose features are pooled too
        shared = np.isin(untrained.examples, statistics.pooled_examples)
        known = [labels is not None and labels[i] is not None for i in untrained.examples]
        rows = np.flatnonzero(shared & np.array(known, bool))
        self.examples = untrained.examples[rows]
        self.names, self.labels = number_labels(
            [str(labels[i]) for i in self.examples] if labels else []
        )
        self.texts = np.unique(texts[self.examples], return_inverse=True)[1]
        place = np.searchsorted(statistics.pooled_examples, self.examples)
        own = statistics.pooled_max if pooling == "max" else statistics.pooled_mean
        self.sources: dict[str, list[Matrix]] = {FEATURES: [own[place]]}
        self.dictionaries = list(untrained.pooled)
        for kind, draws in untrained.pooled.items():
            self.sources[kind] = [getattr(pooled, pooling)[rows] for pooled in draws]
        self.sources[STREAM] = [untrained.stream[rows]]
        self.read = [read_text(int(i)) for i in self.examples] if read_text else None

    def columns(self, name: str, split: int, first: np.ndarray) -> Matrix:
        """The columns of a source for a half split: of its draws in turn, of the words those that
        the finding half has."""
        if name == WORDS:
            assert self.read is not None
            return word_counts(self.read, first)
        draws = self.sources[name]
        return draws[split % len(draws)]

    @property
    def all_names(self) -> list[str]:
        """The sources that there are."""
        return [*self.sources, *([WORDS] if self.read is not None else [])]


def probe(probed: Probed, bound: float, seed: int) -> dict[str, Any] | None:
    """Everything that is measured of `probed`, JSON-able; None where no category has texts enough.

    `bound`: the AUC above which a feature is counted. See `docs/files.md` for the keys.
    """
    if not len(probed.labels):
        return None
    categories = probing.probed_categories(probed.labels, probed.texts)
    if not len(categories):
        return None
    inside = probed.labels[None, :] == categories[:, None]  # (n_categories, n)
    splits = probing.half_splits(probed.labels, len(probed.names), probed.texts, seed, N_SPLITS)
    sparse_aucs: dict[str, np.ndarray] = {}  # each (n_splits, len(KS), n_categories)
    dense_aucs: dict[str, np.ndarray] = {}  # each (n_splits, n_categories)
    counts: dict[str, np.ndarray] = {}  # each (n_splits, 2): named, above the bound
    for name in probed.all_names:
        of_splits = [probed.columns(name, i, first) for i, first in enumerate(splits)]
        pairs = list(zip(of_splits, splits))
        sparse_aucs[name] = np.stack([probing.sparse_probe(c, inside, f) for c, f in pairs])
        dense_aucs[name] = np.stack([probing.dense_probe(c, inside, f) for c, f in pairs])
        if name == FEATURES or name in KINDS:
            counts[name] = np.array(
                [counted(c, probed, seed + i, bound) for i, c in enumerate(of_splits)]
            )
    return {
        "n_examples": len(probed.examples),
        "n_categories": len(categories),
        "n_splits": len(splits),
        "n_draws": max([len(draws) for draws in probed.sources.values()]),
        "sparse_probing": {
            str(k): {name: auc_over(found[:, i].mean(1)) for name, found in sparse_aucs.items()}
            for i, k in enumerate(KS)
        },
        "dense_probing": {name: auc_over(found.mean(1)) for name, found in dense_aucs.items()},
        "probe_gap": over_splits((dense_aucs[STREAM] - sparse_aucs[FEATURES][:, -1]).mean(1)),
        "added_by_training": {
            kind: {
                str(k): over_splits((sparse_aucs[FEATURES] - sparse_aucs[kind])[:, i].mean(1))
                for i, k in enumerate(KS)
            }
            for kind in sparse_aucs
            if kind in probed.dictionaries
        },
        "auc_bound": bound,
        "n_with_category": {name: over_splits(found[:, 0], 0) for name, found in counts.items()},
        "n_above_auc_bound": {name: over_splits(found[:, 1], 0) for name, found in counts.items()},
        "per_category": {
            str(probed.names[category]): {
                "n_examples": int(inside[i].sum()),
                **{
                    str(k): {
                        name: _rounded(found[:, j, i].mean()) for name, found in sparse_aucs.items()
                    }
                    for j, k in enumerate(KS)
                },
                "dense": {name: _rounded(found[:, i].mean()) for name, found in dense_aucs.items()},
            }
            for i, category in enumerate(categories)
        },
    }


def describe_probing(probing_part: Mapping[str, Any]) -> list[str]:
    """What the probes say, as lines of text for people: the AUC of most columns of each source, and
    what training added. The report has the rest."""
    k, by_source = list(probing_part["sparse_probing"].items())[-1]
    shown = ", ".join(f"{NAMES[name]} {plus_minus(found)}" for name, found in by_source.items())
    line = (
        f"AUC of {k} columns on held-out texts, mean of {probing_part['n_categories']} categories: "
        f"{shown}"
    )
    return [each for each in (line, verdict(probing_part)) if each]


def probing_rows(probing_part: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a table: a row for each source, its AUCs with few columns and with all."""
    by_k, dense = probing_part["sparse_probing"], probing_part["dense_probing"]
    head = ["", *(f"{k} column" + "s" * (k != "1") for k in by_k), "all columns"]
    columns = [*by_k.values(), dense]
    return head, [[NAMES[name], *(plus_minus(each[name]) for each in columns)] for name in dense]


def probing_note(probing_part: Mapping[str, Any]) -> str:
    """What the table of `probing_rows` counts, for a reader who sees nothing else."""
    return (
        f"AUC of telling each of {probing_part['n_categories']} categories from the rest, their "
        f"mean, on {probing_part['n_examples']:,} examples: columns chosen and a probe fitted on "
        "one half, measured on the other (0.5 is chance, 1 perfect). The dictionaries have as many "
        "directions as the autoencoder and its encoding rule, but nobody trained them. "
        f"± is a 95 % interval over {probing_part['n_splits']} half splits."
    )


def model_loss_sentence(loss: Mapping[str, Any] | None) -> str:
    """What the model loses with the reconstruction in place of its stream; "" if not measured."""
    if not loss or "recovered" not in loss:
        return ""
    zero, mean = (with_interval(loss["recovered"][each], 3) for each in ("zero", "mean"))
    return (
        f"loss recovered with the reconstruction in the model: {zero} against zeros, {mean} "
        f"against the mean; KL {loss['kl']['spliced']:.3f} nats against {loss['kl']['zero']:.2f} "
        f"and {loss['kl']['mean']:.2f} ({loss['n_tokens']:,} tokens of {loss['n_examples']} "
        + ("held-out examples)" if loss["held_out"] else "examples)")
    )


def stability_sentence(found: Mapping[str, Any] | None) -> str:
    """How many features other seeds have too; "" where there are none."""
    if not found:
        return ""
    beside = ""
    if tokens := found.get("random tokens"):
        beside = f"; of random tokens in other random tokens {100 * tokens['found_in_all']:.0f} %"
    return (
        f"seeds: {100 * found['features']['found_in_all']:.0f} % of the features are in all "
        f"{found['n_seeds']} autoencoders (cosine above {SAME}){beside}"
    )


def describe(table: Mapping[str, Any]) -> list[str]:
    """The run table as lines of text."""
    lines = [model_loss_sentence(table.get("model_loss")), effects.sentence(table.get("effects"))]
    if probing_part := table.get("probing"):
        lines += describe_probing(probing_part)
    lines.append(stability_sentence(table.get("seed_stability")))
    return [line for line in lines if line]


def markdown(table: Mapping[str, Any]) -> list[str]:
    """The run table as lines of Markdown, for the model card."""
    lines = []
    if probing_part := table.get("probing"):
        head, rows = probing_rows(probing_part)
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", probing_note(probing_part), "", sentence(verdict(probing_part)), ""]
    for said in (
        model_loss_sentence(table.get("model_loss")),
        effects.sentence(table.get("effects")),
        stability_sentence(table.get("seed_stability")),
    ):
        lines += [sentence(said), ""] if said else []
    return lines[:-1]


def sentence(text: str) -> str:
    """`text` with a capital and a full stop."""
    return text[:1].upper() + text[1:] + "." * bool(text)


def verdict(probing_part: Mapping[str, Any]) -> str:
    """A sentence on what training added over random tokens, and where the interval holds 0."""
    added = probing_part["added_by_training"].get(KINDS[0])
    if not added:
        return ""
    k = str(KS[-1])
    low, high = added[k]["interval"]
    meaning = "more" if low > 0 else "less" if high < 0 else "no difference that can be told"
    return (
        f"training added {plus_minus(added[k], '+')} over random tokens with {k} columns "
        f"({meaning}), {plus_minus(added['1'], '+')} with 1"
    )


def plus_minus(found: Mapping[str, Any] | None, sign: str = "", digits: int = 3) -> str:
    """'0.850 ±0.013' of an estimate as JSON holds it; '-' for none."""
    if found is None:
        return "-"
    low, high = found["interval"]
    half = max(found["value"] - low, high - found["value"])  # one end may be at a bound
    return f"{found['value']:{sign}z.{digits}f} ±{half:.{digits}f}"


def counted(columns: Matrix, probed: Probed, seed: int, bound: float) -> tuple[float, float]:
    """(how many columns separate a category above chance, how many of these with an AUC above
    `bound`), on the held-out half of a split; of many columns a random part stands for all."""
    n_columns = columns.shape[1]
    if n_columns > COUNTED:
        chosen = np.random.default_rng((seed, 8)).permutation(n_columns)[:COUNTED]
        columns = columns[:, np.sort(chosen)]
    _, auc, named = category_above_chance(
        columns, probed.labels, len(probed.names), seed, probed.texts
    )
    share = n_columns / max(columns.shape[1], 1)
    return float(named.sum() * share), float((named & (auc > bound)).sum() * share)


def over_splits(
    values: np.ndarray, least: float = -np.inf, most: float = np.inf
) -> dict[str, Any] | None:
    """`estimate` of (n_splits,) values, as JSON holds it."""
    found = estimate(values, least, most)
    return None if found is None else found.plain()


def auc_over(values: np.ndarray) -> dict[str, Any] | None:
    """`over_splits` of AUCs."""
    return over_splits(values, 0, 1)


def _rounded(value: Any) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 4)
