"""HypotheSAEs 2.0.1's known traps, each with the test that fails if it comes back here; those
without another home are below."""

import ast

import pytest
import torch
from conftest import PROJECT, planted_tokens

TRAPS = {
    "fit gives NaN when one row is left over for the last batch": (
        "test_training",
        "test_sizes_that_leave_one_row_over",
    ),
    "aux-k gives dead features with negative pre-activation no gradient": (
        "test_training_step",
        "test_dead_features_with_negative_pre_activation_get_a_gradient",
    ),
    "without dead features the aux loss adds a constant": (
        "test_training_step",
        "test_without_dead_features_the_aux_loss_adds_nothing",
    ),
    "early stopping keeps the last weights": ("test_training", "test_the_best_weights_are_kept"),
    "a run cannot be continued": (
        "test_training",
        "test_an_interrupted_run_ends_in_the_same_bytes",
    ),
    "dead counters change while features are computed": (
        "test_traps",
        "test_encoding_changes_nothing",
    ),
    "load_model runs code of a crafted file": (
        "test_guarantees_damage",
        "test_no_pickle_is_loaded",
    ),
    "a damaged checkpoint loads as other weights": (
        "test_guarantees_damage",
        "test_no_flipped_bit_gives_other_numbers",
    ),
    "a checkpoint is reused for its name": (
        "test_training",
        "test_only_a_checkpoint_of_the_same_settings_is_reused",
    ),
    "the whole matrix goes to the device for a median": (
        "test_traps",
        "test_initialisation_takes_a_sample",
    ),
    "the Responses API is used, which local servers lack": (
        "test_interpretation_llm",
        "test_labels_scores_and_validation_end_to_end",
    ),
    "failures and refusals become labels": (
        "test_guarantees_llm",
        "test_a_failure_is_a_status_and_never_a_label",
    ),
    "a torn cache loses every label": (
        "test_interpretation_llm",
        "test_a_torn_journal_loses_one_line_only",
    ),
    "only OPENAI_KEY_SAE is read": ("test_traps", "test_either_key_variable_will_do"),
    "negative, zero or falling prefixes and K = 0 train silently": (
        "test_config",
        "test_one_bad_flag_is_one_line",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_its_test(trap):
    module, name = TRAPS[trap]
    (path,) = (PROJECT / "tests").rglob(f"{module}.py")
    functions = [
        n.name
        for n in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(n, ast.FunctionDef)
    ]
    assert functions.count(name) == 1


def test_a_test_that_leaves_points_out_says_so():
    """Who asks `sampling` is marked `sampled`, or `--rest` would not run it."""
    marked, asking = set(), set()
    for path in (PROJECT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        asks = "import sampling\n" in text or "from sampling import " in text
        for function in ast.parse(text).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                if any("mark.sampled" in ast.unparse(each) for each in function.decorator_list):
                    marked.add(function.name)
                names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
                if asks and names & {"points", "sampling"}:
                    asking.add(function.name)
    assert len(asking) >= 10 and asking <= marked, asking - marked


def test_encoding_changes_nothing():
    from fastsae.sae.autoencoder import encode, new_sae
    from fastsae.sae.initialisation import initialise

    sae = new_sae(
        {"input_dim": 8, "m_total_neurons": 16, "k_active_neurons": 2, "use_batch_topk": True}
    )
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    initialise(sae, x, 0)
    before = {name: value.clone() for name, value in sae.state_dict().items()} | {
        "steps": sae.steps_since_activation.clone()
    }
    encode(sae, x)
    after = {**sae.state_dict(), "steps": sae.steps_since_activation}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_initialisation_takes_a_sample(write_activations, run_main, monkeypatch):
    import fastsae.training.run as training_run
    from fastsae.training import loop

    seen = []

    def remember(sae, sample, seed, initialise=training_run.initialise, **start):
        seen.append(len(sample))
        initialise(sae, sample, seed, **start)

    monkeypatch.setattr(training_run, "initialise", remember)
    tokens, _ = planted_tokens(50_000, 2, 4, 1)
    flags = write_activations(tokens, [100] * 500)
    assert (
        run_main(
            "train_sae",
            *flags,
            "--run-name",
            "test",
            "--m",
            4,
            "--k",
            1,
            "--matryoshka-prefixes=none",
            "--n-epochs",
            1,
            "--batch-size",
            4096,
        )
        == 0
    )
    assert seen == [loop.INIT_SAMPLE] and loop.INIT_SAMPLE < 40_000


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "OPENAI_KEY_SAE"])
def test_either_key_variable_will_do(monkeypatch, variable):
    from fastsae.interpretation.llm.client import endpoint

    assert endpoint() is None
    monkeypatch.setenv(variable, "sk-x")
    assert endpoint() == ("sk-x", None)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    assert endpoint() == ("sk-x", "http://localhost:1/v1")
