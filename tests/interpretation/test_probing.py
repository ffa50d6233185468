"""Probes against answers worked out by hand, a slow twin, and the definitions of sae-probes."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fastsae.interpretation import probing
from fastsae.interpretation.probing import (
    aucs,
    dense_probe,
    estimate,
    half_splits,
    probed_categories,
    ranking,
    sparse_probe,
)


def test_an_interval_by_hand():
    """Variance 1, times 1/3 + 1; Student's t with 2 degrees of freedom has 4.3027 at 97.5 %."""
    found = estimate([1.0, 2.0, 3.0, np.nan])
    half = 4.30265 * (4 / 3) ** 0.5
    assert found == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    assert estimate([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert estimate([0.5])[1:] == (-np.inf, np.inf) and estimate([np.nan]) is None
    # an AUC is never above 1
    assert estimate([0.9, 1.0, 0.95], 0, 1).high == 1 and estimate([0.1, 0, 0], 0, 1).low == 0


def test_intervals_hold_the_truth():
    """Mean AUC of a noisy column: 50 data sets, five half splits each; 95 % of the intervals hold
    what 20,000 examples say. Without the correction it would be half of them."""
    generator = np.random.default_rng(0)

    def data(n):
        inside = generator.random((1, n)) < 0.3
        return (0.8 * inside + generator.standard_normal((1, n))).T, inside

    truth = aucs(*data(20_000))[0]
    holds = []
    for _ in range(50):
        column, inside = data(120)
        splits = half_splits(inside[0].astype(int), 2, np.arange(120), 0, 5)
        found = estimate([aucs(column[~first], inside[:, ~first])[0] for first in splits])
        holds.append(found.low <= truth <= found.high)
    assert np.mean(holds) > 0.85


@pytest.mark.parametrize("k", [1, 2, 16])
@pytest.mark.parametrize("n, share", [(20, 0.5), (60, 0.1), (700, 0.3), (3000, 0.02)])
def test_a_logistic_regression_is_scikit_learns(n, share, k):
    """Also where columns are equal, constant, or tell the category without a mistake, and where
    the categories that are fitted together take different numbers of steps."""
    generator = np.random.default_rng(n + k)
    strengths = np.array([0, 1, 50])
    inside = np.stack([generator.permutation(np.arange(n) < share * n) for _ in strengths])
    x = generator.standard_normal((3, n, k)) + strengths[:, None, None] * inside[:, :, None]
    x = np.maximum(x, 0)
    x[:, :, 1:3] = x[:, :, :1]
    x = (x - x.mean(1, keepdims=True)) / np.where(x.std(1) > 0, x.std(1), 1)[:, None]
    x[:, :, 3:4] = 0
    found, scores = probing.logistic_weights(x, inside), probing.logistic_scores(x, inside, x)
    for i in range(len(strengths)):
        slow = LogisticRegression(solver="newton-cholesky", tol=probing.TOLERANCE, max_iter=30)
        expected = slow.fit(x[i], inside[i]).coef_[0]
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-6 * abs(expected).max())
        assert roc_auc_score(inside[i], scores[i]) == pytest.approx(
            roc_auc_score(inside[i], x[i] @ expected), abs=1e-3
        )
    inside[1] = True  # a category that has all examples
    assert not probing.logistic_scores(x, inside, x)[1].any()


def planted(n=600, seed=0):
    """(columns (n, 12), inside (2, n)): category 0 where column 0 is large, category 1 where the
    sum of columns 1 and 2, both uniform, is above 1; the rest is noise."""
    columns = np.random.default_rng(seed).random((n, 12))
    return columns, np.stack([columns[:, 0] > 0.7, columns[:, 1] + columns[:, 2] > 1])


def test_k_sparse_probes_find_what_was_planted():
    """One column decides category 0: AUC 1 with one. Of category 1 a single column gives
    4/3 - 1/2 = 5/6 (densities 2x and 2 - 2x), two give 1."""
    columns, inside = planted(2000)
    first = np.arange(2000) % 2 == 0
    for given in (columns, sparse.csr_matrix(columns)):
        found = sparse_probe(given, inside, first, ks=(1, 2, 5))
        assert found[0, 0] == 1 and found[0, 1] == pytest.approx(5 / 6, abs=0.02)
        assert (found[1:] > 0.99).all()
        assert (dense_probe(given, inside, first) > 0.98).all()


def test_nothing_is_read_where_nothing_is():
    generator = np.random.default_rng(1)
    columns, inside = generator.random((300, 40)), generator.random((20, 300)) < 0.2
    splits = [generator.random(300) < 0.5 for _ in range(4)]
    for probe in (lambda *given: sparse_probe(*given)[-1], dense_probe):
        found = estimate([probe(columns, inside, first).mean() for first in splits])
        assert found.low < 0.5 < found.high and 0.45 < found.value < 0.55


def test_without_columns_nothing_is_known():
    inside, first = np.arange(8)[None] < 4, np.arange(8) % 2 == 0
    for empty in (np.zeros((8, 0)), sparse.csr_matrix((8, 0))):
        assert np.isnan(sparse_probe(empty, inside, first)).all()
        assert np.isnan(dense_probe(empty, inside, first)).all()
    silent = sparse.csr_matrix((8, 3))  # columns that are all 0
    assert sparse_probe(silent, inside, first).tolist() == [[0.5]] * len(probing.KS)
    assert dense_probe(silent, inside, first).tolist() == [0.5]


def test_aucs_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    inside = generator.random((5, 60)) < 0.3
    scores = generator.integers(0, 4, (60, 5)).astype(float)  # with ties
    expected = [roc_auc_score(inside[i], scores[:, i]) for i in range(5)]
    assert aucs(scores, inside) == pytest.approx(expected)


def theirs(columns, inside):
    """The order of columns as sae-probes 0.4 defines it, category by category."""
    unit = np.abs(columns).sum(0) / ((columns != 0).sum(0) + 1e-6)
    scaled = columns / (unit + 1e-6)
    return np.array([scaled[rows].mean(0) - scaled[~rows].mean(0) for rows in inside])


def made_up():
    generator = np.random.default_rng(3)
    columns = generator.standard_normal((90, 30)) * (generator.random((90, 30)) < 0.4)
    inside = np.stack([columns[:, i] + 0.5 * generator.standard_normal(90) > 0.3 for i in range(4)])
    return columns.astype(np.float32), inside


def test_columns_are_chosen_as_in_sae_probes():
    columns, inside = made_up()
    for given in (columns, sparse.csr_matrix(columns)):
        assert ranking(given, inside) == pytest.approx(theirs(columns, inside), abs=1e-4)


def test_agrees_with_the_sae_probes_package():
    """Its own functions on the same arrays: the same columns, and AUCs as good as equal (its
    penalty is chosen by cross-validation)."""
    evals = pytest.importorskip("sae_probes.run_sae_evals", reason="pip install sae-probes")
    training = pytest.importorskip("sae_probes.utils_training")
    import torch

    generator = np.random.default_rng(5)
    columns = generator.random((600, 40)) * (generator.random((600, 40)) < 0.5)
    noise = 0.4 * generator.standard_normal((4, 600))
    inside = columns[:, :4].T + columns[:, 4:8].T + noise > 0.8
    columns = columns.astype(np.float32)
    first = np.arange(len(columns)) % 2 == 0
    found = sparse_probe(columns, inside, first)
    worth = ranking(columns[first], inside[:, first])
    x, y = torch.from_numpy(columns), torch.from_numpy(inside)
    for category in range(len(inside)):
        order = evals.get_sorted_indices(
            x[first], y[category, first].int(), evals.mean_act_normalization
        ).numpy()
        mine = np.argsort(-np.abs(worth[category]), kind="stable")
        assert order[:16].tolist() == mine[:16].tolist()
        for i, k in enumerate(probing.KS):
            chosen = order[:k]
            best = training.find_best_reg(
                columns[first][:, chosen],
                inside[category, first],
                columns[~first][:, chosen],
                inside[category, ~first],
            )
            assert found[i, category] == pytest.approx(best.metrics.test_auc, abs=0.01)


def test_which_categories_are_probed():
    """0: four texts. 1: four examples of three texts. 2: all but three. -1: of the rest."""
    labels = np.array([0] * 4 + [1] * 4 + [-1] * 2)
    texts = np.array([0, 1, 2, 3, 4, 4, 5, 6, 7, 8])
    assert probed_categories(labels, texts).tolist() == [0]
    assert probed_categories(np.array([2] * 9 + [0]), np.arange(10)).tolist() == []
    assert probed_categories(np.full(6, -1), np.arange(6)).tolist() == []


def test_the_commonest_categories_are_probed(monkeypatch):
    monkeypatch.setattr(probing, "MOST_CATEGORIES", 2)
    labels = np.repeat([0, 1, 2], [4, 9, 5])
    assert probed_categories(labels, np.arange(18)).tolist() == [1, 2]
