"""The tokens on which FAST and block training are compared: those that an autoencoder is trained
on, in each way of reading them, and held-out dialogues, read alone and in blocks.

Dialogues read alone, apart in blocks and in whole blocks are the same tokens in the same order, so
a choice of tokens made once is the same in all three.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.shared.heldout import MAX_NORM_RATIO, mark_special
from fastsae.data.token_masks import token_norms
from fastsae.data.tokenization import CONTENT, SHARED_PREFIX
from fastsae.sae import Autoencoder

SETS = ("all tokens", "without sinks", "without openings and sinks")
MIN_FIRINGS = 10  # a feature that fires less often is about nothing that could be told
BATCH = 4096


class Tokens:
    """The tokens of an activations file: the first `n` of them, or all.

    dialogues: the file of the same tokens read alone, which knows where dialogues and their
    openings are; none for a plain text, which has neither.
    """

    def __init__(self, path: Path, dialogues: Path | None = None, n: int | None = None) -> None:
        from fastsae.activations.files import open_activations

        data = open_activations(path)
        self.activations = data["activations"][:n]  # (n_tokens, d)
        n = len(self.activations)
        self.ids = np.asarray(data["token_ids"][:n])
        self.kind = np.zeros(n, np.uint8)
        self.dialogue = np.zeros(n, np.int64)
        if dialogues is not None:
            alone = open_activations(dialogues)
            if not np.array_equal(alone["token_ids"][:n], self.ids):
                raise ValueError(f"{path}: holds other tokens than {dialogues}")
            lengths = alone["seq_lengths"]
            self.kind = np.asarray(alone["token_kind"][:n])
            self.dialogue = np.repeat(np.arange(len(lengths)), lengths)[:n]
        self.opening = self.kind == SHARED_PREFIX  # (n_tokens,)
        norms = token_norms(self.activations)
        # as train_sae.py has it: of the tokens after the shared prefix
        self.max_norm = float(MAX_NORM_RATIO * np.median(norms[~self.opening]))
        self.sink = norms > self.max_norm

    def allowed(self, *, openings: bool, sinks: bool) -> np.ndarray:
        """(n_tokens,) bool: the tokens that a training with, or without, openings and sinks may
        use."""
        keep = np.ones(len(self.ids), bool)
        if not openings:
            keep &= ~self.opening
        return keep if sinks else keep & ~self.sink

    def some(self, n: int, seed: int, *, openings: bool, sinks: bool) -> np.ndarray:
        """(n,) rows, ascending, of the first n allowed tokens in an order that the seed decides:
        of the same tokens read otherwise the same ones, but for their sinks."""
        order = np.random.default_rng((seed, 1)).permutation(len(self.ids))
        return np.sort(order[self.allowed(openings=openings, sinks=sinks)[order]][:n])


class Tested(Tokens):
    """Held-out dialogues, and what an autoencoder's errors on them are compared with.

    special (n_tokens,) bool: FAST's special tokens. For each set of SETS and, under the set's name
    followed by ", special", for the special tokens in it: counts, (n_dialogues,) tokens; spread,
    (n_dialogues,) squared distances from the set's mean.
    """

    def __init__(self, path: Path, dialogues: Path, n: int | None, tokenizer: Any) -> None:
        super().__init__(path, dialogues, n)
        self.special = mark_special(self.ids, self.kind, tokenizer)
        everything = np.ones(len(self.ids), bool)
        sets = dict(zip(SETS, (everything, ~self.sink, ~self.sink & ~self.opening)))
        self.sets = sets | {f"{name}, special": of & self.special for name, of in sets.items()}
        self.counts = {name: self.per_dialogue(of, of) for name, of in self.sets.items()}
        wide = np.asarray(self.activations, np.float32)
        self.spread = {}
        for name in SETS:
            chosen = self.sets[name]
            squared = np.zeros(len(self.ids))
            squared[chosen] = np.square(wide[chosen] - wide[chosen].mean(0)).sum(1)
            self.spread[name] = self.per_dialogue(squared, chosen)

    @property
    def n_dialogues(self) -> int:
        """How many dialogues there are, the last one perhaps in part."""
        return int(self.dialogue[-1]) + 1

    def per_dialogue(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """(n_dialogues,) sums of values (n_tokens,) over each dialogue's chosen tokens."""
        return np.bincount(self.dialogue[chosen], values[chosen], minlength=self.n_dialogues)

    def measure(self, sae: Autoencoder) -> dict[str, Any]:
        """{"errors": {set: (n_dialogues,) squared errors, summed over tokens and dimensions}, "l0",
        "dead_fraction"} of an autoencoder."""
        from fastsae.sae.metrics import evaluate

        errors = np.empty(len(self.ids))
        rows = np.arange(len(errors))
        found = evaluate(sae, self.activations, rows, self.dialogue, self.special, errors=errors)
        return {
            "errors": {name: self.per_dialogue(errors, of) for name, of in self.sets.items()},
            "l0": found["l0"],
            "dead_fraction": found["dead_fraction"],
        }


def template_share(sae: Autoencoder, tokens: Tokens) -> float:
    """The share of the features that have more than half of their activation on tokens which the
    chat template wrote, sinks left out; of the features that fire MIN_FIRINGS times."""
    mass, firings = np.zeros((2, sae.m_total_neurons)), np.zeros(sae.m_total_neurons, np.int64)
    for rows, entries in encoded(sae, tokens.activations, np.flatnonzero(~tokens.sink)):
        column, value = entries.column.cpu().numpy(), entries.value.cpu().numpy()
        by_template = tokens.kind[rows[entries.row.cpu().numpy()]] != CONTENT
        for side in (0, 1):
            here = by_template == side
            mass[side] += np.bincount(column[here], value[here], minlength=len(firings))
        firings += np.bincount(column, minlength=len(firings))
    often = firings >= MIN_FIRINGS
    return float((mass[1] > mass[0])[often].mean()) if often.any() else float("nan")


def encoded(sae: Autoencoder, activations: Any, rows: np.ndarray) -> Any:
    """Yield (rows, SparseActivations) of the rows (n,) of activations (n_tokens, d), some at a
    time."""
    from fastsae.sae.autoencoder import encode

    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        x = torch.from_numpy(np.asarray(activations[part], np.float32))
        yield part, encode(sae, x.to(sae.input_bias.device))
