"""Stage 2 on made-up activations: recovery of known directions, odd sizes, the checkpoint, and what
makes it train again."""

import json
import signal

import numpy as np
import pytest
import torch
from conftest import planted_tokens
from small import small

from fastsae.data.token_masks import (
    TEST,
    TRAIN,
    VALIDATION,
    split_examples,
    split_texts,
    usable_tokens,
)
from fastsae.formats.load import load_sae
from fastsae.runtime import artifacts
from fastsae.sae.autoencoder import checkpoint_name, encode
from fastsae.sae.metrics import evaluate

SMALL = small()


def metrics_of(tmp_path):
    return json.loads((tmp_path / "checkpoints" / "test" / "metrics.json").read_text())


def checkpoint_of(tmp_path):
    return tmp_path / "checkpoints" / "test" / metrics_of(tmp_path)["checkpoint"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("batch_topk", [False, True], ids=["topk", "batchtopk"])
def test_planted_dictionary_is_recovered(tmp_path, write_activations, run_main, batch_topk):
    tokens, directions = planted_tokens(12_000, 32, 48, 3)
    flags = write_activations(tokens, [10] * 1200)
    assert (
        run_main(
            "train_sae",
            *flags,
            *SMALL,
            "--m",
            48,
            "--k",
            3,
            "--n-epochs",
            60,
            "--learning-rate",
            3e-3,
            "--batch-size",
            256,
            "--max-norm-ratio",
            "none",
            "--architecture=batchtopk" if batch_topk else "--architecture=topk",
        )
        == 0
    )
    sae, _ = load_sae(checkpoint_of(tmp_path))
    cosine = directions @ sae.decoder.weight.detach().numpy()  # (true, learnt)
    assert cosine.max(1).mean() > 0.9
    assert metrics_of(tmp_path)["l0"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("side", ["train", "validation", "test"])
@pytest.mark.parametrize("n", [512, 513, 514])
def test_sizes_that_leave_one_row_over(tmp_path, write_activations, run_main, side, n):
    """HypotheSAEs' fit gives an all-NaN model for n_train = 513 at batch size 512."""
    part = split_texts(np.arange(10), 0.1, 0.1, seed=0)
    number = {"train": TRAIN, "validation": VALIDATION, "test": TEST}[side]
    lengths = np.full(10, 60)
    lengths[np.flatnonzero(part == number)[-1]] = n - 60 * 7 if side == "train" else n
    tokens, _ = planted_tokens(int(lengths.sum()), 8, 16, 2)
    flags = write_activations(tokens, lengths)
    assert (
        run_main("train_sae", *flags, *SMALL, "--max-norm-ratio", "none", "--batch-size", 512) == 0
    )
    metrics = metrics_of(tmp_path)
    assert metrics[f"n_{side}_tokens"] == n and metrics["measured_on"] == "test"
    assert np.isfinite(metrics["normalized_mse"])
    sae, _ = load_sae(checkpoint_of(tmp_path))
    assert all(bool(value.isfinite().all()) for value in sae.state_dict().values())


def test_hypothesaes_reads_the_checkpoint(tmp_path, write_activations, run_main):
    import hypothesaes.sae as theirs

    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    assert run_main("train_sae", *flags, *SMALL, "--matryoshka-prefixes", "4,16") == 0
    path = checkpoint_of(tmp_path)
    assert (
        path.name
        == theirs.get_sae_checkpoint_name(16, 2, [4, 16])
        == checkpoint_name(16, 2, [4, 16])
    )
    assert theirs.get_sae_checkpoint_name(16, 2) == checkpoint_name(16, 2)
    loaded = theirs.load_model(str(path), device="cpu")
    ours, _ = load_sae(path)
    x = torch.from_numpy(tokens[:50])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x)[0], ours(x)[0])
    activations = loaded.get_activations(tokens[:50], show_progress=False)
    from fastsae.sae.autoencoder import encode

    entries = encode(ours, x)
    dense = np.zeros_like(activations)
    dense[entries.row, entries.column] = entries.value
    np.testing.assert_allclose(dense, activations, atol=1e-5)


def test_the_best_weights_are_kept(tmp_path, write_activations, run_main):
    """Few noisy tokens and many epochs: validation gets worse again. HypotheSAEs keeps the last
    weights even so."""
    tokens, _ = planted_tokens(100, 16, 32, 2, noise=0.5)
    flags = write_activations(tokens, [5] * 20)
    assert (
        run_main(
            "train_sae",
            *flags,
            *SMALL,
            "--learning-rate",
            0.05,
            "--n-epochs",
            40,
            "--patience",
            40,
            "--batch-size",
            16,
        )
        == 0
    )
    history = [
        json.loads(line)
        for line in (tmp_path / "checkpoints" / "test" / "metrics.jsonl").read_text().splitlines()
    ]
    values = [line["normalized_mse"] for line in history]
    metrics = metrics_of(tmp_path)
    assert metrics["best_epoch"] == 1 + int(np.argmin(values)) < len(values)
    assert metrics["validation"]["normalized_mse"] == pytest.approx(min(values), rel=1e-6)


def test_only_a_checkpoint_of_the_same_settings_is_reused(
    tmp_path, write_activations, run_main, capsys
):
    """HypotheSAEs' quickstart returns any file with the same M, K and prefixes."""
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    run = lambda *more: run_main("train_sae", *flags, *SMALL, *more)  # noqa: E731
    assert run() == 0
    first = checkpoint_of(tmp_path).read_bytes()
    capsys.readouterr()
    assert run() == 0
    assert "up to date" in capsys.readouterr().out
    assert checkpoint_of(tmp_path).read_bytes() == first
    assert run("--learning-rate", 0.01) == 0
    out = capsys.readouterr().out
    assert "LEARNING_RATE 0.004 -> 0.01" in out and "up to date" not in out
    assert (tmp_path / "checkpoints" / "test" / "SAE_M=16_K=2.old-1.pt").read_bytes() == first
    assert run("--k", 3) == 0
    assert metrics_of(tmp_path)["checkpoint"] == "SAE_M=16_K=3.pt"
    # trained already, under its own name: only metrics.json turns to it
    assert run("--learning-rate", 0.01) == 0
    assert "up to date" in capsys.readouterr().out
    assert metrics_of(tmp_path)["checkpoint"] == "SAE_M=16_K=2.pt"
    # other activations under the same name
    write_activations(tokens * 2, [20] * 30, dataset=checkpoint_of(tmp_path))
    assert run("--learning-rate", 0.01) == 0
    assert "activations changed" in capsys.readouterr().out


def test_equal_runs_give_equal_bytes(tmp_path, write_activations, run_main):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    contents = []
    for _ in range(2):
        assert run_main("train_sae", *flags, *SMALL) == 0
        contents.append(checkpoint_of(tmp_path).read_bytes())
        checkpoint_of(tmp_path).unlink()
    assert contents[0] == contents[1]


def test_engines_train_the_same_autoencoder(tmp_path, write_activations, run_main):
    tokens, _ = planted_tokens(800, 8, 16, 2)
    flags = write_activations(tokens, [20] * 40)
    results = {}
    for engine in ("sparse", "reference"):
        assert (
            run_main(
                "train_sae",
                *flags,
                *SMALL,
                f"fastsae.training.objective.ENGINE={engine}",
                "--dead-after-tokens",
                512,
                "--run-name",
                "test",
            )
            == 0
        )
        results[engine] = metrics_of(tmp_path)["normalized_mse"]
        checkpoint_of(tmp_path).unlink()
    assert results["sparse"] == pytest.approx(results["reference"], rel=1e-3)


def test_prefix_and_sinks_are_left_out_of_training(tmp_path, write_activations, run_main):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    kind = np.tile([2, 2] + [0] * 18, 30)
    tokens[kind == 2] *= 1000
    tokens[[7, 28]] *= 1000  # two sinks
    flags = write_activations(tokens, [20] * 30, kind=kind)
    assert run_main("train_sae", *flags, *SMALL) == 0
    metrics = metrics_of(tmp_path)
    assert (metrics["n_excluded_shared_prefix"], metrics["n_excluded_sinks"]) == (60, 2)
    assert sum(metrics[f"n_{part}_tokens"] for part in ("train", "validation", "test")) == 600 - 62
    assert metrics["with_prefix_and_sinks"]["mse"] > 100 * metrics["mse"]


def test_a_loss_that_is_no_number_ends_with_a_setting_named(
    tmp_path, write_activations, run_main, capsys
):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    assert run_main("train_sae", *flags, *SMALL, "--learning-rate", 1e30) == 2
    assert "LEARNING_RATE" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("*/*.pt"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_no_numbers_are_refused(write_activations, run_main, capsys, bad):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    tokens[17, 3] = bad
    assert run_main("train_sae", *write_activations(tokens, [20] * 30), *SMALL) == 2
    assert "token 17" in capsys.readouterr().err


def test_metrics_by_hand():
    """One feature along (1, 0), K = 1, no biases. Tokens (2, 0), (0, 2) of example 0 and (4, 4) of
    example 1.

    Reconstructions (2, 0), (0, 0), (4, 0); squared errors 0, 4, 16; their sum 20. The mean token is
    (2, 2), the squared distances from it 4, 4, 8, so the normalised MSE is 20 / 16. Eq. 7: example
    0 has (0 + 2) / 2 = 1, example 1 has 8: mean 4.5. The only special token is the second, with
    error 4 / 2. L0: two of three tokens fire.
    """
    from fastsae.sae.autoencoder import new_sae

    sae = new_sae(
        {
            "input_dim": 2,
            "m_total_neurons": 2,
            "k_active_neurons": 1,
            "aux_k": 0,
            "prefix_lengths": [1, 2],
        }
    ).eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, -1.0]]))
        sae.decoder.weight.copy_(torch.eye(2))
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 4.0]])
    result = evaluate(sae, x, np.arange(3), np.array([0, 0, 1]), np.array([False, True, False]))
    assert result["normalized_mse"] == pytest.approx(20 / 16)
    assert result["explained_variance"] == pytest.approx(1 - 20 / 16)
    assert result["mse"] == pytest.approx(4.5)
    assert result["mse_template_tokens"] == pytest.approx(2)
    assert result["l0"] == pytest.approx(2 / 3)
    assert result["dead_fraction"] == 0.5
    assert result["prefix_normalized_mse"] == {
        "1": pytest.approx(20 / 16),
        "2": pytest.approx(20 / 16),
    }


def test_split_is_by_example_and_never_empty():
    for n in (2, 3, 10, 1000):
        for fraction in (0.001, 0.1, 0.9, 0.999):
            validation = split_examples(n, fraction, 0)
            assert 0 < validation.sum() < n
    assert split_examples(1000, 0.1, 0).sum() == 100
    assert np.array_equal(split_examples(50, 0.1, 3), split_examples(50, 0.1, 3))


def test_usable_tokens_by_hand():
    norms, kind = np.array([500.0, 1, 2, 3, 100]), np.array([2, 0, 1, 0, 0])
    keep, bound = usable_tokens(norms, kind, exclude_shared_prefix=True, max_norm_ratio=10)
    # the median of 1, 2, 3, 100 is 2.5
    assert bound == 25 and keep.tolist() == [False, True, True, True, False]
    keep, bound = usable_tokens(norms, kind, exclude_shared_prefix=False, max_norm_ratio=None)
    assert bound is None and keep.all()


def test_too_few_tokens_name_the_setting(write_activations, run_main, capsys):
    assert (
        run_main("train_sae", *write_activations(np.ones((2, 4), np.float32), [1, 1]), *SMALL) == 2
    )
    assert "VALIDATION_FRACTION" in capsys.readouterr().err


def test_checkpoints_hold_no_time(tmp_path, write_activations, run_main):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    assert run_main("train_sae", *write_activations(tokens, [20] * 30), *SMALL) == 0
    meta = artifacts.read_checkpoint_metadata(checkpoint_of(tmp_path))
    assert "seconds" not in json.dumps(meta) and {"seconds", "tokens_per_second"} <= set(
        metrics_of(tmp_path)
    )


@pytest.mark.parametrize(
    "variant",
    [[], ["--architecture=batchtopk", "--lr-schedule", "linear", "--warmup-steps", 7]],
    ids=["topk", "batchtopk, schedule"],
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    tmp_path, write_activations, run_main, monkeypatch, capsys, variant
):
    """Stopped by a signal in the middle of epochs, with dead features present; the same command
    goes on."""
    from fastsae.training import loop

    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = [
        *write_activations(tokens, [20] * 30),
        *SMALL,
        "--m",
        64,
        "--n-epochs",
        6,
        "--batch-size",
        50,
        "--dead-after-tokens",
        100,
        *variant,
    ]
    assert run_main("train_sae", *flags) == 0
    whole = checkpoint_of(tmp_path).read_bytes()
    history = (tmp_path / "checkpoints" / "test" / "metrics.jsonl").read_text()
    checkpoint_of(tmp_path).unlink()
    steps = []
    original = loop.learning_rate_factor

    def count(step, **options):
        steps.append(step)
        if len(steps) % 17 == 0:
            signal.raise_signal(signal.SIGTERM if len(steps) % 2 else signal.SIGINT)
        return original(step, **options)

    codes = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate_factor", count)
        while not codes or codes[-1]:
            codes.append(run_main("train_sae", *flags))
            assert len(codes) < 20
    assert set(codes) == {130, 143, 0} and "going on in epoch" in capsys.readouterr().out
    assert sorted(steps) == list(range(len(steps)))  # no step twice, none left out
    assert checkpoint_of(tmp_path).read_bytes() == whole
    assert (tmp_path / "checkpoints" / "test" / "metrics.jsonl").read_text() == history
    assert not list(tmp_path.rglob("*.resume.pt"))


def test_a_damaged_or_foreign_resume_state_is_not_used(
    tmp_path, write_activations, run_main, capsys
):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = [*write_activations(tokens, [20] * 30), *SMALL]
    state = tmp_path / "checkpoints" / "test" / "SAE_M=16_K=2.resume.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"PK not a zip")
    assert run_main("train_sae", *flags) == 0
    assert "not continued" in capsys.readouterr().out


def test_learning_rate_schedules_by_hand():
    from fastsae.training.run import learning_rate_factor as factor

    options = {"n_steps": 100, "warmup_steps": 4, "decay_fraction": 0.2}
    assert [factor(s, schedule="constant", **options) for s in (0, 1, 3, 50, 99)] == [
        0.25,
        0.5,
        1,
        1,
        1,
    ]
    assert [factor(s, schedule="linear", **options) for s in (79, 80, 90, 99)] == pytest.approx(
        [1, 1, 0.5, 0.05]
    )
    assert factor(90, schedule="cosine", **options) == pytest.approx(0.5)


def test_bfloat16_selection_trains_as_well(tmp_path, write_activations, run_main):
    tokens, _ = planted_tokens(3000, 16, 32, 2)
    flags = [
        *write_activations(tokens, [20] * 150),
        *SMALL,
        "--m",
        32,
        "--n-epochs",
        20,
        "--learning-rate",
        3e-3,
    ]
    results = {}
    for dtype in ("float32", "bfloat16"):
        assert run_main("train_sae", *flags, "--select-dtype", dtype) == 0
        results[dtype] = metrics_of(tmp_path)["normalized_mse"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.1)


def test_several_autoencoders_in_one_pass_equal_those_trained_alone(
    tmp_path, write_activations, run_main, capsys
):
    tokens, _ = planted_tokens(600, 8, 16, 2, noise=0.3)
    flags = [
        *write_activations(tokens, [20] * 30),
        *SMALL,
        "--n-epochs",
        12,
        "--patience",
        1,
        "--learning-rate",
        0.02,
        "--batch-size",
        50,
    ]
    alone = {}
    for k in (1, 2):
        assert run_main("train_sae", *flags, "--k", k) == 0
        alone[k] = load_sae(checkpoint_of(tmp_path))[0].state_dict(), metrics_of(tmp_path)
    assert run_main("train_sae", *flags, "--seed", "0,5", "--k", "1,2") == 0
    folder = tmp_path / "checkpoints" / "test"
    saes = {path.stem: load_sae(path)[0].state_dict() for path in folder.glob("*_seed=*.pt")}
    assert sorted(saes) == [f"SAE_M=16_K={k}_seed={seed}" for k in (1, 2) for seed in (0, 5)]
    epochs = set()
    for k in (1, 2):
        state, metrics = alone[k]
        assert all(
            torch.equal(value, saes[f"SAE_M=16_K={k}_seed=0"][name])
            for name, value in state.items()
        )
        assert not torch.equal(
            saes[f"SAE_M=16_K={k}_seed=5"]["encoder.weight"], state["encoder.weight"]
        )
        own = json.loads((folder / f"SAE_M=16_K={k}_seed=0.metrics.json").read_text())
        assert (
            own["normalized_mse"] == metrics["normalized_mse"]
            and own["checkpoint"] == f"SAE_M=16_K={k}_seed=0.pt"
        )
        epochs |= {
            len((folder / f"SAE_M=16_K={k}_seed={seed}.metrics.jsonl").read_text().splitlines())
            for seed in (0, 5)
        }
        assert (folder / f"SAE_M=16_K={k}_seed=0.training.png").exists()
    assert len(epochs) > 1 or min(epochs) < 12  # each stops when its own patience is at its end
    assert metrics_of(tmp_path)["checkpoint"] == "SAE_M=16_K=1_seed=0.pt"
    for path in folder.glob("SAE_*.pt"):  # the report's curves
        meta = load_sae(path)[1]
        assert len(meta["history"]) == meta["metrics"]["epochs"]
    capsys.readouterr()
    assert run_main("train_sae", *flags, "--seed", "0,5,6", "--k", "1,2") == 0
    assert capsys.readouterr().out.count("up to date") == 4  # only the new seed is trained


def test_what_stands_beside_a_checkpoint_is_its_own(tmp_path, write_activations, run_main):
    """After another training in the same folder the first command, up to date, brings its figures
    and curves back."""
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags, folder = (
        [*write_activations(tokens, [20] * 30), *SMALL],
        tmp_path / "checkpoints" / "test",
    )
    assert run_main("train_sae", *flags, "--k", 2, "--n-epochs", 3) == 0
    first = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "training.png")}
    assert run_main("train_sae", *flags, "--k", 4, "--n-epochs", 2) == 0
    assert all((folder / name).read_bytes() != content for name, content in first.items())
    assert run_main("train_sae", *flags, "--k", 2, "--n-epochs", 3) == 0
    assert {name: (folder / name).read_bytes() for name in first} == first


@pytest.mark.parametrize(
    "more",
    [
        ["--architecture", "batchtopk"],
        ["--architecture", "batchtopk", "--k", "2,4"],
        ["--architecture", "topk"],
        ["--architecture", "standard"],
    ],
)
def test_a_loss_that_is_no_number_is_one_line(tmp_path, write_activations, run_main, capsys, more):
    tokens, _ = planted_tokens(300, 8, 16, 2)
    assert (
        run_main(
            "train_sae",
            *write_activations(tokens, [20] * 15),
            *SMALL,
            *more,
            "--learning-rate",
            1e30,
            "fastsae.training.objective.CLIP_GRAD=None",
        )
        == 2
    )
    assert all(
        line.startswith("error: LEARNING_RATE: the loss")
        for line in capsys.readouterr().err.splitlines()
    )


def test_of_several_the_good_ones_are_handed_over(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = [
        *write_activations(tokens, [20] * 30),
        *SMALL,
        "--architecture",
        "standard",
        "--sparsity-coefficient",
        "0.5,1e38",
        "--export",
        "saelens",
    ]
    for _ in range(2):  # nor does the second run forget it
        assert run_main("train_sae", *flags) == 2
        assert "L1=1e+38" in capsys.readouterr().err
    folder = tmp_path / "checkpoints" / "test"
    assert (
        metrics_of(tmp_path)["checkpoint"] == "SAE_standard_M=16_K=2_L1=0.5.pt"
        and (folder / "README.md").exists()
    )
    assert (folder / "SAE_standard_M=16_K=2_L1=0.5.saelens" / "cfg.json").exists()


def test_coefficients_that_look_alike_have_names_of_their_own(
    tmp_path, write_activations, run_main
):
    tokens, _ = planted_tokens(300, 8, 16, 2)
    assert (
        run_main(
            "train_sae",
            *write_activations(tokens, [20] * 15),
            *SMALL,
            "--architecture",
            "standard",
            "--sparsity-coefficient",
            "1.0000001,1.0000002,2",
        )
        == 0
    )
    assert sorted(
        path.stem.partition("_L1=")[2]
        for path in (tmp_path / "checkpoints" / "test").glob("SAE*.pt")
    ) == ["1.0000001", "1.0000002", "2"]


def test_k_of_all_features_and_no_rows(tmp_path, write_activations, run_main):
    """HypotheSAEs takes 2 K dead features by default, of which there are no more than M; an empty
    batch has no features."""
    from hypothesaes.sae import load_model

    tokens, _ = planted_tokens(300, 8, 16, 2)
    for architecture in ("topk", "batchtopk"):
        assert (
            run_main(
                "train_sae",
                *write_activations(tokens, [20] * 15),
                *SMALL,
                "--m",
                8,
                "--k",
                8,
                "--architecture",
                architecture,
            )
            == 0
        )
        theirs = load_model(str(checkpoint_of(tmp_path)))
        assert theirs(torch.from_numpy(tokens[:5]))[0].isfinite().all()
        assert len(encode(load_sae(checkpoint_of(tmp_path))[0], torch.zeros(0, 8)).value) == 0


def test_batchtopk_starts_without_all_pre_activations(monkeypatch):
    """The bound guessed for a threshold that is still 0 leaves exactly the entries that none would
    leave, from far fewer candidates."""
    from fastsae.sae import sparse_step
    from fastsae.sae.autoencoder import new_sae

    torch.manual_seed(0)
    sae = new_sae(
        {
            "input_dim": 32,
            "m_total_neurons": 256,
            "k_active_neurons": 4,
            "aux_k": 0,
            "architecture": "batchtopk",
        }
    )
    x, counts = torch.randn(2000, 32), []
    original = sparse_step._above
    monkeypatch.setattr(
        sparse_step,
        "_above",
        lambda *args: counts.append(len((found := original(*args)).value)) or found,
    )
    with torch.no_grad():
        guessed = sparse_step.active_entries(sae, x, training=True)
        monkeypatch.setattr(sparse_step, "_first_bound", lambda *_: -torch.inf)
        plain = sparse_step.active_entries(sae, x, training=True)
    assert counts[-1] == 2000 * 256 and counts[0] < 3 * 4 * 2000
    assert (
        torch.equal(guessed.row, plain.row)
        and torch.equal(guessed.column, plain.column)
        and torch.equal(guessed.value, plain.value)
    )


def test_activations_replaced_while_training_begins(
    tmp_path, write_activations, run_main, monkeypatch, capsys
):
    from fastsae.activations import stream

    tokens, _ = planted_tokens(300, 8, 16, 2)
    flags = write_activations(tokens, [20] * 15)
    read = stream.read_metadata
    # as they were a second ago
    monkeypatch.setattr(
        stream, "read_metadata", lambda path: {**read(path), "fingerprint": "0" * 64}
    )
    assert (
        run_main("train_sae", *flags, *SMALL) == 3
        and "was replaced while this run began" in capsys.readouterr().err
    )
    assert not list((tmp_path / "checkpoints").rglob("SAE*.pt"))


def test_a_cpu_without_bfloat16(monkeypatch):
    from fastsae.sae import products

    monkeypatch.setattr(products, "HAS_BFLOAT16", False)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *_: pytest.fail("such a CPU refuses it")
    )
    x, weight, bias = (
        torch.randn(3, 8).bfloat16(),
        torch.randn(4, 8).bfloat16(),
        torch.randn(4).bfloat16(),
    )
    torch.testing.assert_close(
        products.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    )


def test_an_interrupted_pass_of_several_ends_in_the_same_bytes(
    tmp_path, write_activations, run_main, monkeypatch
):
    """Each state is saved on its own, so a kill can leave one ahead of the other; the one behind
    catches up."""
    from fastsae.training.run import TrainingRun

    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = [
        *write_activations(tokens, [20] * 30),
        *SMALL,
        "--architecture",
        "standard",
        "--sparsity-coefficient",
        "0.5,2.5",
        "--n-epochs",
        4,
        "--batch-size",
        50,
        "fastsae.training.loop.SAVE_EVERY=1e-9",
    ]
    assert run_main("train_sae", *flags) == 0
    paths = [
        tmp_path / "checkpoints" / "test" / f"SAE_standard_M=16_K=2_L1={value}.pt"
        for value in ("0.5", "2.5")
    ]
    whole = [path.read_bytes() for path in paths]
    assert whole[0] != whole[1]
    for path in paths:
        path.unlink()
    original, saves = TrainingRun.save, []

    def save(run, *args):
        saves.append(run)
        if len(saves) in (8, 33, 46):
            raise KeyboardInterrupt  # between the two: one has saved this step, the other has not
        return original(run, *args)

    monkeypatch.setattr(TrainingRun, "save", save)
    codes = [run_main("train_sae", *flags) for _ in range(4)]
    assert codes == [130, 130, 130, 0]
    assert [path.read_bytes() for path in paths] == whole


def test_one_of_several_that_fails_stops_no_other(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = [
        *write_activations(tokens, [20] * 30),
        *SMALL,
        "--architecture",
        "standard",
        "--n-epochs",
        3,
        "--batch-size",
        50,
    ]
    assert run_main("train_sae", *flags, "--sparsity-coefficient", "1e38,0.5") == 2
    name = "SAE_standard_M=16_K=2_L1={}.pt"
    assert (
        f"error: SPARSITY_COEFFICIENT: the loss of {name.format('1e+38')} is not a number after "
        "epoch 1" in capsys.readouterr().err
    )
    folder = tmp_path / "checkpoints" / "test"
    assert not (folder / name.format("1e+38")).exists()
    assert artifacts.read_checkpoint_metadata(folder / name.format("0.5"))["metrics"]["epochs"] == 3


def test_lists_that_change_nothing_are_refused(run_main, capsys):
    for architecture, flag in (("topk", "--sparsity-coefficient"), ("standard", "--k")):
        with pytest.raises(SystemExit):
            run_main(
                "train_sae",
                "--architecture",
                architecture,
                "--matryoshka-prefixes=none",
                flag,
                "1,2",
            )
        name = flag[2:].upper().replace("-", "_")
        assert capsys.readouterr().err == (
            f"error: {name}: {architecture} does not use it, so all would be alike. "
            "give one value, or another --architecture.\n"
        )


def test_lists_are_checked_before_anything_loads(run_main, capsys):
    with pytest.raises(SystemExit):
        run_main(
            "train_sae",
            "--m",
            16,
            "--matryoshka-prefixes=none",
            "--k",
            "4,99",
            "--seed",
            "1,1",
            "--sparsity-coefficient",
            "1,x",
        )
    errors = capsys.readouterr().err
    assert (
        "K: 99 active features of only M=16" in errors
        and "SEED: (1, 1) are not different" in errors
    )
    assert "SPARSITY_COEFFICIENT: expected float or a tuple of float or none, got '1,x'" in errors
