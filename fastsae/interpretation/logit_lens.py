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
N_MIXES, CHANCE = 256, 0.95  # random mixes of the features, and the share of them below chance


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
    they are not at hand. Each row is given `promoted_chance` and `suppressed_chance` too: what the
    strongest logit of a random mix of the features, as long as this one, stays within.
    """
    unembedding, decoder = load_unembedding(located, **source), evidence.sae.decoder.weight.t()
    if unembedding is None or unembedding.shape[1] != decoder.shape[1]:
        return {}
    unembedding = unembedding.to(decoder.device)
    lens, sides = {}, promoted_and_suppressed(decoder, unembedding, n_top)
    bounds = chance_logits(decoder, unembedding)
    for row in rows:
        if row["status"] != "dead":
            j = row["feature"]
            lens[j] = tuple(
                [("".join(evidence.texts_of([t])), float(v)) for t, v in zip(ids[j], values[j])]
                for ids, values in sides
            )
            for name, side, bound in zip(("promoted", "suppressed"), lens[j], bounds[j].tolist()):
                row[f"{name}_chance"] = bound
                row[f"{name}_tokens"] = ", ".join(
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


@torch.no_grad()
def chance_logits(
    decoder_rows: torch.Tensor, unembedding: torch.Tensor, seed: int = 0
) -> torch.Tensor:
    """(M, 2): above the first a promoted token, below the second a suppressed one stands out for a
    feature: beyond the strongest logit of CHANCE of N_MIXES random mixes of all features, each as
    long as the feature.

    What raises all tokens alike changes no prediction, so a logit counts from its direction's mean
    over the vocabulary; mixes with random signs have no other preference than that of the space
    which the features span.
    """
    rows, mean = decoder_rows.float().cpu(), unembedding.mean(0).cpu()
    weights = torch.randn(N_MIXES, len(rows), generator=torch.Generator().manual_seed(seed))
    mixes = torch.nn.functional.normalize(weights @ rows, dim=1)
    strongest = (mixes.to(unembedding) @ unembedding.t()).amax(1).cpu() - mixes @ mean
    reach = torch.quantile(strongest, CHANCE) * rows.norm(dim=1)
    return (rows @ mean)[:, None] + torch.stack([reach, -reach], dim=1)
