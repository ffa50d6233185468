"""Evidence from a dataset's own labels: how well one feature alone separates one category of examples from the rest."""
import numpy as np
from scipy.stats import rankdata


def auc_matrix(pooled, labels, n_categories):
    """AUC of every feature for every category against the rest, (n_categories, M); nan where a category is empty or is all.

    pooled: (n_examples, M); labels: (n_examples,) category numbers. Ties count half.
    """
    ranks = rankdata(pooled, axis=0)                                                  # (n_examples, M)
    member = (labels[None] == np.arange(n_categories)[:, None]).astype(np.float64)    # (n_categories, n_examples)
    inside = member.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (member @ ranks - inside * (inside + 1) / 2) / (inside * (len(labels) - inside))


def best_category(pooled, labels, n_categories, seed):
    """(category number (M,), AUC (M,)): the category is chosen on one half of the examples, its AUC computed on the other.

    Each category is halved by the seed. Features and categories without evidence give AUC nan.
    """
    generator = np.random.default_rng(seed)
    first = np.zeros(len(labels), bool)
    for category in range(n_categories):
        members = generator.permutation(np.flatnonzero(labels == category))
        first[members[:len(members) // 2 + (category % 2) * (len(members) % 2)]] = True
    choosing = auc_matrix(pooled[first], labels[first], n_categories)
    testing = auc_matrix(pooled[~first], labels[~first], n_categories)
    choosing[np.isnan(choosing) | np.isnan(testing)] = -1
    chosen = choosing.argmax(0)
    auc = testing[chosen, np.arange(pooled.shape[1])]
    auc[choosing.max(0) < 0] = np.nan
    return chosen, auc


def shuffled_count(pooled, labels, n_categories, seed, above, repeats=10):
    """How many features reach an AUC above the bound under shuffled labels, the mean over `repeats` shuffles."""
    generator = np.random.default_rng((seed, 1))
    counts = [(best_category(pooled, generator.permutation(labels), n_categories, seed + i)[1] > above).sum() for i in range(repeats)]
    return float(np.mean(counts))
