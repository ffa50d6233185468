"""The model with its residual stream replaced, against a hand-made splice, and the studies built on
it."""

import importlib
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import PROJECT

from fastsae import intervention
from fastsae.lm import loading
from fastsae.sae.autoencoder import new_sae
from fastsae.sae.initialisation import initialise

TEXTS = [
    "The bread rose twice before noon.",
    "Seven times eight is fifty-six.",
    "Why does the tap drip only at night?",
]


@pytest.fixture(scope="session")
def whole_model():
    return loading.load_model("SmolLM2-135M-Instruct", dtype=torch.float32)


@pytest.fixture(scope="session")
def examples(smol_tokenizer):
    return [
        np.array(
            smol_tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=True, return_dict=False
            )
        )
        for text in TEXTS
    ]


@pytest.fixture(scope="session")
def some_sae():
    """An untrained TopK autoencoder for the embedded model: good enough to splice in."""
    sae = new_sae({"input_dim": 576, "m_total_neurons": 64, "k_active_neurons": 4})
    initialise(sae, 10 * torch.randn(256, 576, generator=torch.Generator().manual_seed(0)), 0)
    return sae.eval()


def by_hand(model, ids, layer, replace):
    """Log-probabilities of one example: its first blocks, `replace`, then the later blocks, norm
    and head called one by one."""
    ids, stack = torch.tensor(ids)[None], model.model
    with torch.inference_mode():
        position = torch.arange(ids.shape[1])[None]
        x = stack.embed_tokens(ids)
        rotary = stack.rotary_emb(x, position)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for i, block in enumerate(stack.layers):
            x = replace(x) if i == layer else x
            x = block(x, attention_mask=mask, position_embeddings=rotary, position_ids=position)
            x = x[0] if isinstance(x, tuple) else x
        x = replace(x) if layer == len(stack.layers) else x
        return model.lm_head(stack.norm(x))[0, :-1].log_softmax(-1)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layer", [1, 12, 30])
def test_a_splice_equals_one_made_by_hand(whole_model, examples, some_sae, layer):
    functions = {
        "spliced": intervention.reconstruction(some_sae),
        "zero": intervention.constant(torch.zeros(576)),
    }
    found = intervention.next_token_losses(whole_model, layer, examples, functions)
    starts = np.cumsum([0, *map(len, examples)])
    for i, ids in enumerate(examples):
        place, target = slice(starts[i] + 1, starts[i + 1]), torch.tensor(ids)[1:, None]
        clean = by_hand(whole_model, ids, layer, lambda x: x)
        for name, function in functions.items():
            patched = by_hand(whole_model, ids, layer, lambda x: function(x[0], None)[None])
            np.testing.assert_allclose(
                found[name].ce[place], -patched.gather(1, target)[:, 0], atol=1e-5, rtol=1e-5
            )
            kl = torch.nn.functional.kl_div(patched, clean, log_target=True, reduction="none").sum(
                1
            )
            np.testing.assert_allclose(found[name].kl[place], kl, atol=1e-4, rtol=1e-4)
    assert (found["spliced"].ce[1:9] != found["clean"].ce[1:9]).all()


def test_identity_gives_exactly_the_models_own_loss(whole_model, examples):
    found = intervention.next_token_losses(
        whole_model, 12, examples, {"identity": lambda x, token: x}, batch_tokens=1
    )
    np.testing.assert_array_equal(found["identity"].ce, found["clean"].ce)
    assert np.nanmax(np.abs(found["identity"].kl)) == 0
    starts = np.cumsum([0, *map(len, examples)])
    for i, ids in enumerate(examples):
        with torch.inference_mode():
            own = whole_model(torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss
        assert np.isnan(found["clean"].ce[starts[i]])
        assert np.nanmean(found["clean"].ce[starts[i] : starts[i + 1]]) == pytest.approx(
            float(own), abs=1e-5
        )


@pytest.mark.parametrize(
    "config_name", ["Qwen2Config", "Qwen3Config", "MistralConfig", "Gemma3TextConfig"]
)
def test_other_architectures_can_be_spliced(config_name):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_name)(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    examples = [np.arange(3, 40), np.arange(50, 61)]
    stream = intervention.residual_stream(model, 2, examples)
    zero = intervention.constant(torch.zeros(32))
    found = intervention.next_token_losses(
        model,
        2,
        examples,
        {"identity": lambda x, token: x, "own": lambda x, token: stream[token], "zero": zero},
    )
    np.testing.assert_array_equal(found["identity"].ce, found["clean"].ce)
    np.testing.assert_allclose(found["own"].ce, found["clean"].ce, atol=1e-5)
    assert np.nanmin(found["zero"].kl) > 0
    # the slow twin: every block runs
    with torch.inference_mode(), intervention.replaced(model, 2, torch.zeros_like):
        logits = model(torch.from_numpy(examples[0])[None]).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(
        found["zero"].ce[1:37],
        -logits.gather(1, torch.from_numpy(examples[0])[1:, None])[:, 0],
        atol=1e-5,
    )


def test_batches_change_nothing_and_only_the_chosen_tokens_are_replaced(whole_model, examples):
    starts = np.cumsum([0, *map(len, examples)])
    where = np.zeros(starts[-1], bool)
    # one token of the second example: what comes before it, and the other examples, cannot change
    where[starts[1] + 20] = True
    zero = {"zero": intervention.only(where, intervention.constant(np.zeros(576, np.float32)))}
    together, alone = (
        intervention.next_token_losses(whole_model, 12, examples, zero, batch_tokens=n)
        for n in (1024, 1)
    )
    for name in ("clean", "zero"):
        np.testing.assert_allclose(together[name].ce, alone[name].ce, atol=1e-4)
        np.testing.assert_allclose(together[name].kl, alone[name].kl, atol=1e-4)
    changed = np.flatnonzero(np.nan_to_num(alone["zero"].kl) > 1e-6)
    assert changed.min() == starts[1] + 21 and changed.max() < starts[2]
    assert (alone["zero"].kl[changed] > 0).all()


def test_the_stream_is_the_hidden_state(whole_model, examples):
    found = intervention.residual_stream(whole_model, 12, examples, batch_tokens=64)
    with torch.inference_mode():
        expected = torch.cat(
            [
                whole_model(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[12][0]
                for ids in examples
            ]
        )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def test_loss_recovered_by_hand():
    assert intervention.loss_recovered(2.0, 2.5, 4.0) == 0.75
    assert (
        intervention.loss_recovered(2.0, 2.0, 4.0) == 1
        and intervention.loss_recovered(2.0, 5.0, 4.0) == -0.5
    )


def test_ablation_takes_away_one_feature_only(some_sae):
    from fastsae.sae.autoencoder import encode

    x = 10 * torch.randn(50, 576, generator=torch.Generator().manual_seed(1))
    entries = encode(some_sae, x)
    feature = int(entries.column[0])
    dense = torch.zeros(50, 64).index_put_(
        (entries.row.long(), entries.column.long()), entries.value
    )
    expected = x - dense[:, feature, None] * some_sae.decoder.weight[:, feature]
    found = intervention.without_feature(some_sae, feature)(x, None)
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        found[dense[:, feature] == 0], x[dense[:, feature] == 0]
    ) and not torch.equal(found, x)


def test_greedy_text_equals_transformers_and_alpha_0_changes_no_token(whole_model, examples):
    prompt = torch.tensor(examples[2])[None]
    with torch.inference_mode():
        expected = whole_model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=2,
        )
    expected = expected[0, prompt.shape[1] :].tolist()
    direction = torch.nn.functional.normalize(
        torch.randn(576, generator=torch.Generator().manual_seed(0)), dim=0
    )
    steered = intervention.steering(direction, [0.0, 200.0])
    (plain,) = intervention.generate(whole_model, prompt, n_new=24, stop_ids=[2])
    zero, strong = intervention.generate(
        whole_model, prompt.expand(2, -1), n_new=24, stop_ids=[2], layer=12, function=steered
    )
    assert plain == zero == expected and strong != zero


def test_steering_adds_alpha_times_the_direction():
    stream, direction = torch.zeros(2, 3, 4), torch.tensor([1.0, 0, 0, 2])
    everywhere = intervention.steering(direction, [0.0, 5.0])(stream)
    assert torch.equal(everywhere[0], stream[0]) and torch.equal(
        everywhere[1], (5 * direction).expand(3, 4)
    )
    answer = intervention.steering(direction, [0.0, 5.0], answer_only=True)(stream)
    assert torch.equal(answer[1, :2], stream[1, :2]) and torch.equal(answer[1, 2], 5 * direction)


# The studies, on a tiny random model

TINY = [
    "--layer-idx",
    2,
    "--max-length",
    64,
    "--label-field",
    "kind",
    "--run-name",
    "tiny",
    "--device",
    "cpu",
]
TRAINING = ["--m", 16, "--k", 2, "--matryoshka-prefixes=none", "--n-epochs", 2, "--batch-size", 64]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, smol_tokenizer):
    """Flags for a folder with a tiny random model, a dataset of 40 labelled texts and a trained
    autoencoder."""
    import transformers

    from fastsae.runtime.stage import run_stage

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    smol_tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "text": f"The {'red' if i % 2 else 'blue'} box number {i} holds {i * 7} <b>nails</b>.",
            "kind": "red" if i % 2 else "blue",
        }
        for i in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--output-dir",
        folder,
        "--model-name",
        folder / "model",
        "--dataset-path",
        folder / "data.jsonl",
        *TINY,
    ]
    argv = sys.argv
    for script, more in (("extract_activations", []), ("train_sae", TRAINING)):
        known = (
            [f for f in flags if f not in ("--model-name", folder / "model")]
            if script == "train_sae"
            else flags
        )
        sys.argv = [script, *map(str, known), *map(str, more)]
        assert run_stage(importlib.import_module(script).main) == 0
    sys.argv = argv
    return folder, flags


@pytest.fixture
def study(tmp_path, monkeypatch, run_main):
    """Run a study's `main()` with flags, its results under tmp_path: (exit code, result)."""
    provenance = importlib.import_module("experiments.shared.provenance")
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)

    def run(name, *flags):
        module = importlib.import_module(f"experiments.studies.{name}")
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        code = run_main(f"experiments.studies.{name}", *flags)
        path = tmp_path / f"{name}.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


def test_loss_recovered_of_a_tiny_model(tiny, study, tmp_path, monkeypatch):
    folder, flags = tiny
    code, result = study("loss_recovered", *flags, "--n-examples", 3)
    ((name, row),) = result["autoencoders"].items()
    assert (
        code == 0
        and row["layer"] == 2
        and row["n_examples"] == 3
        and result["commit"]
        and result["machine"]
    )
    every, usable = row["kinds_every_token_replaced"]["all"], row["kinds"]["all"]
    for kind in (every, usable):
        ce = kind["ce"]
        assert kind["loss_recovered_zero"]["value"] == pytest.approx(
            (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"])
        )
        assert kind["kl"]["spliced"] > 0 and len(kind["loss_recovered_mean"]["interval"]) == 2
    assert (
        every["ce"]["clean"] == usable["ce"]["clean"]
        and every["ce"]["zero"] != usable["ce"]["zero"]
    )
    assert (
        row["kinds"]["content"]["n_tokens"] + row["kinds"]["template"]["n_tokens"]
        == usable["n_tokens"]
    )
    assert row["kinds"]["user"]["n_tokens"] == row["kinds"]["content"]["n_tokens"]
    # the second run reads its journal
    monkeypatch.setattr(
        importlib.import_module("experiments.studies.loss_recovered"), "measure", None
    )
    assert (
        study("loss_recovered", *flags, "--n-examples", 3)[1]["autoencoders"]
        == result["autoencoders"]
    )


def test_quick_leaves_flags_alone(tiny, study, tmp_path):
    folder, flags = tiny
    _, result = study("loss_recovered", *flags, "--quick", "--n-examples", 3, "--n-bootstrap", 5)
    assert (
        next(iter(result["autoencoders"].values()))["n_examples"]
        == result["settings"]["N_EXAMPLES"]
        == 3
    )
    _, result = study(
        "steer", *flags, "--quick", "--alphas", "0,3,60", "--n-new-tokens", 4, "--features", "1"
    )
    assert (
        result["alphas"] == [0, 3, 60]
        and result["n_new_tokens"] == 4
        and result["n_prompts"] == 4
        and len(result["targets"]) == 2
    )
    _, result = study(
        "steer",
        *flags,
        "--alphas",
        "3",
        "--n-new-tokens",
        2,
        "--features",
        "1",
        "--n-random",
        0,
        "--ablate",
        # what it leaves out its page leaves out
        "--n-ablated",
        0,
        "--n-ablation-examples",
        2,
    )
    words = importlib.import_module("experiments.pages.studies_page").steer(result)
    assert "was not tried" in words and "Feature 1 (named)" in words
    assert "random features" not in words


@pytest.mark.parametrize("flags, where", [(["--k", 3], "K"), (["--layer-idx", 1], "LAYER_IDX")])
def test_a_flag_that_the_run_contradicts_is_one_line(tiny, study, capsys, flags, where):
    assert study("loss_recovered", *tiny[1], *flags)[0] == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {where}: ") and "leave" in error[0]


def test_what_other_code_or_data_computed_is_not_remembered(tiny, study, tmp_path, monkeypatch):
    provenance = importlib.import_module("experiments.shared.provenance")
    journal, calls = tmp_path / "journal.jsonl", []
    for version in ("a", "a", "b"):
        monkeypatch.setattr(provenance, "code_version", lambda version=version: version)
        provenance.remembered(journal, {"x": 1}, lambda: calls.append(1))
    assert len(calls) == 2
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Number {i} is new."}) + "\n" for i in range(9)))
    for n in (2, 5):
        _, result = study(
            "loss_recovered",
            *tiny[1],
            "--dataset-path",
            other,
            "--max-examples",
            n,
            "--n-bootstrap",
            5,
        )
        assert next(iter(result["autoencoders"].values()))["n_examples"] == n


def test_held_out_examples_are_the_test_examples(tiny, study):
    import config
    from fastsae.activations.files import open_activations

    folder, flags = tiny
    inputs = importlib.import_module("experiments.shared.subjects")
    settings = config.resolve(
        *inputs.STAGES,
        PROJECT / "experiments" / "studies" / "loss_recovered.py",
        argv=list(map(str, flags)),
    )
    (subject,) = inputs.subjects(settings)
    table = inputs.some_dialogues(subject, settings, 100, held_out=True)
    data = open_activations(folder / "activations" / "activations_layer2.npz")
    expected = subject.meta["test_examples"]
    assert (
        table.lines.tolist() == data["example_ids"][expected].tolist() and len(table.lengths) == 4
    )
    rows = np.flatnonzero(np.isin(np.repeat(np.arange(40), data["seq_lengths"]), expected))
    assert (table.ids == data["token_ids"][rows]).all() and (
        table.kind == data["token_kind"][rows]
    ).all()
    model = inputs.load_model(subject, settings)
    stream = intervention.residual_stream(model, 2, inputs.example_ids(table))
    np.testing.assert_allclose(stream, data["activations"][rows], atol=2e-3)
    assert (inputs.usable_tokens_of(subject, stream, table) == (table.kind != 2)).all()


def test_an_autoencoder_of_another_width_is_one_line(tiny, study, tmp_path, some_sae, capsys):
    from fastsae.sae.autoencoder import save_sae

    save_sae(tmp_path / "wide.pt", some_sae, {})
    assert study("loss_recovered", *tiny[1], "--sae", tmp_path / "wide.pt")[0] == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "576 dimensions" in error[0] and "has 32" in error[0]


def test_a_saelens_folder_gives_what_its_checkpoint_gives(tiny, study):
    from fastsae.formats import export
    from fastsae.formats.load import load_sae

    folder, flags = tiny
    path = next(folder.glob("checkpoints/*/SAE*.pt"))
    export.export(path, ["saelens"])
    code, result = study(
        "loss_recovered",
        *flags,
        "--sae",
        f"{path},{path.with_suffix('.saelens')}",
        "--n-bootstrap",
        5,
    )
    own, foreign = result["autoencoders"].values()
    assert code == 0 and own["held_out"] and not foreign["held_out"] and foreign["layer"] == 2
    # it does not say which ones it was trained on
    assert own["n_examples"] == 4 and foreign["n_examples"] == 40
    assert foreign["kinds"]["all"]["kl"]["spliced"] == pytest.approx(
        own["kinds"]["all"]["kl"]["spliced"], rel=0.5
    )
    one, other = (load_sae(where)[0] for where in (path, path.with_suffix(".saelens")))
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        intervention.reconstruction(one)(x, None), intervention.reconstruction(other)(x, None)
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def test_steering_a_tiny_model(tiny, study, tmp_path):
    folder, flags = tiny
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"text": "<script>alert(1)</script> | *hi*", "expected": "box"}\n{"text": "Why?"}\n'
    )
    code, result = study(
        "steer",
        *flags,
        "--prompts",
        prompts,
        "--alphas",
        "0,3,60",
        "--n-new-tokens",
        6,
        "--n-random",
        1,
        "--ablate",
        "--n-ablated",
        2,
        "--n-ablation-examples",
        3,
    )
    assert code == 0 and [t["feature"] is None for t in result["targets"]] == [False, True]
    for target in result["targets"]:
        assert target["alpha_0_equals_unsteered"] is True
        zero, _, strong = target["curves"]
        assert zero["changed"] == 0 and zero["perplexity"] == pytest.approx(
            result["unsteered"]["perplexity"], rel=1e-4
        )
        assert strong["changed"] > 0
    assert result["alphas_over_mean_norm"][2] == pytest.approx(60 / result["mean_norm"])
    for feature in result["ablation"]["features"]:
        assert feature["change_elsewhere"] in (None, 0)
    tags = Tags()
    text = (tmp_path / "steer.html").read_text()
    tags.feed(text)
    assert not {"script", "a", "img", "link"} & set(tags.found) and "&lt;script&gt;" in text
    assert (
        r"\| \*hi\*" in (tmp_path / "steer.md").read_text()
        and "<script>" not in (tmp_path / "steer.md").read_text()
    )


@pytest.mark.parametrize(
    "flags, where",
    [
        (["--features", 99], "FEATURES"),
        (["--special-token", "<nothing>"], "SPECIAL_TOKEN"),
        (["--label-search", "x"], "interpretations.jsonl"),
        (["--n-features", 0], "N_FEATURES"),
    ],
)
def test_a_feature_that_is_not_there_is_one_line(tiny, study, capsys, flags, where):
    assert study("steer", *tiny[1], *flags)[0] == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and where in error[0]


def test_the_strongest_feature_by_hand(study):
    steer = importlib.import_module("experiments.studies.steer")
    sae = new_sae({"input_dim": 2, "m_total_neurons": 2, "k_active_neurons": 1}).eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(2)), sae.decoder.weight.copy_(torch.eye(2))
        sae.neuron_bias.zero_(), sae.input_bias.zero_()
    # examples 7, 7, 7, 9, 9: maxima (5, 4) and (3, 2)
    x = torch.tensor([[1.0, 0], [5, 0], [0, 4], [0, 2], [3, 0]])
    assert steer.average_maximum(sae, x, np.array([7, 7, 7, 9, 9])).tolist() == [4.0, 3.0]


def test_curves_by_hand(study):
    steer = importlib.import_module("experiments.studies.steer")
    assert (
        steer.repetition([1, 2, 3, 1, 2, 3]) == 0.25
        and steer.repetition([1, 2]) == 0
        and steer.repetition([5] * 12) == 0.9
    )
    paris = {"ids": [1, 2], "text": "It is Paris.", "nll": 2.0, "repetition": 0.0}
    plain = [paris, {"ids": [3], "text": "Nice.", "nll": 1.0, "repetition": 0.0}]
    other = [paris, {"ids": [4, 4], "text": "ice", "nll": 6.0, "repetition": 0.5}]
    found = steer.curves(
        [[a, b] for a, b in zip(plain, other)], plain, [("q", "paris|lyon"), ("q", "ice")]
    )
    assert [p["changed"] for p in found] == [0, 0.5] and [p["expected_word"] for p in found] == [
        0.5,
        1.0,
    ]
    assert [p["perplexity"] for p in found] == pytest.approx([np.e, np.exp(2)]) and found[1][
        "repetition"
    ] == 0.25


def test_the_effect_of_an_ablation_by_hand(study):
    ablate = importlib.import_module("experiments.studies.ablate")
    example = np.array([0, 0, 0, 1, 1])
    fires = np.array([True, False, False, False, False])
    change, counted = (
        np.array([np.nan, 0.4, 0.2, np.nan, 0.0]),
        np.array([False, True, True, False, True]),
    )
    found = ablate.effect(change, np.ones(5, np.float32), fires, counted, example, 0)
    assert (
        found["change_where_it_fires"] == pytest.approx(0.3)
        and found["change_after_a_firing_token"] == 0.4
    )
    assert (
        found["change_elsewhere"] == 0
        and found["share_of_examples"] == 0.5
        and found["interval"] == pytest.approx([0.3, 0.3])
    )


@pytest.mark.exhaustive
def test_layers_of_a_tiny_model(tiny, study, run_main, tmp_path, monkeypatch):
    _, flags = tiny
    study_flags = [
        "--output-dir",
        tmp_path / "out",
        *flags[2:],
        *TRAINING,
        "--compared-layers",
        "1,3",
        "--n-seeds",
        2,
    ]
    module = importlib.import_module("experiments.studies.layers")

    def in_process(script, *stage_flags):
        assert run_main(script.removesuffix(".py"), *stage_flags) in (None, 0)

    monkeypatch.setattr(module, "run_stage", in_process)
    code, result = study("layers", *study_flags)
    assert code == 0 and [row["layer"] for row in result["layers"]] == [1, 3]
    for row in result["layers"]:
        assert (
            len(row["seeds"]) == 2 and 0 < row["mean_token_purity"] <= 1 and row["median_norm"] > 0
        )
        assert row["normalized_mse"] == pytest.approx(
            np.mean([s["normalized_mse"] for s in row["seeds"]])
        )
        assert 0.5 < row["probe_auc_stream"] <= 1 and 0 < row["probe_auc"] <= 1
        assert row["probe_auc"] == pytest.approx(np.mean([s["probe_auc"] for s in row["seeds"]]))
    assert result["layers"][0]["median_norm"] < result["layers"][1]["median_norm"]
    # up to date, the same again
    assert study("layers", *study_flags)[1]["layers"] == result["layers"]


def test_the_readmes_table_and_the_page_come_from_the_results(study, tmp_path, monkeypatch):
    module = importlib.import_module("experiments.pages.studies_page")
    results = PROJECT / "experiments" / "results"
    written = [
        name
        for name in ("loss_recovered", "steer", "layers")
        if (results / f"{name}.json").exists()
    ]
    monkeypatch.setattr(module, "RESULTS", results)
    found = module.sentences()
    assert len(found) >= len(written) and all(
        (results / f"{name}.png").exists() for name in written
    )
    for text in found:
        assert "nan" not in text and "None" not in text
    table = importlib.import_module("experiments.pages.studies_table")
    monkeypatch.setattr(table, "RESULTS", results)
    rows = [line for line in table.table().splitlines() if line.startswith("|")]
    assert len(rows) >= 2 + len(written) and {
        row.count(" | ") for row in rows if "---" not in row
    } == {3}
    for each in (module, table):
        monkeypatch.setattr(each, "RESULTS", tmp_path)
    assert module.sentences() == [] and table.table() == ""
