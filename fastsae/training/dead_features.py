"""When a feature counts as dead, and how many dead ones a step looks at."""

import torch

MOST_AT_ONCE = 8192  # dead features that one step tries to revive
SHORTEST = 131_072  # tokens, however small the autoencoder
STEPS = 256  # at least so many steps, however large the batch
CHANCES = 1024  # times that the average feature fires meanwhile, K / M of all tokens
CHANCES_LIMIT = 10_000_000  # tokens, beyond which CHANCES alone does not go


def tokens_until_dead(m: int, k: int, batch_size: int) -> int:
    """Training tokens without firing after which a feature counts as dead, where nobody chose.

    A large autoencoder fires each feature seldom, and a large batch makes few steps of many tokens:
    with a fixed number of tokens most features of such a run would count as dead at once.
    """
    return max(SHORTEST, STEPS * batch_size, min(CHANCES * m // k, CHANCES_LIMIT))


def considered(dead: torch.Tensor, turn: int, at_least: int = 0) -> torch.Tensor:
    """Of the dead features (M,) bool those that this step looks at: MOST_AT_ONCE or `at_least`.

    Which ones depends on the number of the `turn` alone, and in consecutive turns all have theirs.
    So the loss that revives them never takes memory or time for all M; the host waits for nothing.
    """
    limit = max(MOST_AT_ONCE, at_least)
    if len(dead) <= limit:
        return dead
    place = dead.cumsum(0) - 1  # (M,) of each dead feature among them
    n_dead = (place[-1] + 1).clamp_min(1)
    return dead & ((place - turn * limit) % n_dead < limit)
