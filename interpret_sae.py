"""Stage 3: say what each feature means, from the tokens and examples it fires on, the dataset's labels, and an LLM if there is one.

    python interpret_sae.py
    OPENAI_API_KEY=... python interpret_sae.py --n-top-neurons 50 --interpreter-model gpt-5-mini

Reads the activations, the checkpoint that `checkpoints/<run>/metrics.json` names, and the dataset. Writes
`interpretations.csv`, one row per feature, and its exact twin `interpretations.jsonl` (first line: settings and provenance).
Without an endpoint every label is made of the feature's most characteristic tokens; nothing is sent anywhere.
"""
import csv
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np

import config
from fastsae import artifacts, llm_labels
from fastsae.errors import EXIT_INCOMPLETE, EnvironmentFailure, InputError, run_stage

POOLING: str = "max"                    # of a feature over an example's tokens: max or mean
N_TOP_NEURONS: int = 20                 # features that the LLM labels: best category AUC first, else most activation
INTERPRETER_MODEL: str = "gpt-5-mini"   # model name at the endpoint (OPENAI_API_KEY or OPENAI_KEY_SAE, OPENAI_BASE_URL)
LLM_TIMEOUT: float = 60.0               # seconds for one call
N_LLM_WORKERS: int = 8                  # calls at a time

N_TOP_TOKENS, N_TOP_EXAMPLES = 8, 5
AUC_BOUND = 0.8  # a feature above this separates its category well; the report counts them
COLUMNS = ("feature", "label", "label_source", "status", "density", "max_activation", "top_tokens",
           *(f"top_example_{i}" for i in range(1, N_TOP_EXAMPLES + 1)), "best_category", "category_auc")


def main():
    settings = config.resolve(__file__)
    settings.show()
    checkpoint_path = named_checkpoint(settings.run_dir)
    sae_meta = artifacts.read_checkpoint_metadata(checkpoint_path)
    source = sae_meta["activations"]
    endpoint = llm_labels.endpoint() if settings.N_TOP_NEURONS else None
    metadata = artifacts.new_metadata(
        "interpretations",
        {**settings.select(["POOLING", "LABEL_FIELD", "TEXT_FIELD", "SEED"]),
         "llm": endpoint and [settings.INTERPRETER_MODEL, endpoint[1], settings.N_TOP_NEURONS]},
        {"checkpoint": sae_meta["fingerprint"], "dataset": source["inputs"]["dataset"]}, checkpoint=str(checkpoint_path))
    csv_path, jsonl_path = (settings.output_dir / f"interpretations{suffix}" for suffix in (".csv", ".jsonl"))
    if done(csv_path, jsonl_path, metadata):
        return

    features = Features(settings, checkpoint_path, sae_meta)
    rows = features.rows()
    selected = []
    if endpoint:
        selected = features.choose(settings.N_TOP_NEURONS)
        add_llm_labels(rows, selected, features, endpoint, settings)
    failed = [j for j in selected if rows[j]["label_source"] != settings.INTERPRETER_MODEL]
    write_tables(csv_path, jsonl_path, rows, {**metadata, "complete": not failed, "summary": features.summary()})
    report(rows, features, csv_path)
    if failed:
        reasons = sorted({rows[j]["status"] for j in failed})
        print(f"unlabelled: {len(failed)} of {len(selected)} features ({'; '.join(reasons[:3])}). mend it and run again: "
              "what was answered is not asked twice.", file=sys.stderr)
        return EXIT_INCOMPLETE


def named_checkpoint(run_dir):
    """The checkpoint that the run's metrics.json names."""
    path = run_dir / "metrics.json"
    try:
        return run_dir / json.loads(path.read_text())["checkpoint"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not found. run train_sae.py first, or check --run-name and --output-dir.") from None
    except (ValueError, KeyError, TypeError):
        raise EnvironmentFailure(f"{path}: damaged. run train_sae.py again.") from None


def done(csv_path, jsonl_path, metadata):
    """True if both tables are there, complete, and made from the same inputs."""
    def read(path):
        lines = artifacts.read_lines(path)
        if not lines or "fingerprint" not in lines[0]:
            raise EnvironmentFailure(f"{path}: damaged. it will be made anew.")
        if not csv_path.exists() or artifacts.file_sha256(csv_path) != lines[0]["csv_sha256"]:
            raise EnvironmentFailure(f"{csv_path}: was changed by hand or is missing. it will be made anew.")
        if not lines[0]["complete"]:
            raise EnvironmentFailure(f"{path}: some features are unlabelled. only these are asked again.")
        return lines[0]

    return artifacts.matches(jsonl_path, metadata, read)


class Features:
    """Everything known about each feature without an LLM."""

    def __init__(self, settings, checkpoint_path, sae_meta):
        from fastsae import feature_statistics
        from fastsae.autoencoder import load_sae
        from fastsae.examples import read_dataset
        from fastsae.language_model import choose_device, load_tokenizer
        from fastsae.tokens import token_norms, usable_tokens

        self.statistics, self.settings = feature_statistics, settings
        data = artifacts.read_npz(settings.activations_path, made_by="extract_activations.py")
        source = artifacts.metadata_of(data, settings.activations_path)
        if source["fingerprint"] != sae_meta["inputs"]["activations"]:
            raise InputError(f"{checkpoint_path}: was trained on other activations than {settings.activations_path}. run train_sae.py.")
        if artifacts.file_sha256(settings.DATASET_PATH) != source["inputs"]["dataset"]:
            raise InputError(f"DATASET_PATH: {settings.DATASET_PATH} is not the file the activations were made from. run extract_activations.py.")
        examples = read_dataset(settings.DATASET_PATH, text_field=settings.TEXT_FIELD, label_field=settings.LABEL_FIELD,
                                max_examples=len(data["seq_lengths"]))
        self.texts = [self._plain(example) for example in examples]
        self.labels = self._labels(examples)
        device = choose_device(settings.DEVICE)
        sae, _ = load_sae(checkpoint_path, "cpu" if device == "mps" else device)
        chosen = sae_meta["settings"]
        usable, _ = usable_tokens(token_norms(data["activations"]), data["token_kind"], max_norm=sae_meta["max_norm"],
                                  exclude_shared_prefix=chosen["EXCLUDE_SHARED_PREFIX"], max_norm_ratio=None)
        kept = np.flatnonzero(usable)
        example_of_token = np.repeat(np.arange(len(examples)), data["seq_lengths"])[kept]  # (n_kept,)
        self.token_ids = data["token_ids"][kept]
        self.first_row = np.searchsorted(example_of_token, np.arange(len(examples) + 1))   # rows of example i
        features = feature_statistics.encode_tokens(sae, data["activations"], kept)        # CSR (n_kept, M)
        self.pooled = feature_statistics.pool(features, example_of_token, len(examples), settings.POOLING)
        self.maxima = self.pooled if settings.POOLING == "max" else feature_statistics.pool(features, example_of_token, len(examples), "max")
        self.by_feature = features.tocsc()
        self.mass = np.asarray(features.sum(0)).ravel()
        self.tokenizer = load_tokenizer(source["model_name"], revision=source["model_revision"], cache_dir=settings.CACHE_DIR)
        name_of_token, names = feature_statistics.token_names(self.tokenizer, self.token_ids)
        self.top_tokens = feature_statistics.characteristic_tokens(features, name_of_token, names, N_TOP_TOKENS)
        self._category_evidence()

    @staticmethod
    def _plain(example):
        return example.messages[0]["content"] if example.is_text else "\n\n".join(f"{m['role']}: {m['content']}" for m in example.messages)

    def _labels(self, examples):
        """Category names of the examples, or None when there are none."""
        labels, name = [example.label for example in examples], self.settings.LABEL_FIELD
        if name and not any(label is not None for label in labels):
            if self.settings.source["LABEL_FIELD"].startswith("preset"):
                return None
            raise InputError(f"LABEL_FIELD: no row of {self.settings.DATASET_PATH} has {name}. name another field, or set --label-field none.")
        return labels if name else None

    def _category_evidence(self):
        from fastsae.categories import best_category, shuffled_count

        self.category = self.auc = self.chance = None
        if self.labels is None:
            return
        known = np.array([label is not None for label in self.labels])
        names, numbers = np.unique([label for label in self.labels if label is not None], return_inverse=True)
        if len(names) < 2:
            return
        pooled = self.pooled[known]
        chosen, self.auc = best_category(pooled, numbers, len(names), self.settings.SEED)
        self.category = names[chosen]
        self.chance = shuffled_count(pooled, numbers, len(names), self.settings.SEED, AUC_BOUND)

    def rows(self):
        """One dict per feature with the columns of the tables, labelled from evidence."""
        n_tokens, m = self.by_feature.shape
        rows = []
        for j in range(m):
            entries = slice(self.by_feature.indptr[j], self.by_feature.indptr[j + 1])
            values = self.by_feature.data[entries]
            alive = len(values) > 0
            row = {"feature": j, "label": self.statistics.evidence_label(self.top_tokens[j]), "label_source": "tokens" if alive else "",
                   "status": "ok" if alive else "dead", "density": len(values) / n_tokens,
                   "max_activation": float(values.max()) if alive else 0.0,
                   "top_tokens": ", ".join(f"'{name}' {100 * share:.0f}%" for name, share in self.top_tokens[j])}
            examples = self.statistics.top_examples(self.maxima[:, j], N_TOP_EXAMPLES)
            for i in range(N_TOP_EXAMPLES):
                row[f"top_example_{i + 1}"] = self.excerpt(j, examples[i]) if i < len(examples) else ""
            has_category = alive and self.auc is not None and not np.isnan(self.auc[j])
            row["best_category"] = str(self.category[j]) if has_category else ""
            row["category_auc"] = float(self.auc[j]) if has_category else None
            rows.append(row)
        return rows

    def excerpt(self, feature, example):
        first, last = self.first_row[example], self.first_row[example + 1]
        entries = slice(self.by_feature.indptr[feature], self.by_feature.indptr[feature + 1])
        token, value = self.by_feature.indices[entries], self.by_feature.data[entries]
        inside = (token >= first) & (token < last)
        activations = np.zeros(last - first)
        activations[token[inside] - first] = value[inside]
        return self.statistics.excerpt(self.tokenizer, self.token_ids[first:last], activations)

    def summary(self):
        """Counts over all features, for the report and the tables' first line."""
        counts = {"n_features": len(self.mass), "n_dead": int((self.mass == 0).sum())}
        if self.auc is not None:
            counts |= {"auc_bound": AUC_BOUND, "n_above_auc_bound": int((self.auc > AUC_BOUND).sum()),
                       "n_above_auc_bound_shuffled": self.chance}
        return counts

    def choose(self, n):
        """The features to label: alive ones by category AUC where there are labels, else by total activation."""
        score = self.mass if self.auc is None else np.nan_to_num(self.auc, nan=-1)
        order = np.argsort(-score, kind="stable")
        return [int(j) for j in order if self.mass[j] > 0][:n]


def add_llm_labels(rows, selected, features, endpoint, settings):
    """Replace the evidence labels of the selected features where the LLM gave one; else say in `status` why not."""
    labeller = llm_labels.ChatLabeller(*endpoint, settings.INTERPRETER_MODEL, settings.run_dir / "llm_replies.jsonl",
                                       timeout=settings.LLM_TIMEOUT, n_workers=settings.N_LLM_WORKERS)
    for feature, (label, status) in labeller.label_features(features.texts, features.pooled, selected).items():
        if label:
            rows[feature].update(label=label, label_source=settings.INTERPRETER_MODEL, status="ok")
        else:
            rows[feature]["status"] = f"llm {status}"


def write_tables(csv_path, jsonl_path, rows, metadata):
    """The CSV for spreadsheets, where no cell may act as a formula, and the JSONL with the exact text."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.6g}"
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(row[name]) for name in COLUMNS} for row in rows)
    text = table.getvalue()
    artifacts.write_text(csv_path, text, keep_old=True)
    lines = [{**metadata, "csv_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}, *rows]
    artifacts.write_text(jsonl_path, "".join(artifacts.to_json(line) + "\n" for line in lines), keep_old=True)


def report(rows, features, csv_path):
    alive, counts = [row for row in rows if row["status"] != "dead"], features.summary()
    print(f"features: {counts['n_features']}, {counts['n_dead']} dead on these tokens; "
          f"labelled by an LLM: {sum(row['label_source'] not in ('', 'tokens') for row in rows)}")
    shown = sorted(alive, key=lambda row: -row["max_activation"])
    if features.auc is not None:
        print(f"category AUC above {AUC_BOUND}: {counts['n_above_auc_bound']} features; with shuffled labels "
              f"{counts['n_above_auc_bound_shuffled']:.1f} on average")
        shown = sorted(alive, key=lambda row: -(row["category_auc"] or 0))
    for row in shown[:5]:
        category = f" ({row['best_category']}, AUC {row['category_auc']:.2f})" if row["best_category"] else ""
        print(f"  {row['feature']}: {row['label'][:90]}{category}")
    print(f"wrote {csv_path} and {Path(csv_path).with_suffix('.jsonl').name}")


if __name__ == "__main__":
    sys.exit(run_stage(main))
