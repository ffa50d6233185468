"""Dictionaries that nobody trained, of the same width and encoding rule as an autoencoder, on the
same tokens: what a figure about features has to be compared with.

Two kinds. *Random tokens*: the activations of M training tokens, less their mean, at length 1. It
knows where the data lie and nothing else, and is the stronger of the two. *Random directions*:
drawn from the normal distribution with the data's covariance.

The encoding rule is that of the autoencoder. Where the K largest of a token fire, the K largest
fire here. Where a threshold decides, one threshold for all directions lets as many fire per token,
in the mean of a sample, as of the autoencoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from fastsae.activations.files import release
from fastsae.data.token_masks import chosen_tokens, usable_tokens
from fastsae.interpretation.probing import KINDS
from fastsae.interpretation.statistics import (
    PRE_ACTIVATIONS,
    choose_pooled,
    counts_per_example,
    encode_rows,
    example_pairs,
    pooled_rows,
)
from fastsae.sae import Autoencoder
from fastsae.sae.autoencoder import encode
from fastsae.sae.initialisation import draw_directions

N_DRAWS = 2  # of each kind, fewer where they would need more than WEIGHTS numbers together
WEIGHTS = 1 << 27
SAMPLE = 4096  # tokens that the mean, the covariance and the threshold are taken from
ENTRIES = 1 << 22  # pooled values held of each dictionary at most
EXAMPLES = 2000  # examples pooled at most, drawn at random


@dataclass
class Dictionary:
    """M untrained directions with what `sparse_step.active_entries` asks of an autoencoder."""

    kind: str
    input_bias: torch.Tensor  # (d,) the mean of the tokens
    encoder: SimpleNamespace  # .weight (M, d), rows of length 1
    neuron_bias: torch.Tensor  # (M,) zeros
    threshold: torch.Tensor  # ()
    use_batch_topk: bool
    k_active_neurons: int

    @property
    def m_total_neurons(self) -> int:
        """The number of directions, M."""
        return len(self.encoder.weight)


class Pooled(NamedTuple):
    """A dictionary's activations over the kept tokens of examples: CSR (n, M) each."""

    max: sparse.csr_matrix
    mean: sparse.csr_matrix


def draw(kind: str, sae: Autoencoder, sample: torch.Tensor, seed: int) -> Dictionary:
    """A `Dictionary` of one of KINDS, as wide as `sae` and with its encoding rule.

    sample (n, d): activations of training tokens; at least M of them, or some are taken twice.
    """
    m, device = sae.m_total_neurons, sae.input_bias.device
    centre = sample.mean(0)
    centred = sample - centre
    if kind == "random tokens":
        rows = draw_directions("data", m, centred, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        some = centred[:SAMPLE]
        rows = torch.randn(m, len(some), generator=generator) @ some
    rows = torch.nn.functional.normalize(rows, dim=1).to(device)
    dictionary = Dictionary(
        kind,
        centre.to(device),
        SimpleNamespace(weight=rows),
        torch.zeros(m, device=device),
        torch.zeros((), device=device),
        bool(sae.use_batch_topk),
        int(sae.k_active_neurons),
    )
    if dictionary.use_batch_topk:
        set_threshold(dictionary, sae, sample)
    return dictionary


@torch.no_grad()
def set_threshold(dictionary: Dictionary, sae: Autoencoder, sample: torch.Tensor) -> None:
    """Give the dictionary the threshold at which it has as many active entries on a part of
    `sample` (n, d) as `sae` has there."""
    some = sample[: max(64, min(SAMPLE, PRE_ACTIVATIONS // dictionary.m_total_neurons))]
    some = some.to(sae.input_bias.device)
    n_active = len(encode(sae, some).value)
    pre = ((some - dictionary.input_bias) @ dictionary.encoder.weight.t()).flatten()
    largest = pre.topk(min(n_active + 1, len(pre)), sorted=True).values
    # between the last that fires and the first that does not
    dictionary.threshold = largest[-2:].mean() if n_active else largest[0]


def sample_tokens(
    activations: Any, candidates: np.ndarray, n: int, max_norm: float | None, seed: int
) -> torch.Tensor:
    """(at most n, d) float32 activations of random tokens among `candidates` (their numbers), none
    with a norm above `max_norm`."""
    generator = np.random.default_rng((seed, 7))
    # some to spare for those beyond the norm
    chosen = generator.choice(len(candidates), min(len(candidates), n + n // 4 + 64), replace=False)
    rows = torch.from_numpy(np.array(activations[np.sort(candidates[chosen])], np.float32))
    release(activations)
    rows = rows[torch.from_numpy(generator.permutation(len(rows)))]
    if max_norm is not None:
        rows = rows[rows.norm(dim=1) <= max_norm]
    return rows[:n]


@dataclass
class Untrained:
    """Dictionaries of KINDS beside an autoencoder, and what they do on some of the examples.

    `watch` is called with the tokens of one pass (see `statistics.collect`); `finish` then gives
    `examples` (n,), their numbers, `stream` (n, d), the mean of their activations, and `pooled`,
    {kind: [Pooled of each draw]}.
    """

    dictionaries: list[Dictionary]
    chosen: np.ndarray  # (n_examples,) bool
    examples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    stream: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    pooled: dict[str, list[Pooled]] = field(default_factory=dict)
    _seen: list[np.ndarray] = field(default_factory=list)
    _means: list[np.ndarray] = field(default_factory=list)
    _parts: list[list[tuple]] = field(default_factory=list)

    def watch(self, x: torch.Tensor, example: np.ndarray) -> None:
        """Pool a block of kept tokens x (n, d), float32 on the CPU, of the examples numbered in
        `example` (n,), which rise."""
        inside = np.flatnonzero(self.chosen[example])
        if not len(inside):
            return
        x = x[torch.from_numpy(inside)]
        numbers, row = np.unique(example[inside], return_inverse=True)
        n, counts = len(numbers), np.bincount(row)
        member = sparse.csr_matrix((np.ones(len(row)), (row, np.arange(len(row)))))
        self._seen.append(numbers)
        self._means.append(((member @ x.numpy()) / counts[:, None]).astype(np.float32))
        everything = np.ones(n, bool)
        parts = []
        for dictionary in self.dictionaries:
            m = dictionary.m_total_neurons
            found = encode_rows(dictionary, x)
            token = np.repeat(np.arange(len(row)), np.diff(found.indptr))
            column = found.indices.astype(np.int64)
            pairs = example_pairs(row[token], column, found.data, token, n, m)
            parts.append(pooled_rows(pairs, everything, counts, row, m))
        self._parts.append(parts)

    def finish(self) -> "Untrained":
        """Join what the blocks gave; the examples that have no kept token are left out."""
        if not self._seen:
            return self
        self.examples, self.stream = np.concatenate(self._seen), np.concatenate(self._means)
        for i, dictionary in enumerate(self.dictionaries):
            of_blocks = [parts[i] for parts in self._parts]
            pooled = Pooled(*(sparse.vstack(part, format="csr") for part in zip(*of_blocks)))
            self.pooled.setdefault(dictionary.kind, []).append(pooled)
        self._seen, self._means, self._parts = [], [], []
        return self


def prepare(
    sae: Autoencoder,
    data: Mapping[str, Any],
    *,
    max_norm: float | None,
    exclude_shared_prefix: bool,
    use: str,
    not_trained_on: np.ndarray,
    seed: int,
) -> Untrained:
    """`Untrained` for the members of an activations file, with N_DRAWS dictionaries of each kind.

    not_trained_on: numbers of the examples whose tokens training did not see; the dictionaries take
    theirs from the others. max_norm, exclude_shared_prefix and use as in training.
    """
    lengths, m, d = data["seq_lengths"], sae.m_total_neurons, data["activations"].shape[1]
    kind, role = data["token_kind"], data["token_role"]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    within, _ = usable_tokens(
        np.zeros(0), kind, exclude_shared_prefix=exclude_shared_prefix, max_norm_ratio=None
    )
    within = within & chosen_tokens(use, kind, role)
    named = np.flatnonzero(counts_per_example(within, offsets))
    chosen = np.zeros(len(lengths), bool)
    k = sae.k_active_neurons
    # part of those whose features are pooled, for a smaller choice is part of a larger
    chosen[choose_pooled(lengths, named, m, k, seed, ENTRIES, EXAMPLES)] = True
    unseen = np.zeros(len(lengths), bool)
    unseen[not_trained_on] = True
    trained = within & ~np.repeat(unseen, lengths)
    candidates = np.flatnonzero(trained if trained.any() else within)
    n_draws = max(1, min(N_DRAWS, WEIGHTS // (len(KINDS) * m * d)))
    dictionaries = []
    for i in range(n_draws if len(candidates) else 0):
        sample = sample_tokens(
            data["activations"], candidates, max(m, SAMPLE), max_norm, seed + 1000 * i
        )
        if len(sample) > 1:
            dictionaries += [draw(name, sae, sample, seed + 1000 * i) for name in KINDS]
    return Untrained(dictionaries, chosen)
