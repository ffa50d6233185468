"""Interpretability of autoencoders on one labelled dataset, run dialogue by dialogue: without a
language model, and with one.

Category AUC and token purity need no language model. Token purity is the share of a feature's
activation that lies on its commonest token (by its name: lower case, without spaces around it).
Where an endpoint is configured, a language model scores features from 1 to 5 by FAST's rubric
(arXiv 2506.07691), through the project's own prompts and journal.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.shared import heldout
from experiments.shared.statistics import interval, widened
from fastsae.sae import Autoencoder
from fastsae.settings.values import Settings

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

AUC_BOUND = 0.8
# a feature that fires once has purity 1 and one that fires seldom AUC 0.5, whatever it means: such
# are left out
MIN_FIRINGS = 10
N_TOP_EXAMPLES = 5


def token_purity(name_mass: Any, count: np.ndarray) -> np.ndarray:
    """(M,) share of each feature's activation on the token name with the largest part; nan where it
    fires less than MIN_FIRINGS times.

    name_mass: CSR (M, n_names), each feature's activation by token name; count: (M,) tokens on
    which it fires.
    """
    total = np.asarray(name_mass.sum(1)).ravel()
    largest = np.asarray(name_mass.max(1).todense()).ravel()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count >= MIN_FIRINGS, largest / total, np.nan)


class Labelled:
    """A labelled dataset's activations at one layer, and the evidence that an autoencoder's
    features find in it."""

    def __init__(self, path: Path, dataset_path: Path, tokenizer: Any, settings: Settings):
        from fastsae.activations.files import open_activations
        from fastsae.data.datasets import read_dataset
        from fastsae.data.token_masks import token_norms, usable_tokens

        self.data, self.tokenizer, self.settings = open_activations(path), tokenizer, settings
        self.examples = read_dataset(
            dataset_path,
            text_field=settings.TEXT_FIELD,
            label_field=settings.LABEL_FIELD,
            only_lines=self.data["example_ids"],
        )
        norms = token_norms(self.data["activations"])
        _, self.max_norm = usable_tokens(
            norms,
            self.data["token_kind"],
            exclude_shared_prefix=True,
            max_norm_ratio=heldout.MAX_NORM_RATIO,
        )

    def evidence(self, sae: Autoencoder) -> "Evidence":
        """What the features do here, on the same tokens for every autoencoder: without shared
        prefix and sinks."""
        from fastsae.interpretation.evidence import Evidence

        bounds = {"max_norm": self.max_norm, "exclude_shared_prefix": True}
        return Evidence(
            sae,
            self.data,
            self.examples,
            self.tokenizer,
            bounds,
            n_top=N_TOP_EXAMPLES,
            seed=self.settings.SEED,
        )

    def per_feature(self, evidence: "Evidence") -> dict[str, Any]:
        """{token_purity: (M,), category_auc: (M,) or None without labels}, nan for features that
        fire less than MIN_FIRINGS times here."""
        from fastsae.interpretation.categories import best_category

        s, auc = evidence.statistics, None
        names, labels = np.unique([str(e.label) for e in self.examples], return_inverse=True)
        if len(names) > 1:
            auc = best_category(
                s.pooled_max, labels[s.pooled_examples], len(names), self.settings.SEED
            )[1]
            auc = np.where(s.count >= MIN_FIRINGS, auc, np.nan)
        return {"token_purity": token_purity(s.name_mass.sums, s.count), "category_auc": auc}

    def scores(self, evidence: "Evidence", journal: Path) -> list[int] | None:
        """The language model's scores of N_SCORED_FEATURES random features; None without an
        endpoint."""
        from fastsae.interpretation.llm import client
        from fastsae.interpretation.llm.labels import Labelling, plain_text
        from fastsae.interpretation.llm.shown import Shown

        if not client.endpoint():
            return None
        seed, alive = self.settings.SEED, np.flatnonzero(evidence.statistics.count > 0)
        backend = client.choose_backend(self.settings.INTERPRETER_MODEL, timeout=60.0, device="cpu")
        work = Labelling(
            Shown(evidence, [plain_text(e) for e in self.examples], seed),
            client.Asker(backend, journal, n_workers=8),
            protocol="fast",
            labelled=[],
            candidates=np.random.default_rng(seed).permutation(alive).tolist(),
            n_scored=self.settings.N_SCORED_FEATURES,
            n_fidelity=0,
        )
        return [result["score"] for result in work.run().values() if "score" in result]


def study(
    cells: Sequence[tuple[tuple, Path]], labelled: Mapping[int, Labelled]
) -> list[dict[str, Any]]:
    """For each group of autoencoders that differ in the seed alone, means over features with
    intervals, and the sources' differences.

    cells: [((source, architecture, layer, sinks in training, seed), checkpoint path)]; labelled:
    {layer: a `Labelled`}.
    """
    from fastsae.formats.load import load_sae

    groups, draws = {}, {}
    for cell, path in cells:
        here = labelled[cell[2]]
        evidence = here.evidence(load_sae(path)[0])
        found = here.per_feature(evidence)
        found["score"] = here.scores(evidence, path.with_name("llm_scores.jsonl"))
        groups.setdefault(cell[:4], []).append(found)
    rows = []
    for group, found in groups.items():
        row = dict(zip(("source", "architecture", "layer", "sinks_in_training"), group))
        row["features_counted"] = float(
            np.mean([np.isfinite(each["token_purity"]).sum() for each in found])
        )
        for name, (feature, statistic) in STATISTICS.items():
            values = [
                np.asarray(each[feature], float)
                for each in found
                if each[feature] is not None and len(each[feature])
            ]
            if len(values) == len(found):
                value, draws[group, name] = resampled(values, statistic, seed=len(rows))
                row[name] = {"value": value, "interval": interval(draws[group, name])}
        rows.append(row)
    for row in rows:
        same = tuple(row[part] for part in ("architecture", "layer", "sinks_in_training"))
        for name in [name for name in STATISTICS if name in row and row["source"] != "FAST"]:
            if (("FAST", *same), name) in draws:  # not where the language model gave it no score
                row[name]["below_fast_by"] = interval(
                    draws[("FAST", *same), name] - draws[(row["source"], *same), name]
                )
    return rows


STATISTICS: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "token_purity": ("token_purity", np.mean),
    "category_auc": ("category_auc", np.mean),
    "share_above_auc_bound": ("category_auc", lambda auc: np.mean(auc > AUC_BOUND)),
    "share_scored_4_or_5": ("score", lambda score: np.mean(score >= 4)),
    "share_scored_up_to_3": ("score", lambda score: np.mean(score <= 3)),
}


def resampled(
    by_seed: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], Any],
    seed: int = 0,
    n: int = heldout.N_BOOTSTRAP,
) -> tuple[float, np.ndarray]:
    """(value, (n,) draws) of a statistic of features, [(n_features,) of each seed], nan left out:
    seeds and features are resampled."""
    by_seed = [values[~np.isnan(values)] for values in by_seed]
    random, of_features, of_both = np.random.default_rng(seed), np.empty(n), np.empty(n)
    for i in range(n):
        found = np.array(
            [statistic(values[random.integers(0, len(values), len(values))]) for values in by_seed]
        )
        of_features[i], of_both[i] = (
            found.mean(),
            found[random.integers(0, len(found), len(found))].mean(),
        )
    return float(np.mean([statistic(values) for values in by_seed])), widened(
        of_features, of_both, len(by_seed)
    )
