"""Which autoencoders one command trains, where each goes, and what identifies it."""

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.formats.load import start_of
from fastsae.formats.source import Source
from fastsae.runtime import artifacts
from fastsae.sae import autoencoder
from fastsae.settings.values import Settings
from fastsae.training import objective
from fastsae.training.dead_features import tokens_until_dead
from fastsae.training.usual import epochs, learning_rate


class Plan(NamedTuple):
    """One autoencoder to train."""

    settings: Settings  # its own: K, SEED and the like are single values
    path: Path  # of its checkpoint
    metadata: dict[str, Any]  # of its checkpoint, fingerprint included
    start: Source | None  # the autoencoder that INIT_FROM stands for here
    several: bool  # whether the same pass trains others too

    def beside(self, name: str) -> Path:
        """The path of metrics.json and the like: that of the run, or the checkpoint's own where a
        pass trains several."""
        return self.path.with_suffix(f".{name}") if self.several else self.path.with_name(name)


def make_plans(settings: Settings, source: dict[str, Any], decisive: Iterable[str]) -> list[Plan]:
    """A Plan for each of SEEDS x K_LIST x SPARSITY_COEFFICIENT_LIST, or the one that the settings
    without lists describe.

    `source` is the metadata of the activations, `decisive` names the settings that decide the
    weights.
    """
    choices = list(
        itertools.product(
            settings.SEEDS or [settings.SEED],
            settings.K_LIST or [settings.K],
            settings.SPARSITY_COEFFICIENT_LIST or [settings.SPARSITY_COEFFICIENT],
        )
    )
    plans = []
    for seed, k, coefficient in choices:
        own = own_settings(settings, k, coefficient, source)
        path = settings.run_dir / checkpoint_name(own, seed)
        start = start_of(settings.INIT_FROM, path)
        inputs = {"activations": source["fingerprint"]}
        if start:
            inputs["init_from"] = start.sha256()
        decided_by = {**own.select([*decisive, "SEED"]), "INIT_SEED": seed}
        metadata = artifacts.new_metadata("sae", decided_by, inputs, activations=source)
        plans.append(Plan(own, path, metadata, start, several=len(choices) > 1))
    return plans


def own_settings(
    settings: Settings, k: int, coefficient: float | None, source: Mapping[str, Any]
) -> Settings:
    """The settings of one autoencoder of the activations with this metadata, with what follows
    from its own and the code's constants."""
    m, batch_size = settings.M, settings.BATCH_SIZE
    usual_rate = learning_rate(
        settings.ARCHITECTURE,
        m,
        source.get("d_model", 0),
        batch_size,
        going_on=settings.INIT_FROM is not None,
    )
    n_tokens = min(source.get("n_tokens", 0), settings.MAX_TRAIN_TOKENS or math.inf)
    own = {
        "K": k,
        "SPARSITY_COEFFICIENT": coefficient,
        "DEAD_AFTER_TOKENS": settings.DEAD_AFTER_TOKENS or tokens_until_dead(m, k, batch_size),
        "LEARNING_RATE": settings.LEARNING_RATE or usual_rate,
        "N_EPOCHS": settings.N_EPOCHS or epochs(n_tokens, batch_size),
    }
    if recorded_as := objective.about(settings.values).coefficient:
        own[recorded_as] = coefficient
    return settings.replace(**own, **objective.constants())


def checkpoint_name(settings: Settings, seed: int) -> str:
    """The file's name, with the coefficient and the seed where there are several."""
    prefixes = list(settings.MATRYOSHKA_PREFIXES) if settings.USE_MATRYOSHKA else None
    name = autoencoder.checkpoint_name(
        settings.M, settings.K, prefixes, settings.ARCHITECTURE
    ).removesuffix(".pt")
    if settings.SPARSITY_COEFFICIENT_LIST:
        value = settings.SPARSITY_COEFFICIENT
        kind = str(objective.about(settings.values).coefficient).partition("_")[0]  # L1 or L0
        name += f"_{kind}={value:g}" if float(f"{value:g}") == value else f"_{kind}={value!r}"
    if settings.SEEDS:
        name += f"_seed={seed}"
    return f"{name}.pt"
