"""Held-out dialogues, each run alone: what an autoencoder reconstructs of them, with and without
the tokens of huge norm.

`SETS` are the sets of tokens that are measured. FAST's special tokens (arXiv 2506.07691, section on
MSE) are the template's role names and control tokens, in ChatML `<|im_start|>`, `<|im_end|>`, user,
assistant; the first of each dialogue is an attention sink.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared.statistics import (
    bootstrap_counts,
    draw_seeds,
    interval,
    seed_factor,
    widened,
)
from fastsae.data.datasets import Example
from fastsae.sae import Autoencoder

SPECIAL = (
    "user",
    "assistant",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
SETS = ("all tokens", "without sinks", "without prefix and sinks")
PER_DIALOGUE = (
    *(f"{what}, {tokens}" for what in ("mse", "mse_special") for tokens in SETS),
    "mse_special, part on sinks",
)
# a token whose norm is above this many times the median is a sink, as in train_sae.py
MAX_NORM_RATIO = 10
N_BOOTSTRAP = 2000


def split(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out), drawn by the seed, each in the order of the dataset."""
    from fastsae.data.token_masks import split_examples

    held_out = split_examples(len(examples), fraction, seed)
    return [e for e, out in zip(examples, held_out) if not out], [
        e for e, out in zip(examples, held_out) if out
    ]


def as_row(example: Example, label_field: str | None, text_field: str = "text") -> str:
    """An `Example` as a line of a JSONL dataset."""
    content = (
        {text_field: example.messages[0]["content"]}
        if example.is_text
        else {"messages": example.messages}
    )
    label = {label_field: example.label} if label_field and example.label is not None else {}
    return json.dumps({**content, **label}, ensure_ascii=False) + "\n"


def mark_special(
    token_ids: np.ndarray, kind: np.ndarray, tokenizer: Any, strings: Iterable[str] = SPECIAL
) -> np.ndarray:
    """(n_tokens,) bool: the tokens that spell one of `strings` and that the chat template wrote; a
    string may take several."""
    from fastsae.data.tokenization import CONTENT

    ids, by_template = np.asarray(token_ids), np.asarray(kind) != CONTENT
    special = np.zeros(len(ids), bool)
    for string in strings:
        wanted = tokenizer.encode(string, add_special_tokens=False)
        starts = np.arange(len(ids) - len(wanted) + 1)
        fits = np.all(
            [
                (ids[starts + i] == token) & by_template[starts + i]
                for i, token in enumerate(wanted)
            ],
            axis=0,
        )
        for i in range(len(wanted)):
            special[starts[fits] + i] = True
    return special


class HeldOut:
    """The activations file of held-out dialogues, which of their tokens are special, and which
    belong to each set."""

    def __init__(self, path: Path, tokenizer: Any):
        from fastsae.activations.files import open_activations
        from fastsae.data.token_masks import token_norms, usable_tokens

        data = open_activations(path)
        # (n_tokens, d)
        self.activations, kind = np.asarray(data["activations"]), data["token_kind"]
        # (n_tokens,)
        self.example = np.repeat(np.arange(len(data["seq_lengths"])), data["seq_lengths"])
        # (n_tokens,)
        self.special = mark_special(data["token_ids"], kind, tokenizer)
        norms = token_norms(self.activations)
        usable, max_norm = usable_tokens(
            norms, kind, exclude_shared_prefix=True, max_norm_ratio=MAX_NORM_RATIO
        )
        self.sink = norms > max_norm
        self.sets = dict(zip(SETS, (np.ones(len(norms), bool), ~self.sink, usable)))
        self.variance = {name: self._variance(chosen) for name, chosen in self.sets.items()}

    def _variance(self, chosen: np.ndarray) -> float:
        rows = self.activations[chosen].astype(np.float64)
        return float(np.square(rows - rows.mean(0)).sum())

    def counts(self) -> dict[str, int]:
        """How many tokens there are, and how many of them are special, sinks and both."""
        return {
            "tokens": len(self.sink),
            "special": int(self.special.sum()),
            "sinks": int(self.sink.sum()),
            "special_sinks": int((self.special & self.sink).sum()),
            "special_without_prefix_and_sinks": int((self.special & self.sets[SETS[2]]).sum()),
        }

    def measure(self, sae: Autoencoder) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(figures on each set, {name: (n_dialogues,) errors, nan where a dialogue has no such
        token})."""
        from fastsae.sae.metrics import evaluate

        # (n_tokens,) squared, summed over d
        errors = np.empty(len(self.example))
        overall = evaluate(
            sae, self.activations, np.arange(len(errors)), self.example, self.special, errors=errors
        )
        d, n = self.activations.shape[1], int(self.example[-1]) + 1
        figures = {name: overall[name] for name in ("l0", "dead_fraction", "cosine_similarity")}
        figures["sets"], per_dialogue = {}, {}
        for name, chosen in self.sets.items():
            for what, of in (("mse", chosen), ("mse_special", chosen & self.special)):
                per_dialogue[f"{what}, {name}"] = per_example(errors / d, self.example, of, n)
            normalised = float(errors[chosen].sum() / self.variance[name])
            mse, special = (
                float(np.nanmean(per_dialogue[f"{what}, {name}"]))
                for what in ("mse", "mse_special")
            )
            figures["sets"][name] = {
                "mse": mse,
                "mse_special": special,
                "normalized_mse": normalised,
                "explained_variance": 1 - normalised,
            }
        per_dialogue["mse_special, part on sinks"] = per_example(
            np.where(self.sink, errors, 0) / d, self.example, self.special, n
        )
        return figures, per_dialogue


def per_example(values: np.ndarray, example: np.ndarray, chosen: np.ndarray, n: int) -> np.ndarray:
    """(n,) mean of `values` over each example's chosen tokens (eq. 7's inner mean); nan where it
    has none."""
    total = np.bincount(example[chosen], values[chosen], minlength=n)
    with np.errstate(invalid="ignore"):
        return total / np.bincount(example[chosen], minlength=n)


def resampled(errors: np.ndarray, seeds_drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(N_BOOTSTRAP,) means of errors (n_seeds, n_dialogues) under resampling of the dialogues, the
    same of dialogues and seeds, the mean.

    seeds_drawn: (N_BOOTSTRAP, n_seeds). The dialogues drawn are the same in every call; those
    without such a token are left out.
    """
    errors = errors[:, ~np.isnan(errors).any(0)]
    n = errors.shape[1]
    # (N_BOOTSTRAP, n_dialogues)
    weights = bootstrap_counts(n, len(seeds_drawn)) / n
    # (N_BOOTSTRAP, n_seeds)
    by_seed = weights @ errors.T
    return (
        by_seed.mean(1),
        np.take_along_axis(by_seed, seeds_drawn, axis=1).mean(1),
        float(errors.mean()),
    )


def ordering(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means of the three sources' errors, {source: (n_seeds, n_dialogues)}, log2 of their ratios
    with intervals, and the verdict.

    The dialogues drawn are the same for all sources, the seeds are drawn for each, their part
    widened by `seed_factor` (in logarithms, where errors stay above 0). confirmed: both intervals
    of log2 BT(F) / FAST and log2 BT(P) / BT(F) are above 0; refuted: one of them is below 0;
    otherwise open.
    """
    drawn, means = {}, {}
    for stream, (source, errors) in enumerate(arrays.items()):
        of_dialogues, of_both, means[source] = resampled(
            errors, draw_seeds(len(errors), N_BOOTSTRAP, stream)
        )
        drawn[source] = np.log2(of_dialogues) + seed_factor(len(errors)) * np.log2(
            of_both / of_dialogues
        )
    result: dict[str, Any] = {
        "mean": {source: float(mean) for source, mean in means.items()},
        "log2": {source: float(np.log2(mean)) for source, mean in means.items()},
    }
    intervals = []
    for better, worse in (("FAST", "BT(F)"), ("BT(F)", "BT(P)")):
        intervals.append(interval(drawn[worse] - drawn[better]))
        result[f"log2 {worse} / {better}"] = {
            "value": float(np.log2(means[worse] / means[better])),
            "interval": intervals[-1],
        }
    result["ordering"] = (
        "confirmed"
        if min(i[0] for i in intervals) > 0
        else "refuted"
        if min(i[1] for i in intervals) < 0
        else "open"
    )
    return result


def gap_on_sinks(fast: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The part of the gap in MSE_st (all tokens) that lies on sinks: the mean over dialogues splits
    into sinks and other tokens.

    fast, other: {name: (n_seeds, n_dialogues)}. share is part / gap, None where the gap's interval
    holds 0.
    """
    n_seeds = len(fast[PER_DIALOGUE[0]])
    draws = [draw_seeds(n_seeds, N_BOOTSTRAP, stream) for stream in (0, 1)]

    def difference(name: str) -> tuple[np.ndarray, float]:
        """(n_draws,) other less FAST, and its value."""
        of_fast = resampled(fast[name], draws[0])
        of_other = resampled(other[name], draws[1])
        drawn = [widened(by_example, both, n_seeds) for by_example, both, _ in (of_other, of_fast)]
        return drawn[0] - drawn[1], of_other[2] - of_fast[2]

    gaps, gap = difference("mse_special, all tokens")
    parts, part = difference("mse_special, part on sinks")
    low, high = interval(gaps)
    clear = low > 0 or high < 0
    return {
        "gap": float(gap),
        "gap_interval": [low, high],
        "on_sinks": float(part),
        "share": float(part / gap) if clear else None,
        "share_interval": interval(parts / gaps) if clear else None,
    }
