"""How far autoencoders that differ in their seed alone have the same features."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.runtime.stops import stop_if_asked

SAME = 0.7  # cosine above which two directions count as the same feature
COMPARED = 2048  # features compared at most, drawn at random
BLOCK = 512
SEED_IN_NAME = re.compile(r"_seed=\d+(?=\.pt$)")


def siblings(path: Path) -> list[Path]:
    """The checkpoints beside `path` whose names differ from its own in the seed alone."""
    if not SEED_IN_NAME.search(path.name):
        return []
    stem = SEED_IN_NAME.sub("", path.name)
    return sorted(
        each
        for each in path.parent.glob("*.pt")
        if each != path
        and SEED_IN_NAME.search(each.name)
        and SEED_IN_NAME.sub("", each.name) == stem
    )


@torch.no_grad()
def nearest(rows: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """(n,) the largest cosine of each of `rows` (n, d) with any of `others` (m, d)."""
    rows, others = (torch.nn.functional.normalize(each.float(), dim=1) for each in (rows, others))
    found = []
    for block in rows.split(BLOCK):
        stop_if_asked()
        found.append((block @ others.t()).max(1).values.cpu().numpy())
    return np.concatenate(found)


def agreement(own: torch.Tensor, others: Sequence[torch.Tensor], seed: int) -> dict[str, Any]:
    """How many of the directions `own` (M, d) are in all of `others` [(M, d)] too: the mean over
    directions of the largest cosine, and the share with one above SAME in every other."""
    some = torch.from_numpy(np.random.default_rng((seed, 11)).permutation(len(own))[:COMPARED])
    best = np.stack([nearest(own[some], other) for other in others])  # (n_others, n)
    return {
        "mean_max_cosine": float(best.mean()),
        "found_in_all": float((best.min(0) > SAME).mean()),
    }


def seed_stability(
    path: Path, own: torch.Tensor, untrained: Sequence[torch.Tensor], seed: int
) -> dict[str, Any] | None:
    """`agreement` of the autoencoder at `path`, its directions `own` (M, d), with those of other
    seeds beside it; None where there are none.

    untrained [(M, d)]: directions of independent draws of random tokens, compared with each other
    as the seeds are.
    """
    from fastsae.runtime.errors import EnvironmentFailure
    from fastsae.sae.autoencoder import load_checkpoint

    others = []
    for each in siblings(path):
        try:
            sae, _ = load_checkpoint(each)
        except EnvironmentFailure:  # damaged: stage 2 says so
            continue
        others.append(sae.decoder.weight.t())
    others = [other for other in others if other.shape == own.shape]
    if not others:
        return None
    found: dict[str, Any] = {"n_seeds": len(others) + 1, "features": agreement(own, others, seed)}
    if len(untrained) > 1:
        found["random tokens"] = agreement(untrained[0], untrained[1:], seed)
    return found
