"""Training as train_sae.py trains, on chosen rows of activations that are at hand: for studies that
choose tokens in ways for which no stage has a setting."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import config
from experiments.shared.provenance import PROJECT
from fastsae.sae import Autoencoder
from fastsae.settings.values import Settings


def stage_settings(*flags: Any) -> Settings:
    """The settings that train_sae.py has with these flags."""
    return config.resolve(PROJECT / "train_sae.py", argv=[str(flag) for flag in flags])


def train(
    settings: Settings, activations: Any, rows: np.ndarray, *, seed: int, device: str = "cpu"
) -> Autoencoder:
    """The autoencoder after all epochs on the rows (n,) of activations (n_tokens, d).

    The steps are those of train_sae.py with these settings; there are no validation examples, so
    the last weights are taken. The seed decides the order of the tokens and the first weights.
    """
    from fastsae.training.data import TrainingRows
    from fastsae.training.loop import INIT_SAMPLE, PlannedRun, one_step
    from fastsae.training.plans import Plan, own_settings

    about = {"d_model": activations.shape[1], "n_tokens": len(rows)}
    own = own_settings(settings, settings.K, settings.SPARSITY_COEFFICIENT, about)
    metadata = {"settings": {"INIT_SEED": seed}, "fingerprint": ""}
    order = np.random.default_rng(seed).permutation(rows)
    sample = np.asarray(activations[np.sort(order[:INIT_SAMPLE])], np.float32)  # (n, d)
    plan = Plan(own, Path("unsaved.pt"), metadata, start=None, several=False)
    run = PlannedRun(plan, torch.from_numpy(sample), device)
    data = TrainingRows(
        activations,
        rows,
        batch_size=own.BATCH_SIZE,
        buffer_tokens=max(own.BUFFER_TOKENS, len(rows)),
        seed=seed,
        device=device,
    )
    n_batches = data.n_batches()
    for epoch in range(own.N_EPOCHS):
        for batch, x in enumerate(data.batches(epoch + 1)):
            one_step(run, x, epoch * n_batches + batch, n_batches)
        run.end_epoch(None)
    return run.result()
