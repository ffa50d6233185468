"""The files that a local model is read from, and where the cache lies."""

import contextlib
import json
import os
from pathlib import Path

from fastsae.runtime.digests import content_sha256

NOT_PARTS = (".md", ".lock")  # endings of files in a model's folder that decide nothing


def cache_root(cache_dir: str | None) -> Path:
    """The folder of the embedded model and of remembered digests."""
    return Path(cache_dir or os.environ.get("FASTSAE_CACHE") or Path.home() / ".cache" / "fastsae")


def parts_of(path: Path) -> list[Path]:
    """The files that a local model is read from: the .gguf, or those of its folder, weights and
    templates in inner folders too."""
    if not path.is_dir():
        return [path]
    found = {
        file
        for file in path.iterdir()
        if file.suffix not in NOT_PARTS and not file.name.startswith(".")
    }
    found |= set((path / "additional_chat_templates").glob("*.jinja"))
    for index in path.glob("*.index.json"):
        # transformers will say what is wrong with it
        with contextlib.suppress(
            ValueError, AttributeError, LookupError, TypeError, RecursionError
        ):
            found |= {
                path / shard for shard in json.loads(index.read_bytes())["weight_map"].values()
            }
    return sorted(file for file in found if file.is_file())


def digest_of(file: Path, cache_dir: str | None) -> str:
    """sha256 (hex) of a model's file; that of a large one is remembered in the cache."""
    return content_sha256(file, cache_root(cache_dir) / "digests")


def base_of_adapter(path: Path) -> str | None:
    """The model that an adapter's folder names as its base; None if it is not an adapter."""
    try:
        base = json.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        return (
            base
            if isinstance(base, str)
            and base
            and not Path(base).joinpath("adapter_config.json").exists()
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
