"""Objectives beside the one that stage 2 minimises, as functions that fill the gradients of a step.

Each takes `base(sae, x, dead) -> (loss, fired)`, which has filled the gradients of the usual loss,
and adds its own in closed form or by autograd through a small part.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastsae.sae import Autoencoder
from fastsae.sae.architectures import aligned
from fastsae.sae.dense_step import dense_step
from fastsae.sae.sparse_step import active_entries, sparse_step

Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]
AUX_COEF = 1 / 32  # as stage 2 has it
ANNEALED_FROM, ANNEALED_OVER = 4, 0.5  # times K at the first step; part of all steps until it is K


@dataclass(frozen=True)
class Objective:
    """An architecture with or without prefixes (M / 4 and M), and what its training adds."""

    architecture: str = "topk"
    prefixes: bool = True
    adds: str | None = None  # aligned, orthogonal, annealed or pairs

    @property
    def weighted(self) -> bool:
        """Whether what it adds is a term with a weight."""
        return self.adds in ("orthogonal", "pairs")

    @property
    def dense(self) -> bool:
        """Whether a coefficient rather than K decides how many features fire."""
        return self.architecture == "standard"


DEFAULT = "topk, prefixes"
OBJECTIVES = {
    DEFAULT: Objective(),
    "topk": Objective(prefixes=False),
    "batchtopk, prefixes": Objective("batchtopk"),
    "batchtopk": Objective("batchtopk", prefixes=False),
    "aligned": Objective(adds="aligned"),
    "topk, aligned": Objective(prefixes=False, adds="aligned"),
    "batchtopk, aligned": Objective("batchtopk", prefixes=False, adds="aligned"),
    "orthogonal": Objective(adds="orthogonal"),
    "annealed K": Objective(adds="annealed"),
    "temporal pairs": Objective(adds="pairs"),
    "standard": Objective("standard", prefixes=False),
    "standard, aligned": Objective("standard", prefixes=False, adds="aligned"),
}


def step_of(objective: Objective, weight: float, coefficient: float) -> Step:
    """The step function of an objective; `weight` is of what it adds, `coefficient` of an L1."""
    if objective.dense:
        base: Step = functools.partial(
            dense_step, sparsity=coefficient, bandwidth=1.0, target_l0=None
        )
    else:
        base = functools.partial(sparse_step, aux_coef=AUX_COEF)
    added: dict[str | None, Callable[..., Any]] = {
        "aligned": aligned.ARCHITECTURE.around(base),
        "orthogonal": functools.partial(orthogonal_step, base=base, weight=weight),
        "pairs": functools.partial(pairs_step, base=base, weight=weight),
    }
    return added.get(objective.adds, base)


def annealed_k(k: int, m: int, step: int, n_steps: int) -> int:
    """Active features at a step: ANNEALED_FROM times K at first, then falling to K linearly."""
    left = max(0.0, 1 - step / (ANNEALED_OVER * n_steps))
    return min(m, round(k * (1 + (ANNEALED_FROM - 1) * left)))


def orthogonal_step(
    sae: Autoencoder, x: torch.Tensor, dead: torch.Tensor, *, base: Step, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`base` and a penalty on features that point alike (arXiv 2509.22033)."""
    loss, fired = base(sae, x, dead)
    value, gradient = nearness(sae.decoder.weight.detach().t())
    sae.decoder.weight.grad += weight * gradient.t()
    return loss + weight * value, fired


def nearness(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean over rows (M, d), of length 1, of the squared largest product with another one, its
    gradient (M, d))."""
    products = rows @ rows.t()
    products.fill_diagonal_(-torch.inf)
    largest, other = products.max(1)  # (M,)
    largest = largest.clamp_min(0)
    part = (2 / len(rows)) * largest[:, None]
    return largest.square().mean(), (part * rows[other]).index_add(0, other, part * rows)


def pairs_step(
    sae: Autoencoder, x: torch.Tensor, dead: torch.Tensor, *, base: Step, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`base`, and a contrast that makes the features of the first prefix alike at neighbouring
    tokens (arXiv 2511.05541); the second half of x (2 n, d) are the tokens before those of the
    first."""
    loss, fired = base(sae, x, dead)
    first = sae.prefix_lengths[0]
    active = active_entries(sae, x - sae.input_bias, training=True)
    mask = torch.zeros(len(x), sae.m_total_neurons)
    mask[active.row.long(), active.column.long()] = (active.value > 0).float()
    own = [
        value.detach().clone().requires_grad_()
        for value in (sae.encoder.weight[:first], sae.neuron_bias[:first], sae.input_bias)
    ]
    with torch.enable_grad():
        features = ((x - own[2]) @ own[0].t() + own[1]) * mask[:, :first]
        value = contrast(*features.chunk(2))
        gradients = torch.autograd.grad(value, own)
    sae.encoder.weight.grad[:first] += weight * gradients[0]
    sae.neuron_bias.grad[:first] += weight * gradients[1]
    sae.input_bias.grad += weight * gradients[2]
    return loss + weight * value.detach(), fired


def contrast(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """InfoNCE of the cosines of features (n, m) with those of the token before, each against the
    other pairs of the batch, both ways."""
    now, before = (torch.nn.functional.normalize(each, dim=1) for each in (now, before))
    cosines = now @ before.t()  # (n, n)
    own = torch.arange(len(now))
    loss = torch.nn.functional.cross_entropy
    return (loss(cosines, own) + loss(cosines.t(), own)) / 2
