"""Dictionaries that nobody trained: their rule, their pass beside a dense twin, and worlds in which
it is known what training added."""

import numpy as np
import pytest
import torch
from test_interpretation_statistics import made_up

from fastsae.interpretation import nulls, statistics
from fastsae.interpretation.nulls import draw, prepare, sample_tokens
from fastsae.interpretation.probing import KINDS
from fastsae.interpretation.run_table import (
    FEATURES,
    WORDS,
    Probed,
    describe_probing,
    plus_minus,
    probe,
    verdict,
)
from fastsae.interpretation.statistics import collect
from fastsae.sae.autoencoder import encode, new_sae

BOUNDS = {"exclude_shared_prefix": True, "use": "all"}


def an_sae(m=24, d=8, k=3, batch_topk=False):
    sae, _ = made_up(d=d, m=m, k=k, batch_topk=batch_topk)
    return sae


@pytest.mark.parametrize("kind", KINDS)
def test_the_k_largest_fire_where_they_do_in_the_autoencoder(kind):
    sae, sample = an_sae(), torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    dictionary = draw(kind, sae, sample, 0)
    entries = encode(dictionary, sample)
    pre = (sample - sample.mean(0)) @ dictionary.encoder.weight.t()
    expected = torch.zeros_like(pre).scatter(1, (top := pre.topk(3, dim=1)).indices, top.values)
    found = torch.zeros_like(pre)
    found[entries.row.long(), entries.column.long()] = entries.value
    assert torch.allclose(found, expected.relu(), atol=1e-5)
    assert torch.allclose(dictionary.encoder.weight.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_fire_as_in_an_autoencoder_with_a_threshold(kind):
    sae = an_sae(batch_topk=True)
    sample = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    dictionary = draw(kind, sae, sample, 0)
    n_active = len(encode(sae, sample).value)
    assert 500 < n_active < 500 * 20  # neither silent nor everything
    assert len(encode(dictionary, sample).value) == n_active


def test_a_threshold_of_an_autoencoder_that_is_silent():
    sae = an_sae(batch_topk=True)
    sae.threshold.fill_(1e9)
    sample = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    assert len(encode(draw(KINDS[0], sae, sample, 0), sample).value) == 0


def test_what_the_directions_are():
    """Data in two of eight dimensions: tokens lie there and so do directions with the data's
    covariance. Each token direction is a token, less the mean."""
    sample = torch.zeros(300, 8)
    sample[:, :2] = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 3
    sample += 5
    sae = an_sae()
    tokens, directions = (draw(kind, sae, sample, 0).encoder.weight for kind in KINDS)
    assert (directions[:, 2:].abs() < 1e-5).all() and (tokens[:, 2:].abs() < 0.1).all()
    cosine = tokens @ torch.nn.functional.normalize(sample - sample.mean(0), dim=1).t()
    assert (cosine.max(1).values > 0.99).all()
    other = draw(KINDS[0], sae, sample, 1).encoder.weight
    assert not torch.allclose(tokens, other)


def test_tokens_are_drawn_within_the_bound(tmp_path):
    x = np.arange(1, 401, dtype=np.float16)[:, None] * np.ones((1, 4), np.float16)
    found = sample_tokens(x, np.arange(10, 300), 50, max_norm=400.0, seed=0)
    assert found.shape == (50, 4) and float(found[:, 0].min()) >= 11
    assert float(found[:, 0].max()) <= 200
    assert len(sample_tokens(x, np.arange(10, 14), 50, None, 0)) == 4
    again = sample_tokens(x, np.arange(10, 300), 50, max_norm=400.0, seed=0)
    assert torch.equal(found, again)


@pytest.mark.parametrize("batch_topk", [False, True])
def test_the_pass_gives_what_a_dense_twin_gives(monkeypatch, batch_topk):
    monkeypatch.setattr(statistics, "BLOCK_TOKENS", 40)
    sae, data = made_up(batch_topk=batch_topk)
    kind, lengths = data["token_kind"], data["seq_lengths"]
    kind[: lengths[0]] = 2  # an example of the shared prefix alone
    untrained = prepare(
        sae, data, max_norm=100.0, **BOUNDS, not_trained_on=np.array([1, 2]), seed=0
    )
    assert [each.kind for each in untrained.dictionaries] == [*KINDS, *KINDS]
    s = collect(
        sae,
        data["activations"],
        lengths,
        kind,
        data["token_role"],
        data["token_ids"],
        9,
        max_norm=100.0,
        watch=untrained.watch,
    )
    untrained.finish()
    assert untrained.examples.tolist() == s.pooled_examples.tolist() and 0 not in s.pooled_examples
    x = torch.from_numpy(data["activations"].astype(np.float32))
    example = np.repeat(np.arange(len(lengths)), lengths)
    for i, dictionary in enumerate(untrained.dictionaries):
        entries = encode(dictionary, x)
        dense = np.zeros((len(x), sae.m_total_neurons), np.float32)
        dense[entries.row.long(), entries.column.long()] = entries.value
        pooled = untrained.pooled[dictionary.kind][i // 2]
        for row, number in enumerate(untrained.examples):
            rows = (example == number) & s.kept
            assert pooled.max[[row]].toarray()[0] == pytest.approx(dense[rows].max(0), abs=1e-4)
            assert pooled.mean[[row]].toarray()[0] == pytest.approx(dense[rows].mean(0), abs=1e-4)
            assert untrained.stream[row] == pytest.approx(x[rows].mean(0).numpy(), abs=1e-4)


def test_a_part_of_the_examples_where_there_are_many(monkeypatch):
    monkeypatch.setattr(nulls, "EXAMPLES", 7)
    sae, data = made_up()
    untrained = prepare(sae, data, max_norm=None, **BOUNDS, not_trained_on=np.zeros(0, int), seed=0)
    assert untrained.chosen.sum() == 7
    monkeypatch.setattr(nulls, "WEIGHTS", 1)  # directions of one draw, however large
    untrained = prepare(sae, data, max_norm=None, **BOUNDS, not_trained_on=np.zeros(0, int), seed=0)
    assert [each.kind for each in untrained.dictionaries] == list(KINDS)


def a_world(trained: bool, n_examples=240, n_true=40, d=24, seed=0):
    """(statistics, untrained, labels): each token is the sum of two of 40 planted directions; an
    example of category c has direction c on a fifth of its tokens. The autoencoder holds these
    directions, or else random tokens."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((n_true, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.full(n_examples, 20, np.int32)
    labels = np.arange(n_examples) % 6
    chosen = generator.integers(6, n_true, (n_examples * 20, 2))
    has = generator.random(n_examples * 20) < 0.2
    chosen[has, 0] = np.repeat(labels, 20)[has]
    x = directions[chosen].sum(1) * 3 + 0.1 * generator.standard_normal((len(chosen), d))
    sae = new_sae(
        {"input_dim": d, "m_total_neurons": n_true, "k_active_neurons": 2, "prefix_lengths": None}
    )
    rows = torch.from_numpy(directions).float()
    if not trained:
        rows = draw(KINDS[0], sae, torch.from_numpy(x).float(), 99).encoder.weight
    with torch.no_grad():
        sae.encoder.weight.copy_(rows)
        sae.neuron_bias.zero_()
        sae.input_bias.copy_(torch.from_numpy(x.mean(0) if not trained else np.zeros(d)))
    data = {
        "activations": x.astype(np.float32),
        "seq_lengths": lengths,
        "token_kind": np.zeros(len(x), np.uint8),
        "token_role": np.full(len(x), 2, np.uint8),
    }
    untrained = prepare(sae, data, max_norm=None, **BOUNDS, not_trained_on=np.zeros(0, int), seed=0)
    s = collect(sae, *data.values(), np.zeros(len(x), int), 1, watch=untrained.watch)
    return s, untrained.finish(), [f"c{label}" for label in labels]


def test_what_training_added_where_it_is_known():
    """The planted directions separate each category alone; random tokens in their place are worth
    what other random tokens are."""
    figures = {}
    for trained in (True, False):
        s, untrained, labels = a_world(trained)
        probed = Probed(s, untrained, labels, np.arange(240), None, "mean")
        figures[trained] = probe(probed, 0.8, 0)
    right, wrong = figures[True], figures[False]
    assert right["n_categories"] == 6 and right["n_examples"] == 240
    assert right["sparse_probing"]["1"][FEATURES]["value"] > 0.95
    added = right["added_by_training"]["random tokens"]["1"]
    assert added["value"] > 0.05 and added["interval"][0] > 0
    low, high = wrong["added_by_training"]["random tokens"]["1"]["interval"]
    assert low < 0 < high
    # six directions and no more separate a category, and so they do in every split
    assert right["n_above_auc_bound"][FEATURES]["value"] == pytest.approx(6, abs=0.5)
    assert set(right["per_category"]) == {f"c{i}" for i in range(6)}
    assert right["per_category"]["c0"]["1"][FEATURES] > 0.95


def test_labels_that_few_examples_have():
    s, untrained, labels = a_world(True, n_examples=40)
    texts = np.arange(40)
    assert probe(Probed(s, untrained, None, texts, None, "mean"), 0.8, 0) is None
    few = ["a" if i < 3 else None for i in range(40)]
    assert probe(Probed(s, untrained, few, texts, None, "mean"), 0.8, 0) is None
    some = [label if i % 2 else None for i, label in enumerate(labels)]
    assert probe(Probed(s, untrained, some, texts, None, "mean"), 0.8, 0)["n_examples"] == 20


def test_words_are_counted_among_the_sources():
    s, untrained, labels = a_world(True, n_examples=60)
    probed = Probed(s, untrained, labels, np.arange(60), lambda i: f"word{i % 6} and", "mean")
    found = probe(probed, 0.8, 0)
    assert found["sparse_probing"]["1"][WORDS]["value"] == 1


def an_estimate(value, half):
    return {"value": value, "interval": [value - half, value + half]}


def test_what_is_said_of_the_figures():
    def part(added):
        each = dict.fromkeys(("features", "random tokens", "random directions"), an_estimate(7, 2))
        return {
            "n_categories": 3,
            "auc_bound": 0.8,
            "sparse_probing": {str(k): each for k in (1, 2, 5, 16)},
            "dense_probing": each,
            "n_above_auc_bound": each,
            "added_by_training": {"random tokens": {"1": an_estimate(0, 1), "16": added}},
        }

    assert plus_minus(an_estimate(0.5, 0.25)) == "0.500 ±0.250" and plus_minus(None) == "-"
    assert plus_minus(an_estimate(-0.0001, 0.25), "+") == "+0.000 ±0.250"
    assert "(more)" in verdict(part(an_estimate(0.2, 0.1)))
    assert "(less)" in verdict(part(an_estimate(-0.2, 0.1)))
    assert "(no difference that can be told)" in verdict(part(an_estimate(0.05, 0.1)))
    lines = describe_probing(part(an_estimate(0, 1)))
    assert lines[0] == (
        "AUC of 16 columns on held-out texts, mean of 3 categories: the features 7.000 ±2.000, "
        "random tokens as a dictionary 7.000 ±2.000, random directions as a dictionary 7.000 "
        "±2.000"
    )
    assert (
        lines[1].startswith("training added +0.000 ±1.000 over random tokens") and lines[2:] == []
    )
