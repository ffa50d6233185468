"""Damaged, foreign and hostile files are refused: no flipped bit, no cut and no pickle gives other
numbers or runs anything."""

import io
import pickle
import struct
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import torch
from sampling import points
from small import small

from fastsae.activations import files
from fastsae.formats import load as formats
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure

SMALL = small(m=8, n_epochs=1, run_name="r")


# Pickles


def reduce(module, name, *arguments):
    """A pickle, written by hand, that calls `module.name(*arguments)` when it is loaded."""
    given = "".join(f"V{argument}\n" for argument in arguments)
    return f"c{module}\n{name}\n({given}tR.".encode()


PAYLOADS = {  # what each would do: make a folder at the path
    "os.mkdir": lambda path: reduce("os", "mkdir", path),
    "os.system": lambda path: reduce("posix", "system", f"mkdir {path}"),
    "eval": lambda path: reduce("builtins", "eval", f"__import__('os').mkdir({str(path)!r})"),
    "exec": lambda path: reduce("builtins", "exec", f"import os; os.mkdir({str(path)!r})"),
    "subprocess": lambda path: reduce("subprocess", "getoutput", f"mkdir {path}"),
    "a method by a dotted name": lambda path: (
        b"\x80\x04"
        + b"\x8c\x02os\x8c\x05mkdir\x93"
        + b"\x8c"
        + bytes([len(str(path))])
        + str(path).encode()
        + b"\x85R."
    ),
    "runpy": lambda path: reduce("runpy", "run_path", f"{path}.py"),
    "a state that is set": lambda path: (
        b"ctorch._utils\n_rebuild_tensor\n0" + reduce("os", "mkdir", path)
    ),
}


def object_array(payload):
    """An .npz whose members are object arrays with that pickle."""
    member, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("activations.npy", member.getvalue() + payload)
        file.writestr("metadata.npy", member.getvalue() + payload)
    return archive.getvalue()


def torch_archive(payload, sealed=True):
    """A .pt as torch.save lays it out, with that pickle inside, and with our seal, which anybody
    can compute."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in (("data.pkl", payload), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"archive/{name}", content)
    content = archive.getvalue()[:-2]
    return content + (
        struct.pack("<H", 64) + sha256(content).hexdigest().encode() if sealed else b"\0\0"
    )


def write_canary_script(canary):
    canary.with_name(canary.name + ".py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_canary_sings(tmp_path, name):
    """Each payload does what it should where pickles are loaded, so that the next test cannot pass
    for want of one."""
    for i, load in enumerate(
        (
            pickle.loads,
            lambda p: np.load(io.BytesIO(object_array(p)), allow_pickle=True)["activations"],
            lambda p: torch.load(io.BytesIO(torch_archive(p)), weights_only=False),
        )
    ):
        canary = tmp_path / f"canary{i}"
        write_canary_script(canary)
        load(PAYLOADS[name](canary))
        assert canary.is_dir()


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_pickle_is_loaded(tmp_path, run_main, capsys, write_activations, tally, name):
    """As activations, as a checkpoint and as the state of an unfinished run, through the stages
    that read them."""
    canary = tmp_path / "canary"
    write_canary_script(canary)
    payload, npz = PAYLOADS[name](canary), tmp_path / "activations" / "activations_layer12.npz"
    npz.parent.mkdir()
    npz.write_bytes(object_array(payload))
    assert run_main("train_sae", "--output-dir", tmp_path) == 3
    run = tmp_path / "checkpoints" / "r"
    run.mkdir(parents=True)
    (run / "sae.pt").write_bytes(torch_archive(payload))
    (run / "metrics.json").write_text('{"checkpoint": "sae.pt"}')
    assert run_main("interpret_sae", "--output-dir", tmp_path, "--run-name", "r") == 3
    assert len(capsys.readouterr().err.splitlines()) == 2
    flags = write_activations(
        np.random.default_rng(0).standard_normal((60, 4)).astype(np.float16), 6 * [10]
    )
    (run / "SAE_M=8_K=2.resume.pt").write_bytes(torch_archive(payload))
    assert (
        run_main("train_sae", *flags, *SMALL) == 0 and "not continued: " in capsys.readouterr().out
    )
    assert not canary.exists()
    tally("pickles refused", 3)


def npy():
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [npy(), b"", b"no archive at all", torch_archive(b"}.", sealed=False), b"PK\5\6" + bytes(18)],
    ids=["npy", "empty", "foreign", "without seal", "empty archive"],
)
def test_foreign_files_are_refused(tmp_path, outcome, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    code, (line,) = outcome(lambda: artifacts.read_npz(path, ["activations"], made_by="make.py"))
    assert code == 3 and line.startswith(f"error: {path}: ") and line.endswith("run make.py.")
    code, (line,) = outcome(lambda: artifacts.read_checkpoint(path))
    assert (
        code == 3
        and line.startswith(f"error: {path}: ")
        and line.endswith("run train_sae.py.")
        and "delete" not in line
    )


@pytest.fixture
def rows(tmp_path):
    """Write an .npz with one member that is larger than a read buffer and one small one; returns
    its path."""
    path = tmp_path / "rows.npz"
    artifacts.write_npz(
        path,
        {
            "activations": np.arange(8000, dtype=np.int16).reshape(2000, 4),
            "seq_lengths": np.array([1500, 500], np.int32),
        },
    )
    return path


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"a": 1},
        [1],
        {"config": {}, "state_dict": {}, "meta": {"format": 1, "fingerprint": "f"}},
        {"config": {"input_dim": 1}, "state_dict": {}},
        {"meta": {"format": 0, "fingerprint": "f"}},
        {"meta": {"w": torch.ones(2)}},
    ],
)
def test_checkpoints_of_others_are_refused(tmp_path, checkpoint):
    artifacts.write_checkpoint(tmp_path / "a.pt", checkpoint)
    with pytest.raises(EnvironmentFailure, match="run train_sae.py"):
        formats.load_sae(tmp_path / "a.pt")
        pytest.fail("read as an autoencoder")
    if "config" not in checkpoint:
        with pytest.raises(EnvironmentFailure, match="run train_sae.py"):
            artifacts.read_checkpoint_metadata(tmp_path / "a.pt")


def test_an_npz_of_others_is_refused(rows):
    with pytest.raises(EnvironmentFailure, match=r"rows\.npz: has no member .*metadata"):
        artifacts.read_npz_metadata(rows)
    artifacts.write_npz(rows, {"metadata": np.array('{"format": 0, "fingerprint": "f"}')})
    with pytest.raises(EnvironmentFailure, match="is not of this version"):
        artifacts.read_npz_metadata(rows)


# Damage


def reads_as(kind, path, content):
    """What a file with this content reads as: None if it is refused, else the numbers and their
    names."""
    path.write_bytes(content)
    try:
        if kind == "npz":
            found = artifacts.read_npz(
                path, ["activations", "seq_lengths"], made_by="extract_activations.py"
            )
        elif kind == "mapped":
            found = files.open_activations(path)
            found.pop("metadata")
        else:
            found = artifacts.read_checkpoint(path)
            return {
                **found,
                "state_dict": {
                    name: tensor.tolist() for name, tensor in found["state_dict"].items()
                },
            }
        return {name: array.tolist() for name, array in found.items()}
    except EnvironmentFailure as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


@pytest.fixture
def small_files(tmp_path, write_activations):
    """{kind: a file of one or two kilobytes}: an .npz, a checkpoint, and an activations file as
    other stages map it."""
    artifacts.write_npz(
        tmp_path / "a.npz",
        {
            "activations": np.arange(480, dtype=np.int16).reshape(120, 4),
            "seq_lengths": np.array([50, 70]),
        },
    )
    artifacts.write_checkpoint(
        tmp_path / "a.pt",
        {"config": {"a": 1}, "state_dict": {"w": torch.arange(6.0)}, "meta": {"x": "y"}},
    )
    write_activations(np.arange(24, dtype=np.float16).reshape(6, 4), [2, 4])
    return {
        "npz": tmp_path / "a.npz",
        "pt": tmp_path / "a.pt",
        "mapped": tmp_path / "activations" / "activations_layer12.npz",
    }


@pytest.mark.sampled
@pytest.mark.parametrize("kind, step", [("npz", 1), ("pt", 1), ("mapped", 13)])
def test_no_flipped_bit_gives_other_numbers(small_files, tally, kind, step):
    path = small_files[kind]
    whole = path.read_bytes()
    expected, bits = reads_as(kind, path, whole), range(0, 8 * len(whole), step)
    assert expected is not None
    assert len(bits) >= (10_000 if step == 1 else 2000)
    chosen = points(bits, 400)
    for bit in chosen:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        assert reads_as(kind, path, changed) in (None, expected), bit
    name = "flipped bits (npz)" if kind != "pt" else "flipped bits (pt)"
    tally(name, len(chosen), len(bits))


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["npz", "pt", "mapped"])
def test_every_truncation_is_refused(small_files, tally, kind):
    path = small_files[kind]
    whole = path.read_bytes()
    sizes = range(0, len(whole), 5 if kind == "mapped" else 1)
    chosen = points(sizes, 100)
    for size in chosen:
        assert reads_as(kind, path, whole[:size]) is None, size
    tally("truncations", len(chosen), len(sizes))


@pytest.mark.sampled
def test_flips_beyond_a_read_buffer(rows, tally):
    whole = rows.read_bytes()
    expected, places = reads_as("npz", rows, whole), range(0, len(whole), 61)
    chosen = points(places, 60)
    for at in chosen:
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        assert reads_as("npz", rows, changed) in (None, expected), at
    tally("flipped bits (npz)", len(chosen), len(places))


@pytest.mark.parametrize(
    "old, new",
    [
        (b"(2000, 4)", b"(0000, 4)"),
        (b"(2000, 4)", b"(200 , 4)"),
        (b"(2000, 4)", b"(2000, 0)"),
        (b"NUMPY\x01\x00\xb5", b"NUMPY\x01\x00\xa5"),
    ],
)
def test_a_damaged_header_never_gives_fewer_rows(rows, old, new):
    whole = rows.read_bytes()
    assert old in whole
    assert reads_as("npz", rows, whole.replace(old, new, 1)) is None


def test_a_member_that_a_flipped_bit_hides(rows, run_main, write_activations, capsys, tmp_path):
    flags = write_activations(np.ones((4, 2), np.float16), [2, 2])
    path = tmp_path / "activations" / "activations_layer12.npz"
    whole = bytearray(path.read_bytes())
    # the length of the first entry's comment: it swallows the entries that follow
    whole[whole.index(b"PK\x01\x02") + 33] ^= 8
    path.write_bytes(whole)
    assert run_main("train_sae", *flags, *SMALL) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
