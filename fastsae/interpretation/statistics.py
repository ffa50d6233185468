"""What every feature does on the tokens of a dataset, gathered in one pass over the activations,
one block of examples at a time.

Memory grows with features x examples kept, never with tokens x features: sums, maxima and
histograms per feature, its strongest examples and a random sample of the others, and two tables of
pairs (feature x token name, feature x feature) that are cut back to each feature's largest when
they grow too long. `tests/interpretation/test_interpretation_statistics.py` holds the dense twin.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse

from fastsae.data.token_masks import chosen_tokens, usable_tokens
from fastsae.data.tokenization import ROLES

BLOCK_TOKENS = 8192  # about so many tokens of whole examples are worked on at a time
PRE_ACTIVATIONS = 1 << 24  # at most so many encoder outputs at a time (64 MiB)
# bins of a histogram while it grows; its upper half always holds the maximum
N_BINS = 64
PAIR_LIMIT = 1 << 22  # pairs (feature, token name) held, and as many (feature, feature)
# pairs of features counted for co-activation; beyond, every n-th token is taken
CO_PAIRS = 1 << 26
# values of pooled features held; beyond, a random part of the examples is pooled
POOLED_ENTRIES = 1 << 24


class Statistics:
    """Per-feature results of `collect`: M features, kept tokens = those that the autoencoder is
    meant for.

    Of each feature:
    count (M,): tokens on which it fires; total (M,): its summed activation; maximum (M,).
    top, sample: `LargestExamples`, its strongest examples, and random ones where it fires.
    kind_role_mass (M, 3, 5): its activation by token kind and role.
    name_mass: `PairSums`, its activation by token name.
    together: `PairSums`, tokens on which two features fire, of every n-th token where there are
    many; co_count (M,): of these tokens, those on which it fires.
    pooled_max, pooled_mean: CSR (n_pooled, M), of the examples `pooled_examples`, all of which
    have kept tokens.

    Of the tokens: norms (n_tokens,) of all; kept (n_tokens,) bool; name_count (n_names,), the kept
    tokens of each name.
    """

    def __init__(self, m: int, n_tokens: int, n_names: int, *, n_top: int, n_sampled: int) -> None:
        self.m, self.n_kept = m, 0
        self.count = np.zeros(m, np.int64)
        self.total = np.zeros(m)
        self.maximum = np.zeros(m, np.float32)
        self.histogram = Histogram(m)
        self.top, self.sample = LargestExamples(m, n_top), LargestExamples(m, n_sampled)
        self.kind_role_mass = np.zeros((m, 3, len(ROLES)))
        self.name_mass, self.together = PairSums(m, n_names), PairSums(m, m)
        self.co_count = np.zeros(m, np.int64)
        self.name_count = np.zeros(n_names, np.int64)
        self.norms, self.kept = np.empty(n_tokens, np.float32), np.zeros(n_tokens, bool)
        self.pooled_examples: np.ndarray  # these three are added by `collect`
        self.pooled_max: sparse.csr_matrix
        self.pooled_mean: sparse.csr_matrix

    @property
    def density(self) -> np.ndarray:
        """(M,) each feature's density: the share of the kept tokens on which it fires."""
        return self.count / max(self.n_kept, 1)

    def add_entries(self, column: np.ndarray, value: np.ndarray, kind_role: np.ndarray) -> None:
        """Sums over the entries of a block; kind_role (nnz,): kind * 5 + role of each entry's
        token."""
        m, n_groups = self.m, self.kind_role_mass[0].size
        self.count += np.bincount(column, minlength=m)
        self.total += np.bincount(column, value, minlength=m)
        np.maximum.at(self.maximum, column, value)
        self.histogram.add(column, value, self.maximum)
        groups = np.bincount(column * n_groups + kind_role, value, minlength=m * n_groups)
        self.kind_role_mass += groups.reshape(self.kind_role_mass.shape)


def collect(
    sae: Any,
    activations: Any,
    lengths: np.ndarray,
    token_kind: np.ndarray,
    token_role: np.ndarray,
    name_of_token: np.ndarray,
    n_names: int,
    *,
    max_norm: float | None = None,
    exclude_shared_prefix: bool = True,
    use: str = "all",
    n_top: int = 5,
    n_sampled: int = 32,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    watch: Callable[[Any, np.ndarray], object] | None = None,
    observe: Callable[[np.ndarray, np.ndarray, np.ndarray], object] | None = None,
) -> Statistics:
    """`Statistics` of the features of `sae` on activations (n_tokens, d), an array or memory map of
    examples one after the other.

    Tokens of the shared prefix, those whose norm is above `max_norm` and those that `use`
    (USE_TOKENS) does not name are left out, as in training. name_of_token (n_tokens,) numbers the
    tokens' names. `progress(n)` is called with the tokens done; `watch(x, example)` with the kept
    tokens of each block, (n, d) float32 on the CPU, and the numbers (n,) of their examples;
    `observe(tokens, features, values)` with all activations (nnz,) of a block.
    """
    import torch

    m, offsets = sae.m_total_neurons, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    result = Statistics(m, int(offsets[-1]), n_names, n_top=n_top, n_sampled=n_sampled)
    k = sae.k_active_neurons
    stride = max(1, int(np.ceil(offsets[-1] * k * k / CO_PAIRS)))
    within, _ = usable_tokens(
        result.norms, token_kind, exclude_shared_prefix=exclude_shared_prefix, max_norm_ratio=None
    )
    # kept, but for the bound on norms
    named = counts_per_example(within & chosen_tokens(use, token_kind, token_role), offsets)
    pooled = choose_pooled(lengths, np.flatnonzero(named), m, k, seed)
    is_pooled = np.zeros(len(lengths), bool)
    is_pooled[pooled] = True
    pooled_parts = []
    for first, last in example_blocks(offsets):
        rows = slice(offsets[first], offsets[last])
        x = torch.from_numpy(np.array(activations[rows])).float()  # (n_rows, d)
        result.norms[rows] = x.norm(dim=1).numpy()
        keep, _ = usable_tokens(
            result.norms[rows],
            token_kind[rows],
            exclude_shared_prefix=exclude_shared_prefix,
            max_norm_ratio=None,
            max_norm=max_norm,
        )
        result.kept[rows] = keep = keep & chosen_tokens(use, token_kind[rows], token_role[rows])
        chosen = np.flatnonzero(keep)
        x = x if keep.all() else x[chosen]
        # CSR (n_chosen, M)
        features = encode_rows(sae, x)
        # (n_chosen,) number of each row's token
        token = rows.start + chosen
        row = np.repeat(np.arange(len(chosen)), np.diff(features.indptr))  # (nnz,)
        column, value = features.indices.astype(np.int64), features.data
        result.n_kept += len(chosen)
        kind_role = token_kind[token].astype(np.int64) * len(ROLES) + token_role[token]
        result.add_entries(column, value, kind_role[row])
        if observe:
            observe(token[row], column, value)
        names = name_of_token[token]
        result.name_count += np.bincount(names, minlength=n_names)
        result.name_mass.add_entries(column, names[row], value)
        fired = (
            features[np.arange((-rows.start) % stride, len(chosen), stride)]
            if stride > 1
            else features
        )
        fired = sparse.csr_matrix(
            (np.ones(fired.nnz, np.float32), fired.indices, fired.indptr), fired.shape
        )
        result.co_count += np.bincount(fired.indices, minlength=m)
        result.together.add_product(fired)
        # (n_chosen,) example within the block
        example = np.repeat(np.arange(last - first), lengths[first:last])[chosen]
        pairs = example_pairs(
            example[row], column, value, token[row] - offsets[first + example[row]], last - first, m
        )
        keep_examples(result, pairs, first, seed)
        pooled_parts.append(
            pooled_rows(pairs, is_pooled[first:last], lengths[first:last], example, m)
        )
        if watch:
            watch(x, first + example)
        if progress:
            progress(rows.stop - rows.start)
    # without the examples whose only tokens are attention sinks
    has_tokens = counts_per_example(result.kept, offsets)[pooled] > 0
    result.pooled_examples = pooled[has_tokens]
    result.pooled_max, result.pooled_mean = (
        sparse.vstack(part, format="csr")[has_tokens] for part in zip(*pooled_parts)
    )
    result.name_mass.fold()
    result.together.fold()
    return result


def example_blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last) ranges of whole examples of about BLOCK_TOKENS tokens."""
    first = 0
    while first < len(offsets) - 1:
        last = max(
            first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK_TOKENS, "right")) - 1
        )
        yield first, last
        first = last


def encode_rows(sae: Any, x: Any) -> sparse.csr_matrix:
    """Features of activations x (n, d), a float32 CPU tensor, as a CSR matrix (n, M) float32."""
    import torch

    from fastsae.sae.autoencoder import encode

    indices = [np.zeros(0, np.int32)]
    data = [np.zeros(0, np.float32)]
    counts = [np.zeros(1, np.int64)]
    for part in x.split(max(64, min(BLOCK_TOKENS, PRE_ACTIVATIONS // sae.m_total_neurons))):
        entries = encode(sae, part.to(sae.input_bias.device))
        indices.append(entries.column.to(torch.int32).cpu().numpy())
        data.append(entries.value.cpu().numpy())
        counts.append(torch.bincount(entries.row, minlength=len(part)).cpu().numpy())
    join = np.concatenate
    return sparse.csr_matrix(
        (join(data), join(indices), np.cumsum(join(counts))), shape=(len(x), sae.m_total_neurons)
    )


def example_pairs(
    example: np.ndarray,
    column: np.ndarray,
    value: np.ndarray,
    position: np.ndarray,
    n_examples: int,
    m: int,
) -> tuple:
    """The (example, feature) pairs of a block with a positive value: (example, feature, maximum,
    sum, position of the maximum)."""
    flat = example * m + column
    largest = np.zeros(n_examples * m, np.float32)
    np.maximum.at(largest, flat, value)
    # backwards, so that the first of equal maxima is written last
    peak = np.flatnonzero(value == largest[flat])[::-1]
    where = np.zeros(n_examples * m, np.int32)
    where[flat[peak]] = position[peak]
    pair = np.flatnonzero(largest)
    total = np.bincount(flat, value, minlength=n_examples * m)[pair]
    return pair // m, pair % m, largest[pair], total, where[pair]


def keep_examples(result: Statistics, pairs: tuple, first: int, seed: int) -> None:
    """Offer a block's pairs to the strongest examples and to the random sample.

    pairs: as `example_pairs` gives them, examples counted from `first`.
    """
    example, feature, largest, _, position = pairs
    result.top.offer(feature, largest, example + first, position, largest)
    result.sample.offer(
        feature, random_keys(example + first, feature, seed), example + first, position, largest
    )


def random_keys(example: np.ndarray, feature: np.ndarray, seed: int) -> np.ndarray:
    """A number in (0, 1] for each pair, the same in every run and block order (splitmix64's mixing
    of the two numbers)."""
    x = (
        (example.astype(np.uint64) << np.uint64(32))
        ^ feature.astype(np.uint64)
        ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / (1 << 53) + 2.0**-54


def counts_per_example(chosen: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n_examples,) how many of its tokens are chosen, bool (n_tokens,)."""
    return np.diff(np.concatenate([[0], np.cumsum(chosen)])[offsets])


def choose_pooled(
    lengths: np.ndarray,
    examples: np.ndarray,
    m: int,
    k: int,
    seed: int,
    entries: int | None = None,
    most: int | None = None,
) -> np.ndarray:
    """Numbers of the examples whose pooled features are held: all of `examples`, or a random
    choice of `most`, or of as many as `entries` values (None: POOLED_ENTRIES) allow. A smaller
    choice is part of a larger.

    `examples` have kept tokens: one without would be a row of zeros, and count as one where every
    feature is silent.
    """
    per_example = min(m, int(np.mean(lengths) * k) + 1)
    entries = entries or POOLED_ENTRIES
    n = max(2, min(len(examples), entries // per_example, most or len(examples)))
    return np.sort(np.random.default_rng((seed, 2)).permutation(examples)[:n])


def pooled_rows(
    pairs: tuple, is_pooled: np.ndarray, lengths: np.ndarray, example_of_token: np.ndarray, m: int
) -> tuple:
    """(maximum, mean) over the kept tokens of each pooled example of a block, two CSR matrices
    (n_pooled in the block, M)."""
    example, feature, largest, total, _ = pairs
    inside = is_pooled[example]
    row = np.cumsum(is_pooled)[example[inside]] - 1
    n_tokens = np.maximum(np.bincount(example_of_token, minlength=len(lengths)), 1)
    shape = (int(is_pooled.sum()), m)
    mean = (total[inside] / n_tokens[example[inside]]).astype(np.float32)
    return tuple(
        sparse.csr_matrix((values, (row, feature[inside].astype(np.int32))), shape=shape)
        for values in (largest[inside], mean)
    )


class Histogram:
    """Counts of positive values per feature in N_BINS equal bins from 0 to a power of two that
    doubles when a value exceeds it."""

    def __init__(self, m: int) -> None:
        self.counts = np.zeros((m, N_BINS), np.int64)
        self.exponent = np.full(m, -127, np.int32)  # bins span 2 ** exponent

    def add(self, column: np.ndarray, value: np.ndarray, maximum: np.ndarray) -> None:
        """Count values (nnz,) of features (nnz,); maximum (M,): the largest so far, with these."""
        needed = np.frexp(maximum)[1]  # smallest e with maximum < 2 ** e
        for feature in np.flatnonzero((needed > self.exponent) & (maximum > 0)):
            shift = min(int(needed[feature] - self.exponent[feature]), 30)
            width = 1 << shift
            wide = np.add.reduceat(self.counts[feature], np.arange(0, N_BINS, width))
            self.counts[feature] = 0
            self.counts[feature, : len(wide)] = wide
            self.exponent[feature] = needed[feature]
        bins = (value * (N_BINS / np.exp2(self.exponent[column].astype(np.float64)))).astype(
            np.int64
        )
        self.counts += np.bincount(column * N_BINS + bins, minlength=self.counts.size).reshape(
            self.counts.shape
        )

    def bars(self, feature: int) -> tuple[np.ndarray, float]:
        """(counts, upper end): the bins up to the one that holds the maximum, merged in pairs."""
        counts = self.counts[feature].reshape(-1, 2).sum(1)
        filled = np.flatnonzero(counts)
        last = int(filled[-1]) + 1 if len(filled) else 0
        return counts[:last], last * float(np.exp2(self.exponent[feature])) / (N_BINS // 2)


class LargestExamples:
    """For each feature the n examples of largest key: key, value, example and position of the
    maximum, (M, n) each, best first.

    Unused places have key 0 and example -1.
    """

    def __init__(self, m: int, n: int) -> None:
        self.key, self.value = np.zeros((m, n)), np.zeros((m, n), np.float32)
        self.example, self.position = np.full((m, n), -1, np.int64), np.zeros((m, n), np.int64)

    def offer(
        self,
        feature: np.ndarray,
        key: np.ndarray,
        example: np.ndarray,
        position: np.ndarray,
        value: np.ndarray,
    ) -> None:
        """Candidates (n,) with positive keys, in the order of their examples; of equal keys the
        earlier stays."""
        n = self.key.shape[1]
        better = np.flatnonzero(key > self.key[feature, -1])
        order = better[np.lexsort((-key[better].astype(np.float64), feature[better]))]
        if not len(order):
            return
        touched, start, group = np.unique(feature[order], return_index=True, return_inverse=True)
        rank = np.arange(len(order)) - start[group]
        group, place, order = group[rank < n], n + rank[rank < n], order[rank < n]
        both = {}
        for name, new in (
            ("key", key),
            ("value", value),
            ("example", example),
            ("position", position),
        ):
            old = getattr(self, name)
            both[name] = (
                np.zeros((len(touched), 2 * n), old.dtype)
                if name != "example"
                else np.full((len(touched), 2 * n), -1)
            )
            both[name][:, :n] = old[touched]
            both[name][group, place] = new[order]
        best = np.argsort(-both["key"], axis=1, kind="stable")[:, :n]
        for name, merged in both.items():
            getattr(self, name)[touched] = np.take_along_axis(merged, best, axis=1)


class PairSums:
    """Sums over pairs (feature, other) as a CSR matrix `sums`; past PAIR_LIMIT pairs each feature
    keeps only its largest.

    `exact` says whether anything was cut; the largest sums of a feature survive unless they grow
    late from small parts.
    """

    def __init__(self, m: int, n_others: int) -> None:
        self.sums, self.exact = sparse.csr_matrix((m, n_others), dtype=np.float32), True
        self.waiting, self.n_waiting = [], 0

    def add_entries(self, feature: np.ndarray, other: np.ndarray, value: np.ndarray) -> None:
        """Add values (n,) to the sums of pairs (feature, other), each (n,)."""
        self._wait((feature.astype(np.int32), other.astype(np.int32), value))

    def add_product(self, fired: sparse.csr_matrix) -> None:
        """Count the pairs of features that fire together; fired: CSR (n_tokens, M) of ones."""
        product = (fired.T.tocsr() @ fired).tocoo()
        self._wait((product.row, product.col, product.data))

    def _wait(self, entries):
        self.waiting.append(entries)
        self.n_waiting += len(entries[0])
        if self.n_waiting > PAIR_LIMIT:
            self.fold()

    def fold(self) -> None:
        """Add what is waiting to `sums`, and cut these back if they are too many."""
        if self.waiting:
            feature, other, value = (np.concatenate(part) for part in zip(*self.waiting))
            self.waiting, self.n_waiting = [], 0
            self.sums = self.sums + sparse.csr_matrix(
                (value, (feature, other)), shape=self.sums.shape
            )
        if self.sums.nnz > PAIR_LIMIT:
            self.exact = False
            row = np.repeat(np.arange(self.sums.shape[0]), np.diff(self.sums.indptr))
            order = np.lexsort((-self.sums.data, row))
            rank = np.arange(len(order)) - self.sums.indptr[row]
            order = np.sort(order[rank < max(16, PAIR_LIMIT // (2 * self.sums.shape[0]))])
            counts = np.bincount(row[order], minlength=self.sums.shape[0])
            self.sums = sparse.csr_matrix(
                (
                    self.sums.data[order],
                    self.sums.indices[order],
                    np.concatenate([[0], np.cumsum(counts)]),
                ),
                shape=self.sums.shape,
            )
