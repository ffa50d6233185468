"""The learning rate where none is set."""

import pytest
from conftest import planted_tokens

from fastsae.runtime import artifacts
from fastsae.training.usual import learning_rate


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


@pytest.mark.parametrize("flags, rate", [([], 0.001), (["--learning-rate", "0.02"], 0.02)])
def test_a_run_records_the_rate_it_had(tmp_path, write_activations, run_main, flags, rate):
    tokens, _ = planted_tokens(600, 8, 16, 2)
    sizes = ["--run-name", "test", "--m", 16, "--k", 2, "--n-epochs", 1, "--batch-size", 32]
    assert run_main("train_sae", *write_activations(tokens, [20] * 30), *sizes, *flags) == 0
    (path,) = (tmp_path / "checkpoints").glob("*/SAE_*.pt")
    assert artifacts.read_checkpoint_metadata(path)["settings"]["LEARNING_RATE"] == rate
