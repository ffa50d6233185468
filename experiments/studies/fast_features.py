"""The evidence on the features of fast_factors' autoencoders: rules and five-shot detection on
held-out dialogues, probing of categories on labelled texts, and what the model loses with the
reconstruction in place of its stream."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse

from experiments.shared.fast_measures import ATTENTION
from experiments.shared.fast_tokens import encoded
from experiments.shared.heldout import MAX_NORM_RATIO
from experiments.shared.statistics import seed_factor

N_SPLITS = 5  # halves of the labelled texts
LOSS_TOKENS = 3000  # of held-out dialogues, through the whole model
BATCH_TOKENS = 1024
FIGURES = ("rule_f1", "detection_auc", "probing_1", "probing_16", "loss_recovered")


class Evidence:
    """What an autoencoder of one layer is examined on; read when it is first asked for.

    datasets: {"held_out", "labelled"} files; paths: {"held_out_alone", "labelled"} their
    activations.
    """

    def __init__(
        self,
        settings: Any,
        datasets: Mapping[str, Any],
        paths: Mapping[str, Any],
        tokenizer: Any,
        layer: int,
    ) -> None:
        self.settings, self.datasets, self.paths = settings, datasets, paths
        self.tokenizer, self.layer = tokenizer, layer
        self._model: Any = None
        self._ablated: dict[str, Any] = {}

    def of(self, sae: Any) -> dict[str, float | None]:
        """{one of FIGURES, or detection_random: its value, None where it cannot be measured}."""
        found = {**self.labels(sae), **self.probing(sae), **self.loss(sae)}
        return {name: None if np.isnan(value) else float(value) for name, value in found.items()}

    def labels(self, sae: Any) -> dict[str, float]:
        """Means over features: the F1 of their rules on the half of the texts that they were not
        found on (0 without a rule), and the AUC of five-shot detection, with that of random
        directions."""
        from fastsae.activations.files import open_activations
        from fastsae.data.datasets import read_dataset
        from fastsae.interpretation.detection import add_detection
        from fastsae.interpretation.evidence import Evidence as OfFeatures
        from fastsae.interpretation.firings import Firings
        from fastsae.interpretation.rule_labels import add_rules

        data = open_activations(self.paths["held_out_alone"])
        examples = read_dataset(self.datasets["held_out"], text_field=self.settings.TEXT_FIELD)
        seed = self.settings.SEED
        firings = Firings(data["seq_lengths"], sae.k_active_neurons, seed)
        bounds = {"max_norm": max_norm_of(data), "exclude_shared_prefix": True, "use": "all"}
        evidence = OfFeatures(
            sae, data, examples, self.tokenizer, bounds, n_top=1, seed=seed, firings=firings
        )
        rows = evidence.rows(1)
        rules = add_rules(rows, evidence, firings, seed).summary()
        detection = add_detection(rows, evidence, firings, seed).summary()
        return {
            "rule_f1": rules.get("mean_label_f1", np.nan),
            "detection_auc": detection.get("mean_detection_auc", np.nan),
            "detection_random": detection.get("mean_detection_auc_random", np.nan),
        }

    def probing(self, sae: Any) -> dict[str, float]:
        """The mean AUC over categories of probes on 1 and on 16 features, mean-pooled over each
        text; over half splits."""
        from fastsae.activations.files import open_activations
        from fastsae.data.datasets import read_dataset
        from fastsae.interpretation import probing
        from fastsae.interpretation.categories import number_labels

        data = open_activations(self.paths["labelled"])
        examples = read_dataset(
            self.datasets["labelled"],
            text_field=self.settings.TEXT_FIELD,
            label_field=self.settings.LABELLED_FIELD,
            only_lines=data["example_ids"],
        )
        known = np.array([example.label is not None for example in examples])
        columns = pooled(sae, data)[np.flatnonzero(known)]
        names, labels = number_labels([str(e.label) for e in examples if e.label is not None])
        texts = np.arange(len(labels))
        categories = probing.probed_categories(labels, texts)
        if not len(categories):
            return {"probing_1": np.nan, "probing_16": np.nan}
        inside = labels[None, :] == categories[:, None]
        splits = probing.half_splits(labels, len(names), texts, self.settings.SEED, N_SPLITS)
        aucs = [probing.sparse_probe(columns, inside, first, (1, 16)) for first in splits]
        one, sixteen = np.mean(aucs, axis=(0, 2))
        return {"probing_1": one, "probing_16": sixteen}

    def loss(self, sae: Any) -> dict[str, float]:
        """The share of the model's next-token loss that survives when the tokens after the opening,
        sinks left out, are replaced by their reconstruction, against zeros in their place."""
        import torch

        from fastsae import intervention
        from fastsae.activations.files import open_activations
        from fastsae.data.tokenization import SHARED_PREFIX

        if self._model is None:
            self._model = whole_model(self.settings)
        data = open_activations(self.paths["held_out_alone"])
        offsets = np.concatenate([[0], np.cumsum(data["seq_lengths"], dtype=np.int64)])
        n = max(1, int(np.searchsorted(offsets, LOSS_TOKENS, "right")) - 1)
        rows = np.arange(offsets[n])
        kind = np.asarray(data["token_kind"][rows])
        norms = np.linalg.norm(np.asarray(data["activations"][rows], np.float32), axis=1)
        usable = (kind != SHARED_PREFIX) & (norms <= max_norm_of(data))
        replacements = {"spliced": intervention.reconstruction(sae)}
        if not self._ablated:
            replacements["zero"] = intervention.constant(torch.zeros(sae.input_dim))
        losses = intervention.next_token_losses(
            self._model,
            self.layer,
            np.split(np.asarray(data["token_ids"][rows]), offsets[1:n]),
            {name: intervention.only(usable, each) for name, each in replacements.items()},
            batch_tokens=BATCH_TOKENS,
        )
        counted = (kind != SHARED_PREFIX) & ~np.isnan(losses["clean"].ce)
        means = {
            name: float(each.ce[counted].mean(dtype=np.float64)) for name, each in losses.items()
        }
        self._ablated = self._ablated or {"zero": means["zero"]}
        zero = self._ablated["zero"]
        recovered = intervention.loss_recovered(means["clean"], means["spliced"], zero)
        return {"loss_recovered": recovered}


def max_norm_of(data: Mapping[str, Any]) -> float:
    """The norm above which a token of an activations file is a sink."""
    from fastsae.data.token_masks import token_norms, usable_tokens

    bound = usable_tokens(
        token_norms(data["activations"]),
        data["token_kind"],
        exclude_shared_prefix=True,
        max_norm_ratio=MAX_NORM_RATIO,
    )[1]
    assert bound is not None  # there is a ratio
    return bound


def pooled(sae: Any, data: Mapping[str, Any]) -> sparse.csr_matrix:
    """(n_examples, M) each feature's mean over an example's tokens, openings and sinks left out."""
    from fastsae.data.token_masks import token_norms
    from fastsae.data.tokenization import SHARED_PREFIX

    lengths = data["seq_lengths"]
    example = np.repeat(np.arange(len(lengths)), lengths)
    usable = token_norms(data["activations"]) <= max_norm_of(data)
    rows = np.flatnonzero(usable & (data["token_kind"] != SHARED_PREFIX))
    parts = [
        (
            example[part[entries.row.cpu().numpy()]],
            entries.column.cpu().numpy(),
            entries.value.cpu(),
        )
        for part, entries in encoded(sae, data["activations"], rows)
    ]
    of, column, value = (np.concatenate(each) for each in zip(*parts))
    n_tokens = np.bincount(example[rows], minlength=len(lengths))
    return sparse.csr_matrix(
        (value / n_tokens[of], (of, column)), shape=(len(lengths), sae.m_total_neurons)
    )


def whole_model(settings: Any) -> Any:
    """The model with all its blocks; on a CPU with faster products, equal up to rounding."""
    from fastsae.lm import decoders, devices, loading

    device = devices.choose_device(settings.DEVICE)
    model = loading.load_model(
        settings.MODEL_NAME,
        revision=settings.MODEL_REVISION,
        cache_dir=settings.CACHE_DIR,
        device=device,
        dtype=devices.choose_dtype("auto", device),
    )
    if device == "cpu":
        from fastsae.lm.cpu_kernels import quicken

        quicken(decoders.decoder_stack(model))
    return model


def summed_up(values: Mapping[Any, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each group of cells that differ in the seed alone the mean of each figure over seeds, and
    its difference to FAST's of the same seed, openings and sinks kept or dropped as there (of a
    plain text, which has no openings, to FAST without); intervals are of the seeds alone (Student's
    t), None with one seed."""
    groups: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for cell, value in values.items():
        groups.setdefault(tuple(cell[1:4]), {})[cell.seed] = value["features"]
    rows = []
    for (source, openings, sinks), by_seed in groups.items():
        fast = groups.get(("alone", openings if source in ATTENTION else 0, sinks), {})
        row: dict[str, Any] = {"source": source, "openings": openings, "sinks": sinks}
        for name in (*FIGURES, "detection_random"):
            found = {s: v[name] for s, v in by_seed.items() if v.get(name) is not None}
            row[name] = over_seeds(list(found.values()))
            above = [
                value - fast[s][name] for s, value in found.items() if fast.get(s, {}).get(name)
            ]
            row[f"{name}_above_fast"] = over_seeds(above)
        rows.append(row)
    return rows


def over_seeds(values: list[float]) -> dict[str, Any] | None:
    """The mean of values, one a seed, with its 95 % interval; None of none."""
    if not values:
        return None
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"value": mean, "interval": None}
    # of the bootstrap's standard deviation, which `seed_factor` widens to Student's t
    half = 1.96 * seed_factor(n) * float(np.std(values)) / np.sqrt(n)
    return {"value": mean, "interval": [mean - half, mean + half]}
