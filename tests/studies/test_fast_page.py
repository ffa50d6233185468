"""What docs/fast.md says of the paper's sentences: the verdicts on results made by hand."""

import json

import pytest

from experiments.pages import fast_page
from experiments.pages.fast_page import FAILS, SURVIVES, UNCLEAR


def figure(value, half=0.1):
    return {"value": value, "interval": [value - half, value + half]}


def step(factor, start, value, half=0.1):
    return {"factor": factor, "from": start, **figure(value, half)}


def gap(measure, name, on, total, steps=(), layer=1, half=0.1):
    return {
        "layer": layer,
        "measure": measure,
        "gap": name,
        "measured on": on,
        "total": figure(total, half),
        "steps": list(steps),
    }


def run(*gaps, texts=(), features=(), layers=(1,)):
    settings = {"DATASET_PATH": "one.jsonl", "ARCHITECTURE": "topk", "M": 16, "LAYERS": layers}
    return {
        "settings": settings,
        "gaps": list(gaps),
        "texts": list(texts),
        "features": list(features),
    }


@pytest.mark.parametrize(
    "above, below, n, said",
    [
        (3, 0, 3, SURVIVES),
        (2, 0, 3, UNCLEAR),
        (0, 0, 3, UNCLEAR),
        (1, 2, 3, FAILS),
        (0, 0, 0, UNCLEAR),
    ],
)
def test_a_verdict_counts_clear_cases(above, below, n, said):
    assert fast_page.verdict(above, below, n) == said


def test_the_ordering_is_counted_layer_by_layer():
    gaps = [
        gap("MSE", fast_page.PAPERS, "alone", v, layer=i) for i, v in enumerate((0.5, 0.2, -0.3))
    ]
    gaps.append(gap("MSE", fast_page.PAPERS, "alone", 0.13, layer="mean"))
    claim = fast_page.ordering({"one": run(*gaps, layers=(0, 1, 2))}, "MSE", "so it is")
    assert claim.verdict == UNCLEAR
    assert claim.here.startswith("clearly so in 2 of 3 cases, clearly not in 1; log2 one +0.13 ")
    assert claim.short == "+0.13"
    survives = fast_page.ordering({"one": run(*gaps[:2], gaps[3], layers=(0, 1))}, "MSE", "")
    assert survives.verdict == SURVIVES


def cause(seeing, total, elsewhere):
    def steps(value):
        return [step("attention", "alone", 0.0), step("attention", "apart", value)]

    gaps = [
        gap(fast_page.NORMALISED, fast_page.BOTH, "alone", total, steps(seeing)),
        gap(fast_page.NORMALISED, fast_page.BOTH, "whole", 0.0, steps(elsewhere)),
    ]
    return fast_page.because_alone({"one": run(*gaps)})


def test_reading_alone_is_the_cause_if_it_is_most_of_the_gap_and_holds_in_blocks():
    assert cause(0.8, 1.0, 0.3).verdict == SURVIVES
    assert cause(0.4, 1.0, 0.3).verdict == FAILS  # openings and sinks make most of it
    assert cause(0.8, 1.0, -0.3).verdict == FAILS  # the other way where both are in blocks
    assert cause(0.8, 1.0, 0.05).verdict == UNCLEAR
    assert cause(0.05, 0.05, 0.3).verdict == UNCLEAR  # no gap to explain
    assert cause(0.4, 1.0, 0.3).short == "+0.40, in blocks +0.30"


def test_plain_texts_are_worse_only_if_both_are():
    def text(name, value):
        where = {"layer": 1, "text": name, "sinks": "dropped", "measure": fast_page.NORMALISED}
        return {**where, **figure(value)}

    both = run(texts=[text("manual", 0.9), text("own text", 0.3)])
    assert fast_page.plain_text({"one": both}).verdict == SURVIVES
    one = run(texts=[text("manual", 0.9), text("own text", 0.02)])
    claim = fast_page.plain_text({"one": one})
    assert claim.verdict == UNCLEAR and "the dialogues' own text +0.02" in claim.short


def test_features_are_compared_with_the_same_tokens_kept():
    def row(rule, detection):
        above = {"rule_f1_above_fast": figure(rule, 0.01)}
        above["detection_auc_above_fast"] = figure(detection, 0.01)
        return {"source": "whole", "openings": 1, "sinks": 1, **above}

    said = [
        fast_page.understood({"one": run(features=[row(*values)])}).verdict
        for values in ((-0.1, -0.1), (-0.1, 0.0), (0.1, 0.0))
    ]
    assert said == [SURVIVES, UNCLEAR, FAILS]
    assert fast_page.understood({"one": run()}).here == "not measured yet"


def test_steering_has_to_beat_random_directions(tmp_path, monkeypatch):
    def curves(*words):
        return [{"expected_word": word} for word in words]

    def said(steered, random):
        result = {
            "alphas": [0, 25],
            "mean_norm": 100.0,
            "n_with_expected_word": 10,
            "unsteered": {"expected_word": 0.2},
            "targets": [
                {"feature": 3, "fluent_up_to_alpha": 25.0, "curves": curves(0.2, steered)},
                {"feature": None, "fluent_up_to_alpha": None, "curves": curves(0.2, random)},
            ],
        }
        (tmp_path / "steer.json").write_text(json.dumps(result))
        return fast_page.steering()

    monkeypatch.setattr(fast_page, "RESULTS", tmp_path)
    assert fast_page.steering() is None
    assert said(0.9, 0.3).verdict == SURVIVES
    claim = said(0.9, 0.9)
    assert claim.verdict == FAILS and "alpha 25, 0.25 of the stream's mean norm" in claim.here


def test_numbers_and_tables_as_people_read_them():
    assert [fast_page.signed(value) for value in (0.126, -0.126, -0.001)] == [
        "+0.13",
        "-0.13",
        "0.00",
    ]
    assert fast_page.with_interval(figure(0.5)) == "+0.50 [+0.40, +0.60]"
    assert fast_page.table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_without_a_result_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_page, "RESULTS", tmp_path)
    made = {make() for make in fast_page.BLOCKS.values()}
    assert made == {"Not measured yet."}
    other = run()
    other["settings"]["ARCHITECTURE"] = "standard"
    (tmp_path / "fast_factors.json").write_text(json.dumps({"runs": {"one": other}}))
    assert {make() for make in fast_page.BLOCKS.values()} == made
