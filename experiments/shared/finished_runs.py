"""What the outputs of stages 1 and 2 in a folder give: the evidence on the features, and untrained
dictionaries beside it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence
    from fastsae.interpretation.nulls import Dictionary, Untrained

NAMED = ("M", "K", "MATRYOSHKA_PREFIXES", "N_EPOCHS")  # settings that a result says of a run


class Finished(NamedTuple):
    """A trained autoencoder on its own dataset."""

    evidence: "Evidence"
    untrained: "Untrained"
    meta: dict[str, Any]  # of its checkpoint

    def about(self) -> dict[str, Any]:
        """What a result says of the autoencoder."""
        return {name: self.meta["settings"][name] for name in NAMED}


def finished(
    folder: Path,
    dataset: str,
    label_field: str | None = None,
    beside: "Callable[[Path, Mapping[str, Any]], Sequence[Dictionary]] | None" = None,
) -> Finished:
    """The run under `folder`, with one pass over its activations; `dataset`: the file they were
    made from, whose `label_field` becomes the examples' labels. `beside`, given the activations and
    the checkpoint's metadata, returns more dictionaries that see the same tokens."""
    from fastsae.activations.files import open_activations
    from fastsae.data.datasets import read_dataset
    from fastsae.formats.load import load_sae
    from fastsae.interpretation import nulls
    from fastsae.interpretation.evidence import Evidence
    from fastsae.lm.loading import load_tokenizer

    metrics_path = next(folder.glob("checkpoints/*/metrics.json"))
    sae, meta = load_sae(metrics_path.with_name(json.loads(metrics_path.read_text())["checkpoint"]))
    source = meta["activations"]
    path = folder / "activations" / f"activations_layer{source['settings']['LAYER_IDX']}.npz"
    data = open_activations(path)
    examples = read_dataset(
        dataset, text_field="text", label_field=label_field, only_lines=data["example_ids"]
    )
    bounds = {
        "max_norm": meta["max_norm"],
        "exclude_shared_prefix": meta["settings"]["EXCLUDE_SHARED_PREFIX"],
        "use": meta["settings"].get("USE_TOKENS", "all"),
    }
    unseen = [*meta["validation_examples"], *meta.get("test_examples", [])]
    untrained = nulls.prepare(
        sae, data, **bounds, not_trained_on=np.array(unseen, np.int64), seed=0
    )
    untrained.dictionaries.extend(beside(path, meta) if beside else [])
    tokenizer = load_tokenizer(source["model_name"])
    evidence = Evidence(sae, data, examples, tokenizer, bounds, n_top=1, watch=untrained.watch)
    return Finished(evidence, untrained.finish(), meta)
