"""From a dataset, its activations and an autoencoder to everything that can be said of each feature
without a language model."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastsae.data.datasets import Example
from fastsae.data.token_text import TokenTexts, characteristic_tokens, excerpt, token_names
from fastsae.data.tokenization import SHARED_PREFIX
from fastsae.interpretation.firings import Firings
from fastsae.interpretation.statistics import collect, encode_rows, example_blocks
from fastsae.interpretation.tables import RULE

# quantiles of the strongest activation per example, over the examples where a feature fires
QUANTILES = (0.9, 0.7, 0.5, 0.3, 0.1)
# random firing examples per feature from which the quantiles are read
N_SAMPLED = 32
N_NEIGHBOURS = 6
COSINE_BLOCK = 512


class Evidence:
    """The statistics of all features with the texts to show them in.

    data: the members of an activations file; examples: its `Example`s; bounds: {"max_norm",
    "exclude_shared_prefix", "use"} of training; watch: see `statistics.collect`; firings: filled
    on the way, if given.
    """

    def __init__(
        self,
        sae: Any,
        data: Mapping[str, Any],
        examples: Sequence[Example],
        tokenizer: Any,
        bounds: Mapping[str, Any],
        *,
        n_top: int,
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
        watch: Callable[[Any, np.ndarray], object] | None = None,
        firings: Firings | None = None,
    ) -> None:
        self.sae = sae
        self.data = data
        self.examples = examples
        self.tokenizer = tokenizer
        self.n_top = n_top
        self.offsets = np.concatenate([[0], np.cumsum(data["seq_lengths"], dtype=np.int64)])
        name_of_token, self.names = token_names(tokenizer, data["token_ids"])
        self.statistics = collect(
            sae,
            data["activations"],
            data["seq_lengths"],
            data["token_kind"],
            data["token_role"],
            name_of_token,
            len(self.names),
            n_top=n_top,
            n_sampled=N_SAMPLED,
            seed=seed,
            progress=progress,
            watch=watch,
            observe=firings.add if firings else None,
            **bounds,
        )
        self.texts_of = TokenTexts(tokenizer)
        self._texts = {}

    @property
    def m(self) -> int:
        """The number of features, M."""
        return self.statistics.m

    def token_texts(self, example: int) -> list[str]:
        """The texts of an example's tokens, one each."""
        if example not in self._texts:
            self._texts[example] = self.texts_of(
                self.data["token_ids"][self.offsets[example] : self.offsets[example + 1]]
            )
        return self._texts[example]

    def text_read(self, example: int) -> str:
        """The text of an example's kept tokens, as the model read it."""
        kept = self.statistics.kept[self.offsets[example] : self.offsets[example + 1]]
        return "".join(np.array(self.token_texts(example), object)[kept])

    @functools.cached_property
    def text_numbers(self) -> np.ndarray:
        """(n_examples,) numbers; examples of one number are the same tokens."""
        numbers, ids = {}, self.data["token_ids"]
        return np.array(
            [
                numbers.setdefault(bytes(ids[a:b]), len(numbers))
                for a, b in zip(self.offsets, self.offsets[1:])
            ]
        )

    def own_start(self, example: int) -> int:
        """Where an example's own tokens begin, after the prefix that all examples share."""
        kind = self.data["token_kind"][self.offsets[example] : self.offsets[example + 1]]
        return int(np.argmax(kind != SHARED_PREFIX)) if (kind != SHARED_PREFIX).any() else 0

    def rows(self, n_top_tokens: int) -> list[dict[str, Any]]:
        """One dict per feature: the columns of the tables that need no labels of the dataset and no
        LLM."""
        s = self.statistics
        self.top_tokens = characteristic_tokens(
            s.name_mass.sums, s.name_count, self.names, n_top_tokens
        )
        special = s.kind_role_mass[:, 1:].sum((1, 2)) / np.maximum(
            s.kind_role_mass.sum((1, 2)), 1e-30
        )
        rows = []
        for j in range(self.m):
            alive = s.count[j] > 0
            row = {
                "feature": j,
                "label": "",
                "label_source": RULE if alive else "",
                "status": "ok" if alive else "dead",
                "density": float(s.density[j]),
                "max_activation": float(s.maximum[j]),
                "top_tokens": ", ".join(
                    f"'{name}' {100 * share:.0f}%" for name, share in self.top_tokens[j]
                ),
            }
            for i, (example, position) in enumerate(zip(s.top.example[j], s.top.position[j]), 1):
                row[f"top_example_{i}"] = (
                    excerpt(self.token_texts(example), position, self.own_start(example))
                    if example >= 0
                    else ""
                )
            row["special_token_share"] = float(special[j]) if alive else None
            row["matryoshka_level"] = level_name(j, self.sae.prefix_lengths)
            rows.append(row)
        return rows

    def shown_examples(
        self, features: Iterable[int]
    ) -> dict[int, list[tuple[float | None, int, int]]]:
        """{feature: [(quantile or None for the strongest, example, position of the maximum), ...]},
        strongest first."""
        s, shown = self.statistics, {}
        for j in features:
            strongest: list[tuple[float | None, int, int]] = [
                (None, int(e), int(p))
                for e, p in zip(s.top.example[j], s.top.position[j])
                if e >= 0
            ]
            taken = {example for _, example, _ in strongest}
            there = np.flatnonzero(s.sample.example[j] >= 0)
            ranked = there[np.argsort(-s.sample.value[j][there], kind="stable")]
            others: list[tuple[float | None, int, int]] = []
            for quantile in QUANTILES if len(ranked) else ():
                i = ranked[round((1 - quantile) * (len(ranked) - 1))]
                if (example := int(s.sample.example[j][i])) not in taken:
                    taken.add(example)
                    others.append((quantile, example, int(s.sample.position[j][i])))
            shown[j] = strongest + others
        return shown

    def token_values(
        self, pairs: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        """{(feature, example): (positions, values)} of a feature's activations in an example, for
        the pairs given.

        Encodes the examples named once more; what is kept is only what was asked for.
        """
        wanted = {}
        for feature, example in pairs:
            wanted.setdefault(example, []).append(feature)
        order, result = np.array(sorted(wanted), np.int64), {}
        lengths = np.diff(self.offsets)[order] if len(order) else np.zeros(0, np.int64)
        for first, last in example_blocks(np.concatenate([[0], np.cumsum(lengths)])):
            rows = np.concatenate(
                [np.arange(self.offsets[e], self.offsets[e + 1]) for e in order[first:last]]
            )
            rows = rows[self.statistics.kept[rows]]
            features = encode_rows(
                self.sae, torch.from_numpy(np.array(self.data["activations"][rows], np.float32))
            ).tocsc()
            features.sort_indices()
            for example in order[first:last]:
                left, right = np.searchsorted(rows, self.offsets[example : example + 2])
                for feature in wanted[int(example)]:
                    start, end = features.indptr[feature : feature + 2]
                    a, b = start + np.searchsorted(features.indices[start:end], (left, right))
                    result[feature, int(example)] = (
                        rows[features.indices[a:b]] - self.offsets[example],
                        features.data[a:b],
                    )
        return result

    def neighbours(self, features: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
        """{feature: [(other, cosine of the decoder directions), ...]}, nearest first."""
        decoder = torch.nn.functional.normalize(self.sae.decoder.weight.t().float(), dim=1)
        found = {}
        for start in range(0, len(features), COSINE_BLOCK):
            block = torch.as_tensor(features[start : start + COSINE_BLOCK], device=decoder.device)
            cosine = decoder[block] @ decoder.t()
            cosine[torch.arange(len(block)), block] = -2
            best = cosine.topk(min(N_NEIGHBOURS, self.m - 1), dim=1)
            for j, others, values in zip(
                block.tolist(), best.indices.tolist(), best.values.tolist()
            ):
                found[j] = list(zip(others, values))
        return found

    def coactive(self, features: Iterable[int]) -> dict[int, list[tuple[int, float]]]:
        """{feature: [(other, Jaccard index of the tokens where they fire), ...]}, closest first."""
        together, counts, found = self.statistics.together.sums, self.statistics.co_count, {}
        for j in features:
            row = slice(together.indptr[j], together.indptr[j + 1])
            other, both = together.indices[row], together.data[row]
            other, both = other[other != j], both[other != j]
            jaccard = both / np.maximum(counts[j] + counts[other] - both, 1)
            order = np.lexsort((other, -jaccard))[:N_NEIGHBOURS]
            found[j] = [(int(other[i]), float(jaccard[i])) for i in order]
        return found


def level_name(feature: int, prefixes: Sequence[int] | None) -> str:
    """'coarse' for the first Matryoshka prefix, 'fine' for what only the last one holds, 'level i'
    between; '' without prefixes."""
    if not prefixes or len(prefixes) < 2:
        return ""
    level = int(np.searchsorted(prefixes, feature, "right"))
    return {0: "coarse", len(prefixes) - 1: "fine"}.get(level, f"level {level + 1}")
