"""What a path given as an autoencoder stands for: its format and files, loaded and hashed.

Known are checkpoints of this project, folders of SAELens (cfg.json and sae_weights.safetensors), of
sparsify (cfg.json and sae.safetensors) and of dictionary_learning (ae.pt, config.json), Gemma
Scope's params.npz, and files of HypotheSAEs. Importing this module loads no torch, so that an
up-to-date run ends quickly.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.formats import detect
from fastsae.runtime import artifacts
from fastsae.runtime.digests import Held
from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    from fastsae.formats.parts import Parts

FILES = {
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
    # the first one tells the format
    "dictionary_learning": ("ae.pt", "config.json"),
    "gemma scope": ("params.npz",),
}
# of the content of a single file
FORMAT_OF = {"fastsae": "fastsae", "torch": "torch", "npz": "gemma scope"}


@dataclass(frozen=True)
class Source:
    """An autoencoder on the disk, not read yet. `files`: its weights first, then its settings."""

    path: Path  # as it was given
    kind: str  # fastsae, torch, saelens, sparsify or gemma scope
    files: tuple[Path, ...]

    def sha256(self) -> str:
        """sha256 (hex) over the files' content, independent of where they lie."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.suffix} {artifacts.file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """What `load` gives as the metadata's fingerprint, without loading the weights."""
        if self.kind == "fastsae":
            return artifacts.read_checkpoint_metadata(self.files[0])["fingerprint"]
        return self.sha256()

    def load(self, device: str = "cpu") -> tuple[Any, dict]:
        """(sae, meta), for inference.

        Of another library's, meta has the keys of a checkpoint's, as far as they can be known:
        `meta["activations"]["settings"]["LAYER_IDX"]` is None where the files do not name a layer,
        `meta["settings"]["K"]` is None where the number of active features is not fixed
        (`sae.k_active_neurons` is then only a guess for sizes, see `load.fit`).

        Raises EnvironmentFailure if a file is damaged or changes meanwhile, InputError if it holds
        what this project cannot compute exactly.
        """
        if self.kind == "fastsae":
            from fastsae.sae.autoencoder import load_checkpoint

            return load_checkpoint(self.files[0], device)
        from fastsae.formats import readers

        held = Held(self.files)
        parts = readers.READERS[self.kind](self.files[0])
        found = parts.as_module(device), self._metadata(parts)
        held.require_unchanged()
        return found

    def _metadata(self, parts: "Parts") -> dict:
        return {
            "format": artifacts.FORMAT,
            "stage": "imported autoencoder",
            "fingerprint": self.sha256(),
            "inputs": {},
            "settings": {
                "ARCHITECTURE": parts.architecture,
                "M": len(parts.w_enc),
                "K": parts.k,
                "MATRYOSHKA_PREFIXES": parts.prefixes,
                "EXCLUDE_SHARED_PREFIX": True,
            },
            "activations": {
                "model_name": parts.about.get("model_name"),
                "model_revision": None,
                "settings": {"LAYER_IDX": parts.about.get("layer")},
            },
            "max_norm": None,
            "validation_examples": [],
            "test_examples": [],
            "metrics": {},
            "source": {**parts.about, "path": str(self.path)},
        }


def locate(path: str | Path) -> Source:
    """The autoencoder at `path`, a folder or one of its files.

    A file is judged by its content, unless its name and its neighbours make it one of FILES;
    "torch" is what torch.save wrote elsewhere. A run's folder stands for the checkpoint that its
    metrics.json names. Raises InputError where nothing is known.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: not found. give a checkpoint (.pt) or the folder of an autoencoder."
        )
    folder = path.parent if path.is_file() else path
    if path.is_file() and not _is_of_folder(path):
        return Source(path, FORMAT_OF[detect.kind_of(path)], _with_neighbours(path))
    for kind, names in FILES.items():
        weights = folder / names[0]
        if weights.is_file() and (folder == path or path.name in names):
            if kind in ("dictionary_learning", "gemma scope"):
                return Source(path, FORMAT_OF[detect.kind_of(weights)], _with_neighbours(weights))
            there = tuple(folder / name for name in names if (folder / name).is_file())
            return Source(path, kind, there)
    if (metrics := folder / "metrics.json").is_file() and folder == path:
        checkpoint = folder / _named_checkpoint(metrics)
        if not checkpoint.is_file():
            raise InputError(
                f"{checkpoint}: not found, though {metrics} names it. give the .pt file itself."
            )
        return Source(path, "fastsae", (checkpoint,))
    raise InputError(f"{path}: holds no autoencoder; {_what_there_is(folder)}.")


def _is_of_folder(path: Path) -> bool:
    """Whether a file stands for its folder: the weights or the settings of a format that keeps
    both."""
    named = any(
        path.name in names[:2] and (path.parent / names[0]).is_file() for names in FILES.values()
    )
    return named and path.suffix in (".safetensors", ".json")


def _with_neighbours(path: Path) -> tuple[Path, ...]:
    """The file, and the config of dictionary_learning beside its weights."""
    config = path.with_name("config.json")
    return (path, config) if path.name == "ae.pt" and config.is_file() else (path,)


def _what_there_is(folder: Path) -> str:
    """What to give in place of a folder that is no autoencoder."""
    inner = sorted(
        str(p.parent.relative_to(folder))
        for names in FILES.values()
        for p in folder.glob(f"*/{names[0]}")
    )
    if inner:
        return f"folders in it are: {', '.join(inner[:5])}. give the folder that has the weights"
    if files := sorted(p.name for p in folder.glob("*.pt") if ".resume" not in p.name):
        return f"files in it are: {', '.join(files[:5])}. give one of them"
    telling = ", ".join(names[0] for names in FILES.values())
    return f"files that tell one are {telling}. give the folder that has the weights"


def _named_checkpoint(metrics_path: Path) -> str:
    """The name of the checkpoint that a run's metrics.json names. Raises InputError if it names
    none."""
    try:
        name = artifacts.from_json(metrics_path.read_bytes())["checkpoint"]
        if Path(name).name in ("", ".."):
            raise ValueError
        return Path(name).name
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{metrics_path}: names no checkpoint. give the .pt file itself."
        ) from None
