"""The studies of ground truth and of stability: their measures by hand, their model against a slow
twin, and tiny runs from end to end."""

import json
import sys

import numpy as np
import pytest
import torch


def test_matching_gives_each_column_away_once():
    from experiments.shared.directions import matched_mean, mean_max

    similarity = np.array([[0.9, 0.8], [0.8, 0.1]])  # greedy would pair 0.9 with 0.1
    assert matched_mean(similarity) == pytest.approx(0.8)
    assert mean_max(similarity) == pytest.approx(0.85)
    # one column for two rows: the row left over counts as 0
    assert matched_mean(similarity[:, :1]) == pytest.approx(0.45)


def test_cosines_by_hand():
    from experiments.shared.directions import absolute_correlations, absolute_cosines, cosines

    a, b = np.array([[3.0, 0], [0, 0]]), np.array([[-1.0, 1], [0, 5]])
    assert np.allclose(cosines(a, b), [[-np.sqrt(0.5), 0], [0, 0]])
    assert np.allclose(absolute_cosines(a, b), [[np.sqrt(0.5), 0], [0, 0]])
    x, y = np.array([[1.0, 7], [2, 7], [3, 7]]), np.array([[30.0], [20], [10]])
    # a column that does not vary correlates with nothing
    assert np.allclose(absolute_correlations(x, y), [[1], [0]])


def test_share_found_by_all_by_hand():
    from experiments.shared.directions import found_by_all

    first, second, third = (
        np.eye(4)[:3],
        np.eye(4)[[0, 1, 3]],
        np.eye(4)[[1, 0, 2]] * [[1], [1], [-1]],
    )
    # first: e0 and e1 are in both others; e2 only as its opposite. second: e0, e1. third: e1, e0
    assert found_by_all([first, second, third], 0.7) == pytest.approx(2 / 3)


def test_principal_directions_of_a_stretched_cloud():
    from experiments.shared.directions import absolute_cosines, principal_directions

    x = np.random.default_rng(0).standard_normal((5000, 3)) * [1, 5, 3] + [9, 9, 9]
    assert np.allclose(
        absolute_cosines(principal_directions(x, 2), np.eye(3)), [[0, 1, 0], [0, 0, 1]], atol=0.1
    )


def planted_embedding(p, amplitudes, d=16, phase=0.0):
    """(table (p, d), the orthonormal rows (2 F, d) that its cosines and sines use) for {frequency:
    amplitude}."""
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((d, d)))[0][: 2 * len(amplitudes)]
    table = np.full((p, d), 0.3)
    for i, (k, amplitude) in enumerate(amplitudes.items()):
        angle = 2 * np.pi * k * np.arange(p) / p + phase
        table += amplitude * (
            np.outer(np.cos(angle), basis[2 * i]) + np.outer(np.sin(angle), basis[2 * i + 1])
        )
    return table, basis


def test_fourier_directions_of_an_embedding_with_known_frequencies():
    from experiments.shared.directions import (
        absolute_cosines,
        fourier_directions,
        fourier_power,
        key_frequencies,
        lengths_in_planes,
        matched_mean,
    )

    table, basis = planted_embedding(13, {5: 3.0, 2: 2.0, 6: 0.1})
    assert fourier_power(table)[[4, 1, 5]] == pytest.approx(np.array([9, 4, 0.01]) / 13.01)
    assert key_frequencies(table, 0.9) == [5, 2]
    assert key_frequencies(table, 0.9999) == [5, 2, 6]
    found = fourier_directions(table, [5, 2])
    assert np.allclose(found @ basis[:4].T, np.eye(4), atol=1e-9)
    turned = fourier_directions(planted_embedding(13, {5: 3.0, 2: 2.0}, phase=np.pi / 4)[0], [5, 2])
    # the phase decides cosines
    assert matched_mean(absolute_cosines(found, turned)) == pytest.approx(np.sqrt(0.5))
    # and not planes
    assert matched_mean(lengths_in_planes(found, turned)) == pytest.approx(1)
    assert np.allclose(lengths_in_planes(found, basis[4:5]), 0, atol=1e-9)


@torch.no_grad()
def test_transformer_equals_attention_written_out():
    from experiments.studies.modular_transformer import (
        D_MODEL,
        N_HEADS,
        ModularTransformer,
        all_pairs,
    )

    torch.manual_seed(0)
    model, (a, b) = ModularTransformer(7), all_pairs(7)
    tokens = torch.stack([a, b, torch.full_like(a, 7)], 1)  # (49, 3)
    x = model.embedding[tokens] + model.position  # (49, 3, d)
    size, mixed = D_MODEL // N_HEADS, []
    for head in range(N_HEADS):
        columns = slice(head * size, (head + 1) * size)
        query, key, value = (
            x @ matrix[:, columns] for matrix in (model.query, model.key, model.value)
        )
        mixed.append((query @ key.transpose(1, 2) / size**0.5).softmax(2) @ value)
    x = x + torch.cat(mixed, 2) @ model.output
    x = x + torch.relu(x @ model.into + model.hidden_bias) @ model.out + model.out_bias
    assert torch.allclose(model.residual(a, b), x[:, 2], atol=1e-4)
    assert torch.allclose(model(a, b), (x @ model.unembedding)[:, 2], atol=1e-4)


def test_transformer_is_trained_once_and_its_test_pairs_are_new(tmp_path, capsys):
    from experiments.studies.modular_transformer import split_pairs, trained_model

    training, test = split_pairs(5, 0.6, 0)
    assert len(training) == 15 and sorted([*training.tolist(), *test.tolist()]) == list(range(25))
    settings = dict(
        p=5,
        train_fraction=1 - 1 / 25,
        epochs=3,
        batch_size=8,
        learning_rate=1e-3,
        weight_decay=1.0,
        seed=0,
    )
    first, figures = trained_model(tmp_path / "model.pt", **settings)
    capsys.readouterr()
    again, same = trained_model(tmp_path / "model.pt", **settings)
    assert "up to date" in capsys.readouterr().out and same == figures
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in first.state_dict().items())
    trained_model(tmp_path / "model.pt", **{**settings, "epochs": 4})
    assert "epochs 3 -> 4" in capsys.readouterr().out


def test_planted_tokens_are_sums_of_the_stated_number_of_directions():
    from experiments.studies.planted import planted_tokens

    tokens, directions = planted_tokens((6, 8, 2, 0.0), 500, 0)
    # (500, 6): exact, as there are more dimensions than directions
    codes = tokens @ np.linalg.pinv(directions)
    used = np.abs(codes) > 1e-3
    assert (used.sum(1) == 2).all() and used.any(0).all()
    assert codes[used].min() > 0.99 and codes[used].max() < 2.01
    noisy = planted_tokens((6, 8, 2, 0.5), 500, 0)[0]
    assert np.isclose(
        (noisy - noisy @ np.linalg.pinv(directions) @ directions).std() * np.sqrt(8 / 2),
        0.5,
        rtol=0.1,
    )


def words(name, result):
    """What the README would say of a result."""
    from experiments.pages import studies_page

    return getattr(studies_page, name)(result)


@pytest.mark.parametrize(
    "counts, verdict",
    [
        ({4: [10, 12], 15: [20, 21], 28: [18, 19]}, "yes"),
        ({4: [10, 12], 15: [20, 21], 28: [18, 20]}, "open"),
        ({4: [10, 12], 15: [11, 12], 28: [18, 20]}, "no"),
        ({4: [10, 12], 28: [18, 20]}, "open"),
        ({4: [10], 15: [20], 28: [18]}, "open"),
    ],
)
def test_middle_layers_win_only_beyond_their_seeds(counts, verdict):
    from experiments.pages import studies_page

    rows = [
        {"layer": layer, "seeds": [{"probe_auc": n / 30} for n in values]}
        for layer, values in counts.items()
    ]
    assert studies_page.middle_wins({"n_blocks": 30, "layers": rows}) == verdict


def run_study(monkeypatch, tmp_path, name, *flags):
    """The result of a study run in this process, its outputs under tmp_path."""
    import importlib

    from experiments.shared import provenance

    study = importlib.import_module(f"experiments.studies.{name}")
    for module in (provenance, study):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        sys, "argv", [study.__file__, "--output-dir", str(tmp_path), *map(str, flags)]
    )
    assert not study.main()
    return json.loads((tmp_path / "results" / f"{name}.json").read_text())


PLANTED = [
    "--large",
    "48,24,3",
    "--small",
    "16,8,1",
    "--actives",
    "1,2",
    "--noises",
    "0.3",
    "--l1-coefficients",
    "1,2",
    "--seeds",
    "0",
    "--architectures",
    "topk,standard",
    "--large-architectures",
    "topk",
    "--n-tokens",
    "8000",
    "--batch-size",
    "256",
    "--steps",
    "600",
    "--learning-rate",
    "0.005",
]


@pytest.mark.exhaustive
def test_planted_study_finds_directions_and_remembers(monkeypatch, tmp_path):
    result = run_study(monkeypatch, tmp_path, "planted", *PLANTED)
    methods = result["large"][0]["methods"]
    assert methods["topk"]["mean"]["mean_max_cosine"] > 0.9 and methods["topk"]["mean"][
        "l0"
    ] == pytest.approx(3, abs=0.01)
    assert methods["random"]["mean"]["mean_max_cosine"] < 0.6
    assert methods["principal components"]["mean"]["mcc"] <= 0.5  # 24 components for 48 directions
    assert result["noise"][0]["methods"]["standard"]["runs"][0]["l1_coefficient"] in (1, 2)
    assert [case["active"] for case in result["active"]] == [1, 2] and result["noise"][0][
        "noise"
    ] == 0.3

    reached = methods["topk"]["mean"]["mean_max_cosine"] > 0.95
    assert f"Above 0.95 in every seed: {'topk' if reached else 'none; not: topk'}." in words(
        "planted", result
    )

    from experiments.studies import planted

    monkeypatch.setattr(planted, "run", lambda *args: pytest.fail("measured again"))
    assert run_study(monkeypatch, tmp_path, "planted", *PLANTED)["large"] == result["large"]


@pytest.mark.exhaustive
def test_modular_study_runs_on_tiny_settings(monkeypatch, tmp_path):
    result = run_study(
        monkeypatch,
        tmp_path,
        "modular_arithmetic",
        "--p",
        13,
        "--model-epochs",
        3,
        "--seeds",
        "0,1",
        "--n-epochs",
        1,
        "--ms",
        "12,16",
        "--ks",
        "2",
        "--l1-coefficients",
        "1",
        "--n-random",
        2,
        "--architectures",
        "standard,topk",
    )
    assert sum(result["embedding_power"]) == pytest.approx(1, abs=1e-3)
    for site, n_distinct in (("embedding", 26), ("answer", 169)):
        examined = result["sites"][site]
        assert examined["n_distinct"] == n_distinct and set(examined["autoencoders"]) == {
            f"{kind}, M = {m}, {sparsity}"
            for kind, sparsity in (("standard", "L1 = 1"), ("topk", "K = 2"))
            for m in (12, 16)
        }
        for row in [
            *examined["baselines"].values(),
            *(r["mean"] for r in examined["autoencoders"].values()),
        ]:
            assert all(
                0 <= row[name] <= 1
                for name in ("mcc", "plane_mcc", "mean_max_cosine", "correlation")
            )
            assert row["plane_mcc"] >= row["mcc"]
        pca = examined["baselines"]["principal components, M = 12"]["mcc"]
        best = max(
            run["mcc"]
            for name, rows in examined["autoencoders"].items()
            if "M = 12" in name
            for run in rows["runs"]
        )
        word = "does better than" if best > pca else "does not reach"
        assert (
            f"{site}, M = 12: the best autoencoder has an MCC of {best:.3f} and {word} principal "
            f"components ({pca:.3f})" in words("modular_arithmetic", result)
        )


@pytest.mark.exhaustive
def test_stability_study_runs_on_tiny_settings(monkeypatch, tmp_path):
    result = run_study(
        monkeypatch,
        tmp_path,
        "stability",
        "--max-examples",
        12,
        "--layer-idx",
        1,
        "--ms",
        "8,16",
        "--ks",
        "2",
        "--seeds",
        "0,1,2",
        "--n-epochs",
        1,
    )
    assert [(row["m"], row["k"], len(row["runs"])) for row in result["runs"]] == [
        (8, 2, 3),
        (16, 2, 3),
    ]
    for row in [
        *result["runs"],
        *(b for pair in result["baselines"].values() for b in pair.values()),
    ]:
        assert row["mcc"] <= row["mean_max_cosine"] + 1e-9 and 0 <= row["found_by_all"] <= 1
    assert result["baselines"]["8"]["random"]["found_by_all"] == 0
    assert f"| 16 | 2 | {result['runs'][1]['mean_max_cosine']:.3f} |" in words("stability", result)


@pytest.mark.exhaustive
def test_training_defaults_are_compared_seed_by_seed(monkeypatch, tmp_path):
    flags = ["--max-examples", 12, "--layer-idx", 1, "--m", 8, "--k", 2, "--seeds", "0,1"]
    cases = "default,rate x 2,fall over the last fifth"
    earlier = {"settings": {}, "cases": {}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "training_defaults.json").write_text(
        json.dumps({"runs": {"earlier": earlier}})
    )
    result = run_study(monkeypatch, tmp_path, "training_defaults", *flags, "--cases", cases)
    assert result["runs"].pop("earlier") == earlier
    (entry,) = result["runs"].values()
    assert list(entry["cases"]) == cases.split(",")
    default, doubled, later = entry["cases"].values()
    assert default["flags"] == "" and "percent_over_default" not in default
    assert doubled["flags"] == "--learning-rate 0.008"
    changes = [
        100 * (ours / its - 1)
        for ours, its in zip(doubled["normalized_mse"], default["normalized_mse"])
    ]
    assert doubled["percent_over_default"] == pytest.approx(sum(changes) / 2, abs=1e-3)
    assert later["normalized_mse"] != default["normalized_mse"]  # the constant arrived


def test_intervals_of_few_seeds_by_hand():
    from experiments.shared.statistics import mean_interval

    # Student's t with one degree of freedom: 12.706 standard errors
    assert mean_interval([1.0, 3.0]) == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)
    assert mean_interval([1.0]) is None


def test_quick_studies_time_each_study_in_a_folder_of_its_own(monkeypatch, tmp_path, capsys):
    from experiments.benchmarks import quick_studies
    from experiments.shared import provenance

    studies = tmp_path / "experiments" / "studies"
    studies.mkdir(parents=True)
    (studies / "good.py").write_text(
        "import os, sys\nfolder = sys.argv[2]\nassert sys.argv[1] == '--output-dir' and "
        "sys.argv[3:] == ['--quick', '--x']\n"
        "assert os.environ['FASTSAE_RESULTS'] == folder != '' and os.listdir(folder) == "
        "['printed.log']\n"
    )
    (studies / "bad.py").write_text("print('why it failed')\nraise SystemExit(3)\n")
    for module in (provenance, quick_studies):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(quick_studies, "PROJECT", tmp_path)
    monkeypatch.setattr(quick_studies, "STUDIES", ("good", "bad"))
    monkeypatch.setattr(quick_studies, "FLAGS", {"good": ["--x"]})
    monkeypatch.setattr(sys, "argv", ["quick_studies.py", "good"])
    quick_studies.main()
    found = json.loads((tmp_path / "results" / "quick_studies.json").read_text())["studies"]
    assert set(found) == {"good"} and found["good"]["seconds"] >= 0 and found["good"]["cores"]
    for name, message in (
        ("bad", "why it failed\n\nerror: bad --quick ended with exit code 3"),
        ("none", "no such study"),
    ):
        monkeypatch.setattr(sys, "argv", ["quick_studies.py", name])
        with pytest.raises(SystemExit, match=message):
            quick_studies.main()
