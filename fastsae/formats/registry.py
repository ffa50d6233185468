"""Public autoencoders by name: `saelens:RELEASE/ID`, looked up in the table that SAELens brings.

The table names a repository on the Hugging Face hub, a folder in it and how it is to be read. The
folder's files are fetched once, into the hub's own cache, and are read like any other folder.
SAELens itself is not imported, only its table is read.
"""

import difflib
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from fastsae.formats import readers
from fastsae.runtime.errors import EnvironmentFailure, InputError

PREFIX = "saelens:"
TABLE = "pretrained_saes.yaml"
# which reader takes what SAELens gives to one of its converters; None: its own folders
READERS = {
    None: "saelens",
    "gemma_2": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
}
# in repositories' and folders' names: attention's heads before they are projected, and transcoders.
# Asked before gigabytes are fetched; the readers refuse them too
OTHER_PLACES = re.compile(r"-att$|attn_out|transcoder|clt")
# what the table adds to the files of a release and does not change what is computed
HARMLESS = {"dataset_path"}


def is_name(path: object) -> bool:
    """Whether what is given as an autoencoder is a name of the registry rather than a path."""
    return str(path).startswith(PREFIX)


def folder_of(name: str) -> Path:
    """The folder with the files of `name`, fetched from the hub if they are not in its cache.

    Raises InputError for a name that the table lacks, or a kind that is not read here, and
    EnvironmentFailure without the table or where the hub does not give the files.
    """
    repository, folder, kind = _entry(name)
    weights, *others = (f"{folder}/{file}" for file in readers.FORMATS[kind].files)
    for file in others:  # first, as they are small
        _fetched(name, repository, folder, file, needed=False)
    return _fetched(name, repository, folder, weights).parent


def _entry(name):
    """(repository, folder in it, name of the reader) of a name."""
    table = _table()
    release, _, wanted = name.removeprefix(PREFIX).partition("/")
    if release not in table:
        raise InputError(
            f"{name}: SAELens' table has no release {release[:80]!r}. {_near(release, table)}"
        )
    about = table[release]
    entries = {str(each["id"]): each for each in about["saes"] if "id" in each and "path" in each}
    if wanted not in entries:
        raise InputError(
            f"{name}: the release {release} has no {wanted[:80]!r}. {_near(wanted, entries)}"
        )
    kind = READERS.get(about.get("conversion_func"))
    changed = sorted(set(about.get("config_overrides") or {}) - HARMLESS)
    if kind is None or changed:
        why = f"sets {', '.join(changed)}" if kind else f"converts {about['conversion_func']}"
        raise InputError(
            f"{name}: SAELens {why} when it loads this release, which is not done here. load it "
            "there with SAE.from_pretrained, save it with save_model, and give that folder."
        )
    repository, folder = str(about["repo_id"]), str(entries[wanted]["path"])
    if kind.startswith("gemma") and (
        OTHER_PLACES.search(repository) or OTHER_PLACES.search(folder)
    ):
        raise InputError(
            f"{name}: is of another place than the residual stream or what the MLP adds to it: "
            "attention's heads before they are projected, or a transcoder. choose another."
        )
    return repository, folder, kind


def _near(word, names):
    near = difflib.get_close_matches(word, map(str, names), n=3, cutoff=0.5) or list(names)[:3]
    return f"give one of its {len(names):,}, for example {', '.join(map(str, near))}."


@functools.cache
def _table() -> dict[str, Any]:
    found = importlib.util.find_spec("sae_lens")
    path = Path(found.origin).with_name(TABLE) if found and found.origin else None
    if path is None or not path.is_file():
        raise EnvironmentFailure(
            f"{PREFIX}...: names are looked up in the table of SAELens, which is not installed. "
            "run: pip install sae-lens, or give the autoencoder's folder."
        )
    import yaml

    # the other loader takes seconds; PyYAML can be built without this one
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_bytes(), Loader=loader)


def _fetched(name, repository, folder, file, needed=True):
    """The path of a repository's file in the hub's cache; None where it has none and none is
    needed. What is there is not asked for again."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # the hub's client raises types of several libraries
        kind = type(error).__name__
        if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError") and not needed:
            return None  # the reader says so if it cannot do without
        remedy = (
            "accept its licence on its hub page, then run: hf auth login"
            if kind == "GatedRepoError"
            else f"connect, or elsewhere run: hf download {repository} --include '{folder}/*', "
            "and give the folder"
        )
        raise EnvironmentFailure(
            f"{name}: {file} of {repository} could not be fetched ({kind}). {remedy}."
        ) from None
