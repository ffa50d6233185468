"""What a run cannot do is said before it starts, or with the name of the setting that is to
blame."""

import pytest
from conftest import planted_tokens

from fastsae.runtime import memory
from fastsae.runtime.errors import InputError
from fastsae.runtime.memory import memory_of
from fastsae.training import limits
from fastsae.training.limits import bytes_needed, cause_of_divergence, require_memory

USUAL = {"LEARNING_RATE": 2e-3, "SPARSITY_COEFFICIENT": 5.0, "M": 256, "BATCH_SIZE": 512}


@pytest.mark.parametrize(
    "architecture, changed, name",
    [
        ("standard", {}, "LEARNING_RATE"),
        ("standard", {"SPARSITY_COEFFICIENT": 1e30}, "SPARSITY_COEFFICIENT"),
        ("gated", {"SPARSITY_COEFFICIENT": 1e30, "LEARNING_RATE": 0.1}, "SPARSITY_COEFFICIENT"),
        ("standard", {"SPARSITY_COEFFICIENT": 10.0, "LEARNING_RATE": 1.0}, "LEARNING_RATE"),
        ("jumprelu", {"SPARSITY_COEFFICIENT": 1e30}, "SPARSITY_COEFFICIENT"),
        ("topk", {"SPARSITY_COEFFICIENT": 1e30}, "LEARNING_RATE"),
        ("topk", {"LEARNING_RATE": 1e-5}, "LEARNING_RATE"),
    ],
)
def test_the_setting_furthest_above_what_is_usual_is_blamed(architecture, changed, name):
    assert cause_of_divergence({**USUAL, "ARCHITECTURE": architecture, **changed}) == name


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--architecture", "standard", "--sparsity-coefficient", "1e38"], "SPARSITY_COEFFICIENT"),
        (["--architecture", "jumprelu", "--sparsity-coefficient", "1e38"], "SPARSITY_COEFFICIENT"),
    ],
)
def test_a_huge_coefficient_is_named(write_activations, run_main, capsys, flags, name):
    tokens, _ = planted_tokens(300, 8, 16, 2)
    given = [
        *write_activations(tokens, [20] * 15),
        "--m",
        16,
        "--k",
        2,
        "--n-epochs",
        2,
        "--device",
        "cpu",
        "--run-name",
        "r",
    ]
    assert run_main("train_sae", *given, *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        line == f"error: {name}: the loss is not a number after epoch 1. lower "
        f"--{name.lower().replace('_', '-')}."
    )


def test_what_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch):
    assert bytes_needed(256, 576) == 256 * 576 * 4 * 2 * 5
    monkeypatch.setattr(limits, "memory_of", lambda device: 10**9)
    require_memory(1000, 1000, 25, "cpu")
    with pytest.raises(
        InputError,
        match=r"^M: 1,000 features of 1,000 dimensions times 26 autoencoders take 1.0 GB to train, "
        r"cpu has 1.0 GB. lower --m, or train fewer at a time.$",
    ):
        require_memory(1000, 1000, 26, "cpu")
    monkeypatch.setattr(limits, "memory_of", lambda device: None)
    require_memory(10**9, 10**9, 1, "cuda:0")


def test_the_memory_of_this_machine_is_known():
    assert 10**8 < memory_of("cpu") < 10**14


def test_a_limit_of_the_container_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(memory, "CGROUPS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    assert memory_of("cpu") == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_of("cpu") > 123456789


def test_stage_2_asks_before_it_reads(tmp_path, world, worker):
    """With the tiny model's 8 dimensions: M as large as it may be does not fit in what is said to
    be there."""
    done = world.run(worker, "extract_activations")
    assert done["code"] == 0
    done = world.run(
        worker,
        "train_sae",
        "--m",
        2**26,
        "--matryoshka-prefixes",
        "none",
        "--matryoshka-prefixes=none",
        "--seed",
        ",".join(map(str, range(40))),
    )
    assert done["code"] == 2 and done["err"].startswith(
        "error: M: 67,108,864 features of 8 dimensions times 40 autoencoders take "
    )
