"""The objectives beside the default: their gradients against autograd, planted tokens with
structure, and what is computed from the figures; which K a sweep recommends; then the studies on
tiny data."""

import functools
import json

import numpy as np
import pytest
import torch
from test_studies_truth import run_study
from tiny_world import WORDS

from experiments.shared import objective_steps as steps, planted, trainings
from experiments.studies import objectives, sparsity
from fastsae.sae.autoencoder import new_sae
from fastsae.sae.initialisation import initialise
from fastsae.sae.sparse_step import sparse_step

M, D, N = 12, 6, 16
TOPK = functools.partial(sparse_step, aux_coef=0.0)


def started(architecture="topk", prefixes=None):
    """(an autoencoder with random weights, a batch (N, D))."""
    sae = new_sae(
        {
            "input_dim": D,
            "m_total_neurons": M,
            "k_active_neurons": 3,
            "prefix_lengths": prefixes,
            "architecture": architecture,
        }
    ).eval()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((N, D)).astype(np.float32))
    initialise(sae, x, 0)
    with torch.no_grad():  # encoder rows of their own
        sae.encoder.weight.add_(0.3 * torch.randn(M, D, generator=torch.manual_seed(1)))
    return sae, x


def gradients(sae, step, x):
    """{parameter: the gradient that a step fills}."""
    sae.zero_grad(set_to_none=True)
    step(sae, x, torch.zeros(M, dtype=torch.bool))
    return {name: value.grad.clone() for name, value in sae.named_parameters()}


def test_nearness_by_hand_and_its_gradient():
    rows = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]], requires_grad=True)
    value, gradient = steps.nearness(rows.detach())
    # the first two are nearest to each other at 0.6, the third has none above 0
    assert value == pytest.approx(2 * 0.36 / 3)
    products = (rows @ rows.t()).fill_diagonal_(-9)
    products.max(1).values.clamp_min(0).square().mean().backward()
    assert torch.allclose(gradient, rows.grad)


def test_the_orthogonal_term_reaches_the_decoder():
    sae, x = started()
    plain = gradients(sae, TOPK, x)
    with_term = gradients(sae, functools.partial(steps.orthogonal_step, base=TOPK, weight=2.0), x)
    expected = 2 * steps.nearness(sae.decoder.weight.detach().t())[1].t()
    assert torch.allclose(
        with_term["decoder.weight"] - plain["decoder.weight"], expected, atol=1e-6
    )
    assert torch.equal(with_term["encoder.weight"], plain["encoder.weight"])


def test_contrast_by_hand():
    now, before = torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([[1.0, 0], [0, 1]])
    # cosines 1 with its own and 0 with the other: -log(e / (e + 1)) in every row and column
    assert steps.contrast(now, before) == pytest.approx(np.log(1 + np.exp(-1)))
    assert steps.contrast(now, before.flip(0)) == pytest.approx(np.log(1 + np.exp(1)))


def test_pairs_add_the_gradient_of_the_contrast():
    sae, x = started(prefixes=[4, M])
    plain = gradients(sae, TOPK, x)
    found = gradients(sae, functools.partial(steps.pairs_step, base=TOPK, weight=0.7), x)
    sae.zero_grad(set_to_none=True)
    pre = sae.encoder(x - sae.input_bias) + sae.neuron_bias
    kept = torch.relu(pre) * (pre >= pre.topk(3, dim=1).values[:, -1:])
    (0.7 * steps.contrast(*kept[:, :4].chunk(2))).backward()
    for name in ("encoder.weight", "neuron_bias", "input_bias"):
        assert torch.allclose(found[name] - plain[name], sae.get_parameter(name).grad, atol=1e-6)
    assert torch.equal(found["decoder.weight"], plain["decoder.weight"])


def test_annealed_k_by_hand():
    found = [steps.annealed_k(8, 256, step, 100) for step in (0, 25, 50, 99)]
    assert found == [32, 20, 8, 8]
    assert steps.annealed_k(8, 16, 0, 100) == 16  # no more than there are features


def test_pairs_of_rows_are_neighbours_of_one_example():
    rows = trainings.Rows(torch.arange(10.0)[:, None], np.array([1, 2, 6, 7]))
    for batch in rows.batches(4, 5, 0, True):
        now, before = batch.flatten().chunk(2)
        assert torch.equal(before, now - 1) and set(now.tolist()) <= {1, 2, 6, 7}
    served = torch.cat(list(rows.batches(5, 2, 0, False))).flatten()
    assert sorted(served.tolist()) == list(range(10))  # all, before any comes again


def test_a_threshold_lets_exactly_k_fire():
    sae, x = started("batchtopk")
    trainings.fire_exactly(sae, x, 2)
    pre = sae.encoder(x - sae.input_bias) + sae.neuron_bias
    assert int((pre > sae.threshold).sum()) == 2 * N


def test_correlated_directions_are_active_as_often_as_asked():
    world = planted.correlated(32000, seed=0, n_groups=2, size=2, d=8, correlation=0.8)
    assert world.active.mean(0) == pytest.approx(np.linspace(0.2, 0.03, 4), abs=0.03)
    together = np.corrcoef(world.active.T)
    partner = np.argsort(-together, axis=1)[:, 1]
    assert (partner[partner] == np.arange(4)).all()  # two groups of two
    assert together[np.arange(4), partner].min() > 0.15
    after = np.corrcoef(world.active[1:, 0], world.active[:-1, 0])[0, 1]
    assert after > 0.4  # activity lasts


def test_children_need_their_parent():
    world = planted.hierarchical(16000, seed=0, n_parents=3, children=2, d=12)
    assert world.parent.tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 2]
    for child in range(3, 9):
        assert not (world.active[:, child] & ~world.active[:, world.parent[child]]).any()
    assert world.active.mean(0)[3:] == pytest.approx(np.full(6, 0.12 * 0.4), abs=0.015)
    clean = world.active @ world.directions
    right = planted.correlated(64, seed=0, n_groups=2, size=2, d=8, orthonormal=True).directions
    assert np.allclose(right @ right.T, np.eye(4), atol=1e-9)
    assert np.abs(world.tokens).max() < 2.1 * np.abs(clean).max()


def test_recovery_of_the_truth_and_of_an_absorbed_parent():
    world = planted.hierarchical(8000, seed=0, n_parents=2, children=1, d=8)
    found = planted.recovery(world, world.directions, world.active)
    assert found == pytest.approx({"mcc": 1, "f1": 1, "absorbed": 0})
    fires = world.active.copy()
    fires[:, 0] &= ~world.active[:, 2]  # the first parent is silent where its child is active
    assert planted.recovery(world, world.directions, fires)["absorbed"] == pytest.approx(0.5)


def test_figures_at_equal_l0_by_hand():
    runs = [{"l0": [4.0], "error": [1.0]}, {"l0": [16.0], "error": [3.0]}]
    found = objectives.at_equal_l0(runs, 8)
    assert found["error"] == pytest.approx([2.0]) and found["l0"] == pytest.approx([8.0])
    assert found["l0 trained"] == [4, 16]
    assert objectives.at_equal_l0(runs[:1], 8) is runs[0]


def test_changes_are_taken_seed_by_seed():
    default = {"error": [1.0, 2.0]}
    found = objectives.summed_up({"error": [1.5, 2.5]}, default)["error"]
    assert found["mean"] == 2 and found["change"] == pytest.approx(0.5)
    assert found["change_interval"] == pytest.approx([0.5, 0.5])
    assert "change" not in objectives.summed_up(default, default)["error"]


def test_stability_by_hand():
    first, second = np.eye(3)[:2], np.eye(3)[[1, 2]]
    found = objectives.stability([first, second])
    assert found["stability"] == pytest.approx([0.5, 0.5]) and found["in_all_seeds"] == [0.5]


def test_the_least_value_lies_between_the_ks_tried():
    at = {k: (np.log2(k) - 3.3) ** 2 for k in (2, 4, 8, 16)}
    assert sparsity.least_at(at) == pytest.approx(2**3.3)
    assert sparsity.least_at({2: 1.0, 4: 2.0, 8: 3.0}) == 2  # least at the end of the range
    assert sparsity.least_at({2: 1.0, 4: 1.0, 8: 1.0}) == 2


def test_statistics_of_a_decoder_by_hand():
    sae = new_sae({"input_dim": 2, "m_total_neurons": 4, "k_active_neurons": 1}).eval()
    with torch.no_grad():
        sae.decoder.weight.copy_(torch.tensor([[1.0, 0, -1, 0.6], [0, 1, 0, 0.8]]))
        sae.input_bias.copy_(torch.tensor([1.0, 0]))
    x = torch.tensor([[3.0, 1], [2, 5]])  # less the bias (2, 1) and (1, 5)
    # projections 2, 1, -2, 2 and 1, 5, -1, 4.6: from the largest 5, 4.6, 2, 2, 1, 1, -1, -2
    found = sparsity.decoder_statistics(sae, x, 0.25)
    assert found["projection"] == pytest.approx(2)  # behind 0.25 x 4 of each of two tokens
    assert sparsity.decoder_statistics(sae, x, 0.5)["projection"] == pytest.approx(1)
    # |cosines| of the six pairs: 0, 1, 0.6, 0, 0.8, 0.6
    assert found["cosine"] == pytest.approx(3 / 6)


def test_a_k_is_recommended_by_each_statistic_with_the_interval_of_the_seeds():
    cells = [
        {"seed": seed, "k": k, "projection": abs(np.log2(k) - 2), "cosine": -k, "probe 1": -k}
        for seed in (0, 1)
        for k in (2, 4, 8)
    ]
    found = sparsity.recommended(cells)
    assert found["projection"]["k"] == pytest.approx(4) and not found["projection"]["at_the_edge"]
    assert found["projection"]["interval"] == pytest.approx([4, 4])
    assert found["cosine"]["k"] == 8 and found["cosine"]["at_the_edge"]
    assert found["probe 1"]["k"] == 2 and "probe 5" not in found


def test_planted_worlds_that_were_measured_before_stay():
    first, again, other = (
        {"orthonormal": at, "objective": "topk", "true_l0": l0, "commit": c}
        for at, l0, c in ((0, 11.01, "a"), (0, 11.02, "b"), (1, 11.0, "c"))
    )
    found = sparsity.with_earlier({"worlds": [first, other]}, {"worlds": [again]})
    assert found["worlds"] == [other, again]


def test_objectives_that_were_measured_before_stay():
    earlier = {"objectives": {"a": 1, "b": 2}, "choices": {"b": 3}}
    found = objectives.merged(earlier, {"objectives": {"b": 4}, "choices": {"b": 5}})
    assert found == {"objectives": {"a": 1, "b": 4}, "choices": {"b": 5}}


def row(**changes):
    """A row of a result: {figure: change} with intervals of ±0.1."""
    return {
        name.replace("_1", " 1"): {
            "mean": 0.5,
            "change": change,
            "change_interval": [change - 0.1, change + 0.1],
        }
        for name, change in changes.items()
    }


def test_the_tables_say_who_won_where():
    from experiments.pages import training_tables as tables

    default = {"normalized_mse": {"mean": 0.5}, "probe 1": {"mean": 0.5}, "f1": {"mean": 0.5}}
    groups = [
        {"other": row(normalized_mse=-0.2, probe_1=0.2)},
        {"other": row(normalized_mse=-0.3, probe_1=0.05)},
    ]
    settings = {"N_LOSS_EXAMPLES": 6, "STEPS": 1600}
    result = {
        "datasets": {
            str(i): {"settings": settings, "objectives": {steps.DEFAULT: default, **group}}
            for i, group in enumerate(groups)
        },
        "planted": {
            kind: {steps.DEFAULT: default, "other": row(f1=change)}
            for kind, change in (("correlated", -0.2), ("hierarchical", 0.2))
        }
        | {"settings": {"steps": 1000}},
    }
    found = tables.outcomes(result)["other"]
    assert found == {"better": ["normalised MSE"], "worse": ["F1"]}
    text = tables.objectives(result)
    assert "| 0 | other | 0.500 (-0.200 ±0.100) | 0.500 (+0.200 ±0.100) |" in text
    assert "other: better wherever measured in normalised MSE and worse somewhere in F1." in text


def test_a_recommended_k_says_whether_it_lies_at_an_edge():
    from experiments.pages import training_tables as tables

    assert (
        tables.k_text({"k": 8.04, "interval": [7, 9.26], "at_the_edge": False}) == "8.0 [7.0, 9.3]"
    )
    assert tables.k_text({"k": 2.0, "interval": [1, 3], "at_the_edge": True}) == "2.0 (edge)"
    cells = [{"n_tokens": 10, "m": 4, "k": 2, "error": e} for e in (1.0, 2.0)]
    assert tables.averaged(cells) == [{"n_tokens": 10, "m": 4, "k": 2, "error": 1.5}]


def texts(folder):
    """The path of a small dataset with two topics."""
    rows = [" ".join((WORDS * 3)[i : i + 6 + i % 9]) + f" {i}" for i in range(40)]
    lines = [json.dumps({"text": row, "topic": f"t{i % 2}"}) for i, row in enumerate(rows)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder / "texts.jsonl"


TINY = ["--layer-idx", 1, "--label-field", "topic", "--m", 16, "--k", 2, "--seeds", "0,1"]
TINY += ["--steps", 8, "--planted-steps", 8, "--n-planted", 2560, "--batch-size", 64]
TINY += ["--n-loss-examples", 1, "--n-splits", 1]


@pytest.mark.exhaustive
def test_the_study_runs_on_tiny_settings(monkeypatch, tmp_path, tiny_llama):
    flags = [*TINY, "--model-name", tiny_llama, "--dataset-path", texts(tmp_path)]
    result = run_study(monkeypatch, tmp_path, "objectives", *flags)
    (dataset,) = result["datasets"].values()
    assert set(dataset["objectives"]) == set(steps.OBJECTIVES)
    assert set(result["planted"]["correlated"]) == set(steps.OBJECTIVES)
    for name, row in dataset["objectives"].items():
        if not steps.OBJECTIVES[name].dense:
            assert row["l0"]["mean"] == pytest.approx(2, abs=0.6)
        assert 0 <= row["probe 1"]["mean"] <= 1 and len(row["loss_recovered"]["values"]) == 2
    monkeypatch.setattr(objectives, "planted_run", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(trainings, "train", lambda *_, **__: pytest.fail("made again"))
    again = run_study(monkeypatch, tmp_path, "objectives", *flags)
    assert again["datasets"] == result["datasets"]


@pytest.mark.exhaustive
def test_the_sweep_runs_on_tiny_settings(monkeypatch, tmp_path, tiny_llama):
    flags = ["--layer-idx", 1, "--model-name", tiny_llama, "--dataset-path", texts(tmp_path)]
    flags += ["--label-field", "topic", "--ms", "16,32", "--ks", "2,4,8", "--few-ks", "2"]
    flags += ["--steps", 6, "--planted-steps", 6, "--n-planted", 2560, "--planted-ks", "3,6"]
    flags += ["--planted-seeds", "0,1", "--batch-size", 64, "--n-splits", 1]
    result = run_study(monkeypatch, tmp_path, "sparsity", *flags)
    (dataset,) = result["datasets"].values()
    whole = {(each["m"], each["k"]) for each in dataset["cells"] if each["share"] == 1}
    assert whole == {(16, 2), (16, 4), (32, 2), (32, 4), (32, 8)}
    tokens = [
        {each["n_tokens"] for each in dataset["cells"] if each["share"] == s} for s in (1, 0.25)
    ]
    assert max(tokens[1]) < 0.5 * min(tokens[0])
    assert set(dataset["recommended"]) == {"16", "32"}
    assert [world["true_l0"] for world in result["planted"]["worlds"]] == pytest.approx(
        2 * [4.4, 4.4, 11, 11], rel=0.1
    )
