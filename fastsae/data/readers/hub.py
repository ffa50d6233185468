"""A dataset of the Hugging Face hub, streamed without being stored. By the optional package
datasets."""

import contextlib
from collections.abc import Iterator

from fastsae.data.readers import Row, Source
from fastsae.data.rows import shown
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.dataset_names import hub_name

# of the hub's client: not there, or not open to this user
REFUSALS = (
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "GatedRepoError",
    "HFValidationError",
)


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Iterator[Row]]:
    """The rows of one split, numbered from 1."""
    yield _rows(source.path)


def _rows(path):
    try:
        import datasets
    except ImportError:
        raise EnvironmentFailure(
            f"DATASET_PATH: {path} needs the datasets package. run: pip install datasets."
        ) from None
    named = hub_name(path)
    configuration = {"name": named.configuration} if named.configuration else {}
    try:
        found = datasets.load_dataset(
            named.name, **configuration, revision=named.revision, split=named.split, streaming=True
        )
        words = _class_names(getattr(found, "features", None))
        for number, row in enumerate(found, 1):
            for column, names in words.items():
                value = row.get(column)
                if isinstance(value, int) and 0 <= value < len(names):
                    row[column] = names[value]
            yield Row(number, row)
    except Exception as error:  # the client raises types of several libraries
        brief = shown((str(error) or type(error).__name__).splitlines()[0], 120).rstrip(".")
        if isinstance(error, ValueError):  # a configuration or split that is not there
            raise InputError(
                f"DATASET_PATH: {path} could not be read ({brief}). name its configuration and "
                "split: hf:owner/name:configuration:split."
            ) from None
        raise EnvironmentFailure(
            f"DATASET_PATH: {path} could not be read ({brief}). connect and check its name, "
            "or give a local file."
        ) from None


def _class_names(features):
    """{column: names of its numbers} of the ClassLabels among the features."""
    return {
        name: list(feature.names)
        for name, feature in (features or {}).items()
        if type(feature).__name__ == "ClassLabel" and feature.names
    }


def pinned(path: str) -> str:
    """The path with the revision that it stands for now.

    InputError if the hub has no such dataset, EnvironmentFailure if the hub cannot be reached.
    """
    named = hub_name(path)
    try:
        import huggingface_hub

        sha = (
            huggingface_hub.HfApi()
            .dataset_info(named.name, revision=named.revision, timeout=30)
            .sha
        )
    except Exception as error:  # as above
        if type(error).__name__ in REFUSALS:
            raise InputError(
                f"DATASET_PATH: {path} is not on the hub, or not open to you. check its name, "
                "or run: hf auth login."
            ) from None
        raise EnvironmentFailure(
            f"DATASET_PATH: {path}: the hub cannot be reached ({type(error).__name__}). connect, "
            "or give a local file with --dataset-path FILE.jsonl."
        ) from None
    return named.pinned(str(sha))
