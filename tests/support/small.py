"""Flags of small trainings."""

from typing import Any

SMALL = {
    "m": 16,
    "k": 2,
    "matryoshka_prefixes": None,
    "n_epochs": 2,
    "device": "cpu",
    "run_name": "test",
}


def small(**settings: Any) -> list[str]:
    """Flags of train_sae.py for a training of tenths of a second on the CPU, with other values for
    `settings`, or more of them."""
    return [
        f"--{name.replace('_', '-')}={'none' if value is None else value}"
        for name, value in {**SMALL, **settings}.items()
    ]
