"""The table of formats that are read, and what adding one takes."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fastsae.formats import readers
from fastsae.formats.load import load_sae
from fastsae.formats.parts import Parts
from fastsae.runtime.errors import InputError


def test_every_reader_is_in_the_table():
    files = {path.stem for path in Path(readers.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(readers.FORMATS)
    for name, form in readers.FORMATS.items():
        reader = importlib.import_module(f"{readers.__name__}.{name}")
        assert callable(reader.read) and hasattr(reader, "holds") == bool(form.content)
        assert form.content or form.files  # or nothing could tell it
        assert form.library in readers.LIBRARIES


def test_a_format_is_a_file_and_a_line(tmp_path, monkeypatch):
    """A library that writes `up` (d, M) and `down` (M, d) to an .npz."""
    np.savez(tmp_path / "sae.npz", up=np.eye(3, 5), down=2 * np.eye(5, 3))
    with pytest.raises(InputError, match="not an autoencoder as Gemma Scope saves it"):
        load_sae(tmp_path / "sae.npz")

    def read(path, values):
        up, down = (torch.from_numpy(values[name]).float() for name in ("up", "down"))
        about = {"format": "new", "layer": 4}
        return Parts(up.t(), down, torch.zeros(5), torch.zeros(3), "standard", about=about)

    reader = ModuleType("new")
    reader.__dict__.update(holds=lambda values: {"up", "down"} == set(values), read=read)
    monkeypatch.setitem(sys.modules, f"{readers.__name__}.new", reader)
    monkeypatch.setitem(readers.FORMATS, "new", readers.Format("New", content="npz"))
    sae, meta = load_sae(tmp_path / "sae.npz")
    assert meta["activations"]["settings"]["LAYER_IDX"] == 4
    reconstruction, _ = sae(torch.tensor([[1.0, -2.0, 3.0]]))
    assert reconstruction.tolist() == [[2.0, 0.0, 6.0]]
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(InputError, match="as Gemma Scope or New saves it"):
        load_sae(tmp_path / "other.npz")
