"""Five-shot detection on streams whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastsae.interpretation import detection
from fastsae.interpretation.detection import add_detection, auc_of, one_of_each
from fastsae.interpretation.firings import Firings, finding_half
from fastsae.interpretation.significance import score_interval


def world(in_context, strength=3.0, fires=None, n_texts=120, seed=0):
    """Texts of 10 tokens with ids 0 to 4, whose stream is noise, and along one axis `strength`
    where the context is there; two features fire on the tokens `fires` of id 2."""
    generator = np.random.default_rng(seed)
    n = 10 * n_texts
    ids = np.arange(n) % 5
    stream = generator.standard_normal((n, 6)).astype(np.float32) + 50
    context = in_context(n)
    stream[context, 0] += strength
    on = (ids == 2) & (context if fires is None else fires(n))
    statistics = SimpleNamespace(kept=np.ones(n, bool), maximum=np.ones(2))
    evidence = SimpleNamespace(
        data={"activations": stream, "token_ids": ids},
        text_numbers=np.arange(n_texts),
        offsets=np.arange(0, n + 1, 10),
        statistics=statistics,
        m=2,
    )
    found = Firings(np.full(n_texts, 10), 1, 0)
    at = np.flatnonzero(on)
    found.add(at, np.zeros(len(at), int), np.ones(len(at)))
    found.add(at[:3], np.ones(3, int), np.ones(3))  # too rare to be tested
    return [{"feature": 0}, {"feature": 1}], evidence, found


def half_of_the_texts(n):
    return np.arange(n) // 10 % 2 == 0


def at_random(n):
    return np.random.default_rng(1).random(n) < 0.5


def test_a_context_that_the_stream_shows_is_found():
    rows, evidence, found = world(half_of_the_texts, strength=12)
    result = add_detection(rows, evidence, found, 0)
    assert rows[0]["detection_auc"] > 0.99 and rows[0]["n_detection"] > 20
    assert rows[0]["detection_auc_low"] < rows[0]["detection_auc"] <= rows[0]["detection_auc_high"]
    assert all(rows[1][name] is None for name in detection.FIGURES)
    assert np.isnan(result.auc[1]) and len(result.random) == 1
    assert result.summary()["n_detection"] == 1


def test_the_token_alone_says_nothing():
    """The stream shows which token it is, and the feature fires on half of them at random."""
    aucs = []
    for seed in range(6):
        rows, evidence, found = world(at_random, strength=0, seed=seed)
        evidence.data["activations"][:, 1] += 40 * (evidence.data["token_ids"] == 2)
        add_detection(rows, evidence, found, seed)
        aucs.append(rows[0]["detection_auc"])
    assert abs(np.mean(aucs) - 0.5) < 0.08  # a mean of six has a standard error of 0.03


def test_a_feature_on_every_such_token_is_not_tested():
    rows, evidence, found = world(half_of_the_texts, fires=lambda n: np.ones(n, bool))
    assert add_detection(rows, evidence, found, 0).summary() == {}
    assert rows[0]["detection_auc"] is None


def test_shots_and_tests_are_of_other_texts(monkeypatch):
    """Positives and negatives are the same tokens, none of a text of the finding half."""
    rows, evidence, found = world(half_of_the_texts)
    asked = []
    monkeypatch.setattr(
        detection.Tested,
        "directions",
        lambda self, tokens: asked.append(tokens) or np.ones((len(tokens), 6)),
    )
    add_detection(rows, evidence, found, 0)
    first = finding_half(np.arange(120), 0)[np.arange(1200) // 10]
    shots, positive, negative = asked[:3]
    assert len(shots) == len(set(shots // 10)) == 5 and first[shots].all()
    assert len(positive) == len(negative) == len(set(negative)) == rows[0]["n_detection"] <= 40
    assert not first[positive].any() and not first[negative].any()
    assert (evidence.data["token_ids"][np.concatenate([positive, negative])] == 2).all()
    context = half_of_the_texts(1200)
    assert context[positive].all() and not context[negative].any()
    assert rows[0]["detection_auc"] == 0.5  # all scores are equal


def test_random_directions_fire_as_often(monkeypatch):
    rows, evidence, found = world(half_of_the_texts)
    counts = []
    auc = detection.Tested.auc

    def seen(self, token, value, strong, number):
        counts.append((len(token), int(strong.sum()), bool((np.diff(token) > 0).all())))
        assert not len(token) or value[strong].min(initial=9) >= value[~strong].max(initial=-9)
        return auc(self, token, value, strong, number)

    monkeypatch.setattr(detection.Tested, "auc", seen)
    add_detection(rows, evidence, found, 0)
    assert counts == [counts[0], (3, 3, True), counts[0]] and counts[0][2]


def test_auc_equals_counting_pairs():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 6, 30), generator.integers(0, 5, 20)
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert auc_of(a, b) == pytest.approx(np.mean(pairs))


def test_intervals_cover_and_have_a_width():
    for n in (5, 40):
        low, high = score_interval(1.0, n, n)
        assert low < 1 and high == 1 and score_interval(0.0, n, n)[1] == pytest.approx(1 - low)
        low, high = score_interval(0.5, n, n)
        assert low == pytest.approx(1 - high)
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):  # normal scores one apart: AUC = Phi(1 / sqrt(2)) = 0.7602
        found = auc_of(generator.standard_normal(30) + 1, generator.standard_normal(30))
        low, high = score_interval(found, 30, 30)
        inside += low <= 0.7602 <= high
    assert 0.92 < inside / 400 < 0.985


def test_one_of_each_keeps_the_order():
    group = np.array([0, 0, 1, 1, 2])
    assert one_of_each(group, np.array([3, 1, 2, 0, 4])).tolist() == [3, 1, 4]
