"""Tokens with known directions whose activity has structure: directions that tend to be active
together, or only where another one is; in sequences, in which activity lasts.

Whether a direction is active follows from a latent Gaussian of its own, which is below a threshold
with the wanted probability. Latents of a group correlate, and each goes on from token to token.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from experiments.shared.directions import random_directions

LENGTH = 32  # tokens of a sequence
STRENGTHS = (1.0, 2.0)  # of an active direction, drawn uniformly between
NOISE = 0.01  # standard deviation in each dimension


@dataclass(frozen=True)
class Planted:
    """tokens (n, d) float32, sequences of LENGTH one after the other; directions (g, d) of length
    1; active (n, g) bool; parent (g,) the direction without which each is never active, -1 = none.
    """

    tokens: np.ndarray
    directions: np.ndarray
    active: np.ndarray
    parent: np.ndarray

    @property
    def l0(self) -> float:
        """Active directions of a token, on average."""
        return float(self.active.sum(1).mean())


def correlated(
    n: int,
    *,
    seed: int,
    n_groups: int = 16,
    size: int = 6,
    d: int = 96,
    probabilities: tuple[float, float] = (0.2, 0.03),
    correlation: float = 0.6,
    lasting: float = 0.8,
    orthonormal: bool = False,
) -> Planted:
    """n_groups x size directions, those of a group active together more often than by chance.

    probabilities: of the first and the last direction, falling linearly; correlation: of the
    latents of a group; lasting: of a latent with itself at the next token; orthonormal: directions
    at right angles to each other, else at random.
    """
    generator = np.random.default_rng(seed)
    g = n_groups * size
    share = np.linspace(*probabilities, g)  # (g,)
    group = generator.permutation(g) % n_groups  # so that a group has common and rare ones
    steps = generator.standard_normal((n // LENGTH, LENGTH, g)) * np.sqrt(1 - correlation)
    together = generator.standard_normal((n // LENGTH, LENGTH, n_groups)) * np.sqrt(correlation)
    latent = in_sequence(steps + together[..., group], np.full(g, lasting))
    active = (latent < norm.ppf(share)).reshape(-1, g)
    directions = random_directions(g, d, generator)
    if orthonormal:
        directions = np.linalg.qr(directions.T)[0].T  # (g, d), d >= g
    return tokens_of(active, directions, np.full(g, -1), generator)


def hierarchical(
    n: int,
    *,
    seed: int,
    n_parents: int = 24,
    children: int = 3,
    d: int = 96,
    probability: float = 0.12,
    of_a_child: float = 0.4,
    lasting: tuple[float, float] = (0.95, 0.5),
) -> Planted:
    """Parents, and children each, which are active only where their parent is, then with
    `of_a_child`. lasting: of the latents of parents and of children."""
    generator = np.random.default_rng(seed)
    g = n_parents * (1 + children)
    parent = np.concatenate([np.full(n_parents, -1), np.repeat(np.arange(n_parents), children)])
    is_parent = parent < 0
    steps = generator.standard_normal((n // LENGTH, LENGTH, g))
    latent = in_sequence(steps, np.where(is_parent, *lasting))
    share = np.where(is_parent, probability, of_a_child)
    active = (latent < norm.ppf(share)).reshape(-1, g)
    active[:, ~is_parent] &= active[:, parent[~is_parent]]
    return tokens_of(active, random_directions(g, d, generator), parent, generator)


def in_sequence(steps: np.ndarray, lasting: np.ndarray) -> np.ndarray:
    """(n_sequences, LENGTH, g) of variance 1: each is `lasting` (g,) times the one before, and the
    rest is of steps (n_sequences, LENGTH, g), which have variance 1."""
    latent = steps.copy()
    rest = np.sqrt(1 - lasting**2)
    for i in range(1, steps.shape[1]):
        latent[:, i] = lasting * latent[:, i - 1] + rest * steps[:, i]
    return latent


def tokens_of(
    active: np.ndarray, directions: np.ndarray, parent: np.ndarray, generator: np.random.Generator
) -> Planted:
    """Sums of the active directions (g, d) with random strengths, and noise."""
    strength = np.where(active, generator.uniform(*STRENGTHS, active.shape), 0)
    tokens = strength @ directions + NOISE * generator.standard_normal(
        (len(active), directions.shape[1])
    )
    return Planted(tokens.astype(np.float32), directions, active, parent)


def recovery(planted: Planted, decoder: np.ndarray, fires: np.ndarray) -> dict[str, float]:
    """How well features are the planted directions, each direction having the feature that the best
    one-to-one matching of |cosines| gives it.

    decoder (M, d) with M >= g; fires (n, M) bool on planted.tokens. mcc: mean |cosine|; f1: mean F1
    of where the feature fires for where the direction is active; absorbed: by how much less often,
    in the mean over parents, a parent's feature fires where a child is active than where none is
    (left out without parents).
    """
    from scipy.optimize import linear_sum_assignment

    from experiments.shared.directions import absolute_cosines

    similarity = absolute_cosines(planted.directions, decoder)
    _, feature = linear_sum_assignment(similarity, maximize=True)
    fired = fires[:, feature]  # (n, g)
    hits = (fired & planted.active).sum(0)
    f1 = 2 * hits / np.maximum(fired.sum(0) + planted.active.sum(0), 1)
    found = {
        "mcc": float(similarity[np.arange(len(feature)), feature].mean()),
        "f1": float(f1.mean()),
    }
    parents = np.unique(planted.parent[planted.parent >= 0])
    if len(parents):
        found["absorbed"] = float(np.mean([absorbed(planted, fired, p) for p in parents]))
    return found


def absorbed(planted: Planted, fired: np.ndarray, parent: int) -> float:
    """Share of the tokens with the parent but none of its children on which its feature fires, less
    that of those with a child; fired (n, g)."""
    child = planted.active[:, planted.parent == parent].any(1)
    there = planted.active[:, parent]
    return float(fired[there & ~child, parent].mean() - fired[there & child, parent].mean())
