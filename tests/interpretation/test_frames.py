"""interpretations.csv in pandas."""

import builtins

import pytest

from fastsae.interpretation import frames, outputs, tables
from fastsae.runtime.errors import EnvironmentFailure, InputError

TEXTS = ["NA", "007", "null", "1e5", "True", 'a "b", c', "two\nlines", "=1+1"]


def row(number, text, value):
    words = dict.fromkeys(frames.WORDS, text)
    return {**dict.fromkeys(outputs.COLUMNS, value), **words, "feature": number}


def test_every_column_has_its_type(tmp_path):
    """Whatever is in it: labels that read as numbers or as nothing, and columns that are empty."""
    pandas = pytest.importorskip("pandas")
    rows = [row(i, text, i / 3) for i, text in enumerate(TEXTS)] + [row(len(TEXTS), None, None)]
    (tmp_path / outputs.CSV).write_text(tables.csv_text(rows, outputs.COLUMNS))
    table = frames.read_table(tmp_path)
    assert tuple(table.columns) == outputs.COLUMNS and set(frames.WORDS) < set(outputs.COLUMNS)
    assert [str(text) for text in table["label"][:-1]] == [*TEXTS[:-1], "'=1+1"]
    for name, kind in table.dtypes.items():
        if name in frames.WORDS:
            assert pandas.api.types.is_string_dtype(kind)
        else:
            assert kind == ("int64" if name == "feature" else "float64")
    assert table.drop(columns="feature").iloc[-1].isna().all()
    assert table["density"][1] == pytest.approx(1 / 3, rel=1e-5)
    assert frames.read_table(tmp_path / outputs.CSV).equals(table)


def test_no_table_and_no_pandas(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"interpretations.csv: not found. run interpret_sae.py"):
        frames.read_table(tmp_path)
    found = builtins.__import__

    def without(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentFailure, match="pip install pandas"):
        frames.read_table(tmp_path)
