"""What stage 2 writes beside the checkpoints once they are there, and its summary."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.formats.export import bring_up_to_date
from fastsae.formats.model_card import write_card
from fastsae.runtime import artifacts, progress
from fastsae.sae.metrics import measured_on
from fastsae.settings.values import Settings
from fastsae.training import monitoring
from fastsae.training.plans import Plan

SUMMARISED = ("normalized_mse", "l0", "dead_fraction", "epochs")  # in the last line


def write_beside(
    plans: Sequence[Plan], settings: Settings, *, several: bool
) -> dict[Path, dict[str, Any]]:
    """What others need of the trained autoencoders: figures, folders for other libraries, and the
    model card.

    several: whether the pass was to train several. Returns {path: metadata}.
    """
    # once: reading checks every byte
    metas = {plan.path: artifacts.read_checkpoint_metadata(plan.path) for plan in plans}
    for plan in plans:
        monitoring.write_beside(plan.path, metas[plan.path], plan.beside)
    first = plans[0]
    if several:
        figures = json.loads(first.beside("metrics.json").read_text())
        monitoring.write_if_different(settings.run_dir / "metrics.json", figures)
        print(f"stage 3 reads {first.path.name}, the first of {len(plans)}")
    for path in metas:
        bring_up_to_date(path, settings.EXPORT or ())
    if not metas[first.path]["activations"].get("foreign"):  # it says where in a model to use it
        write_card(settings.run_dir, metas)
    return metas


def print_summary(
    first: Plan, metas: Mapping[Path, Mapping[str, Any]], started: float, status: str
) -> None:
    """The summary line; it names the `first` checkpoint and its figures."""
    metrics = metas[first.path]["metrics"]
    progress.summary(
        "train_sae",
        first.path,
        started,
        status=status,
        n_autoencoders=len(metas),
        **({"names": [path.name for path in metas]} if len(metas) > 1 else {}),
        measured_on=measured_on(metrics),
        **{name: metrics[name] for name in SUMMARISED},
    )
