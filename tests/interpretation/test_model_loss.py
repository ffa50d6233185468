"""What the model loses with a reconstruction in its place, on a tiny model with known answers; and
features that other seeds have too."""

import json

import numpy as np
import pytest
import torch
import transformers

from fastsae.interpretation import model_loss
from fastsae.interpretation.model_loss import measure, model_at_hand, some_held_out, summarise
from fastsae.interpretation.run_table import model_loss_sentence, stability_sentence
from fastsae.interpretation.stability import agreement, nearest, seed_stability, siblings
from fastsae.sae.autoencoder import new_sae, save_sae


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=60,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            initializer_range=0.5,
        )
    ).eval()


def exact_sae(d=8):
    """x = relu(x) - relu(-x): two features a dimension rebuild everything."""
    sae = new_sae(
        {"input_dim": d, "m_total_neurons": 2 * d, "k_active_neurons": 4, "use_batch_topk": True}
    )
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        sae.encoder.weight.copy_(both)
        sae.decoder.weight.copy_(both.t())
        for bias in (sae.input_bias, sae.neuron_bias, sae.threshold):
            bias.zero_()
    return sae.eval()


def data(n=12, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 9, n).astype(np.int32)
    n_tokens = int(lengths.sum())
    kind = np.zeros(n_tokens, np.uint8)
    kind[np.cumsum([0, *lengths[:-1]])] = 2  # the first of each is the shared prefix
    return {
        "seq_lengths": lengths,
        "token_ids": generator.integers(0, 60, n_tokens).astype(np.int32),
        "token_kind": kind,
    }


def test_an_exact_reconstruction_loses_nothing(model):
    given = data()
    kept = given["token_kind"] != 2
    spans = some_held_out(given, range(12), 0)
    found = measure(model, exact_sae(), 2, given, kept, spans, torch.zeros(8), 0)
    assert found["n_examples"] == 12 and found["n_tokens"] == int(kept.sum())
    for ablation in ("zero", "mean"):
        assert found["recovered"][ablation]["value"] == pytest.approx(1, abs=1e-4)
    assert found["kl"]["spliced"] == pytest.approx(0, abs=1e-5) and found["kl"]["zero"] > 0.01
    # the mean given is zero, so these are one
    assert found["ce"]["zero"] == pytest.approx(found["ce"]["mean"], abs=1e-5)


def test_an_autoencoder_that_is_silent_recovers_nothing(model):
    sae, given = exact_sae(), data()
    sae.threshold.fill_(1e9)
    kept = np.ones(len(given["token_ids"]), bool)
    found = measure(
        model, sae, 2, given, kept, some_held_out(given, range(12), 0), torch.ones(8), 0
    )
    assert found["recovered"]["zero"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["kl"]["spliced"] == pytest.approx(found["kl"]["zero"], abs=1e-5)


def test_loss_recovered_and_its_interval_by_hand():
    """Example 0: clean 1, spliced 2, zero 5. Example 1: 1, 3, 5. Together 1 - 1.5 / 4; resamples
    lie between those of the two."""
    ce = {
        "clean": np.array([1, 1, 1.0, 1]),
        "spliced": np.array([2, 2, 3.0, 3]),
        "zero": np.array([5, 5, 5.0, 5]),
        "mean": np.array([4, 4, 4.0, 4]),
    }
    found = summarise(ce, {"spliced": np.ones(4)}, np.array([3, 3, 7, 7]), 0)
    assert found["recovered"]["zero"]["value"] == pytest.approx(1 - 1.5 / 4)
    assert found["recovered"]["mean"]["value"] == pytest.approx(1 - 1.5 / 3)
    assert found["recovered"]["zero"]["interval"] == pytest.approx([0.5, 0.75])
    assert found["n_examples"] == 2 and found["ce"]["spliced"] == 2.5


def test_which_examples_are_run(monkeypatch):
    monkeypatch.setattr(model_loss, "TOKENS", 20)
    monkeypatch.setattr(model_loss, "EXAMPLE_TOKENS", 6)
    given = data()
    offsets = np.concatenate([[0], np.cumsum(given["seq_lengths"])])
    spans = some_held_out(given, [3, 5, 7, 9, 11], 0)
    assert 18 < sum(stop - start for start, stop in spans) <= 20
    assert {start for start, _ in spans} <= {offsets[i] for i in (3, 5, 7, 9, 11)}
    assert all(stop - start <= 6 for start, stop in spans)
    assert some_held_out(given, [], 0) == []


def test_a_model_that_is_not_here_or_large_is_not_run(tmp_path, monkeypatch, model, smol_tokenizer):
    hub = {"revision": None, "cache_dir": None, "device": "cpu", "width": 8}
    found, why = model_at_hand("nobody/absent", **{**hub, "cache_dir": str(tmp_path)})
    assert found is None and "not on this machine" in why
    model.save_pretrained(tmp_path / "model")
    found, why = model_at_hand(str(tmp_path / "model"), **hub)
    assert found is not None and why == ""
    found, why = model_at_hand(str(tmp_path / "model"), **{**hub, "width": 9})
    assert found is None and "not of the model's own stream" in why
    monkeypatch.setattr(model_loss, "MODEL_BYTES", 10)
    found, why = model_at_hand(str(tmp_path / "model"), **hub)
    assert found is None and "slow without a GPU" in why


def test_what_is_said_of_the_loss():
    assert model_loss_sentence(None) == "" == model_loss_sentence({"not_measured": "why"})
    each = {"value": 0.9, "interval": [0.85, 0.95]}
    loss = {
        "recovered": {"zero": each, "mean": each},
        "kl": {"spliced": 0.5, "zero": 6.0, "mean": 5.0},
        "n_tokens": 1200,
        "n_examples": 7,
        "held_out": True,
    }
    assert model_loss_sentence(loss) == (
        "loss recovered with the reconstruction in the model: 0.900 [0.850, 0.950] against zeros, "
        "0.900 [0.850, 0.950] against the mean; KL 0.500 nats against 6.00 and 5.00 "
        "(1,200 tokens of 7 held-out examples)"
    )


def test_features_that_other_seeds_have():
    rows = torch.eye(6)
    assert nearest(rows[:3], rows[3:]).tolist() == [0, 0, 0]
    # lengths do not matter, signs do
    assert nearest(3 * rows[:2], torch.stack([2 * rows[1], -rows[0]])).tolist() == [0, 1]
    same = agreement(rows, [rows[[5, 4, 3, 2, 1, 0]], torch.cat([rows[:3], -rows[3:]])], 0)
    assert same == {"mean_max_cosine": 0.75, "found_in_all": 0.5}


def test_seeds_beside_a_checkpoint(tmp_path):
    names = ("SAE_M=16_K=4_seed=0.pt", "SAE_M=16_K=4_seed=1.pt", "SAE_M=8_K=4_seed=0.pt", "SAE.pt")
    for name in names:
        save_sae(tmp_path / name, exact_sae(), {"settings": {}})
    path = tmp_path / names[0]
    assert [each.name for each in siblings(path)] == [names[1]] and siblings(
        tmp_path / names[3]
    ) == []
    own = exact_sae().decoder.weight.t()
    random = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = seed_stability(path, own, random, 0)
    assert found["n_seeds"] == 2 and found["features"]["found_in_all"] == 1
    assert found["random tokens"]["mean_max_cosine"] < 0.9
    assert stability_sentence(found).startswith("seeds: 100 % of the features are in all 2")
    assert seed_stability(tmp_path / names[2], own, random, 0) is None
    (tmp_path / names[1]).write_bytes(b"damaged")
    assert seed_stability(path, own, random, 0) is None and stability_sentence(None) == ""


def test_a_run_gets_its_figures(tmp_path, planted, run_main):
    """metrics.json and the model card of the run, the tables' first line and the model's absence
    say the same; stage 2 and 3 again change nothing."""
    assert run_main("interpret_sae", *planted) == 0
    head = json.loads((tmp_path / "interpretations.jsonl").read_text().split("\n", 1)[0])
    (metrics,) = tmp_path.glob("checkpoints/*/metrics.json")
    card = metrics.with_name("README.md")
    table, text = head["run_table"], card.read_text()
    assert json.loads(metrics.read_text())["run_table"] == table
    # the planted activations have 16 dimensions, the model 576
    assert table["model_loss"] == {
        "not_measured": "the activations are not of the model's own stream"
    }
    assert table["core"]["l0"] == pytest.approx(1, abs=0.05)
    assert "## What the features are worth\n\n|  | 1 column | " in text
    assert text.index("worth\n") < text.index("## How to load")
    before = metrics.read_bytes(), card.read_bytes()
    (tmp_path / "interpretations.jsonl").unlink()
    assert run_main("interpret_sae", *planted) == 0
    assert (metrics.read_bytes(), card.read_bytes()) == before


def test_parameters_outside_the_blocks_have_memory_of_their_own(model):
    """So that a weights' file, mapped, can go once the blocks' matrices are packed; tied ones stay
    tied, and nothing computes otherwise."""
    import copy

    copied = copy.deepcopy(model)
    copied.lm_head.weight = copied.model.embed_tokens.weight
    before = {name: (p.data_ptr(), p.clone()) for name, p in copied.named_parameters()}
    model_loss.copy_the_rest(copied, copied.model.layers)
    for name, parameter in copied.named_parameters():
        address, value = before[name]
        matrix = ".layers." in name and parameter.ndim > 1
        assert (parameter.data_ptr() == address) is matrix and torch.equal(parameter, value)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
