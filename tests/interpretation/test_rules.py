"""Rules: what holds of a token, what is found on one half and what it is worth on the other, beside
answers worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastsae.data.datasets import Example
from fastsae.interpretation import firings, rule_labels, rules, token_properties
from fastsae.interpretation.firings import Firings, finding_half
from fastsae.interpretation.rule_words import in_words
from fastsae.interpretation.token_properties import TokenRun, condition_table, stem

SENTENCE = [
    "In",
    " May",
    " I",
    " don",
    "'t",
    " rem",
    "ember",
    " 3",
    " of",
    ' "',
    "Them",
    '."',
    " So",
]


def conditions_of(tokens, i, **more):
    """{property: values} of the i-th token."""
    table = condition_table(TokenRun.of_texts(tokens, **more))
    found = {}
    for number in table.indices[table.indptr[i] : table.indptr[i + 1]]:
        name, value = table.names[number]
        found.setdefault(name, set()).add(value)
    return found


def test_what_holds_of_a_token():
    may = conditions_of(SENTENCE, 1)
    assert may["token"] == {"may"} and may["shape"] == {"capitalised"}
    assert may["class"] == {"months", "modal verbs"}
    assert may["begins"] == {"m", "ma", "may"} and may["ends"] == {"ay"}
    assert may["previous"] == {"in"} and may["previous class"] == {"prepositions"}
    assert may["sentence place"] == {"2"} and may["turn place"] == {"2"}
    ember = conditions_of(SENTENCE, 6)
    assert ember["word"] == {"remember"} and ember["position in word"] == {"later part"}
    assert "begins" not in ember and ember["recent"] == {"'t", "don", "i", "may", "in"}
    assert conditions_of(SENTENCE, 4)["word"] == {"don't"}
    of = conditions_of(SENTENCE, 8)
    assert of["previous shape"] == {"number"} and "inside" not in of
    them = conditions_of(SENTENCE, 10)
    assert them["inside"] == {"quotation marks"} and "quotation" not in them
    assert conditions_of(SENTENCE, 9)["quotation"] == {"opening quotation marks"}
    assert conditions_of(SENTENCE, 11)["quotation"] == {"closing quotation marks"}
    assert "quotation" not in conditions_of(SENTENCE, 4)  # don't
    single = ["He", ":", " '", "Go", ".'"]
    assert conditions_of(single, 2)["quotation"] == {"opening quotation marks"}
    assert conditions_of(single, 4)["quotation"] == {"closing quotation marks"}
    so = conditions_of(SENTENCE, 12)
    assert "inside" not in so and so["sentence place"] == {"1"} and "sentence" not in so


def test_nothing_is_read_ahead():
    whole, half = (condition_table(TokenRun.of_texts(SENTENCE[:n])) for n in (13, 7))
    for i in range(7):
        a, b = (
            {
                t.names[n]
                for n in t.indices[t.indptr[i] : t.indptr[i + 1]]
                if t.names[n][0] != "forms"
            }
            for t in (whole, half)
        )
        assert a == b, SENTENCE[i]


def test_roles_categories_and_examples_are_kept_apart():
    run = TokenRun(
        ["a", " b", "c"],
        np.array([0, 1, 2, 1]),
        np.array([0, 0, 1, 1]),
        np.array([0, 0, 1, 0]),
        np.array([2, 2, 0, 3]),
        ["sad", None],
    )
    table = condition_table(run)
    holds = [
        {table.names[n] for n in table.indices[table.indptr[i] : table.indptr[i + 1]]}
        for i in range(4)
    ]
    assert ("role", "user") in holds[0] and ("category", "sad") in holds[1]
    assert ("template", "token") in holds[2] and not any(n == "category" for n, _ in holds[2])
    assert not any(name == "previous" for name, _ in holds[2])  # another example's token
    assert ("turn place", "1") in holds[3] and ("role", "assistant") in holds[3]
    # for a reader the text begins after the template
    assert not any(name in ("previous", "recent", "sentence") for name, _ in holds[3])


@pytest.mark.parametrize(
    "forms",
    ["look looks looked looking", "take takes taking took taken", "try tries tried", "stop stopped",
     "fall falling fell", "horse horses"],
)  # fmt: skip
def test_forms_of_a_word_share_a_stem(forms):
    assert len({stem(form) for form in forms.split()}) == 1


def test_words_that_share_no_stem():
    assert len({stem(word) for word in ("thing", "this", "bus", "string", "fore", "four")}) >= 5
    assert stem("for") == stem("ab") == stem("x9z") == ""


def test_a_rule_on_a_text_never_seen():
    rule = {"any": [[["token", ["of"]], ["previous shape", ["number"]]], [["class", ["months"]]]]}
    text = ["Two", " of", " them", " saw", " 7", " of", " us", " in", " June", "."]
    mask = rules.fires(rule, TokenRun.of_texts(text))
    assert np.flatnonzero(mask).tolist() == [5, 8]
    # it fires strongly on 1, 5 and 8 and 9: two of the rule's two, two of its four
    assert rules.score(2, 2, 4) == (1.0, 0.5, 2 / 3)
    assert in_words(rule) == "“of” after numbers; months"


def test_forms_fire_whatever_form_the_rule_names():
    rule = {"any": [[["forms", ["took"]]]]}
    assert rules.fires(rule, TokenRun.of_texts(["He", " takes", " it", " taking"])).tolist() == [
        False, True, False, True,
    ]  # fmt: skip


WORDS = [
    " of",
    " May",
    " June",
    " the",
    " cat",
    " 3",
    " 40",
    " saw",
    " ran",
    ".",
    " a",
    " in",
    " Tom",
]


def random_run(n, seed):
    words = np.random.default_rng(seed).integers(0, len(WORDS), n)
    zeros = np.zeros(n, np.int64)
    return TokenRun(WORDS, words, np.arange(n) // 20, zeros, zeros, [None] * (n // 20 + 1))


PLANTED = [
    ({"any": [[["class", ["months"]]]]}, 0.99),
    ({"any": [[["token", ["of"]], ["previous shape", ["number"]]]]}, 0.99),
    ({"any": [[["token", ["cat", "saw", "."]]]]}, 0.99),
    ({"any": [[["token", ["the"]]], [["token", ["a"]], ["previous", ["in"]]]]}, 0.95),
]


@pytest.mark.parametrize("planted, least", PLANTED)
def test_a_planted_rule_is_found_and_holds_elsewhere(planted, least):
    table = condition_table(random_run(4000, 0), 3)
    strong = np.flatnonzero(rules.fires(planted, table))
    found, f1 = rules.find_rule(table, strong, rules.own_conditions(table))
    rule = rules.as_rule(table, found)
    other = condition_table(random_run(4000, 1))
    there, wanted = rules.fires(rule, other), rules.fires(planted, other)
    held_out = rules.score(int((there & wanted).sum()), int(there.sum()), int(wanted.sum())).f1
    assert f1 > least and held_out > least, rule


def test_the_fast_path_equals_the_rule_as_data():
    table, other = condition_table(random_run(2000, 2), 3), condition_table(random_run(2000, 3))
    generator = np.random.default_rng(0)
    for _ in range(5):
        strong = np.sort(generator.permutation(2000)[:300])
        found, f1 = rules.find_rule(table, strong, rules.own_conditions(table))
        fast = rules.tokens_of_any(table, found)
        slow = np.flatnonzero(rules.fires(rules.as_rule(table, found), table))
        np.testing.assert_array_equal(fast, slow)
        both = len(np.intersect1d(fast, strong))
        assert f1 == pytest.approx(2 * both / (len(fast) + 300), abs=1e-6)
    assert f1 < rules.LEAST_F1  # what fires anywhere has no rule
    assert len(rules.fires({"any": []}, other)) == 2000


def world(run, activations, seed=0, category=None):
    """Rows, Evidence and Firings of made-up activations, {feature: (n_tokens,)}."""
    n = len(run.text)
    lengths = np.bincount(run.example)
    m = len(activations)
    tokenizer = SimpleNamespace(
        decode=lambda ids: WORDS[ids[0]], convert_ids_to_tokens=lambda i: WORDS[i]
    )
    evidence = SimpleNamespace(
        statistics=SimpleNamespace(
            m=m, kept=np.ones(n, bool), maximum=np.array([a.max() for a in activations])
        ),
        data={"token_ids": run.text, "token_kind": run.kind, "token_role": run.role},
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        text_numbers=np.arange(len(lengths)),
        examples=[Example(i + 1, [], label=category) for i in range(len(lengths))],
        tokenizer=tokenizer,
    )
    found = Firings(lengths, 1, seed)
    for j, values in enumerate(activations):
        at = np.flatnonzero(values)
        found.add(at, np.full(len(at), j), values[at])
    rows = [
        {"feature": j, "status": "ok" if a.max() else "dead", "label": ""}
        for j, a in enumerate(activations)
    ]
    return rows, evidence, found


def test_labels_are_found_on_one_half_and_measured_on_the_other():
    run = random_run(4000, 4)
    first = finding_half(np.arange(200), 0)[run.example]
    months = rules.fires(PLANTED[0][0], run)
    # "cat" in the finding half, "saw" in the other
    turned = np.where(first, run.text == 4, run.text == 7)
    weak = np.where(months, 1.0, 0.2 * (run.text == 0))  # "of" below 0.3 of the maximum
    noise = np.random.default_rng(0).random(4000) < 0.1
    rare = np.zeros(4000)
    rare[np.flatnonzero(first)[:2]] = 1
    rows, evidence, found = world(run, [weak, turned * 1.0, noise * 1.0, rare, np.zeros(4000)])
    labels = rule_labels.add_rules(rows, evidence, found, 0)
    assert rows[0]["label"] == rows[0]["rule"] == "months"
    assert (rows[0]["label_precision"], rows[0]["label_recall"], rows[0]["label_f1"]) == (1, 1, 1)
    assert rows[1]["label"] == "“cat”" and rows[1]["label_f1"] == 0
    assert rows[2]["label"] == "no simple rule found" and rows[2]["rule_data"] is None
    assert rows[3]["label"] == "fires too rarely for a rule" and rows[3]["label_f1"] is None
    assert rows[4]["label"] == "" and rows[4]["rule"] is None
    # features 0 to 2 can be tested: F1 1, 0, and none for want of a rule; 0 and 1 share no token
    assert labels.summary() == {
        "n_with_rule": 2,
        "n_rule_tested": 3,
        "mean_label_f1": pytest.approx(1 / 3),
        "mean_label_f1_other_rule": 0,
    }


def test_equal_texts_go_to_one_half():
    numbers = np.array([4, 9, 4, 7, 9, 9, 1])
    half = finding_half(numbers, 0)
    assert all(len(set(half[numbers == n])) == 1 for n in numbers)
    assert len(set(numbers[half])) == 2


def test_only_a_bounded_part_is_held(monkeypatch):
    monkeypatch.setattr(firings, "MAX_TOKENS", 100)
    found = Firings(np.full(50, 10), 1, 0)
    assert len(found.examples) == 10 and found.seen.sum() == 100
    found.add(np.arange(500), np.zeros(500, int), np.ones(500))
    start, token, value = found.by_feature(2)
    assert start.tolist() == [0, 100, 100] and len(value) == 100 and found.seen[token].all()
    run = random_run(500, 5)
    rows, evidence, found = world(run, [rules.fires(PLANTED[2][0], run) * 1.0])
    monkeypatch.setattr(rule_labels, "LEAST_TOKENS", 1)
    rule_labels.add_rules(rows, evidence, found, 0)
    assert rows[0]["label_f1"] is not None


@pytest.mark.parametrize("n", [1, 20, 40])
def test_one_or_two_texts(n):
    run = random_run(n, 6)
    rows, evidence, found = world(run, [np.ones(n), (run.text == run.text[0]) * 1.0])
    summary = rule_labels.add_rules(rows, evidence, found, 0).summary()
    if n <= 20:
        assert summary == {"n_with_rule": 0} and all(row["label_f1"] is None for row in rows)


def test_rules_in_words():
    for rule, words in (
        ([[["begins", ["m", "n"]]]], "words beginning with “m” or “n”"),
        ([[["ends", ["ing"]], ["sentence place", ["1"]]]],
         "words ending in “-ing” as 1st token of a sentence"),
        ([[["previous", ["the", "a"]]]], "anything after “the” or “a”"),
        ([[["turn place", ["2", "1", "3"]]]], "one of the first 3 tokens of a turn"),
        ([[["turn place", ["4", "2", "3"]]]], "the 2nd to 4th token of a turn"),
        ([[["sentence place", ["4", "2"]]]], "the 2nd or 4th token of a sentence"),
        ([[["shape", ["number"]], ["role", ["user"]]]], "numbers in the user's text"),
        ([[["token", [".", "⏎", "!"]]]], "“.”, a line break or “!”"),
        ([[["token", ["\ufffd"]]]], "a part of a character"),
        ([[["category", ["sad"]]], [["inside", ["brackets"]]]],
         "texts of category “sad”; text inside brackets"),
        ([[["begins", ["i"]], ["shape", ["capitalised"]]]],
         "words beginning with “i” (capitalised)"),
    ):  # fmt: skip
        assert in_words({"any": rule}) == words


def test_every_property_has_words():
    run = TokenRun.of_texts(SENTENCE, role=[2] * 13, category="x", kind=[0] * 12 + [1])
    names = {name for name, _ in condition_table(run).names}
    assert names == set(rules.ORDER)
    for name in names:
        for other in names - {name}:
            assert "{" not in in_words({"any": [[[name, ["1"]], [other, ["2"]]]]})
    assert set(rules.OWN) < names and set(token_properties.CLASSES_OF_WORD["may"]) == {
        "months",
        "modal verbs",
    }
