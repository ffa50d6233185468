"""What the studies that run the whole model share: an autoencoder with its layer and model,
held-out examples, and a journal.

Autoencoders come from this project (`.pt`) or in SAELens' format (a folder);
`fastsae.formats.load.load_sae` reads both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import config
from experiments.shared.provenance import PROJECT, run_stage
from fastsae.data.datasets import Deduplicator, identity, stream_examples
from fastsae.data.token_masks import chosen_tokens, usable_tokens
from fastsae.data.tokenization import (
    TEMPLATE_DATE,
    ChatTokenizer,
    TokenTable,
    mark_shared_prefix,
    tokenise,
)
from fastsae.formats.load import architecture_of
from fastsae.lm import decoders, devices, loading, sources
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import short_name
from fastsae.runtime.errors import InputError
from fastsae.sae import Autoencoder
from fastsae.settings.values import Settings

if TYPE_CHECKING:
    import torch

STAGES = [PROJECT / name for name in config.STAGES[:2]]


@dataclass
class Subject:
    """An autoencoder and what it was made for. `source` is the metadata of the activations it was
    trained on, {} if unknown."""

    sae: Autoencoder
    meta: dict
    path: str
    layer: int
    model_name: str
    revision: str | None
    source: dict

    @property
    def point(self) -> HookPoint:
        """Where in its model it is for."""
        return HookPoint(self.layer, (self.source.get("settings") or {}).get("HOOK", "resid_post"))

    @property
    def knows_its_examples(self) -> bool:
        """Whether it is on record which examples it was trained on: of other libraries'
        autoencoders it is not."""
        return "inputs" in self.source

    @property
    def name(self) -> str:
        """What a result calls it: its run and file, or its folder."""
        path = Path(self.path)
        return path.parent.name + "/" + path.stem if path.suffix == ".pt" else path.name

    def describe(self) -> dict[str, Any]:
        """What a result says of it."""
        from fastsae.sae.metrics import measured_on

        sae, metrics = self.sae, self.meta.get("metrics", {})
        return {
            "checkpoint": self.name,
            "layer": self.layer,
            "model": self.model_name,
            "architecture": architecture_of(sae),
            "m": sae.m_total_neurons,
            "k": sae.k_active_neurons,
            "normalized_mse": metrics.get("normalized_mse"),
            "measured_on": measured_on(metrics),
        }


def require(settings: Settings, least: Mapping[str, float]) -> None:
    """InputError, one line each, for the numbers among the settings `least` {name: bound} that are
    below their bound."""
    low = [name for name, bound in least.items() if np.min(settings.values[name]) < bound]
    if low:
        raise InputError(
            "\n".join(
                f"{name}: {settings.values[name]} is below {least[name]}. give {least[name]} or "
                "more."
                for name in low
            )
        )


def subjects(settings: Settings) -> list[Subject]:
    """The autoencoders that SAE names, or the one of the run, which is trained first if there is
    none.

    Raises InputError where a flag says something else than the run was trained with.
    """
    if settings.SAE:
        return [open_subject(path.strip(), settings) for path in settings.SAE.split(",")]
    metrics = settings.run_dir / "metrics.json"
    if not metrics.exists():
        for script in config.STAGES[:2]:
            run_stage(script, *settings.flags_for(script))
    subject = open_subject(
        str(settings.run_dir / json.loads(metrics.read_text())["checkpoint"]), settings
    )
    trained = subject.meta["settings"]
    # it also draws examples
    asked = settings.select(
        name for name in trained if settings.source.get(name) == "flag" and name != "SEED"
    )
    if other := [name for name, value in asked.items() if value != trained[name]]:
        raise InputError(
            "\n".join(
                f"{name}: the autoencoder in {settings.run_dir} was trained with {trained[name]}, "
                f"not {asked[name]}. "
                "leave the flag out, or train another one under another --run-name."
                for name in other
            )
        )
    return [subject]


def open_subject(path: str | Path, settings: Settings) -> Subject:
    """Load an autoencoder; its model and layer are those its metadata name, else, or by flag,
    MODEL_NAME and LAYER_IDX."""
    from fastsae.formats.load import load_sae

    device = devices.choose_device(settings.DEVICE)
    sae, meta = load_sae(path, "cpu" if device == "mps" else device)
    source = meta.get("activations") or {}
    model_name = source.get("model_name") if settings.source["MODEL_NAME"] != "flag" else None
    layer = (
        source.get("settings", {}).get("LAYER_IDX")
        if settings.source["LAYER_IDX"] != "flag"
        else None
    )
    if model_name and "inputs" not in source and short(model_name) == short(settings.MODEL_NAME):
        # another library's name for the model that is set here, perhaps at hand without the hub
        model_name = None
    known = source.get("settings", {}).get("LAYER_IDX")
    if known and layer is None and settings.LAYER_IDX != known:
        raise InputError(
            f"LAYER_IDX: {path} was trained on layer {known}, not {settings.LAYER_IDX}. leave "
            "--layer-idx out."
        )
    if layer is None and settings.source["LAYER_IDX"] != "flag":
        print(f"{path}: does not name its layer; LAYER_IDX {settings.LAYER_IDX} is taken")
    subject = Subject(
        sae,
        meta,
        str(path),
        layer or settings.LAYER_IDX,
        model_name or settings.MODEL_NAME,
        source.get("model_revision") if model_name else settings.MODEL_REVISION,
        source,
    )
    hub = {"revision": subject.revision, "cache_dir": settings.CACHE_DIR}
    shape = loading.load_config(subject.model_name, **hub)
    loading.check_layer(shape, subject.layer, subject.model_name)
    if shape.hidden_size != sae.input_dim:
        raise InputError(
            f"SAE: {path} takes {sae.input_dim} dimensions, the residual stream of "
            f"{subject.model_name} has "
            f"{shape.hidden_size}. name its model with --model-name."
        )
    return subject


def short(model_name: str) -> str:
    """A model's name, in which upper and lower case do not differ."""
    return short_name(model_name).lower()


def load_model(subject: Subject, settings: Settings) -> Any:
    """The whole model; on a CPU its blocks with faster products, equal up to rounding."""
    device = devices.choose_device(settings.DEVICE)
    model = loading.load_model(
        subject.model_name,
        revision=subject.revision,
        cache_dir=settings.CACHE_DIR,
        device=device,
        dtype=devices.choose_dtype(settings.DTYPE, device),
    )
    if device == "cpu":
        from fastsae.lm.cpu_kernels import quicken

        quicken(decoders.decoder_stack(model))
    return model


def dataset_of(subject: Subject, settings: Settings) -> tuple[str, Path | str]:
    """(what decides its content, its path) of the dataset that --dataset-path names, else of the
    autoencoder's own."""
    by_flag = settings.source["DATASET_PATH"] == "flag"
    return identity(
        settings.DATASET_PATH
        if by_flag
        else subject.source.get("dataset_path") or settings.DATASET_PATH
    )


def scope(subject: Subject, settings: Settings) -> dict[str, Any]:
    """What every remembered figure of an autoencoder depends on: itself, the model, how it is
    computed, and the data."""
    device = devices.choose_device(settings.DEVICE)
    return {
        "sae": subject.meta.get("fingerprint") or subject.path,
        "layer": subject.layer,
        "device": str(device),
        "model": sources.identity(subject.model_name, subject.revision),
        "dtype": str(devices.choose_dtype(settings.DTYPE, device)),
        "dataset": dataset_of(subject, settings)[0],
        **settings.select(
            ("MAX_LENGTH", "MAX_EXAMPLES", "TEXT_FIELD", "USE_CHAT_TEMPLATE", "DEDUP_NGRAM", "SEED")
        ),
        "TEMPLATE_DATE": TEMPLATE_DATE,
    }


def some_dialogues(
    subject: Subject, settings: Settings, n_examples: int, *, held_out: bool
) -> TokenTable:
    """A TokenTable of up to `n_examples` random examples of the autoencoder's own dataset, or of
    the one named with --dataset-path.

    With `held_out`, none that it was trained on, if that is known: of its own dataset the test
    examples, or the validation examples where it has none; any other is new to it as a whole.
    """
    own = subject.source.get("settings", {})
    dataset, path = dataset_of(subject, settings)
    is_own = subject.source.get("inputs", {}).get("dataset") == dataset
    if held_out and is_own and own.get("PROCESSING") == "block":
        raise InputError(
            f"DATASET_PATH: {subject.path} was trained on blocks of {path}, whose examples cannot "
            "be distinguished. name other "
            "data with --dataset-path."
        )
    table = tokens_of(path, subject, settings, {**settings.values, **(own if is_own else {})})
    candidates = (
        np.array(unseen_examples(subject.meta))
        if held_out and is_own
        else np.arange(len(table.lengths))
    )
    return some_examples(
        table, np.sort(np.random.default_rng(settings.SEED).permutation(candidates)[:n_examples])
    )


def unseen_examples(meta: Mapping[str, Any]) -> list[int]:
    """Numbers of the examples of its own dataset on which an autoencoder was not trained: they
    decided nothing where it has such."""
    return meta.get("test_examples") or meta["validation_examples"]


def tokens_of(
    path: str | Path, subject: Subject, settings: Settings, how: Mapping[str, Any]
) -> TokenTable:
    """The TokenTable of a dataset as stage 1 would make it with the settings `how`."""
    tokenizer = loading.load_tokenizer(
        subject.model_name, revision=subject.revision, cache_dir=settings.CACHE_DIR
    )
    tokenizer = ChatTokenizer(
        tokenizer,
        max_length=how["MAX_LENGTH"],
        date=how.get("TEMPLATE_DATE", TEMPLATE_DATE),
        chat_template=how["USE_CHAT_TEMPLATE"],
        dataset_name=str(path),
    )
    examples = stream_examples(path, text_field=how["TEXT_FIELD"], max_examples=how["MAX_EXAMPLES"])
    table = tokenise(
        filter(Deduplicator(how["DEDUP_NGRAM"]).is_new, examples)
        if how["DEDUP_NGRAM"]
        else examples,
        tokenizer,
    )
    mark_shared_prefix(table)
    return table


def some_examples(table: TokenTable, chosen: Sequence[int] | np.ndarray) -> TokenTable:
    """The TokenTable of the examples numbered in `chosen`, in that order."""
    starts = table.starts
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
    return TokenTable(
        table.ids[rows],
        table.kind[rows],
        table.role[rows],
        table.lengths[chosen],
        table.lines[chosen],
    )


def example_ids(table: TokenTable) -> list[np.ndarray]:
    """[(length,) token ids of each example]."""
    return np.split(table.ids, table.starts[1:-1])


def usable_tokens_of(subject: Subject, stream: "torch.Tensor", table: TokenTable) -> np.ndarray:
    """(n_tokens,) bool: the tokens of `stream` (n_tokens, d_model) that the autoencoder is meant
    for, as in its training.

    One that does not say its bounds gets those of train_sae.py: not the shared prefix, and no norm
    above ten times the median.
    """
    own = subject.meta.get("settings", {})
    usable, _ = usable_tokens(
        stream.norm(dim=1).numpy(),
        table.kind,
        exclude_shared_prefix=own.get("EXCLUDE_SHARED_PREFIX", True),
        max_norm_ratio=own.get("MAX_NORM_RATIO", 10.0),
        max_norm=subject.meta.get("max_norm"),
    )
    return usable & chosen_tokens(own.get("USE_TOKENS", "all"), table.kind, table.role)
