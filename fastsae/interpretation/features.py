"""Everything stage 3 knows of the features before a language model is asked: their evidence, the
rows of the tables, categories, promoted tokens, and which of them predict a target.

Importing this module loads no torch, so that an up-to-date run ends quickly.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastsae.activations import files
from fastsae.data import datasets
from fastsae.interpretation.firings import Firings
from fastsae.interpretation.tables import JUDGED
from fastsae.runtime import artifacts, progress
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.flags import flag_name
from fastsae.settings.values import Settings

AUC_BOUND = 0.8  # a feature above this separates its category well; the report counts them
# of a feature over an example's tokens, max or mean: for the categories, and for the target
POOLING, TARGET_POOLING = "mean", "mean"
N_TOP_TOKENS = 8  # characteristic tokens in a row
N_TOP_EXAMPLES = 5  # strongest examples in a row
N_LENS_TOKENS, N_LENS_COLUMN = 20, 8  # promoted tokens in the report, and in a row
# what only the running model tells, see running.py
OF_THE_MODEL = ("kl_removed", "kl_random", "effects")
# what a language model may add to a row
OPTIONAL = (
    "score",
    "score_name",
    "fidelity_f1",
    "fidelity_precision",
    "fidelity_recall",
    "n_held_out",
    "label_protocol",
    "note",
    *JUDGED,
)


def pooling() -> dict[str, str]:
    """The constants that decide rows, recorded as settings are."""
    return {"POOLING": POOLING, "TARGET_POOLING": TARGET_POOLING}


class Features:
    """The evidence on every feature, `rows` of the tables made from it, and what else the outputs
    need.

    InputError where activations, dataset, model or autoencoder are not of one another;
    EnvironmentFailure where one was replaced since it was described.
    """

    def __init__(self, settings: Settings, checkpoint_path: Path, sae_meta: dict[str, Any]):
        self.settings, self.checkpoint_path = settings, checkpoint_path
        # of the hypotheses with what needs no features
        self.comparison: dict[str, Any] | None = None
        data = files.open_activations(settings.activations_path)
        self.source = artifacts.metadata_of(data, settings.activations_path)
        self.example_ids = data["example_ids"]
        self._require_matching_inputs(sae_meta)
        sae, self.sae_meta = self._load_sae(sae_meta, data)
        self.examples = self.read_examples(settings.LABEL_FIELD)
        self.untrained = self._untrained(sae, data)
        self.firings = Firings(data["seq_lengths"], sae.k_active_neurons, settings.SEED)
        self.evidence = self._collect(sae, data)
        progress.step("top tokens, categories and promoted tokens of the features")
        self.rows = self._make_rows()
        self.rule_labels = self._add_rules()
        self.detection = self._add_detection()
        self.categories = self._add_categories()
        self.lens = self._add_lens()
        self.run_table = self._run_table()

    def _require_matching_inputs(self, sae_meta):
        from fastsae.lm.sources import require_same

        settings, source = self.settings, self.source
        if source["fingerprint"] != sae_meta["inputs"]["activations"]:
            raise InputError(
                f"{self.checkpoint_path}: was trained on other activations than "
                f"{settings.activations_path}. run train_sae.py."
            )
        if source["settings"].get("PROCESSING") == "block":
            raise InputError(
                f"{settings.activations_path}: holds blocks of joined examples, whose examples "
                "cannot be told apart. run extract_activations.py with --block-length none."
            )
        if datasets.identity(settings.DATASET_PATH)[0] != source["inputs"]["dataset"]:
            raise InputError(
                f"DATASET_PATH: {settings.DATASET_PATH} is not the file the activations were made "
                "from. run extract_activations.py."
            )
        require_same(
            source["model_name"],
            source["model_revision"],
            settings.CACHE_DIR,
            source["inputs"]["model"],
            "run extract_activations.py",
        )

    def _load_sae(self, sae_meta, data):
        """(the autoencoder, its whole metadata); `sae_meta` is what was read of it before."""
        from fastsae.formats import load
        from fastsae.lm.devices import choose_device

        settings, path = self.settings, self.checkpoint_path
        device = choose_device(settings.DEVICE)
        sae, loaded_meta = load.load_sae(path, "cpu" if device == "mps" else device)
        if loaded_meta["fingerprint"] != sae_meta["fingerprint"]:
            raise EnvironmentFailure(f"{path}: was replaced while this run began. run again.")
        if settings.SAE_PATH:
            load.fit(
                path,
                sae,
                loaded_meta,
                settings.activations_path,
                self.source,
                data,
                seed=settings.SEED,
            )
        return sae, loaded_meta

    def _bounds(self):
        """Which tokens training used, and so which are examined."""
        trained = self.sae_meta["settings"]
        return {
            "max_norm": self.sae_meta["max_norm"],
            "exclude_shared_prefix": trained["EXCLUDE_SHARED_PREFIX"],
            "use": trained.get("USE_TOKENS", "all"),
        }

    def _untrained(self, sae, data):
        """The dictionaries that nobody trained, to be filled by the pass over all tokens."""
        from fastsae.interpretation import nulls

        unseen = [self.sae_meta.get(f"{part}_examples") or [] for part in ("validation", "test")]
        return nulls.prepare(
            sae,
            data,
            **self._bounds(),
            not_trained_on=np.array(sum(unseen, []), np.int64),
            seed=self.settings.SEED,
        )

    def _run_table(self) -> dict[str, Any]:
        """What the run is worth; the parts are those that could be measured."""
        from fastsae.interpretation.run_table import core_figures
        from fastsae.interpretation.stability import seed_stability

        self.untrained.finish()
        tokens = [each for each in self.untrained.dictionaries if each.kind == "random tokens"]
        decoder = self.evidence.sae.decoder.weight.t()
        parts = {
            "core": core_figures(self.sae_meta, self.evidence.statistics),
            "probing": self._probing(),
            "seed_stability": seed_stability(
                self.checkpoint_path,
                decoder,
                [each.encoder.weight for each in tokens],
                self.settings.SEED,
            ),
        }
        return {
            "autoencoder": self.sae_meta["fingerprint"],
            **{name: part for name, part in parts.items() if part is not None},
        }

    def _probing(self):
        """How well categories are read from the features and from what needs no training; None
        without categories."""
        from fastsae.interpretation.run_table import Probed, probe

        settings, evidence = self.settings, self.evidence
        if self.categories is None:
            return None
        progress.step("probing the categories, and dictionaries that nobody trained")
        probed = Probed(
            evidence.statistics,
            self.untrained,
            self.labels(),
            evidence.text_numbers,
            evidence.text_read,
            POOLING,
        )
        return probe(probed, AUC_BOUND, settings.SEED)

    def _collect(self, sae, data):
        """The Evidence from one pass over all tokens, those that training left out excluded."""
        from fastsae.interpretation.evidence import Evidence
        from fastsae.lm.loading import load_tokenizer

        source, settings = self.source, self.settings
        tokenizer = load_tokenizer(
            source["model_name"], revision=source["model_revision"], cache_dir=settings.CACHE_DIR
        )
        with progress.bar(
            len(data["token_ids"]), "statistics", "token", unit_scale=True
        ) as tokens_done:
            return Evidence(
                sae,
                data,
                self.examples,
                tokenizer,
                self._bounds(),
                n_top=N_TOP_EXAMPLES,
                seed=settings.SEED,
                progress=tokens_done.update,
                watch=self.untrained.watch,
                firings=self.firings,
            )

    def _make_rows(self):
        """One dict per feature: what is known of it, and empty places for what is added later."""
        rows = self.evidence.rows(N_TOP_TOKENS)
        for row in rows:
            row.update(
                dict.fromkeys((*OPTIONAL, *OF_THE_MODEL)),
                best_category="",
                category_auc=None,
                promoted_tokens="",
                suppressed_tokens="",
            )
        return rows

    def _add_rules(self):
        from fastsae.interpretation.rule_labels import add_rules

        with progress.bar(len(self.rows), "rules", "feature") as features_done:
            return add_rules(
                self.rows, self.evidence, self.firings, self.settings.SEED, features_done.update
            )

    def _add_detection(self):
        from fastsae.interpretation.detection import add_detection

        with progress.bar(len(self.rows), "detection", "feature") as features_done:
            return add_detection(
                self.rows, self.evidence, self.firings, self.settings.SEED, features_done.update
            )

    def _add_categories(self):
        from fastsae.interpretation.categories import add_categories

        settings, evidence = self.settings, self.evidence
        return add_categories(
            self.rows,
            evidence.statistics,
            self.labels(),
            POOLING,
            settings.SEED,
            evidence.text_numbers,
        )

    def _add_lens(self):
        from fastsae.interpretation.logit_lens import add_lens
        from fastsae.lm.sources import model_source

        source, cache_dir = self.source, self.settings.CACHE_DIR
        return add_lens(
            self.rows,
            self.evidence,
            model_source(source["model_name"], cache_dir),
            {"revision": source["model_revision"], "cache_dir": cache_dir},
            N_LENS_TOKENS,
            N_LENS_COLUMN,
        )

    def read_examples(self, label_field: str | None) -> list:
        """The examples whose activations there are (deduplication may have left some out), with
        that field as their label."""
        return datasets.read_dataset(
            self.settings.DATASET_PATH,
            text_field=self.settings.TEXT_FIELD,
            label_field=label_field,
            only_lines=self.example_ids,
            sha256=self.source["inputs"]["dataset"],
        )

    def labels(self, field: str | None = None) -> list | None:
        """Label of each example (or the value of another field), None where it has none; None if
        there are no labels at all."""
        settings, examples = self.settings, self.examples
        name = field or settings.LABEL_FIELD
        setting = "TARGET_FIELD" if field else "LABEL_FIELD"
        if field and field != settings.LABEL_FIELD:
            examples = self.read_examples(field)
        labels = [example.label for example in examples]
        if name and not any(label is not None for label in labels):
            if settings.source[setting].startswith("preset"):
                return None
            raise InputError(
                f"{setting}: no row of {settings.DATASET_PATH} has {name}. name another field, or "
                f"set --{flag_name(setting)} none."
            )
        return labels if name else None

    def choose(self, n: int) -> list[int]:
        """The features to label: alive ones by category AUC where there are labels, else by total
        activation."""
        s = self.evidence.statistics
        first = np.zeros(s.m)
        if self.categories is not None:
            first = np.where(self.categories.named, self.categories.auc, 0)
        order = np.lexsort((-s.total, -first))
        return [int(j) for j in order if s.count[j] > 0][:n]

    def category_chance(self) -> float | None:
        """The category AUC that 95 % of the features stay below under shuffled labels; None without
        categories."""
        if self.categories is None:
            return None
        return round(float(np.nanquantile(self.categories.shuffled, 0.95)), 3)

    def clearest(self, n: int) -> list[int]:
        """At most n features that fire, those with most evidence first: of the report's first page
        one for each category."""
        from fastsae.interpretation.report import overview

        evidence = self.evidence
        common = overview.commonest(evidence.names, evidence.statistics.name_count)
        order = overview.in_order(self.rows, evidence.top_tokens, common, self.category_chance())
        return overview.clearest(self.rows, order, n)

    def hypotheses(self) -> list[dict[str, Any]]:
        """Features that predict the target, with their scores; [] without one. `comparison` says
        what they are worth."""
        from fastsae.interpretation.categories import target_numbers
        from fastsae.interpretation.target_features import compare, select_features

        settings, value = self.settings, self.settings.TARGET_VALUE
        if not (settings.TARGET_FIELD or value):
            return []
        field = settings.TARGET_FIELD or settings.LABEL_FIELD
        s = self.evidence.statistics
        values = self.labels(field) or [None] * len(self.examples)
        rows = np.array([values[i] is not None for i in s.pooled_examples], bool)
        examples = s.pooled_examples[rows]
        texts = self.evidence.text_numbers[examples]
        target = target_numbers([values[i] for i in examples], field, value)
        pooled = (s.pooled_max if TARGET_POOLING == "max" else s.pooled_mean)[rows]
        found = select_features(
            pooled, target, settings.N_HYPOTHESES, settings.SELECTION_METHOD, settings.SEED, texts
        )
        name = field if value is None else f"{field} = {value}"
        if found:
            self.comparison = compare(
                pooled,
                target,
                examples,
                texts,
                self.untrained,
                self.evidence.text_read,
                n_select=settings.N_HYPOTHESES,
                method=settings.SELECTION_METHOD,
                pooling=TARGET_POOLING,
                seed=settings.SEED,
            )
        else:
            print(f"hypotheses: none, for no feature predicts {name} on these examples")
        how = {"method": settings.SELECTION_METHOD, "pooling": TARGET_POOLING}
        return [{"rank": i, "target": name, **how, **entry} for i, entry in enumerate(found, 1)]

    def summary(self) -> dict[str, Any]:
        """Counts over all features, for the report and the tables' first line."""
        n_dead = sum(row["status"] == "dead" for row in self.rows)
        counts = {"n_features": len(self.rows), "n_dead": n_dead, **self.rule_labels.summary()}
        from fastsae.interpretation.llm.judging import judging_summary

        counts |= self.detection.summary() | judging_summary(self.rows)
        if self.categories is None:
            return counts
        return counts | self.categories.summary(AUC_BOUND)
