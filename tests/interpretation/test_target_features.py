"""What predicts a target: no rank from too few texts, a score of our own, and what the features are
worth beside other columns."""

import importlib
import json

import numpy as np
import pytest
from conftest import read_table
from scipy import sparse

from fastsae.interpretation.nulls import Pooled, Untrained
from fastsae.interpretation.significance import auc_intervals, correlation_intervals
from fastsae.interpretation.target_features import (
    compare,
    finding_half,
    held_out_scores,
    least_support,
    select_features,
    separation_scores,
    supported,
    without_few_silent,
    word_counts,
)


def test_separation_score_by_hand():
    """Feature 0: its two strongest of three (9, 5) less the silent two. 1: fires twice, so both. 2:
    never silent. 3: never fires."""
    pooled = np.array([[9, 0, 1, 0], [5, 2, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]], float)
    target = np.array([10.0, 4, 100, 1, 3])
    for matrix in (pooled, sparse.csr_matrix(pooled)):
        scores = separation_scores(matrix, target, 2)
        assert scores[:2] == pytest.approx(
            [(10 + 4) / 2 - (1 + 3) / 2, (4 + 1) / 2 - (10 + 100 + 3) / 3]
        )
        assert np.isnan(scores[2:]).all()


def test_the_score_is_not_that_of_an_installed_package(monkeypatch):
    # the package has a function of this name too
    theirs = importlib.import_module("hypothesaes.select_neurons")
    monkeypatch.setattr(
        theirs,
        "select_neurons",
        lambda *args, **options: pytest.fail("the package's own score was asked"),
    )
    generator = np.random.default_rng(0)
    pooled = sparse.csr_matrix(generator.random((80, 6)) * (generator.random((80, 6)) < 0.5))
    for method in ("separation_score", "correlation"):
        assert select_features(pooled, generator.random(80), 3, method, 0)


def test_least_support_by_hand():
    """Ten texts; a tenth of 60 is less, the 5 positives of a rare category too, but no feature is
    judged by fewer than 3."""
    assert least_support(np.arange(500.0)) == 10
    assert least_support(np.arange(60.0)) == 6
    assert least_support(np.r_[np.ones(5), np.zeros(300)]) == 5
    assert least_support(np.r_[np.ones(2), np.zeros(300)]) == 3 == least_support(np.arange(8.0))
    pooled = sparse.csr_matrix(
        np.column_stack([np.arange(500) < n for n in (9, 10, 490, 491)]).astype(float)
    )
    assert supported(pooled, 10, silence=True).tolist() == [False, True, True, False]
    assert supported(pooled, 10, silence=False).tolist() == [False, True, True, True]


def test_few_silent_texts_count_as_the_mean_of_the_others():
    pooled = sparse.csc_matrix(np.array([[0, 0, 0, 2.0], [2, 0, 0, 2], [4, 3, 0, 2], [6, 0, 0, 2]]))
    assert without_few_silent(pooled, 2).toarray().tolist() == [
        [4, 0, 0, 2],
        [2, 0, 0, 2],
        [4, 3, 0, 2],
        [6, 0, 0, 2],
    ]
    assert (without_few_silent(pooled, 0) != pooled).nnz == 0


def test_a_feature_that_fires_in_every_text_can_be_ranked_by_its_strength():
    """As in long dialogues: how strongly it fires says something, that it fires nothing."""
    generator = np.random.default_rng(0)
    target = generator.standard_normal(200)
    pooled = 5 + generator.random((200, 4))
    pooled[:, 2] += target
    pooled[3, 2] = 0
    assert (
        select_features(sparse.csr_matrix(pooled), target, 1, "correlation", 0)[0]["feature"] == 2
    )
    assert select_features(sparse.csr_matrix(pooled), target, 1, "separation_score", 0) == []


@pytest.mark.parametrize("method", ["separation_score", "correlation", "lasso"])
@pytest.mark.parametrize("kind", ["number", "category"])
def test_silent_or_active_in_a_few_texts_is_no_evidence(method, kind):
    """Feature 0 is silent, feature 1 active, in six of 900 texts alone, which have an extreme
    target by chance; feature 2 is a real one."""
    generator = np.random.default_rng(1)
    target = (
        generator.standard_normal(900)
        if kind == "number"
        else (np.arange(900) % 4 == 0).astype(float)
    )
    first = finding_half(target, 0)
    few = np.flatnonzero(first)[np.argsort(-target[first], kind="stable")[:3]]
    few = np.r_[few, np.flatnonzero(~first)[:3]]
    pooled = generator.random((900, 30)) * (generator.random((900, 30)) < 0.5)
    pooled[:, 0], pooled[:, 1] = 1, 0
    pooled[:, 3] = 5 + generator.random(900)
    pooled[few, 0], pooled[few, 1], pooled[few, 3] = 0, 50, 0
    pooled[:, 2] = np.maximum(0, 0.4 * target + 0.5 * generator.standard_normal(900))
    found = select_features(sparse.csr_matrix(pooled), target, 5, method, 0)
    assert found[0]["feature"] == 2 and not {0, 1} & {entry["feature"] for entry in found}
    # its silence would make it first
    assert abs(next((entry["score"] for entry in found if entry["feature"] == 3), 0)) < 0.15
    assert found[0]["held_out_correlation"] > 0.2 and found[0]["n_firing"] > 100


def test_copies_of_a_text_are_no_support():
    """A feature fires in one text, which is there forty times."""
    pooled, target = np.random.default_rng(0).random((200, 3)), np.arange(200.0) % 7
    texts = np.r_[np.zeros(40, int), np.arange(1, 161)]
    pooled[:, 0] = texts == 0
    for seed in range(4):
        assert 0 not in [
            entry["feature"]
            for entry in select_features(
                sparse.csr_matrix(pooled), target, 3, "correlation", seed, texts
            )
        ]


def test_ridge_regressions_measure_what_columns_hold():
    generator = np.random.default_rng(0)
    columns = generator.standard_normal((400, 5))
    target = columns @ [1, 2, 0, 0, -1] + 0.1 * generator.standard_normal(400)
    first = np.arange(400) % 2 == 0
    sources = {
        "all": columns,
        "sparse": sparse.csr_matrix(columns),
        "noise": generator.standard_normal((400, 5)),
        "none": columns[:, :0],
    }
    scores = held_out_scores(sources, target, first)
    assert (
        scores["all"]["held_out"] > 0.98
        and scores["sparse"]["held_out"] > 0.98
        and abs(scores["noise"]["held_out"]) < 0.1
    )
    assert scores["none"] == {"n_columns": 0, "held_out": None}
    scores = held_out_scores(sources, (target > 0).astype(float), first)
    assert scores["all"]["held_out"] > 0.97 and 0.3 < scores["noise"]["held_out"] < 0.7  # AUCs


def test_words_are_counted_by_hand():
    counts = word_counts(
        ["The cat, the dog", "a cat the", "dogs", "cat cat"], np.array([True, True, True, False])
    ).toarray()
    # cat, the: in two texts
    assert counts == pytest.approx(
        np.array([[1, 1 + np.log(2)], [1, 1], [0, 0], [1 + np.log(2), 0]])
    )
    assert word_counts(["a", "b"], np.array([True, True])).shape == (2, 0)


def test_a_reader_sees_what_the_features_cost(tmp_path, planted, run_main, capsys):
    """The word itself decides the category: the bag of words and the activations tell it too."""
    assert (
        run_main("interpret_sae", *planted, "--target-value", "cat_river", "--n-hypotheses", 3) == 0
    )
    out, about = capsys.readouterr().out, json.loads((tmp_path / "hypotheses.json").read_text())
    assert (
        about["target"] == "category = cat_river"
        and about["measure"] == "AUC"
        and about["method_version"] == 3
    )
    assert (about["method"], about["pooling"]) == ("correlation", "mean")
    tokens = about["sources"].pop("as many of random tokens")  # three of them, not those of words
    assert 0.5 < tokens["held_out"] <= 1
    assert {name: entry["held_out"] for name, entry in about["sources"].items()} == {
        "selected features": 1,
        "all features": 1,
        "activations themselves": 1,
        "bag of words": 1,
    }
    assert about["n_finding"] + about["n_held_out"] == 120
    line = next(
        line for line in out.splitlines() if line.startswith("the target on the other half")
    )
    assert all(f"{name} 1.000 ±0.000" in line for name in about["sources"])
    assert about["n_splits"] == 4
    page = (tmp_path / "interpretations.html").read_text()
    assert "What predicts the target" in page and "activations themselves (16 columns)" in page
    rows = read_table(tmp_path, "hypotheses.csv")
    assert (
        rows[0]["hypothesis"].startswith("“river”")
        and rows[0]["pooling"] == "mean"
        and int(rows[0]["n_firing"]) >= 10
    )
    first = rows[0]
    assert float(first["held_out_low"]) < float(first["held_out_auc"]) == 1
    assert 0.8 < float(first["held_out_low"]) and float(first["held_out_high"]) == 1


@pytest.mark.parametrize("binary", [True, False])
def test_each_row_has_an_interval_that_holds_the_truth(binary):
    """60 data sets of 200 texts: the held-out interval of the one real feature holds the figure of
    8,000 texts nearly always."""
    generator = np.random.default_rng(4)

    def data(n):
        target = (generator.random(n) < 0.3) * 1.0 if binary else generator.standard_normal(n)
        feature = np.maximum(0, 0.6 * target + generator.standard_normal(n) - 0.5)
        return sparse.csr_matrix(np.column_stack([feature, generator.random(n) < 0.5])), target

    name = "held_out_auc" if binary else "held_out_correlation"
    truth = select_features(*data(8_000), 1, "correlation", 0)[0][name]
    holds = []
    for seed in range(60):
        found = select_features(*data(200), 1, "correlation", seed)[0]
        if found["feature"] == 0:
            assert found["held_out_low"] <= found[name] <= found["held_out_high"]
            holds.append(found["held_out_low"] < truth < found["held_out_high"])
    assert len(holds) > 50 and np.mean(holds) > 0.88


def test_intervals_at_the_ends():
    inside = np.arange(40) < 20
    columns = np.column_stack([inside, ~inside, np.zeros(40)]).astype(float)
    (low, high), (low_0, high_0), (low_half, high_half) = auc_intervals(columns, inside)
    assert 0.8 < low < 0.95 and high == 1 and low_0 == 0 and 0.05 < high_0 < 0.2
    # no order at all: the interval is around a half
    assert low_half < 0.4 and high_half > 0.6
    assert np.isnan(auc_intervals(columns, np.ones(40, bool))).all()
    found = correlation_intervals(columns, inside.astype(float), 0)
    assert found[0] == pytest.approx([1, 1]) and found[1] == pytest.approx([-1, -1])
    assert np.isnan(found[2]).all()


def test_an_auc_interval_by_hand():
    """Two inside (3, 1) and two outside (2, 0): of four pairs three are in order. At either end of
    the interval 0.75 is 1.96 standard errors away, with those of Hanley and McNeil, whose
    q - value ** 2 terms count once for each side."""
    (interval,) = auc_intervals(np.array([[3.0], [1], [2], [0]]), np.array([1, 1, 0, 0], bool))
    for end in interval:
        one, two = end / (2 - end), 2 * end**2 / (1 + end)
        variance = (end * (1 - end) + (one - end**2) + (two - end**2)) / 4
        assert abs(0.75 - end) == pytest.approx(1.96 * variance**0.5, rel=1e-6)
    assert 0.1 < interval[0] < 0.75 < interval[1] < 1


def test_as_many_random_tokens_stand_beside_the_selected_features():
    """Planted: feature 0 decides the target and the dictionary holds nothing of it; the other way
    round the features are the worse ones."""
    generator = np.random.default_rng(0)
    target = (np.arange(120) % 3 == 0) * 1.0
    told = sparse.csr_matrix(np.column_stack([target, generator.random((120, 3)) < 0.5]))
    noise = sparse.csr_matrix((generator.random((120, 4)) < 0.5) * 1.0)
    for features, tokens in ((told, noise), (noise, told)):
        untrained = Untrained([], np.ones(120, bool), np.arange(120), np.zeros((120, 1)))
        untrained.pooled = {"random tokens": [Pooled(tokens, tokens)]}
        about = compare(
            features,
            target,
            np.arange(120),
            np.arange(120),
            untrained,
            lambda i: "no word",
            n_select=2,
            method="correlation",
            pooling="mean",
            seed=0,
        )
        own = about["sources"]["selected features"]
        other = about["sources"]["as many of random tokens"]
        better, worse = (own, other) if features is told else (other, own)
        assert better["held_out"] == 1 and worse["interval"][0] < 0.5 < worse["interval"][1]
