"""Arrays of other programs: what is read of them, what is refused in one line, how they are split,
and the tables that stage 3 makes of their rows."""

import csv
import io
import json
import pickle
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import small

from fastsae.activations import files, foreign
from fastsae.interpretation import row_features
from fastsae.interpretation.frames import read_table
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.sae.autoencoder import new_sae
from fastsae.training.data import Tokens

X = (np.random.default_rng(0).standard_normal((40, 6)) * 3).astype(np.float32)


def bfloat16(x):
    """The bits (uint16) of float32 numbers, cut to bfloat16, and what they stand for."""
    bits = np.ascontiguousarray(x).view(np.uint32) >> 16
    return bits.astype(np.uint16), (bits << 16).astype(np.uint32).view(np.float32)


BITS, CUT = bfloat16(X)
ARRAYS = {  # what is saved, what is read
    "float32": (X, X),
    "float64": (X.astype(np.float64), X),
    "float16": (X.astype(np.float16), X.astype(np.float16)),
    "big-endian": (X.astype(">f4"), X),
    "bits of bfloat16": (BITS, CUT),
    "bfloat16 of ml_dtypes": (BITS.view("V2"), CUT),
}


def saved(path, x, how="npy", **more):
    if how == "npy":
        np.save(path.with_suffix(".npy"), x)
        return path.with_suffix(".npy")
    write = np.savez if how == "npz" else np.savez_compressed
    write(path.with_suffix(".npz"), x=x, **more)
    return path.with_suffix(".npz")


@pytest.mark.parametrize("how", ["npy", "npz", "compressed"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_read_where_they_lie(tmp_path, kind, how):
    given, expected = ARRAYS[kind]
    data = files.open_activations(saved(tmp_path / "a", given, how))
    rows = data["activations"]
    assert rows.shape == X.shape and rows.dtype == expected.dtype and rows.dtype.isnative
    assert isinstance(rows.parts[0], np.memmap) == (how != "compressed")
    for index in (slice(3, 20), np.array([5, 1, 39]), 7, X[:, 0] > 0):
        assert np.array_equal(rows[index], expected[index])
    assert data["seq_lengths"].tolist() == [1] * 40 and data["example_ids"][-1] == 40
    about = json.loads(str(data["metadata"]))
    assert about["n_examples"] == 40 and about["d_model"] == 6 and about["model_name"] is None


class Exploding:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


BAD = {
    "one dimension": (X[:, 0], "has the shape (40,). save it with"),
    "three": (X.reshape(4, 10, 6), "has three dimensions (4, 10, 6). join the tokens"),
    "no dimension": (np.float32(1), "has the shape (). save it with"),
    "integers": (np.arange(80).reshape(40, 2), "holds int64, not floats."),
    "booleans": (X > 0, "holds bool, not floats."),
    "complex": (X.astype(complex), "holds complex128, not floats."),
    "texts": (np.array([["a", "b"]] * 4), "holds <U1, not floats."),
    "structured": (np.zeros((4, 2), [("a", "f4")]), "holds [('a', '<f4')], not floats."),
    "long": (X.astype(np.longdouble), "holds float128. save it"),
    "columns": (np.asfortranarray(X), "is stored column by column (Fortran's order). save numpy."),
    "one row": (X[:1], "has the shape (1, 6): at least two rows"),
    "no rows": (X[:0], "has the shape (0, 6): at least two rows"),
    "other bits": (
        np.random.default_rng(0).integers(0, 300, (40, 6)).astype(np.uint16),
        "whose bits are no bfloat16 of activations. save",
    ),
}


@pytest.mark.parametrize("how", ["npy", "npz"])
@pytest.mark.parametrize("kind", [*BAD, "objects"])
def test_what_is_no_array_of_activations_is_one_line(tmp_path, outcome, kind, how):
    x, what = BAD.get(kind, (None, "holds Python objects, which are never unpickled. save"))
    if kind == "objects":
        x = np.array([[Exploding(), 1.0]] * 3, object)
    path = saved(tmp_path / "a", x, how)
    code, (line,) = outcome(lambda: files.open_activations(path))
    assert code == 2 and line.startswith(f"error: {path}") and what in line and line.isprintable()


def test_several_arrays_are_told_apart_by_their_names(tmp_path, outcome):
    path = saved(tmp_path / "a", X, "npz", other=X[:5], n=np.arange(40), m=np.array({1}, object))
    code, (line,) = outcome(lambda: files.read_metadata(path))
    assert code == 2 and line == (
        f"error: {path}: holds several arrays: x (40, 6) float32, other (5, 6) float32, n (40,) "
        f"int64, m () object. name one: --activations-path {path}:x."
    )
    named = [files.open_activations(f"{path}:{name}")["activations"] for name in ("x", "other")]
    assert [len(rows) for rows in named] == [40, 5]
    fingerprints = {files.read_metadata(f"{path}:{name}")["fingerprint"] for name in ("x", "other")}
    assert len(fingerprints) == 2
    for name, what in (("y", "has no array y. it has: x (40, 6)"), ("n", "has the shape (40,)")):
        assert what in outcome(lambda name=name: files.read_metadata(f"{path}:{name}"))[1][0]
    np.savez(tmp_path / "b.npz", a=np.arange(3), b=np.arange(4))
    _, (line,) = outcome(lambda: files.read_metadata(tmp_path / "b.npz"))
    assert "holds no array (rows, width) of floats: a (3,) int64, b (4,) int64. save" in line


def test_damage_is_one_line(tmp_path, outcome):
    whole = {how: saved(tmp_path / "a", X, how).read_bytes() for how in ("npy", "npz")}
    for how, content in whole.items():
        path = tmp_path / f"b.{how}"
        changed = bytearray(content)
        changed[400] ^= 1
        contents = [content[:n] for n in (0, 4, 60, 200, len(content) - 9)] + [b"[1, 2]\n"]
        contents += [bytes(changed)] if how == "npz" else [content + b"\0"]
        for content in contents:
            path.write_bytes(content)
            code, (line,) = outcome(lambda path=path: files.open_activations(path))
            assert code == 2 and line.startswith(f"error: {path}: ")
            assert "numpy.sav" in line and "extract_activations" not in line
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Exploding()))
    assert outcome(lambda: files.open_activations(tmp_path / "c.npy"))[0] == 2


@pytest.mark.parametrize("how", ["npy", "npz", "compressed"])
def test_mutated_arrays_meet_the_documented_errors_only(tmp_path, how):
    whole = saved(tmp_path / "a", X[:6], how, **({} if how == "npy" else {"groups": np.arange(6)}))
    content, n_refused = whole.read_bytes(), 0
    path = tmp_path / f"b{whole.suffix}"
    for i in range(150):
        chosen, changed = random.Random(f"{how} {i}"), bytearray(content)
        for _ in range(1 + i % 3):
            at = chosen.randrange(len(changed))
            changed[at : at + chosen.randrange(3)] = chosen.randbytes(chosen.randrange(3))
        path.write_bytes(changed[: chosen.randrange(len(changed))] if i % 5 == 0 else changed)
        try:
            files.open_activations(path)["activations"][:]
        except (InputError, EnvironmentFailure) as error:
            n_refused += 1
            assert ". " in str(error) and str(error).isprintable()
    assert n_refused >= 75


def test_the_files_of_stage_1_are_not_taken_for_others(tmp_path, write_activations):
    write_activations(np.ones((4, 2), np.float16), [2, 2])
    path = tmp_path / "activations" / "activations_layer12.npz"
    assert not foreign.is_foreign(path)
    np.savez(path, x=X)
    assert not foreign.is_foreign(path)  # what lies there and is not of stage 1 is refused
    with pytest.raises((InputError, EnvironmentFailure)):
        files.read_metadata(path)
    path = tmp_path / "copied" / path.name
    path.parent.mkdir()
    assert not foreign.is_foreign(path)  # its shards may be there
    path.write_bytes(b"PK damaged")
    with pytest.raises(EnvironmentFailure, match=r"run extract_activations\.py"):
        files.read_metadata(path)


def tokens_of(path, **how):
    given = {"validation_fraction": 0.2, "test_fraction": 0.2, "seed": 0, "use": "all"}
    return Tokens(path, exclude_shared_prefix=True, max_norm_ratio=None, **given | how)


@pytest.mark.parametrize(
    "groups", [np.arange(40) % 10, np.array([f"g{i % 10}" for i in range(40)])]
)
def test_rows_of_a_group_are_in_one_part(tmp_path, groups):
    path = saved(tmp_path / "a", X, "npz", groups=groups)
    part = tokens_of(path).part
    assert sorted(set(part)) == [0, 1, 2] and len(part) == 40
    assert all(len(set(part[groups == group])) == 1 for group in set(groups.tolist()))
    assert np.bincount(part).tolist() == [24, 8, 8]
    alone = tokens_of(saved(tmp_path / "b", X)).part
    assert any(len(set(alone[groups == group])) > 1 for group in set(groups.tolist()))


@pytest.mark.parametrize("groups", [np.arange(39), np.zeros((40, 1)), np.array([{}] * 40, object)])
def test_groups_that_fit_no_rows(tmp_path, groups):
    path = saved(tmp_path / "a", X, "npz", groups=groups)
    with pytest.raises(InputError, match=re.escape(f"{path}: its groups are ({len(groups)},")):
        tokens_of(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_rows_that_are_no_numbers(tmp_path, outcome, value):
    x = X.astype(np.float64)
    x[7, 2] = value
    path = saved(tmp_path / "a", x)
    code, lines = outcome(lambda: tokens_of(path))
    assert (code, lines) == (
        2,
        [f"error: {path}: row 7 holds NaN or infinity, or is too long. leave such rows out."],
    )


def autoencoder(m=9, k=3):
    torch.manual_seed(0)
    return new_sae({"input_dim": 6, "m_total_neurons": m, "k_active_neurons": k}).eval()


def test_the_pass_over_the_rows_equals_a_dense_one(monkeypatch):
    sae, bound = autoencoder(), float(np.quantile(np.linalg.norm(X, axis=1), 0.9))
    monkeypatch.setattr(row_features, "BLOCK_TOKENS", 7)
    found = row_features.collect(sae, X, max_norm=bound)
    kept = np.flatnonzero(np.linalg.norm(X, axis=1) <= bound)
    dense = np.zeros((40, 9), np.float32)
    dense[kept] = row_features.encode_rows(sae, torch.from_numpy(X[kept])).toarray()
    assert found.n_kept == len(kept) == 36 and (found.count == (dense > 0).sum(0)).all()
    assert np.allclose(found.total, dense.sum(0)) and np.allclose(found.maximum, dense.max(0))
    assert np.array_equal(found.pooled.toarray(), dense[found.pooled_rows])
    assert found.pooled_rows.tolist() == kept.tolist()
    texts = [f"text {i}" for i in range(1, 41)]
    for j, row in enumerate(row_features.feature_rows(found, texts, (3, 9))):
        order = [i for i in np.argsort(-dense[:, j], kind="stable") if dense[i, j] > 0][:5]
        assert row["top_rows"] == [i + 1 for i in order]
        assert np.allclose(row["top_values"], dense[order, j])
        assert row["matryoshka_level"] == ("coarse" if j < 3 else "fine")
        if order:
            assert row["top_example_1"].endswith(f": text {order[0] + 1}")


@pytest.mark.parametrize(
    "content, field, what",
    [
        ("topic\na\n\nb\n", "topic", ["a", "b"]),
        ('topic\na\n""\n', "topic", ["a", None]),
        ("topic\na\n", "topic", "DATASET_PATH: {} has 1 rows, the array 2. give one for each."),
        ("topic\na\nb\n", "kind", "{}:1: has no column kind (its first line: topic). name"),
        ("topic,b\na,1\nb\n", "topic", "{}: row 2 (line 3): has 1 cells, the header 2. put"),
    ],
)
def test_a_table_of_the_rows(tmp_path, outcome, content, field, what):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    found = []

    def read():
        found.extend(row_features.column(str(path), field, 2, None, "LABEL_FIELD"))

    code, lines = outcome(read)
    if isinstance(what, list):
        assert (code, found) == (0, what)
    else:
        assert code == 2 and lines[0].startswith("error: " + what.format(path))


@pytest.mark.parametrize(
    "name, rows, labels, texts",
    [
        ("r.jsonl", '{"topic": 1}\n{"topic": 2}\n', ["1", "2"], None),
        ("r.csv", "text,topic\none,1\ntwo,2\n", ["1", "2"], ["one", "two"]),
        ("r.txt", "one\ntwo\n", None, ["one", "two"]),
    ],
)
def test_what_a_table_says_of_the_rows(tmp_path, name, rows, labels, texts):
    (tmp_path / name).write_text(rows)
    settings = SimpleNamespace(
        DATASET_PATH=str(tmp_path / name),
        LABEL_FIELD="topic" if labels else None,
        TEXT_FIELD="text",
        source={"DATASET_PATH": "flag", "LABEL_FIELD": "flag"},
    )
    assert row_features.row_table(settings, 2, None) == (labels, texts)


def test_stages_2_and_3_with_an_array_alone(tmp_path, run_main, capsys):
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 2, 300)
    x = generator.standard_normal((300, 6)) + 6 * kind[:, None] * np.eye(6)[0]
    path = saved(tmp_path / "mine", x, "npz", groups=np.arange(300) // 3)
    (tmp_path / "rows.csv").write_text(
        "kind,text\n" + "".join(f"k{k},=row {i}\n" for i, k in enumerate(kind))
    )
    shared = ["--activations-path", path, "--output-dir", tmp_path / "out", "--run-name", "r"]
    assert run_main("train_sae", *small(batch_size=64), *shared) == 0
    out = capsys.readouterr().out
    assert f"activations: 300 rows of 6 numbers of {path}" in out
    folder = tmp_path / "out" / "checkpoints" / "r"
    assert not (folder / "README.md").exists() and (folder / "metrics.json").exists()
    flags = [*shared, "--device", "cpu"]
    assert run_main("interpret_sae", *flags) == 0
    first = (tmp_path / "out" / "interpretations.csv").read_text()
    table = ["--dataset-path", tmp_path / "rows.csv", "--label-field", "kind"]
    capsys.readouterr()
    assert run_main("interpret_sae", *flags, *table) == 0
    assert "separate one better than chance" in capsys.readouterr().out
    text = (tmp_path / "out" / "interpretations.csv").read_text()
    rows, before = (list(csv.DictReader(io.StringIO(each))) for each in (text, first))
    assert len(rows) == 16 and {row["best_category"] for row in rows} & {"k0", "k1"}
    assert [row["density"] for row in rows] == [row["density"] for row in before]
    top = next(row for row in rows if row["top_example_1"])["top_example_1"]
    number = int(top.split(" ")[1])
    assert top.startswith("row ") and top.endswith(f": =row {number - 1}")
    pandas = pytest.importorskip("pandas")
    assert isinstance(read_table(tmp_path / "out").density.sum(), float) and pandas
    assert run_main("interpret_sae", *flags, *table) == 0
    assert "up to date: " in capsys.readouterr().out
    np.savez(path, x=x + 1, groups=np.arange(300))
    assert run_main("interpret_sae", *flags) == 2
    assert "was trained on other activations than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, flags, what",
    [
        ("train_sae", ["nowhere.npy"], "ACTIVATIONS_PATH: "),
        ("train_sae", ["a.npy", "--export", "saelens"], "EXPORT: other libraries name the place"),
        ("train_sae", ["a.npy", "--stream-bytes", "9"], "STREAM_BYTES: an array of another"),
        ("interpret_sae", ["a.npy", "--target-value", "x"], "TARGET_VALUE: needs texts, and"),
        ("extract_activations", ["a.npy"], "ACTIVATIONS_PATH: stage 1 makes activations and"),
    ],
)
def test_settings_that_an_array_has_no_use_for(tmp_path, run_main, capsys, script, flags, what):
    np.save(tmp_path / "a.npy", X)
    path = tmp_path / flags[0]
    with pytest.raises(SystemExit, match="2"):
        run_main(script, "--activations-path", path, "--output-dir", tmp_path, *flags[1:])
    assert f"error: {what}" in capsys.readouterr().err
