"""The learning rate and the number of epochs where nobody chose them, by the size of the training.

What it is made of, and what was measured: docs/design.md, "How it trains";
experiments/studies/training_defaults.py.
"""

import math

from fastsae.settings.architectures import ARCHITECTURES

RATE = 4e-3  # of the TopK family at the demo's size
RATE_WITH_PENALTY = 2e-3  # of the others
FEATURES, D_MODEL, BATCH = 256, 576, 512  # the demo's size
LARGEST_BATCH = 4 * BATCH  # up to which the rate rises with the batch
GOING_ON = 1 / 8  # of an autoencoder that is trained already, which a new one's rate would undo

STEPS = 4700  # of batches of all tokens of the file: 30 epochs of the demo
EPOCHS = (30, 100)  # at least and at most


def learning_rate(
    architecture: str, m: int, d: int, batch_size: int, going_on: bool = False
) -> float:
    """Adam's learning rate for M features of d dimensions and batches of so many tokens;
    `going_on`: from INIT_FROM.

    It falls with the fourth root of M, since a large autoencoder loses features to a high rate, and
    with the root of d, since a step turns a direction of length 1 by up to rate * sqrt(d). It rises
    with the root of the batch.
    """
    rate = RATE if ARCHITECTURES[architecture].picks_k else RATE_WITH_PENALTY
    rate *= min(1.0, (FEATURES / m) ** 0.25) * min(1.0, math.sqrt(D_MODEL / max(d, 1)))
    rate *= math.sqrt(min(batch_size, LARGEST_BATCH) / BATCH)
    return float(f"{rate * (GOING_ON if going_on else 1):.4g}")


def epochs(n_tokens: float, batch_size: int) -> int:
    """Epochs over n tokens in such batches: more of little data, whose epochs have few steps."""
    fewest, most = EPOCHS
    return max(fewest, min(most, math.ceil(STEPS * batch_size / max(n_tokens, 1))))
