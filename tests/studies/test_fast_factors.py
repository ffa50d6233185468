"""FAST's factors taken apart: the arithmetic by hand on planted effects, training in memory beside
the stage, and the study from end to end on a tiny model."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import planted_tokens, put_activations
from tiny_world import WORDS

from experiments.shared import constants, factors, fast_measures, fast_tokens, in_memory, provenance
from experiments.studies import fast_factors, fast_features, fast_sources, fast_summary
from fastsae.activations.files import open_activations
from fastsae.data import reading
from fastsae.sae.autoencoder import decode, encode, load_checkpoint, new_sae


def planted_cells(effects, together=0.0):
    """(3, 2, 2) cells: 10 and, of each factor, what its levels add; `together` where the second and
    the third are both at 1."""
    y = np.full((3, 2, 2), 10.0)
    for cell in itertools.product(range(3), range(2), range(2)):
        y[cell] += sum(of_factor[level] for of_factor, level in zip(effects, cell))
        y[cell] += together * (cell[1] and cell[2])
    return y


EFFECTS = [(0, 1, 4), (0, 3), (0, 5)]


def test_a_gap_of_effects_that_add_up_is_split_into_them():
    steps = factors.gap_parts(planted_cells(EFFECTS), (0, 0, 0), (2, 1, 1))
    assert [(s.factor, s.start, s.end) for s in steps] == [
        (0, 0, 1),
        (0, 1, 2),
        (1, 0, 1),
        (2, 0, 1),
    ]
    for step, expected in zip(steps, (1, 3, 3, 5)):
        assert (step.mean, step.first, step.last) == (expected, expected, expected)


def test_an_interaction_is_shared_by_its_factors_and_seen():
    y = planted_cells(EFFECTS, together=2)
    steps = {(s.factor, s.start): s for s in factors.gap_parts(y, (0, 0, 0), (2, 1, 1))}
    found = [float(steps[key].mean) for key in ((0, 0), (0, 1), (1, 0), (2, 0))]
    assert found == pytest.approx([1, 3, 4, 6])
    assert (steps[1, 0].first, steps[1, 0].last) == (3, 5)
    assert (steps[0, 1].first, steps[0, 1].last) == (3, 3)
    assert (
        y[2, 1, 1] - y[0, 0, 0] == 14 == pytest.approx(sum(float(s.mean) for s in steps.values()))
    )
    # back again it is the same with the other sign, a factor that stays has no part
    back = factors.gap_parts(y, (2, 1, 1), (0, 1, 0))
    assert [(s.factor, float(s.mean)) for s in back] == [(0, -3.0), (0, -1.0), (2, -7.0)]


def test_draws_are_kept_apart():
    y = np.stack([planted_cells(EFFECTS), planted_cells([(0, 2, 2), (0, 0), (0, 1)])])
    steps = factors.gap_parts(y, (0, 0, 0), (2, 1, 1))
    assert [s.mean.tolist() for s in steps] == [[1, 2], [3, 0], [3, 0], [5, 1]]


def test_variance_shares_by_hand():
    # 2 x 2 cells, means 0 2 / 4 10: factor 0 adds 6, factor 1 adds 4, together +-1; two seeds +-1
    cells = np.array([[0.0, 2], [4, 10]])
    y = np.stack([cells - 1, cells + 1], -1)
    shares = factors.variance_shares(y, 2)
    # effects about the mean 4: +-3, +-2, +-1, each in four cells; seeds +-1 eight times
    squares = {(0,): 8 * 9, (1,): 8 * 4, (0, 1): 8 * 1, (): 8}
    assert {k: float(v) for k, v in shares.items()} == pytest.approx(
        {k: v / 120 for k, v in squares.items()}
    )
    several = factors.variance_shares(np.stack([y, 3 * y + 1]), 2)
    assert all(found == pytest.approx([shares[k]] * 2) for k, found in several.items())


def test_variance_shares_of_three_factors_add_up_and_name_what_was_planted():
    y = planted_cells([(0, 0, 0), (0, 3), (0, 0)], together=4)[..., None].repeat(4, -1)
    shares = factors.variance_shares(y, 3)
    assert sum(shares.values()) == pytest.approx(1)
    # openings 3 + 2, sinks 2, together 4: squares 25, 4 and 4 of 33
    found = {k: round(float(v), 6) for k, v in shares.items() if v > 1e-12}
    assert found == {(1,): round(25 / 33, 6), (2,): round(4 / 33, 6), (1, 2): round(4 / 33, 6)}


def test_training_in_memory_gives_the_stages_weights(tmp_path, write_activations, run_main):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    how = ["--m", 16, "--k", 2, "--n-epochs", 3, "--batch-size", 64, "--patience", 9]
    how += ["--matryoshka-prefixes=none"]
    flags = [*write_activations(tokens, [20] * 30), *how, "--run-name", "r", "--test-fraction", 0]
    assert run_main("train_sae", *flags) == 0
    metrics = json.loads((tmp_path / "checkpoints/r/metrics.json").read_text())
    assert metrics["best_epoch"] == 3  # else the stage would keep other weights than the last
    expected, meta = load_checkpoint(tmp_path / "checkpoints/r" / metrics["checkpoint"])
    part = np.isin(np.repeat(np.arange(30), 20), meta["validation_examples"])
    found = in_memory.train(in_memory.stage_settings(*how), tokens, np.flatnonzero(~part), seed=0)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


LENGTHS = [9, 12, 8, 11]  # 40 tokens, of which two blocks of 16 hold 32
N_IN_BLOCKS = 32


@pytest.fixture
def dialogues(tmp_path, smol_tokenizer):
    """(alone, whole): files of four dialogues with openings of three tokens, the first of each a
    sink; in blocks only the first of a block is one."""
    random = np.random.default_rng(0)
    start, end = smol_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = [token for n in LENGTHS for token in (start, 5, 6, *range(10, n + 6), end)]
    kind = [each for n in LENGTHS for each in (2, 2, 2, *[0] * (n - 4), 1)]
    x = random.standard_normal((40, 8)).astype(np.float32)
    paths = []
    for name, lengths, n, sinks in (
        ("alone", LENGTHS, 40, np.cumsum([0, *LENGTHS[:-1]])),
        ("whole", [16, 16], N_IN_BLOCKS, [0, 16]),
    ):
        read = x[:n].copy()
        read[sinks] += 300
        put_activations(tmp_path / name, read, lengths, kind=kind[:n], token_ids=ids[:n])
        paths.append(tmp_path / name / "activations" / "activations_layer12.npz")
    return paths


def test_the_same_tokens_are_chosen_however_they_are_read(dialogues):
    alone, whole = dialogues
    one = fast_tokens.Tokens(alone, alone, N_IN_BLOCKS)
    other = fast_tokens.Tokens(whole, alone)
    assert (one.ids == other.ids).all() and (one.dialogue == other.dialogue).all()
    assert one.opening.sum() == 4 * 3 == other.opening.sum()
    assert (one.sink.nonzero()[0].tolist(), other.sink.nonzero()[0].tolist()) == (
        [0, 9, 21, 29],
        [0, 16],
    )
    assert one.allowed(openings=True, sinks=True).all()
    for openings, sinks, n in ((0, 1, 20), (1, 0, 28), (0, 0, 20)):
        assert one.allowed(openings=bool(openings), sinks=bool(sinks)).sum() == n
    rows = one.some(12, 3, openings=False, sinks=True)
    assert len(set(rows)) == 12 and not one.opening[rows].any()
    assert (rows == other.some(12, 3, openings=False, sinks=True)).all()
    assert (rows != one.some(12, 4, openings=False, sinks=True)).any()
    # dropped sinks give way to the next tokens of the same order
    a, b = (set(one.some(12, 3, openings=True, sinks=s)) for s in (True, False))
    assert a - b == {row for row in a if one.sink[row]}
    with pytest.raises(ValueError, match="holds other tokens than"):
        fast_tokens.Tokens(whole, other_tokens(alone))


def other_tokens(alone):
    """A file of other tokens than those of `alone`."""
    folder = alone.parents[1] / "other"
    put_activations(folder, np.ones((40, 8), np.float32), LENGTHS)
    return folder / "activations" / "activations_layer12.npz"


def random_sae(m=16, k=3):
    torch.manual_seed(0)
    return new_sae({"input_dim": 8, "m_total_neurons": m, "k_active_neurons": k, "aux_k": 0}).eval()


def test_measures_equal_their_definitions(dialogues, smol_tokenizer):
    """FAST's mean of means (eq. 7) and the normalised MSE, written out token by token."""
    alone, whole = dialogues
    tested = fast_tokens.Tested(whole, alone, None, smol_tokenizer)
    sae = random_sae()
    found = tested.measure(sae)
    x = torch.from_numpy(np.asarray(tested.activations, np.float32))
    squared = (decode(sae, encode(sae, x)) - x).square().sum(1).numpy()
    resampled = fast_measures.Resampled(tested.n_dialogues, 1)
    about = {"counts": tested.counts, "spread": tested.spread}
    # <|im_start|> of each dialogue, <|im_end|> of three: the fourth goes on in the third block
    assert tested.special.sum() == 4 + 3
    usable = ~tested.sink & ~tested.opening
    for name, measure in fast_measures.MEASURES.items():
        chosen = usable if "openings" in name else np.ones(N_IN_BLOCKS, bool)
        chosen = ~tested.sink if name == "MSE_st, without sinks" else chosen
        chosen = chosen & tested.special if "_st" in name else chosen
        if measure.normalised:
            rows = x.numpy()[chosen]
            expected = squared[chosen].sum() / np.square(rows - rows.mean(0)).sum()
        else:
            of = [squared[chosen & (tested.dialogue == i)] for i in range(4)]
            expected = np.mean([each.mean() / 8 for each in of if len(each)])
        errors = np.array(found["errors"][measure.tokens])
        value = resampled.errors(measure, errors, about, 8)
        assert value.shape == (1 + fast_measures.N_BOOTSTRAP,)
        assert value[0] == pytest.approx(np.log2(expected), rel=1e-5), name


def test_a_resample_weighs_dialogues_by_how_often_it_drew_them():
    resampled = fast_measures.Resampled(3, 2)
    measure = fast_measures.MEASURES["MSE"]
    errors, counts = np.array([[2.0, 6, 12]]), np.array([1, 2, 0])
    about = {"counts": {measure.tokens: counts}}
    resampled.weights = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0]])
    value = resampled.errors(measure, errors, about, 2)
    # means 2 / 2 and 6 / 4; the third has no token
    assert 2 ** value[:, 0] == pytest.approx([1.25, (2 + 1.5) / 3, 1.5])


def test_features_of_the_template_by_hand(dialogues):
    alone, _ = dialogues
    tokens = fast_tokens.Tokens(alone, alone)
    tokens.activations = np.zeros((40, 2), np.float32)
    by_template = tokens.kind != 0
    tokens.activations[:, 0] = np.where(by_template, 3.0, 0.0)  # the template's own
    tokens.activations[:, 1] = np.where(by_template, 0.0, 1.0)  # the text's
    sae = new_sae({"input_dim": 2, "m_total_neurons": 3, "k_active_neurons": 1, "aux_k": 0}).eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
        for bias in (sae.input_bias, sae.neuron_bias):
            bias.zero_()
    assert fast_tokens.template_share(sae, tokens) == 0.5  # the third never fires


def test_pooled_features_are_means_over_ordinary_tokens(dialogues):
    data = open_activations(dialogues[0])
    sae, tokens = random_sae(), fast_tokens.Tokens(dialogues[0], dialogues[0])
    assert fast_features.max_norm_of(data) == pytest.approx(tokens.max_norm)
    x = torch.from_numpy(np.array(data["activations"], np.float32))
    entries = encode(sae, x)
    dense = np.zeros((40, 16), np.float32)
    dense[entries.row.numpy(), entries.column.numpy()] = entries.value.numpy()
    ordinary = ~tokens.opening & ~tokens.sink
    expected = [dense[ordinary & (tokens.dialogue == i)].mean(0) for i in range(4)]
    assert fast_features.pooled(sae, data).toarray() == pytest.approx(np.array(expected), rel=1e-5)


def test_differences_to_fast_are_of_the_same_tokens_and_seed():
    def value(rule):
        return {"features": dict.fromkeys((*fast_features.FIGURES, "detection_random"), rule)}

    cell = fast_factors.Cell
    values = {
        cell(1, "alone", 0, 0, 0): value(0.5),
        cell(1, "alone", 1, 0, 0): value(0.9),
        cell(1, "alone", 1, 0, 1): value(0.7),
        cell(1, "whole", 1, 0, 0): value(0.6),
        cell(1, "whole", 1, 0, 1): value(0.6),
        cell(1, "manual", 1, 0, 0): value(0.2),
        cell(1, "whole", 0, 0, 0): value(None),
    }
    rows = {(r["source"], r["openings"]): r for r in fast_features.summed_up(values)}
    whole = rows["whole", 1]["rule_f1_above_fast"]
    assert whole["value"] == pytest.approx(-0.2)
    # Student's t of two values, -0.3 and -0.1: 12.706 times 0.1
    assert whole["interval"] == pytest.approx([-0.2 - 1.2706, -0.2 + 1.2706], abs=1e-3)
    # a text has no openings, and is compared with FAST without them
    assert rows["manual", 1]["rule_f1_above_fast"] == {
        "value": pytest.approx(-0.3),
        "interval": None,
    }
    assert rows["whole", 0]["rule_f1"] is None and rows["whole", 0]["rule_f1_above_fast"] is None


def planted_errors(random, n_seeds, spread):
    """Errors of cells whose log2 MSE has the planted effects, {cell: {on: {set: (n_dialogues,)}}};
    `spread` of the seeds."""
    errors = {}
    of_dialogue = random.uniform(0.5, 2, 30)
    for a, o, s, seed in itertools.product(range(3), range(2), range(2), range(n_seeds)):
        noise = spread * random.standard_normal()
        for on, name in enumerate(fast_measures.ON):
            y = (0, 0.1, 0.4)[a] + 0.3 * o + 0.2 * s + 0.5 * (a == 2 and on == 0) + noise
            errors.setdefault((fast_measures.ATTENTION[a], o, s, seed), {})[name] = {
                fast_measures.SETS[0]: of_dialogue * 2**y
            }
    return errors


def test_planted_effects_come_out_of_the_whole_analysis():
    random = np.random.default_rng(0)
    measure = fast_measures.MEASURES["MSE"]
    counts = {on: {"counts": {measure.tokens: np.ones(30)}} for on in fast_measures.ON}
    resampled = fast_measures.Resampled(30, 4)
    errors = planted_errors(random, 4, 0.0)
    y = fast_measures.table_of(errors, counts, range(4), 1, resampled, measure)
    assert y.shape == (1 + fast_measures.N_BOOTSTRAP, 3, 2, 2, 2, 4)
    found = {(g["gap"], g["measured on"]): g for g in fast_measures.gaps(y, resampled)}
    both = found["both", "alone"]
    assert both["total"]["value"] == pytest.approx(1.4)
    steps = [(s["factor"], s["from"], round(s["value"], 9)) for s in both["steps"]]
    assert steps == [
        ("attention", "alone", 0.1),
        ("attention", "apart", 0.8),
        ("openings", "dropped", 0.3),
        ("sinks", "dropped", 0.2),
    ]
    assert both["steps"][1]["share"]["value"] == pytest.approx(0.8 / 1.4)
    assert both["steps"][1]["interval"] == pytest.approx([0.8, 0.8])  # no noise but the dialogues
    assert found["both", "whole"]["total"]["value"] == pytest.approx(0.9)
    assert len(found["the paper's", "alone"]["steps"]) == 2
    rows = {tuple(r["factors"]): r["share"] for r in fast_measures.shares(y, resampled)}
    assert sum(rows.values()) == pytest.approx(1) and rows[("seeds",)] == pytest.approx(0)
    assert rows[("attention", "measured on")] > 0.05 and rows[("openings", "sinks")] < 1e-9


def test_intervals_hold_the_truth_where_seeds_vary():
    measure = fast_measures.MEASURES["MSE"]
    counts = {on: {"counts": {measure.tokens: np.ones(30)}} for on in fast_measures.ON}
    resampled = fast_measures.Resampled(30, 4)
    held = 0
    for trial in range(20):
        errors = planted_errors(np.random.default_rng(trial), 4, 0.1)
        y = fast_measures.table_of(errors, counts, range(4), 1, resampled, measure)
        (gap,) = (
            g
            for g in fast_measures.gaps(y, resampled)
            if (g["gap"], g["measured on"]) == ("both", "alone")
        )
        low, high = gap["total"]["interval"]
        held += low <= 1.4 <= high
    assert held >= 16


def test_a_journal_remembers_what_other_processes_wrote(tmp_path):
    one, other = (provenance.Journal(tmp_path / "pieces.jsonl", ("experiments",)) for _ in range(2))
    assert one.remembered({"n": 1}, lambda: [1]) == [1]
    assert other.remembered({"n": 1}, lambda: None) == [1]
    assert other.remembered({"n": 2}, lambda: [2]) == [2]
    assert one.remembered({"n": 2}, lambda: None) == [2]
    # other code, other pieces
    again = provenance.Journal(tmp_path / "pieces.jsonl")
    assert again.remembered({"n": 1}, lambda: [3]) == [3]


def test_constants_have_other_values_for_one_job_only():
    first = reading.DIALOGUES_IN_BLOCKS
    name = "fastsae.data.reading.DIALOGUES_IN_BLOCKS"
    with pytest.raises(KeyError), constants.other_values([f"{name}=apart", f"{name}=other"]):
        assert reading.DIALOGUES_IN_BLOCKS == "other"
        raise KeyError
    assert reading.DIALOGUES_IN_BLOCKS == first == "joined"


@pytest.fixture
def study(tmp_path, tiny_llama, run_main, monkeypatch):
    """Run the study in this process, its stages too, on 36 dialogues; returns the result's runs."""
    random = np.random.default_rng(0)

    def words(n):
        return " ".join(random.choice(WORDS, n))

    turns = [
        [{"role": "user", "content": words(6)}, {"role": "assistant", "content": words(4 + i % 9)}]
        for i in range(36)
    ]
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": words(8), "kind": "ab"[i % 2]} for i in range(16)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(words(20) for _ in range(60)))
    stages = []

    def in_process(script, *flags):
        stages.append(script)
        assert run_main(script.removesuffix(".py"), *flags) == 0

    def run(*flags):
        monkeypatch.setattr(provenance, "RESULTS", tmp_path)
        monkeypatch.setattr(fast_summary, "RESULTS", tmp_path)
        monkeypatch.setattr(
            fast_sources, "run_many", lambda script, jobs: [in_process(script, *j) for j in jobs]
        )
        given = {
            "output-dir": tmp_path / "out",
            "model-name": tiny_llama,
            "dataset-path": data,
            "plain-text": plain,
            "labelled-path": labelled,
            "labelled-field": "kind",
            "device": "cpu",
            "layers": "1,",
            "seeds": "0,1",
            "m": 16,
            "k": 2,
            "n-epochs": 1,
            "batch-size": 64,
            "train-tokens": 400,
            "block-length": 64,
            "held-out": 9,
        }
        argv = [fast_factors.__file__, *(f"--{name}={value}" for name, value in given.items())]
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        fast_factors.main()
        return json.loads((tmp_path / "fast_factors.json").read_text())["runs"]

    return run


@pytest.mark.exhaustive
def test_the_study_from_end_to_end(study, tmp_path, monkeypatch, capsys):
    (title, run), *_ = study().items()
    assert title == "dialogues, topk, M = 16, K = 2"
    assert len(run["cells"]) == 3 * 2 * 2 + 2 * 2 and run["train_tokens"] <= 400
    by_name = {(c["source"], c["openings"], c["sinks"]): c for c in run["cells"]}
    assert by_name["alone", 0, 0]["trained_on"]["openings"] == 0
    assert by_name["alone", 1, 1]["trained_on"]["openings"] > 0.2
    # the same choice of tokens however they are read
    kept = [by_name[source, 1, 1]["trained_on"]["openings"] for source in fast_measures.ATTENTION]
    assert len(set(kept)) == 1
    assert all(c["l0"]["alone"] == pytest.approx(2, abs=0.3) for c in run["cells"])
    assert run["positions_differ_by"]["1"]["largest"] < 0.01  # rotary positions, float16
    # the steps of every gap add up to it
    for gap in run["gaps"]:
        total = sum(step["value"] for step in gap["steps"])
        assert total == pytest.approx(gap["total"]["value"], abs=1e-3)
    assert {gap["gap"] for gap in run["gaps"]} == {"the paper's", "this project's", "both"}
    for row in run["shares"]:
        assert sum(part["share"] for part in row["shares"]) == pytest.approx(1, abs=1e-3)
    features = {(f["source"], f["openings"], f["sinks"]): f for f in run["features"]}
    assert 0 <= features["alone", 0, 0]["probing_1"]["value"] <= 1
    assert features["alone", 0, 0]["loss_recovered_above_fast"]["value"] == 0
    work = tmp_path / "out/checkpoints/fast_factors/dialogues"
    training, held_out = (
        set((work / f"{name}.jsonl").read_text().splitlines()) for name in ("training", "held_out")
    )
    assert len(held_out) == 9 and not training & held_out
    # a second run computes nothing anew
    monkeypatch.setattr(fast_factors.in_memory, "train", None)
    assert study()[title] == run
