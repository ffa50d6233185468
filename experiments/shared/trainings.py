"""Autoencoders trained in this process with an objective of objective_steps.py, from rows in
memory, and what is measured of them: for studies that compare what stage 2 has no setting for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.shared.objective_steps import Objective, annealed_k, step_of
from fastsae.sae import Autoencoder
from fastsae.sae.architectures.aligned import aligned

RATE = 4e-3  # of Adam at M = 256 and a batch of 512, as stage 2 has it
CLIP_GRAD = 1.0


@dataclass
class Rows:
    """Tokens to train on: x (n, d) float32, and the numbers of those whose predecessor in their
    example is the row before."""

    x: torch.Tensor
    follows: np.ndarray

    def batches(self, size: int, n: int, seed: int, pairs: bool) -> Iterator[torch.Tensor]:
        """n batches (size, d): rows in a new random order each time all were served; with `pairs`
        the first half are rows and the second half those before them."""
        of, size = (self.follows, size // 2) if pairs else (np.arange(len(self.x)), size)
        generator, left = np.random.default_rng(seed), np.zeros(0, np.int64)
        for _ in range(n):
            if len(left) < size:
                left = generator.permutation(of)
            now, left = left[:size], left[size:]
            yield self.x[np.concatenate([now, now - 1]) if pairs else now]


def train(
    objective: Objective,
    rows: Rows,
    *,
    m: int,
    k: int,
    seed: int,
    steps: int,
    batch_size: int,
    rate: float = RATE,
    weight: float = 0.0,
    coefficient: float = 0.0,
) -> Autoencoder:
    """An autoencoder after so many steps, as it is measured; the rate falls to 0 over all steps.

    Batches depend on the seed, as the first weights do.
    """
    from fastsae.training.dead_features import tokens_until_dead
    from fastsae.training.run import TrainingRun, learning_rate_factor

    run = TrainingRun(
        {
            "input_dim": rows.x.shape[1],
            "m_total_neurons": m,
            "k_active_neurons": k,
            "aux_k": min(2 * k, m),
            "prefix_lengths": [m // 4, m] if objective.prefixes else None,
            "architecture": objective.architecture,
        },
        rows.x[np.sort(np.random.default_rng(seed).permutation(len(rows.x))[:32768])],
        seed=seed,
        device="cpu",
        learning_rate=rate,
        normalise="norm" if objective.dense else "none",
        directions="mixed",
        encoder_scale=None,
    )
    step = step_of(objective, weight, coefficient)
    batches = rows.batches(batch_size, steps, seed, objective.adds == "pairs")
    for number, batch in enumerate(batches):
        if objective.adds == "annealed":
            run.sae.k_active_neurons = annealed_k(k, m, number, steps)
        factor = learning_rate_factor(
            number, n_steps=steps, schedule="linear", warmup_steps=0, decay_fraction=1.0
        )
        run.step(
            step,
            batch,
            learning_rate=rate * factor,
            dead_after=tokens_until_dead(m, k, batch_size),
            clip_grad=CLIP_GRAD,
        )
    run.sae.k_active_neurons = k
    if objective.adds == "aligned":
        with torch.no_grad():
            run.sae.encoder.weight.copy_(aligned(run.sae.encoder.weight, run.sae.decoder.weight))
    return run.result()


@torch.no_grad()
def fire_exactly(sae: Autoencoder, x: torch.Tensor, k: int) -> None:
    """Set the threshold of a BatchTopK autoencoder so that k features fire per token of x (n, d) on
    average: it was learned from batches, and lets a little more or less fire."""
    pre = (x - sae.input_bias) @ sae.encoder.weight.t() + sae.neuron_bias
    sae.threshold.copy_(pre.flatten().topk(k * len(x) + 1, sorted=False).values.min())


class Dataset:
    """A labelled dataset's activations at one layer: rows that train, validate and test, split as
    stage 2 splits them, and its examples' labels."""

    def __init__(self, settings: Any, part: float = 1.0) -> None:
        from fastsae.activations.files import open_activations
        from fastsae.data.datasets import read_dataset
        from fastsae.training.data import Tokens

        self.path = Path(settings.activations_path)
        self.tokens = Tokens(
            self.path,
            validation_fraction=0.1,
            test_fraction=0.1,
            seed=settings.SEED,
            use="all",
            exclude_shared_prefix=True,
            max_norm_ratio=10.0,
        )
        self.data = open_activations(self.path)
        examples = read_dataset(
            settings.DATASET_PATH,
            text_field="text",
            label_field=settings.LABEL_FIELD,
            only_lines=self.data["example_ids"],
        )
        self.labels = [example.label for example in examples]
        self.part = part

    def rows(self) -> Rows:
        """The rows that train: those of a random part of the examples, in the order of the file."""
        tokens = self.tokens
        chosen = tokens.train
        if self.part < 1:
            order = np.random.default_rng(0).permutation(int(tokens.example[-1]) + 1)
            some = np.zeros(len(order), bool)
            some[order[: round(self.part * len(order))]] = True
            chosen = chosen[some[tokens.example[chosen]]]
        same = tokens.example[chosen][1:] == tokens.example[chosen][:-1]
        follows = 1 + np.flatnonzero((np.diff(chosen) == 1) & same)
        return Rows(tokens.rows(chosen), follows)

    def figures(self, sae: Autoencoder) -> dict[str, float]:
        """Of the test examples, which decided nothing."""
        from fastsae.sae.metrics import evaluate

        tokens = self.tokens
        found = evaluate(sae, tokens.activations, tokens.test, tokens.example, tokens.special)
        return {name: found[name] for name in ("normalized_mse", "l0", "dead_fraction")}

    def validation_error(self, sae: Autoencoder) -> dict[str, float]:
        """The same of the validation examples, for choices."""
        from fastsae.sae.metrics import evaluate

        tokens = self.tokens
        rows = tokens.validation
        found = evaluate(sae, tokens.activations, rows, tokens.example, tokens.special)
        return {name: found[name] for name in ("normalized_mse", "l0")}

    def probes(self, sae: Autoencoder, ks: tuple[int, ...], n_splits: int) -> dict[str, float]:
        """{k: mean AUC over categories and half splits} of k-sparse probes of the labels from each
        example's mean features."""
        from scipy import sparse

        from fastsae.interpretation import probing
        from fastsae.interpretation.categories import number_labels
        from fastsae.interpretation.statistics import encode_rows

        tokens = self.tokens
        used = np.sort(np.concatenate([tokens.train, tokens.validation, tokens.test]))
        example = tokens.example[used]
        features = encode_rows(sae, tokens.rows(used))  # (n, M)
        n_examples = int(tokens.example[-1]) + 1
        member = sparse.csr_matrix(
            (np.ones(len(used)), (example, np.arange(len(used)))), (n_examples, len(used))
        )
        counts = np.bincount(example, minlength=n_examples)
        pooled = sparse.csr_matrix(member @ features / np.maximum(counts, 1)[:, None])
        known = np.flatnonzero([label is not None for label in self.labels])
        names, labels = number_labels([str(self.labels[i]) for i in known])
        pooled, texts = pooled[known], np.arange(len(known))
        inside = labels == probing.probed_categories(labels, texts)[:, None]
        splits = probing.half_splits(labels, len(names), texts, 0, n_splits)
        found = [probing.sparse_probe(pooled, inside, first, ks) for first in splits]
        return dict(zip(map(str, ks), np.nanmean(found, axis=(0, 2)).tolist()))

    def losses_recovered(
        self, saes: dict[str, Autoencoder], n_examples: int, model: Any, layer: int
    ) -> dict[str, float]:
        """{name: share of the model's loss that is recovered} with reconstructions in the place of
        the stream at the tokens that are trained on, of so many test examples; zeros there are
        0."""
        from fastsae import intervention

        tokens, ids = self.tokens, self.data["token_ids"]
        starts = np.concatenate([[0], np.cumsum(self.data["seq_lengths"])])
        examples = np.unique(tokens.example[tokens.test])[:n_examples]
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in examples])
        usable = np.isin(rows, tokens.test)
        zeros = intervention.constant(np.zeros(tokens.activations.shape[1], np.float32))
        functions = {"zeros": zeros}
        functions |= {name: intervention.reconstruction(sae) for name, sae in saes.items()}
        after = np.concatenate([[False], usable[:-1]])  # predicted from a token that is replaced
        losses = intervention.next_token_losses(
            model,
            layer,
            [ids[starts[i] : starts[i + 1]] for i in examples],
            {name: intervention.only(usable, each) for name, each in functions.items()},
            wanted=after,
        )
        after &= ~np.isnan(losses["clean"].ce)
        ce = {name: float(each.ce[after].mean()) for name, each in losses.items()}
        whole = ce["zeros"] - ce["clean"]
        return {name: (ce["zeros"] - ce[name]) / whole for name in saes}
