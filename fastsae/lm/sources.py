"""Where a model comes from (embedded, hub, folder, .gguf), and whether it is still the same one."""

import hashlib
from pathlib import Path

from fastsae.lm import embedded
from fastsae.lm.embedded import EMBEDDED
from fastsae.lm.files import base_of_adapter, digest_of, parts_of
from fastsae.runtime.digests import Held
from fastsae.runtime.errors import InputError


def model_source(name: str, cache_dir: str | None = None) -> str:
    """What transformers should load for MODEL_NAME: a folder, a .gguf file or a hub id. Fetches the
    embedded model once."""
    if name == EMBEDDED["name"]:
        return str(embedded.ready_folder(cache_dir))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        if not path.exists():
            raise InputError(
                f"MODEL_NAME: {name} does not exist. "
                f"give a folder, a .gguf file, a hub id or {EMBEDDED['name']}."
            )
        return str(path)
    return str(path) if path.is_dir() else name


def identity(name: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """A JSON-able value that changes when the model does, without loading it or asking the network.

    Embedded: the checksum of its GGUF file, followed by those of its parts if conversion made
    others than are known. Local: a digest of the whole content of its files. Hub: id and revision.
    """
    if name == EMBEDDED["name"]:
        found = embedded.read_manifest(embedded.path_in(cache_dir)).get("sha256", {})
        other = [
            found[part]
            for part in embedded.DECISIVE_PARTS
            if found.get(part, EMBEDDED["parts"][part]) != EMBEDDED["parts"][part]
        ]
        return "/".join([EMBEDDED["gguf_sha256"], *other])
    path = Path(name).expanduser()
    if not path.exists():
        return f"{name}@{revision or 'default'}"
    digest = hashlib.sha256()
    for file in parts_of(path):
        part = file.relative_to(path) if path.is_dir() else file.name
        digest.update(f"{part} {digest_of(file, cache_dir)}\n".encode(errors="surrogateescape"))
    if base := base_of_adapter(path):
        digest.update(identity(base, None, cache_dir).encode())
    return digest.hexdigest()


def held(name: str, cache_dir: str | None = None) -> Held:
    """The files of a local or embedded model as they are now; of a hub model, whose files have
    their content's name, none."""
    if name == EMBEDDED["name"]:  # a damaged one will be made anew
        path = embedded.path_in(cache_dir)
        return Held(parts_of(path) if embedded.is_complete(path, cache_dir) else [])
    path = Path(name).expanduser()
    return Held(parts_of(path) if path.exists() else [])


def require_same(
    name: str, revision: str | None, cache_dir: str | None, recorded: str, remedy: str
) -> None:
    """InputError, ending in `remedy`, unless the model's `identity` is the recorded one."""
    damaged = (
        name == EMBEDDED["name"]
        and (folder := embedded.path_in(cache_dir)).exists()
        and not embedded.is_complete(folder, cache_dir)
    )
    if damaged or identity(name, revision, cache_dir) != recorded:
        raise InputError(f"MODEL_NAME: {name} is not the model that it was. {remedy}.")
