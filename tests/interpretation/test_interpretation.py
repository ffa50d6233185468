"""Stage 3: category evidence and targets against answers worked out by hand, the tables, the
batches, what counts as up to date."""

import json
import re

import numpy as np
import pytest
from conftest import WORDS, planted_tokens, read_table as table
from scipy import sparse

from fastsae.interpretation import neuronpedia
from fastsae.interpretation.categories import (
    auc_matrix,
    best_category,
    correlations,
    first_half,
    number_labels,
    shuffled_aucs,
    target_numbers,
)
from fastsae.interpretation.target_features import select_features
from fastsae.runtime.errors import InputError


def test_auc_by_hand():
    """Category 0 is examples 0 and 1. Feature 0 ranks both on top: 1. Feature 1: pairs won 1 of 4:
    0.25. Feature 2 is constant: 0.5."""
    pooled = np.array([[9, 2, 1], [8, 0, 1], [1, 1, 1], [0, 3, 1]], float)
    auc = auc_matrix(pooled, np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(auc, [[1, 0.25, 0.5], [0, 0.75, 0.5]])


def test_category_is_chosen_and_tested_on_different_halves():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 20)
    pooled = generator.random((200, 30))
    pooled[:, 7] += labels == 4
    chosen, auc = best_category(pooled, labels, 10, seed=0)
    assert chosen[7] == 4 and auc[7] == 1
    others = np.delete(auc, 7)
    # chosen on the test half itself, the mean would be about 0.65
    assert abs(others.mean() - 0.5) < 0.05
    aucs, _ = shuffled_aucs(pooled, labels, 10, seed=0)
    assert (aucs > 0.8).mean() * 30 < 1  # of the 30 features


def test_copies_of_a_text_stand_in_one_half():
    """Four texts of random features, 20 copies each, two texts per category: a copy must not be the
    test of what another one chose."""
    generator = np.random.default_rng(0)
    texts = np.repeat(np.arange(4), 20)
    first = first_half(texts // 2, 2, 0, texts)
    assert [set(first[texts == i]) for i in range(4)] in (
        [{a}, {not a}, {b}, {not b}] for a in (True, False) for b in (True, False)
    )
    pooled = generator.random((40, 2000))[np.repeat(np.arange(40), 5)]  # 40 texts, 5 copies each
    texts, labels = np.repeat(np.arange(40), 5), np.repeat(np.arange(40) % 10, 5)
    leaked, fair = (best_category(pooled, labels, 10, 0, of)[1].mean() for of in (None, texts))
    assert leaked > 0.6 and abs(fair - 0.5) < 0.05
    spread = best_category(pooled, labels, 10, 0, texts)[1].std()
    # labels apart: half of it
    assert shuffled_aucs(pooled, labels, 10, 0, texts)[0].std() == pytest.approx(spread, rel=0.15)
    values = np.repeat(generator.random(40), 5)
    for target in ((labels < 5).astype(float), values):
        found = select_features(sparse.csr_matrix(pooled), target, 20, "correlation", 0, texts)
        assert abs(np.mean([abs(entry["held_out_correlation"]) for entry in found])) < 0.4
    assert (
        select_features(
            sparse.csr_matrix(pooled[:10]), np.repeat([0.0, 1.0], 5), 20, "lasso", 0, texts[:10]
        )
        == []
    )


def test_labels_of_one_example_each_take_no_room():
    names, numbers = number_labels(["b", "x", "a", "b", "a", "y"])
    assert names.tolist() == ["a", "b"] and numbers.tolist() == [1, -1, 0, 1, 0, -1]
    # the rest of the first test is in no category
    pooled = np.array([[9, 2, 1], [8, 0, 1], [1, 1, 1], [0, 3, 1]], float)
    np.testing.assert_allclose(auc_matrix(pooled, np.array([0, 0, -1, -1]), 1), [[1, 0.25, 0.5]])
    first = first_half(np.array([0, 0, -1, -1, -1, -1]), 1, 0)
    assert first[:2].sum() == 1 and first[2:].sum() == 2


def test_sparse_and_dense_pooled_features_agree(monkeypatch):
    monkeypatch.setattr("fastsae.interpretation.categories.BLOCK", 7)
    generator = np.random.default_rng(0)
    pooled = generator.random((60, 30)) * (generator.random((60, 30)) < 0.5)
    labels = np.repeat(np.arange(3), 20)
    for a, b in zip(
        best_category(pooled, labels, 3, 0), best_category(sparse.csr_matrix(pooled), labels, 3, 0)
    ):
        np.testing.assert_array_equal(a, b)
    target = generator.random(60)
    expected = [np.corrcoef(pooled[:, j], target)[0, 1] for j in range(30)]
    np.testing.assert_allclose(correlations(sparse.csr_matrix(pooled), target), expected)
    np.testing.assert_allclose(correlations(pooled, target), expected)


@pytest.mark.parametrize("method", ["separation_score", "correlation", "lasso"])
def test_the_feature_that_predicts_the_target_is_selected(method):
    """Feature 3 is the target with some noise, feature 7 its opposite, the others are noise;
    feature 0 is constant."""
    generator = np.random.default_rng(0)
    target = (np.arange(120) % 3 == 0).astype(float)
    pooled = generator.random((120, 12)) * (generator.random((120, 12)) < 0.5)
    pooled[:, 0], pooled[:, 3], pooled[:, 7] = (
        1,
        target * generator.uniform(1, 2, 120),
        (1 - target) * generator.uniform(1, 2, 120),
    )
    found = select_features(sparse.csr_matrix(pooled), target, 4, method, 0)
    assert {entry["feature"] for entry in found[:2]} <= {3, 7} and 0 not in [
        entry["feature"] for entry in found
    ]
    three = next(entry for entry in found if entry["feature"] == 3)
    assert three["held_out_auc"] == 1 and three["held_out_correlation"] > 0.9


def test_targets_of_words_and_of_numbers():
    assert target_numbers(["a", "b", "a", "b"], "f", "a").tolist() == [1, 0, 1, 0]
    assert target_numbers(["1", "2.5", "3", "4"], "f", None).tolist() == [1, 2.5, 3, 4]
    for values, value in (
        (["a", "b"], None),
        (["a", "b", "b"], "c"),
        (["1", "1", "1", "1"], None),
        (["1", "nan", "3", "4"], None),
        (["1", "0", "0", "0"], None),
        (["1", "1", "0.0", "1"], None),
    ):
        with pytest.raises(InputError, match="TARGET_"):
            target_numbers(values, "f", value)


def test_categories_with_one_example_give_no_auc():
    chosen, auc = best_category(np.eye(3), np.arange(3), 3, seed=0)
    assert np.isnan(auc).all()


def test_planted_features_are_named(tmp_path, planted, run_main, capsys):
    assert run_main("interpret_sae", *planted) == 0
    rows = table(tmp_path)
    assert len(rows) == 20
    for word in WORDS:
        row = next(row for row in rows if row["label"].startswith(f"“{word}”"))
        assert row["best_category"] == f"cat_{word}" and float(row["category_auc"]) == 1.0
        assert row["label_source"] == "rule" and row["status"] == "ok"
        assert row["label"] == row["rule"] and float(row["label_f1"]) == 1.0
        # 30 of the 1,200 tokens are this word
        assert float(row["density"]) == pytest.approx(30 / 1200)
        assert f"«{word}»" in row["top_example_1"] and row["top_example_5"]
    out = capsys.readouterr().out
    assert "training added" in out and len(out.splitlines()) <= 16
    printed = [int(line.split(":")[0]) for line in out.splitlines() if re.match(r"  \d+: ", line)]
    assert len(printed) == 5
    # the planted words before all else, each with its own category
    named = {row["best_category"] for j in printed[:4] for row in rows if int(row["feature"]) == j}
    assert named == {f"cat_{word}" for word in WORDS}
    dead = [row for row in rows if row["status"] == "dead"]
    assert all(row["label"] == "" and float(row["max_activation"]) == 0 for row in dead)


def test_tables_agree_and_carry_no_formula(tmp_path, planted, run_main):
    assert run_main("interpret_sae", *planted) == 0
    metadata, *exact = [
        json.loads(line)
        for line in (tmp_path / "interpretations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = table(tmp_path)
    assert metadata["complete"] and len(exact) == len(rows)
    for row, twin in zip(rows, exact):
        for name, value in row.items():
            assert not value.startswith(("=", "+", "-", "@", "\t", "\r"))
            if isinstance(twin[name], str):
                assert value.removeprefix("'") == twin[name].removeprefix("'")


def test_up_to_date_changed_by_hand_and_other_settings(tmp_path, planted, run_main, capsys):
    assert run_main("interpret_sae", *planted) == 0
    capsys.readouterr()
    assert run_main("interpret_sae", *planted) == 0
    assert "up to date" in capsys.readouterr().out
    with open(tmp_path / "interpretations.csv", "a") as file:
        file.write("my notes\n")
    assert run_main("interpret_sae", *planted) == 0
    assert "changed by hand" in capsys.readouterr().out
    assert (tmp_path / "interpretations.old-1.csv").read_text().endswith("my notes\n")
    assert run_main("interpret_sae", *planted, "fastsae.interpretation.features.POOLING=max") == 0
    assert "POOLING mean -> max" in capsys.readouterr().out


def test_activations_and_checkpoint_must_belong_together(
    tmp_path, planted, run_main, write_activations, capsys
):
    dataset = tmp_path / "planted.jsonl"
    dataset.write_text(
        dataset.read_text() + json.dumps({"text": "one more", "category": "cat_apple"}) + "\n"
    )
    assert run_main("interpret_sae", *planted) == 2
    assert "run extract_activations.py" in capsys.readouterr().err
    write_activations(np.ones((1200, 16), np.float32), [10] * 120, dataset=dataset)
    assert run_main("interpret_sae", *planted) == 2
    assert "run train_sae.py" in capsys.readouterr().err


def test_unknown_label_field_is_named(planted, run_main, capsys):
    assert run_main("interpret_sae", *planted, "--label-field", "colour") == 2
    assert "LABEL_FIELD" in capsys.readouterr().err


def test_labels_that_no_two_examples_share_give_no_auc(tmp_path, planted, run_main, capsys):
    assert run_main("interpret_sae", *planted, "--label-field", "text") == 0
    assert "category AUC: none" in capsys.readouterr().out
    assert all(row["category_auc"] == "" for row in table(tmp_path))


def test_columns_of_the_issue(tmp_path, planted, run_main):
    assert run_main("interpret_sae", *planted) == 0
    rows = table(tmp_path)
    assert list(rows[0])[-6:] == [
        "score",
        "fidelity_f1",
        "matryoshka_level",
        "promoted_tokens",
        "suppressed_tokens",
        "special_token_share",
    ]
    row = next(row for row in rows if row["label"].startswith("“apple”"))
    assert (
        row["score"] == row["fidelity_f1"] == ""
        and float(row["special_token_share"]) == 0
        and row["matryoshka_level"] == ""
    )


def test_no_hypothesis_is_said(planted, run_main, capsys, monkeypatch):
    monkeypatch.setattr(
        "fastsae.interpretation.target_features.correlations",
        lambda pooled, target: np.full(pooled.shape[1], np.nan),
    )  # all constant
    assert run_main("interpret_sae", *planted, "--target-value", "cat_river") == 0
    assert (
        "hypotheses: none, for no feature predicts category = cat_river" in capsys.readouterr().out
    )


def test_hypotheses_for_a_target(tmp_path, planted, run_main, capsys):
    assert (
        run_main("interpret_sae", *planted, "--target-value", "cat_river", "--n-hypotheses", 3) == 0
    )
    rows = table(tmp_path, "hypotheses.csv")
    assert rows[0]["hypothesis"].startswith("“river”") and float(rows[0]["held_out_auc"]) == 1
    assert rows[0]["target"] == "category = cat_river" and rows[0]["method"] == "correlation"
    (tmp_path / "hypotheses.csv").unlink()
    assert (
        run_main("interpret_sae", *planted, "--target-value", "cat_river", "--n-hypotheses", 3) == 0
    )
    assert "is missing" in capsys.readouterr().out and (tmp_path / "hypotheses.csv").exists()
    # without a target the old hypotheses are put aside
    assert run_main("interpret_sae", *planted) == 0
    assert (
        not (tmp_path / "hypotheses.csv").exists() and (tmp_path / "hypotheses.old-1.csv").exists()
    )
    assert run_main("interpret_sae", *planted, "--target-value", "cat_lake") == 2
    assert "TARGET_VALUE" in capsys.readouterr().err


def test_neuronpedia_batches_pass_the_schema(tmp_path, planted, run_main, monkeypatch):
    monkeypatch.setattr(neuronpedia, "BATCH", 8)
    old = tmp_path / "neuronpedia" / "11-test-set" / "batch-009.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")  # of an earlier run with more features
    assert run_main("interpret_sae", *planted, "--neuronpedia-set", "test-set") == 0
    # layer 12 is the state after block 11
    paths = sorted((tmp_path / "neuronpedia" / "11-test-set").glob("batch-*.json"))
    batches = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = {int(row["feature"]): row for row in table(tmp_path)}
    features = [feature for batch in batches for feature in batch["features"]]
    assert [f["index"] for f in features] == [
        j for j, row in rows.items() if row["status"] != "dead"
    ] and len(paths) > 1
    for batch in batches:
        neuronpedia.check(batch)
        assert batch["modelId"] == "smollm2-135m-instruct" and batch["source"] == "11-test-set"
    river = next(f for f in features if f["explanations"][0]["text"].startswith("“river”"))
    activation = river["activations"][0]
    assert len(activation["tokens"]) == len(activation["values"]) == 10
    assert activation["tokens"][int(np.argmax(activation["values"]))] == " river"
    assert activation["quantileMin"] < max(activation["values"]) <= activation["quantileMax"] + 1e-3
    try:
        import jsonschema
    except ImportError:
        return
    for batch in batches:
        jsonschema.validate(batch, neuronpedia.SCHEMA)


def test_the_schema_refuses():
    activation = {
        "tokens": ["a"],
        "values": [1],
        "quantileMin": 0,
        "quantileMax": 1,
        "quantileFraction": 1,
    }
    good = {
        "modelId": "m",
        "source": "3-s",
        "features": [
            {
                "index": 1,
                "density": 0.5,
                "topLogits": [],
                "bottomLogits": [],
                "activations": [activation],
                "explanations": [{"text": "x", "methodName": None, "modelName": None}],
            }
        ],
    }
    neuronpedia.check(good)
    for change in (
        {"source": "s"},
        {"modelId": ""},
        {"features": [{}]},
        {"features": [good["features"][0]] * 129},
        {"features": [{**good["features"][0], "density": 2}]},
        {"features": [{**good["features"][0], "index": True}]},
        {"features": [{**good["features"][0], "density": float("nan")}]},
        {"features": [{**good["features"][0], "topLogits": [{"token": "a", "value": 1}] * 21}]},
        {
            "features": [
                {
                    **good["features"][0],
                    "explanations": [{"text": "x" * 513, "methodName": None, "modelName": None}],
                }
            ]
        },
        *(
            {"features": [{**good["features"][0], "explanations": [{"text": "x", **names}]}]}
            for names in (
                {"methodName": "fastsae", "modelName": None},
                {"methodName": None, "modelName": ""},
            )
        ),
        *(
            {"features": [{**good["features"][0], "activations": [{**activation, **part}]}]}
            for part in ({"tokens": [""]}, {"tokens": []}, {"values": []})
        ),
        {"features": [{**good["features"][0], "activations": []}]},
        {"features": [{**good["features"][0], "index": 10_000_001}]},
    ):
        with pytest.raises(ValueError):
            neuronpedia.check({**good, **change})


def refused_by_neuronpedia(batch):
    """What its rules have against a batch; written from the rules, not from this project's
    schema."""
    found = []

    def need(ok, what):
        if not ok:
            found.append(what)

    need(isinstance(batch["modelId"], str) and batch["modelId"], "modelId")
    need(isinstance(batch["source"], str) and batch["source"].split("-")[0].isdigit(), "source")
    need(1 <= len(batch["features"]) <= 128, "number of features")
    for feature in batch["features"]:
        need(type(feature["index"]) is int and 0 <= feature["index"] <= 10_000_000, "index")
        for logit in [*feature["topLogits"], *feature["bottomLogits"]]:
            need(logit["token"] and np.isfinite(logit["value"]), "logit")
        need(max(len(feature["topLogits"]), len(feature["bottomLogits"])) <= 20, "number of logits")
        for explanation in feature["explanations"]:
            need(explanation["methodName"] is None, "methodName")
            need(explanation["modelName"] is None or explanation["modelName"].strip(), "modelName")
            need(0 < len(explanation["text"]) <= 512, "text")
        need(feature["activations"], "number of activations")
        for activation in feature["activations"]:
            need(
                1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024,
                "number of tokens",
            )
            need(all(isinstance(token, str) and token for token in activation["tokens"]), "token")
            need(all(np.isfinite(activation["values"])), "value")
    return sorted(set(found))


def test_batches_of_texts_beyond_ascii_pass_neuronpedias_rules(
    tmp_path, write_activations, run_main, smol_tokenizer
):
    """Pieces of characters, a label from each source, the lens and every feature that fires."""
    texts = ["the 🦜 sat — quietly", "naïve café 🦜🦜", "数学 and 音楽", "it’s “quoted”"] * 6
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = [smol_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokens, _ = planted_tokens(sum(map(len, ids)), 16, 12, 2)
    flags = [
        *write_activations(tokens, list(map(len, ids)), dataset=dataset, token_ids=sum(ids, [])),
        "--run-name",
        "r",
        "--device",
        "cpu",
    ]
    assert (
        run_main(
            "train_sae", *flags, "--m", 12, "--k", 2, "--matryoshka-prefixes=none", "--n-epochs", 3
        )
        == 0
    )
    assert run_main("interpret_sae", *flags, "--label-field", "none", "--neuronpedia-set", "s") == 0
    batches = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (tmp_path / "neuronpedia").rglob("batch-*.json")
    ]
    assert batches and [refused_by_neuronpedia(batch) for batch in batches] == [[]] * len(batches)
    shown = [
        token
        for batch in batches
        for feature in batch["features"]
        for a in feature["activations"]
        for token in a["tokens"]
    ]
    # the character, and its other pieces
    assert "\ufffd" in shown and any("🦜" in token for token in shown)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("rule", None),
        ("", None),
        ("gpt-5-mini", "gpt-5-mini"),
        (None, None),
        ("local:/home/me/llama/", "llama"),
        ("local:SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
    ],
)
def test_who_explained_a_feature(source, name):
    from types import SimpleNamespace

    row = {
        "feature": 3,
        "density": 0.1,
        "label": "about bread",
        "label_source": source,
        "label_protocol": "hypothesaes",
    }
    found = neuronpedia.feature(SimpleNamespace(), row, [], {}, ([("", 1.0)], []))
    assert found["explanations"] == [{"text": "about bread", "methodName": None, "modelName": name}]
    assert found["topLogits"] == [{"token": "\ufffd", "value": 1.0}]
    emoji = neuronpedia.feature(SimpleNamespace(), {**row, "label": "🦜" * 400}, [], {}, ([], []))
    assert emoji["explanations"][0]["text"] == "🦜" * 256  # 512 as JavaScript counts
    assert (
        neuronpedia.feature(SimpleNamespace(), {**row, "label": " "}, [], {}, ([], []))[
            "explanations"
        ]
        == []
    )
