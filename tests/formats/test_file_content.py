"""Files of weights are judged by what is in them, HypotheSAEs' own are read, and errors of the
machine are no damage."""

import errno
import io
import lzma
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import planted_tokens, read_table
from safetensors.torch import save
from test_formats import (
    D,
    K,
    M,
    dense,
    dictionary_folder,
    dictionary_state,
    saelens_folder,
    saved,
    tokens,
    trained,
)

from fastsae.activations import files
from fastsae.formats import detect, source
from fastsae.formats.load import load_sae
from fastsae.runtime import artifacts, machine_errors, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.training.fine_tuning import check_start

VARIANTS = {
    "plain": {},
    "matryoshka": {"prefix_lengths": [10, M]},
    "batchtopk": {"use_batch_topk": True},
    "multi-k": {"multi_k": 16},
    "all": {"prefix_lengths": [10, M], "use_batch_topk": True, "multi_k": 16},
}


def hypothesaes(path, **variant):
    """An autoencoder of HypotheSAEs, random in every weight, saved at `path` by its own `save`."""
    from hypothesaes.sae import SparseAutoencoder

    torch.manual_seed(5)
    module = SparseAutoencoder(D, M, K, device="cpu", **variant).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else 1))
        module.threshold.fill_(2.5 if variant.get("use_batch_topk") else 0)
    module.save(str(path))
    return module


# HypotheSAEs' own files


@pytest.mark.parametrize("name", VARIANTS)
def test_what_hypothesaes_saves_computes_the_same_here(tmp_path, name):
    theirs, x = hypothesaes(tmp_path / "SAE_M=40_K=4.pt", **VARIANTS[name]), tokens()
    with torch.no_grad():
        reconstruction, info = theirs(x)
    ours, meta = load_sae(tmp_path / "SAE_M=40_K=4.pt")
    features, found = dense(ours, x)
    torch.testing.assert_close(features, info["activations"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, reconstruction, rtol=1e-4, atol=1e-4)
    assert torch.equal(features > 0, info["activations"] > 0) and (features > 0).any()
    assert (
        ours.prefix_lengths == VARIANTS[name].get("prefix_lengths") and meta["settings"]["K"] == K
    )
    assert (
        meta["source"]["format"] == "hypothesaes"
        and meta["activations"]["settings"]["LAYER_IDX"] is None
    )
    assert meta["fingerprint"] == source.locate(tmp_path / "SAE_M=40_K=4.pt").sha256()


def test_one_saved_before_batchtopk(tmp_path):
    """Its config and state know neither use_batch_topk nor a threshold."""
    theirs = hypothesaes(tmp_path / "new.pt")
    values = torch.load(tmp_path / "new.pt")
    del (
        values["config"]["use_batch_topk"],
        values["config"]["multi_k"],
        values["state_dict"]["threshold"],
    )
    torch.save(values, tmp_path / "old.pt")
    features = dense(load_sae(tmp_path / "old.pt")[0], tokens())[0]
    torch.testing.assert_close(
        features, theirs(tokens())[1]["activations"].detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_active_neurons": 41}, "k 41 is not from 1 to 40"),
        ({"k_active_neurons": "4"}, "k_active_neurons: expected int, got '4'"),
        ({"input_dim": 13}, r"encoder.weight has shape \(40, 12\), not \(40, 13\)"),
        ({"m_total_neurons": None}, "m_total_neurons is missing"),
        ({"prefix_lengths": [10, 5]}, "prefix_lengths .* do not rise to 40"),
        ({"power": 2}, "config holds power, which HypotheSAEs does not write"),
        ({"use_batch_topk": 1}, "use_batch_topk: expected bool, got '1'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    hypothesaes(tmp_path / "a.pt")
    values = torch.load(tmp_path / "a.pt")
    values["config"] |= change
    torch.save(values, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path / "a.pt")


def test_hypothesaes_pickles_run_no_code(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    for i, values in enumerate(
        (
            {"config": Payload(), "state_dict": {}},
            {"config": {}, "state_dict": {"encoder.weight": Payload()}},
        )
    ):
        torch.save(values, tmp_path / f"{i}.pt", pickle_module=pickle)
        with pytest.raises(EnvironmentFailure, match="no pickled code is run"):
            load_sae(tmp_path / f"{i}.pt")
    assert not (tmp_path / "canary").exists()


def test_training_starts_from_hypothesaes(tmp_path, write_activations, run_main, capsys):
    values, _ = planted_tokens(300, D, M, K)
    theirs = tmp_path / "theirs.pt"
    hypothesaes(theirs)
    flags = [
        *write_activations(values, [10] * 30),
        "--m",
        M,
        "--k",
        K,
        "--matryoshka-prefixes=none",
        "--device",
        "cpu",
        "--run-name",
        "r",
        "--n-epochs",
        1,
        "--batch-size",
        64,
        "--init-from",
        theirs,
    ]
    assert (
        run_main("train_sae", *flags) == 0
        and f"starting from {theirs} (topk)" in capsys.readouterr().out
    )
    assert run_main("train_sae", *flags) == 0 and "up to date" in capsys.readouterr().out
    hypothesaes(theirs, use_batch_topk=True)
    assert run_main("train_sae", *flags) == 2
    assert "is batchtopk, from which topk cannot start" in capsys.readouterr().err
    with pytest.raises(InputError, match="give --m 40"):
        check_start("path", load_sae(theirs)[0], "batchtopk", d=D, m=M + 1, k=K)


def test_stage_3_reads_hypothesaes(tmp_path, planted, run_main, capsys):
    """The run's own weights, saved by HypotheSAEs, give the same table."""
    from hypothesaes.sae import load_model

    checkpoint = next((tmp_path / "checkpoints" / "test").glob("SAE*.pt"))
    theirs = tmp_path / "theirs.pt"
    load_model(str(checkpoint), "cpu").save(str(theirs))
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 0) == 0
    own = read_table(tmp_path)
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 0, "--sae-path", theirs) == 0
    assert read_table(tmp_path) == own and "does not say which layer" in capsys.readouterr().out


# Whatever else a file may be


def written(path, content):
    path.write_bytes(content)
    return path


def of_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as found:
        for name, content in members.items():
            found.writestr(name, content)
    return file.getvalue()


NOT_OURS = {  # name: (content, what is said of it)
    "empty": (b"", "is empty"),
    "text": (b"The weights are on my other disk.\n", "is a text, not the weights"),
    "html": (b"<!DOCTYPE html><title>404</title>", "is a text, not the weights"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "safetensors": (
        save({"W_enc": torch.ones(2, 3)}),
        "give the library's folder, with its cfg.json",
    ),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "is a language model"),
    "noise": (bytes(range(200, 256)) * 9, "is not a file that is known"),
    "zip": (archive(readme="x"), "is a zip archive without weights"),
    "part": (of_torch({"a": torch.ones(99)})[:700], "a part of a file"),
    "tensor": (of_torch(torch.ones(3)), "holds Tensor, not an autoencoder"),
    "list": (of_torch([1, 2]), "holds list"),
    "module": (of_torch(torch.nn.Linear(2, 3)), "holds more than tensors"),
    "pickle": (b"\x80\x04}.", "holds"),
    "other tensors": (
        of_torch({"fc.weight": torch.ones(2, 3)}),
        "encoder.weight is missing; there are fc.weight",
    ),
    "state of text": (
        of_torch({"config": {}, "state_dict": {"a": "b"}}),
        "is not as HypotheSAEs saves",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("name", NOT_OURS)
def test_a_file_is_judged_by_its_content(tmp_path, outcome, name, suffix):
    content, said = NOT_OURS[name]
    path = written(tmp_path / f"SAE{suffix}", content)
    code, (line,) = outcome(lambda: load_sae(path))
    assert line.startswith(f"error: {path}: ") and said in line and "delete" not in line
    assert code == (3 if name in ("part", "module", "pickle") else 2)


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"]
)
def test_dictionary_learning_under_any_name(tmp_path, kind):
    folder = dictionary_folder(tmp_path / "ae", kind)
    (folder / "ae.pt").rename(tmp_path / "best.pt")
    (folder / "config.json").rename(tmp_path / "config.json")  # of whatever else lies there
    named, x = load_sae(tmp_path / "best.pt")[0], tokens()
    again = load_sae(dictionary_folder(tmp_path / "again", kind))[0]
    assert torch.equal(dense(named, x)[0], dense(again, x)[0])


def test_a_npz_and_a_checkpoint_under_any_name(tmp_path):
    state = dictionary_state("JumpReluAutoEncoder")
    np.savez(tmp_path / "params.npz", **{name: value.numpy() for name, value in state.items()})
    (tmp_path / "params.npz").rename(tmp_path / "scope.pt")
    assert load_sae(tmp_path / "scope.pt")[1]["source"]["format"] == "gemma scope"
    path, sae = saved(tmp_path, "topk")
    for name in ("mine.ckpt", "ae.pt", "params.npz", "no suffix"):
        (tmp_path / name).write_bytes(path.read_bytes())
        loaded, meta = load_sae(tmp_path / name)
        assert "source" not in meta and torch.equal(loaded.encoder.weight, sae.encoder.weight)


def test_a_checkpoint_that_was_damaged_cut_or_saved_again(tmp_path, outcome):
    path, _ = saved(tmp_path, "topk")
    whole = path.read_bytes()
    for content, said in (
        (
            whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
            "damaged, its checksum is another",
        ),
        (whole[:-1], "without its checksum"),
        (whole[:-500], "a part of a file"),
        (whole[:-66] + b"\0\0", "without its checksum"),
        (whole[:-1] + b"\xff", "without its checksum"),
    ):
        path.write_bytes(content)
        code, (line,) = outcome(lambda: load_sae(path))
        assert code == 3 and said in line and "delete" not in line
        with pytest.raises(EnvironmentFailure, match=r"run train_sae\.py\.$"):
            artifacts.read_checkpoint(path)


def test_a_folder_of_files_says_which(tmp_path):
    hypothesaes(tmp_path / "SAE_M=40_K=4.pt")
    with pytest.raises(InputError, match=r"files in it are: SAE_M=40_K=4\.pt\. give one of them"):
        load_sae(tmp_path)


# Errors of the machine are no damage

NUMBERS = (
    errno.EMFILE,
    errno.EIO,
    errno.EACCES,
    errno.ENOENT,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTCONN,
)


def refuse(monkeypatch, path, number):
    """Let opening `path` fail with that number, through `open`, pathlib and zipfile alike."""
    plain = io.open

    def fail(file, *args, **kwargs):
        if str(file) == str(path):
            raise OSError(number, os.strerror(number), str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", fail)
    monkeypatch.setattr("builtins.open", fail)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "reader", ["npz", "mapped", "checkpoint", "load_sae", "hypothesaes", "gemma scope", "config"]
)
def test_errors_of_the_machine_are_no_damage(
    tmp_path, outcome, monkeypatch, write_activations, reader, number
):
    if reader in ("npz", "mapped"):
        write_activations(np.ones((4, 2), np.float16), [2, 2])
        path = tmp_path / "activations" / "activations_layer12.npz"
        read = {"npz": artifacts.read_npz_metadata, "mapped": files.open_activations}[reader]
    elif reader in ("checkpoint", "load_sae"):
        path, read = (
            saved(tmp_path, "topk")[0],
            {"checkpoint": artifacts.read_checkpoint, "load_sae": load_sae}[reader],
        )
    else:
        path, read = (
            tmp_path
            / {"hypothesaes": "a.pt", "gemma scope": "params.npz", "config": "s/cfg.json"}[reader],
            load_sae,
        )
        if reader == "hypothesaes":
            hypothesaes(path)
        elif reader == "config":
            saelens_folder(tmp_path / "s", trained("standard"))
        else:
            np.savez(
                path,
                **{
                    name: value.numpy()
                    for name, value in dictionary_state("JumpReluAutoEncoder").items()
                },
            )
    given = path.parent if reader == "config" else path
    assert outcome(lambda: read(given) and None) == (0, [])
    refuse(monkeypatch, path, number)
    code, (line,) = outcome(lambda: read(given))
    missing = reader == "config" and number == errno.ENOENT  # that is a folder without its cfg.json
    assert code == (2 if missing else 3) and line.startswith(f"error: {path}: ")
    assert "damaged" not in line and "delete" not in line
    assert missing or os.strerror(number) in line


def test_no_more_files_can_be_opened(tmp_path, outcome):
    """The system's own limit, which the Rust code of safetensors meets as well."""
    folder, (path, _) = saelens_folder(tmp_path / "s", trained("standard")), saved(tmp_path, "topk")
    for given in (folder, path):
        load_sae(given)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

        def read(given=given, soft=soft, hard=hard):
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                load_sae(given)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        code, (line,) = outcome(read)
        assert (
            code == 3
            and "Too many open files" in line
            and "damaged" not in line
            and "ulimit -n" in line
        )


@pytest.mark.parametrize(
    "error",
    [
        OverflowError("Python int too large to convert to C ssize_t"),
        lzma.LZMAError("Corrupt input data"),
        struct.error("unpack requires a buffer of 16 bytes"),
        OSError("Invalid data stream"),
    ],
)
def test_whatever_a_decompressor_raises_is_damage(tmp_path, monkeypatch, error):
    """As a mutated archive made zipfile raise; an OSError with a number is the machine's."""

    def fail(archive):
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(EnvironmentFailure, match="a.pt: damaged"):
        artifacts.read_foreign_checkpoint(tmp_path / "a.pt")
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        artifacts.read_foreign_checkpoint(tmp_path / "a.pt")


def test_out_of_memory_is_no_damage(tmp_path, outcome, monkeypatch):
    path, _ = saved(tmp_path, "topk")
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        OSError(errno.EMFILE, "Too many open files"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fail)
        code, (line,) = outcome(lambda: load_sae(path))
        assert code == 3 and "damaged" not in line and "not a plain checkpoint" not in line


# A file that may not grow


def test_a_file_that_may_not_grow_names_shard_bytes(tmp_path, outcome):
    """As on FAT32 at 4 GB: the system's own limit on the size of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            artifacts.write_npz(
                tmp_path / "activations" / "a.npz", {"activations": np.ones((100_000, 4))}
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    code, (line,) = outcome(write)
    assert code == 3 and line.startswith(
        f"error: {tmp_path / 'activations' / 'a.npz'}: File too large. "
    )
    assert (
        "SHARD_BYTES" in line and "FAT32" in line and not list((tmp_path / "activations").iterdir())
    )


def test_a_file_that_is_not_in_shards_has_another_remedy():
    error = OSError(errno.EFBIG, "File too large", "/o/SAE.pt")
    assert "ulimit -f" in machine_errors.remedy(error)
    assert "SHARD_BYTES" not in machine_errors.remedy(error)
    assert machine_errors.remedy(OSError(errno.ENOENT, "x")) is None  # of no file: a bug


@pytest.mark.parametrize("number", sorted(machine_errors.NUMBERS), ids=errno.errorcode.get)
def test_every_error_of_the_machine_has_a_remedy(tmp_path, outcome, monkeypatch, number):
    def fail(operation, path):
        if operation == "write":
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "watch", fail)
    code, (line,) = outcome(lambda: artifacts.write_text(tmp_path / "a.txt", "x"))
    assert code == 3 and line.startswith(f"error: {tmp_path / 'a.txt'}: {os.strerror(number)}. ")


def test_the_kind_is_known_without_torch(tmp_path):
    import subprocess
    import sys

    hypothesaes(tmp_path / "a.pt")
    path = str(tmp_path / "a.pt")
    code = (
        "import sys; from fastsae.formats.source import locate\n"
        f"print(locate({path!r}).kind, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(detect.__file__).parents[2],
    )
    assert done.stdout.split() == ["torch", "False"], done.stderr


# JSON files that somebody edited


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff{", b"", b"[1]", b"5"]
)
def test_json_that_was_edited_ends_in_one_line(tmp_path, outcome, content):
    """metrics.json of a run, cfg.json of SAELens and sparsify, config.json of
    dictionary_learning."""
    saelens, run = saelens_folder(tmp_path / "s", trained("standard")), tmp_path / "run"
    learned = dictionary_folder(tmp_path / "ae", "AutoEncoder")
    run.mkdir()
    for path in (saelens / "cfg.json", learned / "config.json", run / "metrics.json"):
        path.write_bytes(content)
        code, (line,) = outcome(lambda path=path: load_sae(path.parent))
        assert code in (2, 3) and line.startswith(f"error: {path}: ")
        assert "delete" not in line and "damaged" not in line
