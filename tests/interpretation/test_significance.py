"""No category is named for a feature that is not above chance: p-values against exact ones, and
what the tables say."""

import json
from itertools import combinations

import numpy as np
import pytest
from conftest import read_table
from inert_page import read_report
from scipy.stats import hypergeom, rankdata

from fastsae.interpretation.categories import category_above_chance, shuffled_aucs
from fastsae.interpretation.significance import LEVEL, above_chance, rank_sum_p_values, smallest_gap


def exact(ranks, n_inside, rank_sum):
    """The share of all choices of n_inside examples whose ranks sum to as much."""
    sums = np.array([sum(chosen) for chosen in combinations(ranks, n_inside)])
    return (sums >= rank_sum - 1e-9).mean()


@pytest.mark.parametrize("n_inside", [3, 5, 8])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_p_values_agree_with_every_permutation(n_inside, density):
    generator = np.random.default_rng(n_inside)
    values = generator.random((18, 6)) * (generator.random((18, 6)) < density)
    ranks = rankdata(values, axis=0)
    sums = np.sort(ranks, axis=0)[-n_inside:].sum(0) - generator.integers(0, 12, 6)
    found = rank_sum_p_values(ranks, np.full(6, n_inside), sums)
    for column, p in enumerate(found):
        true = exact(ranks[:, column], n_inside, sums[column])
        assert true / 3 - 0.01 < p < 3 * true + 0.1, (column, p, true)  # the small ones decide


def test_a_feature_of_few_examples_is_not_thought_sure():
    """It fires in 10 of 288 examples, in 3 of a category's 6: hypergeometric 8e-4, by the normal
    distribution below 1e-8."""
    fires = np.zeros(288)
    fires[:10] = 1
    ranks = rankdata(fires[:, None], axis=0)
    (p,) = rank_sum_p_values(ranks, np.array([6]), np.array([3 * ranks[0, 0] + 3 * ranks[-1, 0]]))
    true = hypergeom.sf(2, 288, 10, 6)
    assert true / 4 < p < 4 * true


def test_nothing_follows_from_a_constant_or_from_no_examples():
    ranks = rankdata(np.column_stack([np.ones(9), np.arange(9)]), axis=0)
    p = rank_sum_p_values(ranks, np.array([3, 0]), np.array([15.0, 0.0]))
    assert p.tolist() == [1, 1] and smallest_gap(ranks).tolist() == [0, 1]


def test_benjamini_hochberg_by_hand():
    """At 5 % of 5: bounds .01 .02 .03 .04 .05; the third passes, so do the two below it, of which
    the second alone would not."""
    assert above_chance([0.2, 0.001, 0.029, 0.025, 0.06]).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert above_chance([np.nan, 0.02]).tolist() == [False, True]
    assert (
        not above_chance([np.nan, np.nan]).any()
        and not above_chance([0.03, 0.9]).any()
        and above_chance([]).tolist() == []
    )


def test_few_features_are_named_where_labels_say_nothing():
    generator = np.random.default_rng(0)
    pooled = generator.random((240, 300)) * (generator.random((240, 300)) < 0.2)
    labels = np.repeat(np.arange(20), 12)
    aucs, named = shuffled_aucs(pooled, labels, 20, 0, repeats=40)
    assert (aucs > 0.75).mean() > 0.004  # AUCs far above one half come by chance
    # a run of 300 features names any of them in few cases
    assert (named.any(1)).mean() < 3 * LEVEL


def test_real_ones_are_named_and_the_others_not():
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 24)
    pooled = generator.random((240, 60))
    for category in range(10):
        pooled[:, category] += labels == category
    pooled[:, 11] -= labels == 3  # below chance for 3, a little above for all others
    chosen, auc, named = category_above_chance(pooled, labels, 10, 0)
    assert (
        named[:10].all()
        and chosen[:10].tolist() == list(range(10))
        and named[10:].sum() <= 1
        and not (named & ~(auc > 0.5)).any()
    )


def test_copies_of_a_text_count_once():
    """Two texts of each category, twelve copies each: twelve times as many examples are no more
    evidence."""
    generator = np.random.default_rng(2)
    values, labels = generator.random((8, 200)), np.arange(8) % 2
    texts = np.repeat(np.arange(8), 12)
    assert not category_above_chance(values[texts], labels[texts], 2, 0, texts)[2].any()
    assert category_above_chance(values[texts], labels[texts], 2, 0, None)[2].any()


def test_tables_report_and_summary_agree(tmp_path, planted, run_main, capsys):
    """Features of filler words say nothing of the category: no name, no AUC, in any output."""
    assert run_main("interpret_sae", *planted) == 0
    out = capsys.readouterr().out
    head, *lines = [
        json.loads(line) for line in (tmp_path / "interpretations.jsonl").read_text().splitlines()
    ]
    rows = read_table(tmp_path)
    named = [row["feature"] for row in rows if row["best_category"]]
    assert 4 <= len(named) < sum(row["status"] == "ok" for row in rows)
    assert named == [row["feature"] for row in rows if row["category_auc"]]
    assert named == [str(row["feature"]) for row in lines if row["best_category"]]
    assert all(
        (row["category_auc"] is None)
        == (not row["best_category"])
        == ("category_auc_max" not in row)
        for row in lines
    )
    page = (tmp_path / "interpretations.html").read_text()
    data = read_report(page)
    assert {str(f["id"]) for f in data["features"] if f["category"]} == set(named)
    assert head["summary"]["n_with_category"] == len(named)
    # a count over a threshold does not stand alone where probes say what it is worth
    assert "features separate one" not in out and "training added" in out
    assert head["summary"]["n_above_auc_bound"] == sum(
        float(row["category_auc"] or 0) > 0.8 for row in rows
    )
    probing = head["run_table"]["probing"]
    assert set(probing["n_above_auc_bound"]) == {"features", "random tokens", "random directions"}
    assert probing["sparse_probing"]["1"]["features"]["value"] == 1  # planted
    assert "random tokens as a dictionary" in out
    assert f"A category is named for the {len(named)} that are above chance" in page
