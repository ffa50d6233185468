"""FAST against block training, and the sparsity frontier: their arithmetic by hand, and both
studies from end to end on a tiny model."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, put_activations
from scipy import sparse
from small import small

from experiments.pages import studies_page_fast, studies_table
from experiments.shared import evidence, heldout, provenance, statistics, sweeps
from experiments.studies import fast_vs_block, pareto
from fastsae.data.datasets import Example, read_dataset
from fastsae.data.tokenization import SHARED_PREFIX, ChatTokenizer, mark_shared_prefix, tokenise
from fastsae.sae.autoencoder import new_sae
from fastsae.sae.metrics import evaluate

WORDS = (
    "the bread rose twice while rain fell and we chose a longer road home past seven quiet houses "
    "user assistant"
).split()


def dialogue(line, question, answer):
    return Example(
        line, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


def test_special_tokens_are_the_templates_and_not_the_same_words_in_a_text(smol_tokenizer):
    examples = [
        dialogue(1, "user assistant", "a user says assistant"),
        dialogue(2, "bread", "rain"),
    ]
    table = tokenise(examples, ChatTokenizer(smol_tokenizer))
    mark_shared_prefix(table)
    special = heldout.mark_special(table.ids, table.kind, smol_tokenizer)
    spelled = [smol_tokenizer.decode([token]) for token in table.ids[special]]
    one = [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "user",
        "<|im_end|>",
        "<|im_start|>",
        "ass",
        "istant",
        "<|im_end|>",
    ]
    # the system turn's two control tokens come first; "assistant" takes two tokens of this model
    assert spelled == one + one


def test_the_split_is_complete_and_its_rows_read_back(tmp_path):
    examples = [
        Example(i, [{"role": "user", "content": f"text {i}"}], is_text=True, label=str(i % 2))
        for i in range(6)
    ]
    examples += [dialogue(i, "question", "answer") for i in range(6, 10)]
    training, held_out = heldout.split(examples, 0.3, seed=0)
    assert len(held_out) == 3 and sorted(e.line for e in training + held_out) == list(range(10))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(heldout.as_row(e, "kind") for e in examples))
    back = read_dataset(path, label_field="kind")
    assert [(e.messages, e.is_text, e.label) for e in back] == [
        (e.messages, e.is_text, e.label) for e in examples
    ]


def test_per_example_means_by_hand():
    means = heldout.per_example(
        np.array([1.0, 3, 10, 20, 5]), np.array([0, 0, 1, 1, 2]), np.array([1, 1, 1, 0, 0], bool), 3
    )
    assert means[:2].tolist() == [2, 10] and np.isnan(means[2])


@pytest.fixture
def held_out(tmp_path, smol_tokenizer):
    """A `HeldOut` of 12 examples with a shared prefix of 2 tokens, the first of them huge."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 9, 12)
    tokens, kind, ids = generator.standard_normal((lengths.sum(), 8)).astype(np.float32), [], []
    start, end = smol_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for n in lengths:
        kind += [SHARED_PREFIX, SHARED_PREFIX, *[0] * (n - 3), 1]
        ids += [start, 5, *range(10, 7 + n), end]
    tokens[np.cumsum([0, *lengths[:-1]])] += 300
    put_activations(tmp_path, tokens, lengths, kind=kind, token_ids=ids)
    return heldout.HeldOut(tmp_path / "activations" / "activations_layer12.npz", smol_tokenizer)


def random_sae(d=8, m=16, k=3):
    torch.manual_seed(0)
    return new_sae({"input_dim": d, "m_total_neurons": m, "k_active_neurons": k, "aux_k": 0}).eval()


def test_figures_on_each_set_of_tokens_equal_evaluate(held_out):
    sae = random_sae()
    figures, per_dialogue = held_out.measure(sae)
    n = len(held_out.example)
    assert held_out.counts() == {
        "tokens": n,
        "special": 24,
        "sinks": 12,
        "special_sinks": 12,
        "special_without_prefix_and_sinks": 12,
    }
    for name, chosen in held_out.sets.items():
        expected = evaluate(
            sae, held_out.activations, np.flatnonzero(chosen), held_out.example, held_out.special
        )
        found = figures["sets"][name]
        for ours, theirs in (
            ("mse", "mse"),
            ("mse_special", "mse_template_tokens"),
            ("normalized_mse", "normalized_mse"),
            ("explained_variance", "explained_variance"),
        ):
            assert found[ours] == pytest.approx(expected[theirs], rel=1e-6)
        assert per_dialogue[f"mse, {name}"].mean() == pytest.approx(expected["mse"], rel=1e-6)
    assert [int(s.sum()) for s in held_out.sets.values()] == [n, n - 12, n - 24]


def test_the_ordering_is_confirmed_refuted_or_open():
    random = np.random.default_rng(0)
    noise = random.uniform(0.9, 1.1, (3, 40))
    clear = heldout.ordering({"FAST": noise, "BT(F)": 2 * noise, "BT(P)": 8 * noise})
    assert clear["ordering"] == "confirmed"
    assert clear["log2 BT(F) / FAST"]["value"] == pytest.approx(1) and clear["log2 BT(P) / BT(F)"][
        "value"
    ] == pytest.approx(2)
    low, high = clear["log2 BT(F) / FAST"]["interval"]
    assert 0.9 < low <= 1 <= high < 1.1
    assert (
        heldout.ordering({"FAST": 4 * noise, "BT(F)": 2 * noise, "BT(P)": 8 * noise})["ordering"]
        == "refuted"
    )
    wide = random.exponential(size=(3, 40))
    assert (
        heldout.ordering(
            {"FAST": wide, "BT(F)": random.exponential(size=(3, 40)), "BT(P)": 8 * wide}
        )["ordering"]
        == "open"
    )


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_intervals_over_few_seeds_hold_the_truth_as_often_as_they_say(n_seeds):
    """With nothing but seeds that vary, in 400 trials; a plain bootstrap of three values holds the
    mean in about four of five."""
    random = np.random.default_rng(0)
    plain, ours = [], []
    for _ in range(400):
        errors = np.repeat(random.normal(10, 1, (n_seeds, 1)), 2, axis=1)
        of_dialogues, of_both, _ = heldout.resampled(
            errors, random.integers(0, n_seeds, (400, n_seeds))
        )
        for found, draws in (
            (plain, of_both),
            (ours, statistics.widened(of_dialogues, of_both, n_seeds)),
        ):
            low, high = statistics.interval(draws)
            found.append(low <= 10 <= high)
    assert 0.93 <= np.mean(ours) <= 1 and np.mean(plain) < 0.9


def test_cases_clear_in_either_direction_are_counted():
    rows = [
        {"x": {"below_fast_by": interval}} for interval in ([0.1, 0.2], [-0.2, -0.1], [-0.1, 0.1])
    ]
    assert studies_page_fast.clear_cases([*rows, {"x": {"value": 1}}, {}], "x") == (1, 1)
    assert studies_page_fast.l0_of({"l0": {"FAST": 8.0, "BT(F)": 8.01, "BT(P)": 8}}) == "8.0"
    assert (
        studies_page_fast.l0_of({"l0": {"FAST": 8.0, "BT(F)": 15, "BT(P)": 31.2}}) == "8 / 15 / 31"
    )


def test_constant_errors_have_intervals_without_width_and_missing_dialogues_do_not_count():
    ones = np.ones((2, 5))
    ones[:, 3] = np.nan
    result = heldout.ordering({"FAST": ones, "BT(F)": 4 * ones, "BT(P)": 4 * ones})
    assert result["mean"] == {"FAST": 1, "BT(F)": 4, "BT(P)": 4} and result["log2 BT(F) / FAST"][
        "interval"
    ] == [2, 2]
    assert result["ordering"] == "open"


def test_the_gap_on_sinks_by_hand():
    names = ("mse_special, all tokens", "mse_special, part on sinks")

    def errors(whole, part):
        others = {name: np.ones((2, 6)) for name in heldout.PER_DIALOGUE}
        return {**others, names[0]: np.full((2, 6), whole), names[1]: np.full((2, 6), part)}

    result = heldout.gap_on_sinks(errors(3.0, 2.0), errors(11.0, 8.0))
    assert (result["gap"], result["on_sinks"], result["share"]) == (8, 6, 0.75)
    assert result["share_interval"] == pytest.approx([0.75, 0.75])
    assert heldout.gap_on_sinks(errors(3.0, 2.0), errors(3.0, 1.0))["share"] is None


def test_token_purity_by_hand():
    mass = sparse.csr_matrix(np.array([[3.0, 1, 0], [0, 0, 0], [1, 1, 2]], np.float32))
    assert np.allclose(
        evidence.token_purity(mass, np.array([10, 0, 99])), [0.75, np.nan, 0.5], equal_nan=True
    )
    # too seldom to say anything
    assert np.isnan(evidence.token_purity(mass, np.array([9, 0, 99]))[0])


def test_resampled_features_leave_out_the_dead_and_keep_the_mean():
    value, draws = evidence.resampled(
        [np.array([0.0, 1, np.nan]), np.array([0.5, 0.5])], np.mean, n=500
    )
    assert value == 0.5 and draws.shape == (500,) and 0.4 < draws.mean() < 0.6 and draws.std() > 0


def test_training_takes_the_first_tokens_in_the_order_of_the_file(tmp_path, run_main, capsys):
    lengths, random = [10] * 20, np.random.default_rng(0)
    flags = put_activations(tmp_path, random.standard_normal((200, 8)).astype(np.float32), lengths)
    more = small(n_epochs=1, run_name="first")
    assert run_main("train_sae", *flags, *more, "--max-train-tokens", 64) == 0
    assert (
        json.loads((tmp_path / "checkpoints" / "first" / "metrics.json").read_text())[
            "n_train_tokens"
        ]
        == 64
    )
    from fastsae.training.data import Tokens

    options = {
        "validation_fraction": 0.1,
        "seed": 0,
        "exclude_shared_prefix": True,
        "max_norm_ratio": None,
        "use": "all",
    }
    path = tmp_path / "activations" / "activations_layer12.npz"
    some, every = Tokens(path, **options, max_train_tokens=64), Tokens(path, **options)
    assert (
        some.train.tolist() == every.train[:64].tolist()
        and some.validation.tolist() == every.validation.tolist()
    )
    with pytest.raises(SystemExit, match="2"):
        run_main("train_sae", *flags, *more, "--max-train-tokens", 1)
    assert "MAX_TRAIN_TOKENS: 1 is below 2" in capsys.readouterr().err


def test_results_are_rounded_and_name_no_folder():
    assert sweeps.rounded({"a": [1.23456789, 2, "x", None], "b": (1234567.8,)}) == {
        "a": [1.23457, 2, "x", None],
        "b": [1234570.0],
    }


def test_results_hold_names_of_files_and_no_folder_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    settings = {
        "data": str(tmp_path / "data.jsonl"),
        "several": (tmp_path / "a.pt", "b.pt"),
        "hub": "owner/name",
        "home": "~/x/y.txt",
        "n": 3,
    }
    provenance.write_result("one", settings, {})
    written = json.loads((tmp_path / "one.json").read_text())["settings"]
    assert written == {
        "data": "data.jsonl",
        "several": ["a.pt", "b.pt"],
        "hub": "owner/name",
        "home": "y.txt",
        "n": 3,
    }


def test_the_code_version_follows_sub_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    versions = set()
    for name in (
        "config.py",
        "fastsae/a.py",
        "fastsae/deep/b.py",
        "experiments/deep/c.py",
        "fastsae/deep/moved.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("same")
        versions.add(provenance.code_version.__wrapped__())
    assert len(versions) == 5


def test_no_result_names_a_folder_of_a_machine():
    def texts(value):
        if isinstance(value, dict):
            return [text for each in value.values() for text in texts(each)]
        return (
            [text for each in value for text in texts(each)] if isinstance(value, list) else [value]
        )

    results = sorted((PROJECT / "experiments" / "results").glob("*.json"))
    assert len(results) > 10
    for path in results:
        content = json.loads(path.read_text())
        assert not [
            t for t in texts(content["settings"]) if isinstance(t, str) and t.startswith(("/", "~"))
        ], path.name


def test_the_pages_say_what_the_comparison_with_blocks_cannot_tell():
    page = (PROJECT / "experiments" / "results" / "STUDIES.md").read_text()
    for text in (page, studies_table.table()):
        assert "Python's language reference" in text and "has a confounder" in text
    table = studies_table.table()
    assert "refuted in 6" in table and "the paper trains no topk" in table


def test_many_runs_are_the_scripts_own_and_a_failure_is_raised(tmp_path, capfd):
    flags = put_activations(
        tmp_path, np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32), [10] * 10
    )
    common_flags = [
        *flags,
        "--m",
        8,
        "--k",
        2,
        "--matryoshka-prefixes=none",
        "--n-epochs",
        1,
        "--device",
        "cpu",
        "--learning-rate",
        1,
    ]
    sweeps.run_many(
        "train_sae.py", [[*common_flags, "--run-name", name] for name in ("one", "two")]
    )
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning:")]
    assert (
        sum("normalised MSE is not below 1" in line and "(2 of 2 runs)" in line for line in lines)
        == 1
    )
    assert (tmp_path / "checkpoints" / "one" / "SAE_M=8_K=2.pt").exists() and (
        tmp_path / "checkpoints" / "two" / "metrics.json"
    ).exists()
    with pytest.raises(SystemExit) as end:
        sweeps.run_many("train_sae.py", [[*common_flags, "--layer-idx", 3]])
    assert end.value.code == 2  # as train_sae.py says it


def test_interpolation_between_sparsities_by_hand():
    points = [(16, 0.2), (4, 0.4)]
    assert pareto.interpolate(points, 8) == pytest.approx(0.3) and pareto.interpolate(
        points, 16
    ) == pytest.approx(0.2)
    assert pareto.interpolate(points, 2) is None and pareto.interpolate(points, 32) is None
    runs = [
        {"architecture": "topk", "sparsity": k, "seed": seed, "l0": k, "x": value + seed}
        for k, value in points
        for seed in (0, 1)
    ]
    assert pareto.at_equal_l0(runs, "x", (8, 32)) == {
        "topk": {"8": {"mean": pytest.approx(0.8), "deviation": pytest.approx(0.5)}}
    }


def test_the_frontier_leaves_out_what_another_beats():
    rows = [
        ("a", 1, 4, 0.5, 0.7),
        ("a", 2, 8, 0.3, 0.9),
        ("b", 1, 8, 0.4, 0.8),
        ("b", 2, 16, 0.35, 0.95),
    ]
    runs = [
        {
            "architecture": a,
            "sparsity": s,
            "seed": 0,
            "l0": l0,
            "normalized_mse": mse,
            "loss_recovered": loss,
        }
        for a, s, l0, mse, loss in rows
    ]
    assert [
        (p["architecture"], p["sparsity"]) for p in pareto.frontier(runs, "normalized_mse")
    ] == [("a", 1), ("a", 2)]
    assert [
        (p["architecture"], p["sparsity"]) for p in pareto.frontier(runs, "loss_recovered")
    ] == [("a", 1), ("a", 2), ("b", 2)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smol_tokenizer):
    """A folder with a small random model and the embedded model's tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def study(tmp_path, tiny, run_main, monkeypatch):
    """Run a study in this process, its stages too, on 40 labelled dialogues; returns its result."""
    random = np.random.default_rng(0)
    data = tmp_path / "dialogues.jsonl"
    data.write_text(
        "".join(
            heldout.as_row(
                Example(
                    i,
                    [
                        {"role": role, "content": " ".join(random.choice(WORDS, 12))}
                        for role in ("user", "assistant")
                    ],
                    label="ab"[i % 2],
                ),
                "kind",
            )
            for i in range(40)
        )
    )
    (tmp_path / "plain.txt").write_text(
        "\n".join(" ".join(random.choice(WORDS, 20)) for _ in range(80))
    )
    stages = []

    def in_process(script, *flags):
        stages.append((script, flags))
        assert run_main(script.removesuffix(".py"), *flags) == 0

    def run(module, *flags):
        monkeypatch.setattr(provenance, "RESULTS", tmp_path)
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(module, "rounded", lambda value: value)
        monkeypatch.setattr(module, "run_stage", in_process)
        monkeypatch.setattr(
            module, "run_many", lambda script, jobs: [in_process(script, *job) for job in jobs]
        )
        argv = [
            module.__file__,
            "--quick",
            "--output-dir",
            tmp_path / "out",
            "--model-name",
            tiny,
            "--dataset-path",
            data,
            "--device",
            "cpu",
            "--label-field",
            "kind",
            "--name",
            module.__name__.rpartition(".")[2],
            "--m",
            16,
            "--n-epochs",
            1,
            "--batch-size",
            64,
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        module.main()
        return json.loads(
            (tmp_path / f"{module.__name__.rpartition('.')[2]}.json").read_text()
        ), stages

    return run


FAST_FLAGS = [
    "--layers",
    "2",
    "--architectures",
    "topk",
    "--seeds",
    "0,1",
    "--k",
    2,
    "--block-length",
    64,
]


@pytest.mark.exhaustive
def test_fast_against_block_training_from_end_to_end(tmp_path, study, capsys):
    flags = [*FAST_FLAGS, "--plain-text", tmp_path / "plain.txt"]
    result, stages = study(fast_vs_block, *flags)
    assert len(result["runs"]) == 3 * 2 * 2 and {
        run["n_train_tokens"] for run in result["runs"]
    } == {result["train_tokens"]}
    # topk's K
    assert all(
        set(c["l0"]) == {"FAST", "BT(F)", "BT(P)"} and c["l0"]["FAST"] == 2
        for c in result["comparisons"]
    )
    assert len(result["comparisons"]) == 2 and len(result["interpretability"]) == 3
    assert {c["mse_special, all tokens"]["ordering"] for c in result["comparisons"]} <= {
        "confirmed",
        "refuted",
        "open",
    }
    assert result["data"]["held out"]["examples"] == 12 and result["data"]["FAST"]["examples"] == 28
    trained = {
        row
        for row in (tmp_path / "out/checkpoints/fast_vs_block/training.jsonl")
        .read_text()
        .splitlines()
    }
    assert not trained & set(
        (tmp_path / "out/checkpoints/fast_vs_block/held_out.jsonl").read_text().splitlines()
    )
    assert all(
        0 < row["token_purity"]["value"] <= 1 and 0 <= row["category_auc"]["value"] <= 1
        for row in result["interpretability"]
    )
    assert (tmp_path / "fast_vs_block.png").stat().st_size > 10_000
    lines = studies_page_fast.fast_vs_block(result).splitlines()
    assert sum(
        line.startswith("| topk") for line in lines
    ) == 2 + 1 and "0.65 | 1.51 | 5.20 | 0.86 | 3.69" in "\n".join(lines)
    capsys.readouterr()
    again, _ = study(fast_vs_block, *flags)
    # every piece is up to date
    assert "wrote" not in capsys.readouterr().out.replace(
        "wrote " + str(tmp_path / "fast_vs_block"), ""
    )
    assert again["runs"] == result["runs"] and again["comparisons"] == result["comparisons"]


def test_the_frontier_from_end_to_end(tmp_path, study):
    result, _ = study(
        pareto,
        "--layer-idx",
        2,
        "--k-list",
        "1,2",
        "--l1-coefficient-list",
        "2,1",
        "--architectures",
        "topk,gated",
        "--seeds",
        "0",
        "--n-loss-examples",
        2,
        "--at-l0",
        "1,2",
    )
    assert len(result["runs"]) == 4 and set(result["at_l0"]["normalized_mse"]["topk"]) == {"1", "2"}
    for run in result["runs"]:
        assert run["ce_clean"] != run["ce_zero"]
        assert run["loss_recovered"] == pytest.approx(
            (run["ce_zero"] - run["ce"]) / (run["ce_zero"] - run["ce_clean"])
        )
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert (
        sum(
            line.startswith(("| topk", "| gated"))
            for line in studies_page_fast.pareto(result).splitlines()
        )
        == 2
    )


def test_a_language_model_scores_where_an_endpoint_is_configured(tmp_path, study, monkeypatch):
    from loopback import Endpoint

    server = Endpoint(
        reply=lambda prompt: {
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": "clear.\nMy final verdict score is: [[4]], "
                        "feature name is [[bread]]",
                    },
                    "finish_reason": "stop",
                    "index": 0,
                }
            ],
            "object": "chat.completion",
            "id": "1",
            "created": 1,
            "model": "m",
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
    )
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    try:
        result, _ = study(
            fast_vs_block,
            *FAST_FLAGS,
            "--seeds",
            "0",
            "--n-scored-features",
            2,
            "--plain-text",
            tmp_path / "plain.txt",
        )
    finally:
        server.close()
    scored = [
        row["share_scored_4_or_5"]["value"]
        for row in result["interpretability"]
        if "share_scored_4_or_5" in row
    ]
    assert scored and set(scored) == {1.0} and server.requests
