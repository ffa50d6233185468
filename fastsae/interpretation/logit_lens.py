"""Tokens that a feature promotes and suppresses: its decoder direction read through the model's
final norm and unembedding."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastsae.data.token_text import visible
from fastsae.interpretation.unembedding import load_unembedding

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

BLOCK = 256  # features at a time


def add_lens(
    rows: list[dict[str, Any]],
    evidence: "Evidence",
    located: Path | str,
    source: Mapping[str, Any],
    n_top: int,
    n_column: int,
) -> dict[int, tuple]:
    """Name in each row of a feature that fires the tokens it promotes and suppresses; {feature:
    ([(token, logit)], [...])}.

    `located` and `source` ({"revision", "cache_dir"}) say where the model's weights are; {} where
    they are not at hand.
    """
    unembedding, decoder = load_unembedding(located, **source), evidence.sae.decoder.weight.t()
    if unembedding is None or unembedding.shape[1] != decoder.shape[1]:
        return {}
    lens, sides = {}, promoted_and_suppressed(decoder, unembedding.to(decoder.device), n_top)
    for row in rows:
        if row["status"] != "dead":
            j = row["feature"]
            lens[j] = tuple(
                [("".join(evidence.texts_of([t])), float(v)) for t, v in zip(ids[j], values[j])]
                for ids, values in sides
            )
            for name, side in zip(("promoted_tokens", "suppressed_tokens"), lens[j]):
                row[name] = ", ".join(
                    f"'{visible(token.strip() or token)}'" for token, _ in side[:n_column]
                )
    return lens


@torch.no_grad()
def promoted_and_suppressed(
    decoder_rows: torch.Tensor, unembedding: torch.Tensor, n_top: int
) -> tuple:
    """(ids, values) of the n_top largest and of the n_top smallest logits of each feature, (M,
    n_top) each, strongest first.

    decoder_rows (M, d); unembedding (vocabulary, d) with the final norm's weights folded in: see
    `load_unembedding`.
    """
    up, down = ([], []), ([], [])
    for start in range(0, len(decoder_rows), BLOCK):
        block = decoder_rows[start : start + BLOCK].float()
        logits = block @ unembedding.t()  # (block, vocabulary)
        for largest, (ids, values) in ((True, up), (False, down)):
            best = logits.topk(min(n_top, logits.shape[1]), dim=1, largest=largest)
            ids.append(best.indices.cpu().numpy())
            values.append(best.values.cpu().numpy())
    return tuple(tuple(np.concatenate(part) for part in side) for side in (up, down))
