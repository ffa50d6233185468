"""Training, validation and test: who belongs where, and that the test part decides nothing."""

import json

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
    text_numbers,
    usable_tokens,
)
from fastsae.formats.load import load_sae

SMALL = small(n_epochs=3)


def metrics_of(folder):
    return json.loads((folder / "checkpoints" / "test" / "metrics.json").read_text())


def weights_of(folder):
    return load_sae(folder / "checkpoints" / "test" / metrics_of(folder)["checkpoint"])


def test_texts_are_numbered_by_their_tokens():
    ids = np.array([5, 6, 5, 6, 5, 6, 7, 5], np.int32)
    assert text_numbers(ids, [0, 2, 4, 7, 8, 8, 8]).tolist() == [0, 0, 1, 2, 3, 3]
    assert text_numbers(ids.astype(np.int64), [0, 2, 4]).tolist() == [0, 0]


def test_copies_of_a_text_stay_in_one_part():
    texts = np.random.default_rng(0).integers(0, 60, 400)
    texts = np.unique(texts, return_inverse=True)[1]
    part = split_texts(texts, 0.2, 0.2, seed=1)
    assert all(len(set(part[texts == number])) == 1 for number in range(texts.max() + 1))
    assert {int(p): len(set(texts[part == p])) for p in (TRAIN, VALIDATION, TEST)} == {
        0: 36,
        1: 12,
        2: 12,
    }
    assert np.array_equal(part, split_texts(texts, 0.2, 0.2, seed=1))
    assert not np.array_equal(part, split_texts(texts, 0.2, 0.2, seed=2))


@pytest.mark.parametrize(
    "n, parts",
    [
        (2, (1, 1, 0)),
        (3, (2, 1, 0)),
        (5, (4, 1, 0)),
        (6, (4, 1, 1)),
        (10, (8, 1, 1)),
        (576, (460, 58, 58)),
    ],
)
def test_sizes_of_the_parts(n, parts):
    part = split_texts(np.arange(n), 0.1, 0.1, seed=0)
    assert tuple(int((part == p).sum()) for p in (TRAIN, VALIDATION, TEST)) == parts
    # the same examples as without a test part
    assert np.array_equal(part == VALIDATION, split_examples(n, 0.1, 0))


@pytest.mark.parametrize("validation, test", [(0.001, 0.98), (0.9, 0.09), (0.5, 0.49), (0.99, 0)])
def test_training_and_validation_are_never_empty(validation, test):
    for n in (2, 3, 7, 50):
        part = split_texts(np.arange(n), validation, test, 0)
        assert (part == TRAIN).any() and (part == VALIDATION).any()
    # one text only
    assert {TRAIN, VALIDATION} <= set(split_texts(np.zeros(4, int), validation, test, 0).tolist())


def test_the_bound_on_norms_is_of_the_deciding_tokens():
    norms, kind = np.array([1.0, 2, 3, 90, 90, 90]), np.zeros(6)
    deciding = np.array([True, True, True, False, False, False])
    keep, bound = usable_tokens(
        norms, kind, exclude_shared_prefix=True, max_norm_ratio=10, deciding=deciding
    )
    assert bound == 20 and keep.tolist() == [True] * 3 + [False] * 3
    assert (
        usable_tokens(
            norms, kind, exclude_shared_prefix=True, max_norm_ratio=10, deciding=~deciding | True
        )[1]
        == 465
    )


def test_the_test_part_decides_nothing(tmp_path, run_main):
    """Other activations in the test examples: the same weights and epochs, other figures."""
    from conftest import put_activations

    tokens, _ = planted_tokens(600, 8, 16, 2)
    part = np.repeat(split_texts(np.arange(30), 0.1, 0.1, seed=0), 20)
    other = tokens.copy()
    other[part == TEST] = 7 * np.random.default_rng(5).standard_normal(other[part == TEST].shape)
    for name, values in (("a", tokens), ("b", other)):
        assert (
            run_main("train_sae", *put_activations(tmp_path / name, values, [20] * 30), *SMALL) == 0
        )
    a, b = (metrics_of(tmp_path / name) for name in "ab")
    assert a["measured_on"] == b["measured_on"] == "test" and a["n_test_tokens"] == 60
    assert a["validation"] == b["validation"] and a["max_norm"] == b["max_norm"]
    assert (
        a["normalized_mse"] != b["normalized_mse"]
        and a["validation"]["normalized_mse"] != a["normalized_mse"]
    )
    (one, meta), (two, _) = (weights_of(tmp_path / name) for name in "ab")
    assert all(
        torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items()
    )
    assert meta["test_examples"] == np.unique(np.flatnonzero(part == TEST) // 20).tolist()
    assert not set(meta["test_examples"]) & set(meta["validation_examples"])


def test_stage_2_splits_by_what_the_examples_say(tmp_path, write_activations):
    """Thirty examples of ten texts: the copies of one are in one part."""
    from fastsae.training.data import Tokens

    tokens, _ = planted_tokens(120, 8, 16, 2)
    texts = np.random.default_rng(0).permutation(np.arange(30) % 10)
    write_activations(tokens, [4] * 30, token_ids=np.repeat(texts, 4))
    part = Tokens(
        tmp_path / "activations" / "activations_layer12.npz",
        validation_fraction=0.2,
        test_fraction=0.2,
        seed=0,
        exclude_shared_prefix=True,
        max_norm_ratio=None,
        use="all",
    ).part
    assert all(len(set(part[texts == text])) == 1 for text in range(10)) and np.bincount(
        part
    ).tolist() == [18, 6, 6]


def test_few_examples_have_no_test_part(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(30, 8, 16, 2)
    assert run_main("train_sae", *write_activations(tokens, [10] * 3), *SMALL) == 0
    metrics, out = metrics_of(tmp_path), capsys.readouterr().out
    assert metrics["measured_on"] == "validation" and metrics["n_test_tokens"] == 0
    assert metrics["normalized_mse"] == metrics["validation"]["normalized_mse"]
    assert (
        "warning:" in out
        and "too few different texts for a test part" in out
        and "\nvalidation: normalised MSE" in out
    )
    assert (
        "On 10 tokens of validation examples"
        in (tmp_path / "checkpoints" / "test" / "README.md").read_text()
    )


def test_summary_and_card_name_the_part(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    assert run_main("train_sae", *flags, *SMALL) == 0
    out, metrics = capsys.readouterr().out, metrics_of(tmp_path)
    summary = json.loads(
        next(line for line in out.splitlines() if line.startswith("summary: "))[9:]
    )
    assert (
        summary["measured_on"] == "test" and summary["normalized_mse"] == metrics["normalized_mse"]
    )
    assert f"\ntest: normalised MSE {metrics['normalized_mse']:.4f}" in out
    assert f"validation: normalised MSE {metrics['validation']['normalized_mse']:.4f}" in out
    card = (tmp_path / "checkpoints" / "test" / "README.md").read_text()
    assert (
        "split: test" in card
        and "On 60 tokens of test examples" in card
        and f"{metrics['normalized_mse']:.4g}" in card
    )
    assert run_main("train_sae", *flags, *SMALL, "--test-fraction", 0) == 0
    assert (
        metrics_of(tmp_path)["measured_on"] == "validation"
        and "too few" not in capsys.readouterr().out
    )


def test_a_checkpoint_from_before_the_test_part_says_validation():
    from fastsae.formats.model_card import figures, header
    from fastsae.sae.metrics import measured_on

    metrics = dict.fromkeys(
        ("normalized_mse", "explained_variance", "l0", "dead_fraction", "cosine_similarity", "mse"),
        0.5,
    )
    meta = {
        "metrics": {**metrics, "n_validation_tokens": 9, "n_train_tokens": 90},
        "settings": {"ARCHITECTURE": "topk", "M": 4, "K": 1},
        "activations": {"model_name": "m", "dataset_path": "d.jsonl"},
    }
    from pathlib import Path

    assert measured_on(meta["metrics"]) == "validation"
    assert "      split: validation" in header([(Path("x.pt"), meta)])
    assert any(
        "On 9 tokens of validation examples" in line for line in figures([(Path("x.pt"), meta)])
    )


def test_a_start_that_has_seen_the_test_examples_is_named(
    tmp_path, write_activations, run_main, capsys
):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    flags = write_activations(tokens, [20] * 30)
    assert run_main("train_sae", *flags, *SMALL, "--run-name", "start") == 0
    start = next((tmp_path / "checkpoints" / "start").glob("SAE_*.pt"))
    capsys.readouterr()
    assert run_main("train_sae", *flags, *SMALL, "--init-from", start) == 0
    assert "helped to make" not in capsys.readouterr().out
    assert run_main("train_sae", *flags, *SMALL, "--init-from", start, "--seed", 3) == 0
    assert f"of the 3 test examples helped to make {start}" in capsys.readouterr().out


def test_fractions_that_leave_nothing_are_refused(tmp_path, write_activations, run_main, capsys):
    tokens, _ = planted_tokens(60, 8, 16, 2)
    with pytest.raises(SystemExit) as stopped:
        run_main(
            "train_sae",
            *write_activations(tokens, [2] * 30),
            *SMALL,
            "--validation-fraction",
            0.6,
            "--test-fraction",
            0.4,
        )
    assert stopped.value.code == 2
    assert "error: TEST_FRACTION: with VALIDATION_FRACTION it is 1" in capsys.readouterr().err
