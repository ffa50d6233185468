"""What a path given as an autoencoder stands for: its format and files, loaded and hashed.

Known are checkpoints of this project and the formats in `readers.FORMATS`. Importing this module
loads no torch, so that an up-to-date run ends quickly.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.formats import detect, readers, registry
from fastsae.runtime import artifacts
from fastsae.runtime.digests import Held
from fastsae.runtime.errors import EnvironmentFailure, InputError

if TYPE_CHECKING:
    from fastsae.formats.parts import Parts

FOLDERS = {name: form for name, form in readers.FORMATS.items() if form.files}


@dataclass(frozen=True)
class Source:
    """An autoencoder on the disk, not read yet. `files`: its weights first, then its settings."""

    path: Path  # as it was given
    kind: str  # fastsae; a name in `readers.FORMATS`, or torch or npz where the content tells
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

    def load(self, device: str = "cpu", sha256: str | None = None) -> tuple[Any, dict]:
        """(sae, meta), for inference; with `sha256` only if that is still the files' digest.

        Of another library's, meta has the keys of a checkpoint's, as far as they can be known:
        `meta["activations"]["settings"]["LAYER_IDX"]` is None where the files do not name a layer,
        `meta["settings"]["K"]` is None where the number of active features is not fixed
        (`sae.k_active_neurons` is then only a guess for sizes, see `load.fit`).

        Raises EnvironmentFailure if a file is damaged or changes meanwhile, InputError if it holds
        what this project cannot compute exactly.
        """
        held = Held(self.files)
        if sha256 is not None and self.sha256() != sha256:
            raise EnvironmentFailure(f"{self.path}: was replaced while this run began. run again.")
        if self.kind == "fastsae":
            from fastsae.sae.autoencoder import load_checkpoint

            found = load_checkpoint(self.files[0], device)
        else:
            parts = readers.read(self.kind, self.files[0])
            found = parts.as_module(device), self._metadata(parts)
        held.require_unchanged()
        return found

    def _metadata(self, parts: "Parts") -> dict:
        tokens = parts.about.get("tokens") or {}
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
                "EXCLUDE_SHARED_PREFIX": tokens.get("exclude_shared_prefix", True),
                **({"USE_TOKENS": tokens["use"]} if tokens else {}),
            },
            "activations": {
                "model_name": parts.about.get("model_name"),
                "model_revision": None,
                "settings": {
                    "LAYER_IDX": parts.about.get("layer"),
                    **({"HOOK": kind} if (kind := parts.about.get("kind")) else {}),
                },
                **({"hook_module": name} if (name := parts.about.get("hook_module")) else {}),
            },
            "max_norm": tokens.get("max_norm"),
            "validation_examples": [],
            "test_examples": [],
            "metrics": {},
            "source": {**parts.about, "path": str(self.path)},
        }


def locate(path: str | Path) -> Source:
    """The autoencoder at `path`, a folder or one of its files, or of a name in the registry.

    A file is judged by its content, unless its name and its neighbours tell the format. A run's
    folder stands for the checkpoint that its metrics.json names. Raises InputError where nothing is
    known.
    """
    if registry.is_name(path):
        return replace(locate(registry.folder_of(str(path))), path=Path(path))
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: not found. give a checkpoint (.pt), the folder of an autoencoder, or "
            f"{registry.PREFIX}RELEASE/ID."
        )
    folder = path.parent if path.is_file() else path
    if path.is_file() and not _stands_for_its_folder(path):
        return Source(path, detect.kind_of(path), _with_neighbours(path))
    for name, form in FOLDERS.items():
        weights = folder / form.files[0]
        if weights.is_file() and (folder == path or path.name in form.files):
            kind = detect.kind_of(weights) if form.content else name
            return Source(path, kind, _with_neighbours(weights))
    if (metrics := folder / "metrics.json").is_file() and folder == path:
        checkpoint = folder / _named_checkpoint(metrics)
        if not checkpoint.is_file():
            raise InputError(
                f"{checkpoint}: not found, though {metrics} names it. give the .pt file itself."
            )
        return Source(path, "fastsae", (checkpoint,))
    raise InputError(f"{path}: holds no autoencoder; {_what_there_is(folder)}.")


def _stands_for_its_folder(path: Path) -> bool:
    """Whether it is settings beside their weights, or weights that only their name tells."""
    return any(
        path.name in form.files
        and path.with_name(form.files[0]).is_file()
        and not (form.content and path.name == form.files[0])
        for form in FOLDERS.values()
    )


def _with_neighbours(path: Path) -> tuple[Path, ...]:
    """A file of weights, and those of its format's other files that are beside it."""
    names = next((f.files for f in FOLDERS.values() if f.files[0] == path.name), (path.name,))
    return (path, *(each for each in map(path.with_name, names[1:]) if each.is_file()))


def _what_there_is(folder: Path) -> str:
    """What to give in place of a folder that is no autoencoder."""
    inner = sorted(
        str(p.parent.relative_to(folder))
        for form in FOLDERS.values()
        for p in folder.glob(f"*/{form.files[0]}")
    )
    if inner:
        return f"folders in it are: {', '.join(inner[:5])}. give the folder that has the weights"
    if files := sorted(p.name for p in folder.glob("*.pt") if ".resume" not in p.name):
        return f"files in it are: {', '.join(files[:5])}. give one of them"
    telling = ", ".join(form.files[0] for form in FOLDERS.values())
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
