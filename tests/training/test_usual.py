"""The learning rate and the epochs where none are set."""

import pytest
from conftest import planted_tokens

from fastsae.runtime import artifacts
from fastsae.training.usual import epochs, learning_rate


def test_rates_by_hand():
    assert learning_rate("topk", 256, 576, 512) == 0.004
    assert learning_rate("topk", 16 * 256, 576, 512) == 0.002  # the fourth root of 16
    assert learning_rate("topk", 256, 4 * 576, 512) == 0.002
    assert learning_rate("topk", 16, 8, 512) == 0.004  # not higher for smaller ones
    assert learning_rate("batchtopk", 256, 576, 128) == 0.002
    assert learning_rate("topk", 256, 576, 2048) == learning_rate("topk", 256, 576, 65536) == 0.008
    assert learning_rate("standard", 256, 576, 512) == 0.002
    assert learning_rate("topk", 256, 576, 512, going_on=True) == 0.0005
    assert learning_rate("topk", 256, 0, 512) == 0.004  # of a width that nobody recorded


def test_epochs_by_hand():
    assert epochs(81_366, 512) == 30  # the demo: 4700 * 512 / 81,366 = 29.6
    assert epochs(41_570, 512) == 58  # 57.9
    assert epochs(1_000, 512) == epochs(81_366, 4096) == 100
    assert epochs(10**9, 512) == 30
    assert epochs(0, 512) == 100  # of files that do not say how many tokens they hold


@pytest.mark.parametrize("flags, rate", [([], 0.001), (["--learning-rate", "0.02"], 0.02)])
def test_a_run_records_the_rate_it_had(tmp_path, write_activations, run_main, flags, rate):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    sizes = ["--run-name", "test", "--m", 16, "--k", 2, "--n-epochs", 1, "--batch-size", 32]
    assert run_main("train_sae", *write_activations(tokens, [20] * 30), *sizes, *flags) == 0
    (path,) = (tmp_path / "checkpoints").glob("*/SAE_*.pt")
    assert artifacts.read_checkpoint_metadata(path)["settings"]["LEARNING_RATE"] == rate
