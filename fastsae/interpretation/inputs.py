"""What stage 3 reads: which autoencoder, and whether activations and dataset are still those that
it described.

Importing this module loads no torch, so that an up-to-date run ends quickly.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.activations import files
from fastsae.activations.foreign import is_foreign
from fastsae.data.readers.folder_digests import dataset_sha256
from fastsae.formats.source import locate
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.values import Settings


def chosen_sae(settings: Settings) -> tuple[Path, dict[str, Any]]:
    """(path, metadata) of the run's checkpoint, or of SAE_PATH: of the latter only what decides
    whether the work is done."""
    if settings.SAE_PATH is None:
        path = named_checkpoint(settings.run_dir)
        return path, artifacts.read_checkpoint_metadata(path)
    source = files.read_metadata(settings.activations_path)
    return Path(settings.SAE_PATH), {
        "fingerprint": locate(settings.SAE_PATH).fingerprint(),
        "activations": source,
        "inputs": {"activations": source["fingerprint"]},
    }


def without_texts(settings: Settings) -> bool:
    """Whether the activations are an array of another program, which has rows and no texts."""
    return settings.ACTIVATIONS_PATH is not None and is_foreign(settings.ACTIVATIONS_PATH)


def named_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that the run's metrics.json names.

    InputError without that file; EnvironmentFailure if it is damaged.
    """
    path = run_dir / "metrics.json"
    try:
        return run_dir / artifacts.from_json(path.read_bytes())["checkpoint"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: not found. run train_sae.py first, or check --run-name and --output-dir."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise EnvironmentFailure(f"{path}: damaged. run train_sae.py again.") from None


def inputs_now(settings: Settings, sae_meta: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of activations and dataset as they are; one that is gone, or on the hub, counts
    as the one that the autoencoder was trained on."""
    activations = sae_meta["inputs"]["activations"]
    dataset = sae_meta["activations"]["inputs"]["dataset"]
    if files.find_shards(settings.activations_path):
        activations = files.read_metadata(settings.activations_path)["fingerprint"]
    if os.path.exists(settings.DATASET_PATH):
        dataset = dataset_sha256(settings.DATASET_PATH)
    return {"activations": activations, "dataset": dataset}


def require_described(
    source: Mapping[str, Any], metadata: Mapping[str, Any], settings: Settings
) -> None:
    """EnvironmentFailure if the activations and the dataset that were read are not those that
    `metadata` names."""
    read = {"activations": source["fingerprint"], "dataset": source["inputs"]["dataset"]}
    for name, value in read.items():
        if metadata["inputs"][name] != value:
            path = settings.activations_path if name == "activations" else settings.DATASET_PATH
            raise EnvironmentFailure(f"{path}: was replaced while this run began. run again.")
