"""The model card: what the hub reads from it, and that no name can add to it."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from test_formats import SOURCE, trained

from fastsae.formats import export, model_card
from fastsae.runtime import artifacts
from fastsae.sae.autoencoder import save_sae

METRICS = {
    "normalized_mse": 0.25,
    "explained_variance": 0.75,
    "l0": 4.0,
    "dead_fraction": 0.0,
    "cosine_similarity": 0.9,
    "mse": 1.5,
    "n_train_tokens": 1000,
    "n_validation_tokens": 100,
}


def metas(folder, *names):
    return {folder / name: artifacts.read_checkpoint_metadata(folder / name) for name in names}


def written(folder, *, kind="topk", names=("SAE_M=40_K=4.pt",), **source):
    """The text of the card for checkpoints as train_sae.py leaves them."""
    for name in names:
        settings = {"ARCHITECTURE": kind, "M": 40, "K": 4, "EXCLUDE_SHARED_PREFIX": True}
        metadata = artifacts.new_metadata(
            "sae",
            settings,
            {"activations": "f"},
            activations={**SOURCE, **source},
            metrics=METRICS,
            max_norm=12.5,
        )
        save_sae(folder / name, trained(kind), metadata)
    model_card.write_card(folder, metas(folder, *names))
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_it(tmp_path):
    text = written(
        tmp_path,
        dataset_path="hf:allenai/tulu-3-sft-mixture@abc",
        names=("SAE_M=40_K=4.pt", "SAE_M=40_K=4_seed=1.pt"),
    )
    data = ModelCard(text, ignore_metadata_errors=False).data
    # the hub's weights are others
    assert data.base_model is None and data.datasets == ["allenai/tulu-3-sft-mixture"]
    assert "sparse-autoencoder" in data.tags
    header = yaml.safe_load(text.split("---")[1])
    assert [each["name"] for each in header["model-index"]] == [
        "SAE_M=40_K=4",
        "SAE_M=40_K=4_seed=1",
    ]
    for part in (
        "residual stream after 12 blocks",
        "blocks.11.hook_resid_post",
        "--export saelens",
        "load_model(",
        "hf upload",
    ):
        assert part in text
    assert written(tmp_path, names=("SAE_M=40_K=4.pt",)).count("| `SAE_") == 1


def test_it_says_whose_weights_and_which_tokens(tmp_path):
    text = written(tmp_path)
    assert (
        "# Sparse autoencoder of `SmolLM2-135M-Instruct, 4-bit (Q4_1), dequantised`, layer 12"
        in text
    )
    assert "not the weights of HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert (
        "## Which tokens it is for" in text
        and "norm above 12.5 (attention sinks). No mask is part of this format" in text
    )
    assert "set `SPARSIFY_DISABLE_TRITON=1` before it is imported" in text
    of_hub = written(tmp_path / "hub", model_name="owner/model")
    assert "4-bit" not in of_hub and ModelCard(of_hub).data.base_model == "owner/model"
    assert "SPARSIFY" not in written(tmp_path / "other", kind="jumprelu")


def test_the_index_of_a_family_without_the_embedding(tmp_path):
    for name in ("llama", "mamba"):
        (tmp_path / name).mkdir()
    assert "`hidden_states[12]`" in written(tmp_path / "llama")
    assert "`hidden_states[11]`" in written(tmp_path / "mamba", blocks="backbone.layers")


def test_a_plain_text_has_no_template(tmp_path):
    assert "with the model's chat template" in written(tmp_path, dataset_path="dialogues.jsonl")
    assert "without chat template" in written(tmp_path, dataset_path="a/corpus.txt")


def test_a_single_ones_metrics(tmp_path):
    result = {r.metric_type: r.metric_value for r in ModelCard(written(tmp_path)).data.eval_results}
    assert result == {name: METRICS[name] for name, _ in model_card.METRICS}


def test_it_names_the_libraries_that_can_read_it(tmp_path):
    text = written(tmp_path, kind="jumprelu", names=("SAE_jumprelu_M=40_K=4.pt",))
    assert "HypotheSAEs" not in text and "sparsify" not in text
    assert "`--export dictionary_learning` writes what it reads" in text
    export.export(tmp_path / "SAE_jumprelu_M=40_K=4.pt", ["saelens", "dictionary_learning"])
    text = written(tmp_path, kind="jumprelu", names=("SAE_jumprelu_M=40_K=4.pt",))
    assert (
        'SAE.load_from_disk("SAE_jumprelu_M=40_K=4.saelens")' in text
        and ModelCard(text).data.library_name == "saelens"
        and 'load_dictionary("SAE_jumprelu_M=40_K=4.dictionary_learning", device="cpu")' in text
    )


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Buy",
    "a`b`<script>alert(1)</script>",
    "```\nrm -rf ~\n```",
    '"\ntags: [evil]',
    "| a | b |",
    "'; !!python/object:os.system",
    "\u202egnp.exe\u2028x\x00\x1b[2J\ud800",
    "[c](javascript:alert(1))",
    "hf:o/n\n- evil: {}",
    "<!-- " + "y" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["dataset_path", "model_name"])
def test_names_stay_names(tmp_path, field, name):
    """With a hostile name the card has the same lines, the same keys and the same headings as with
    a plain one."""
    plain = written(
        tmp_path / "plain",
        **{
            field: (
                "hf:o/n" if name.startswith("hf:") and field == "dataset_path" else "./some/name"
            )
        },
    )
    text = written(tmp_path / "hostile", **{field: name})
    assert (
        len(text.splitlines()) == len(plain.splitlines()) == text.count("\n")
        and len(text) < len(plain) + 2000
    )
    header, its = (ModelCard(each).data.to_dict() for each in (text, plain))
    assert header.keys() == its.keys() and header["tags"] == its["tags"]
    outside, plain_outside = (
        re.sub(r"`[^`\n]*`", "", re.split("^---$", each, maxsplit=2, flags=re.M)[2])
        for each in (text, plain)
    )
    assert outside == plain_outside  # whatever the name says, it says in code spans
    assert all(line.isprintable() for line in text.splitlines())


def test_a_card_is_written_once(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr(artifacts, "write_text", lambda *_, **__: pytest.fail("written again"))
    model_card.write_card(tmp_path, metas(tmp_path, "SAE_M=40_K=4.pt"))


def test_what_somebody_wrote_stays(tmp_path, capsys):
    text = written(tmp_path)
    edited = text.replace("---\n", "---\nlicense: mit\n", 1)
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    assert (
        written(tmp_path) == edited
        and "was edited, and is left as it is" in capsys.readouterr().out
    )
    (tmp_path / "README.md").unlink()
    assert written(tmp_path) == text


def test_what_stage_3_measured_stays_while_it_is_of_this_autoencoder(tmp_path):
    name = "SAE_M=40_K=4.pt"
    plain = written(tmp_path)
    found = metas(tmp_path, name)
    metrics, path = tmp_path / "metrics.json", tmp_path / "README.md"
    artifacts.write_json(metrics, {"checkpoint": name})
    table = {"autoencoder": found[tmp_path / name]["fingerprint"], "probing": {"x": 1.5}}
    for worth in (["first"], ["| a |", "", "second"]):
        model_card.add_run_table(tmp_path, table, worth)
        text = path.read_text(encoding="utf-8")
        assert model_card.worth_in(text) == worth
    assert artifacts.from_json(metrics.read_bytes()) == {"checkpoint": name, "run_table": table}
    model_card.write_card(tmp_path, found)  # as stage 2 does again
    assert path.read_text(encoding="utf-8") == text
    artifacts.write_json(metrics, {"checkpoint": name, "run_table": {"autoencoder": "another"}})
    model_card.write_card(tmp_path, found)
    assert path.read_text(encoding="utf-8") == plain


def test_figures_go_into_no_card_that_somebody_worked_on(tmp_path):
    text = written(tmp_path) + "mine\n"
    artifacts.write_json(tmp_path / "metrics.json", {"checkpoint": "SAE_M=40_K=4.pt"})
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    model_card.add_run_table(tmp_path, {"autoencoder": "f"}, ["line"])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    (tmp_path / "README.md").unlink()
    model_card.add_run_table(tmp_path, {"autoencoder": "g"}, ["line"])
    assert not (tmp_path / "README.md").exists()
    assert "g" in (tmp_path / "metrics.json").read_text()


def test_settings_are_json(tmp_path):
    block = re.search(r"```json\n(.*?)\n```", written(tmp_path), re.DOTALL)[1]
    assert json.loads(block) == {
        "ARCHITECTURE": "topk",
        "M": 40,
        "K": 4,
        "EXCLUDE_SHARED_PREFIX": True,
    }
