"""`saelens:RELEASE/ID`: a table like SAELens', and a hub on loopback."""

import hashlib
import importlib.util
import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save
from test_formats import M, dense, dictionary_state, saelens_folder, tokens, trained

from fastsae.formats import registry
from fastsae.formats.load import load_sae
from fastsae.formats.readers import FORMATS
from fastsae.formats.source import locate
from fastsae.runtime.errors import EnvironmentFailure, InputError

GEMMA = "layer_20/width_16k/average_l0_71"


def release(repo_id, ids, function=None, **more):
    entries = [{"id": name, "path": path} for name, path in ids.items()]
    return {"conversion_func": function, "repo_id": repo_id, "model": "m", "saes": entries, **more}


TABLE = {
    "gemma-res-canonical": release(
        "google/gemma-scope-2b-pt-res", {"layer_20/width_16k/canonical": GEMMA}, "gemma_2"
    ),
    "gpt2-res": release("me/gpt2", {"blocks.7.hook_resid_pre": "v5_layer_7"}),
    "gpt2-centred": release(
        "me/gpt2", {"a": "a"}, config_overrides={"model_from_pretrained_kwargs": {}}
    ),
    "gemma-att": release("google/gemma-scope-2b-pt-att", {"a": "layer_1/width_16k/x"}, "gemma_2"),
    "gemma-2": release(
        "google/gemma-scope-2-1b-pt",
        {"t": "transcoder_all/layer_0_width_16k", "r": "resid_post/layer_9_width_16k"},
        "gemma_3",
    ),
    "qwen": release("me/qwen", {"layer0": "layer0.sae.pt"}, "qwen_scope"),
}


class Hub(ThreadingHTTPServer):
    """Files {repository/resolve/main/path: bytes} as the hub gives them; `asked` are the paths."""

    def __init__(self, files):
        self.files, self.asked = files, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.asked.append(self.path)
                content = hub.files.get(self.path.lstrip("/"))
                self.send_response(404 if content is None else 200)
                for name, value in self.about(content):
                    self.send_header(name, value)
                self.end_headers()
                return content

            def do_GET(self):
                self.wfile.write(self.do_HEAD() or b"")

            def about(self, content):
                if content is None:
                    return [("X-Error-Code", "EntryNotFound"), ("Content-Length", "0")]
                return [
                    ("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
                    ("X-Repo-Commit", "c" * 40),
                    ("Content-Length", str(len(content))),
                ]

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a Gemma Scope and a SAELens folder, and the table that names them."""
    package = tmp_path / "packages" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    (package / "pretrained_saes.yaml").write_text(yaml.safe_dump(TABLE))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    params = io.BytesIO()
    state = dictionary_state("JumpReluAutoEncoder")
    np.savez(params, **{name: value.numpy() for name, value in state.items()})
    folder = saelens_folder(tmp_path / "v5", trained("standard"), hook_name=HOOK)
    server = Hub(
        {
            f"google/gemma-scope-2b-pt-res/resolve/main/{GEMMA}/params.npz": params.getvalue(),
            **{
                f"me/gpt2/resolve/main/v5_layer_7/{file.name}": file.read_bytes()
                for file in folder.iterdir()
            },
        }
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    registry._table.cache_clear()
    yield server
    registry._table.cache_clear()
    server.shutdown()


HOOK = "blocks.7.hook_resid_pre"


def test_a_name_is_fetched_once_and_read(hub):
    """The folder's name says the layer, though the hub's cache holds links to files without one."""
    name = "saelens:gemma-res-canonical/layer_20/width_16k/canonical"
    sae, meta = load_sae(name)
    assert meta["activations"]["settings"] == {"LAYER_IDX": 21} and sae.m_total_neurons == M
    assert meta["source"]["path"] == name and hub.asked
    hub.asked.clear()
    again, _ = load_sae(name)
    assert not hub.asked and torch.equal(again.encoder.weight, sae.encoder.weight)
    assert locate(name).sha256() == meta["fingerprint"] and "sae_lens" not in sys.modules


def test_a_folder_of_several_files(hub):
    sae, meta = load_sae(f"saelens:gpt2-res/{HOOK}")
    assert meta["activations"]["settings"] == {"LAYER_IDX": 7}
    torch.testing.assert_close(dense(sae, tokens()), dense(trained("standard"), tokens()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-res-canonica/x", "no release 'gemma-res-canonica'. .* gemma-res-canonical"),
        (
            "gemma-res-canonical/layer_20/width_16k/canonic",
            r"has no .*, for example .*width_16k/canonical\.",
        ),
        ("gemma-res-canonical", "has no ''. give one of its 1, for example layer_20"),
        ("gemma-att/a", "is of another place .* choose another"),
        ("gemma-2/t", "is of another place .* choose another"),
        ("qwen/layer0", "SAELens converts qwen_scope .* save it with save_model"),
        ("gpt2-centred/a", "SAELens sets model_from_pretrained_kwargs .* save it with"),
    ],
)
def test_names_that_are_not_read(hub, name, message):
    with pytest.raises(InputError, match=f"^saelens:{name}: .*{message}"):
        load_sae(f"saelens:{name}")
    assert not hub.asked


def test_a_config_that_a_repository_lacks(hub):
    """Some releases of Gemma Scope 2 have none."""
    state = dictionary_state("JumpReluAutoEncoder")
    tensors = {name.replace("W_", "w_"): value.contiguous() for name, value in state.items()}
    path = "google/gemma-scope-2-1b-pt/resolve/main/resid_post/layer_9_width_16k/params.safetensors"
    hub.files[path] = save(tensors)
    sae, meta = load_sae("saelens:gemma-2/r")
    assert meta["activations"]["settings"] == {"LAYER_IDX": 10} and sae.m_total_neurons == M


def test_a_hub_without_the_files(hub):
    hub.files.clear()
    with pytest.raises(EnvironmentFailure, match="could not be fetched .* hf download me/gpt2"):
        load_sae(f"saelens:gpt2-res/{HOOK}")


def test_without_sae_lens(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sae_lens" else find(name)
    )
    registry._table.cache_clear()
    with pytest.raises(EnvironmentFailure, match="pip install sae-lens, or give the autoencoder's"):
        load_sae("saelens:gpt2-res/x")


def test_stage_3_takes_a_name(hub, planted, run_main, capsys):
    """It is no path: no folder is put before it. This one is of another width than the data."""
    flags = [*planted, "--n-top-neurons", 0, "--sae-path"]
    assert run_main("interpret_sae", *flags, "saelens:gpt2-re/x") == 2
    assert "error: saelens:gpt2-re/x: SAELens' table has no release" in capsys.readouterr().err
    assert run_main("interpret_sae", *flags, f"saelens:gpt2-res/{HOOK}") == 2
    assert f"SAE_PATH: saelens:gpt2-res/{HOOK} takes activations of 12" in capsys.readouterr().err


def test_the_table_of_sae_lens_itself():
    """Where it is installed: its releases of the kinds that are read name folders and files."""
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    registry._table.cache_clear()
    kinds = [about.get("conversion_func") for about in registry._table().values()]
    assert {kind for kind in kinds if kind in registry.READERS} >= set(registry.READERS) - {
        "sparsify"
    }
    repository, folder, kind = registry._entry(
        "saelens:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
    )
    assert (repository, kind) == ("google/gemma-scope-2b-pt-res", "gemma_scope")
    assert folder.startswith("layer_20/width_16k/average_l0_") and kind in FORMATS
