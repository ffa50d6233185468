"""What a language model is shown of the examples: which half of the texts, and what the model read
of them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastsae.data.tokenization import CONTENT, ROLES
from fastsae.interpretation.firings import finding_half

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

# of an example in a prompt, HypotheSAEs' 256 words; longer ones are cut around the feature's
# strongest token
MAX_TOKENS = 384
# positive examples of a label, positive and negative held-out ones of its test, at least
MIN_HELD_OUT = 3
ANSWERED = 0.9  # share of the replies of a test that must follow the form


class Shown:
    """Which examples the labeller may see, and the texts and activations that prompts are made of.

    Equal texts count once, and the halves are drawn by text: what the labeller saw is never what
    its label is tested on.
    """

    def __init__(self, evidence: "Evidence", texts: Sequence[str], seed: int) -> None:
        self.evidence, self.texts, self.seed = evidence, texts, seed
        metadata = evidence.data.get("metadata")
        self.max_length = (
            json.loads(str(metadata))["settings"].get("MAX_LENGTH")
            if metadata is not None
            else None
        )
        # (n_pooled,) example numbers
        self.examples = evidence.statistics.pooled_examples
        self.pooled = evidence.statistics.pooled_max.tocsc()  # (n_pooled, M)
        numbers = evidence.text_numbers[self.examples]
        self.may_show = finding_half(numbers, seed)  # (n_pooled,) bool
        first = np.unique(numbers, return_index=True)[1]  # (n_texts,) the first of each text
        # (n_pooled,) the first of its text?
        self.first = np.zeros(len(self.examples), bool)
        self.first[first] = True

    def ranked(self, feature: int, shown: bool) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values): pooled rows of the shown or of the held-out texts, strongest first, ties
        by number."""
        column = self.pooled[:, feature].toarray().ravel()
        rows = np.flatnonzero(self.first & (self.may_show == shown))
        rows = rows[np.argsort(-column[rows], kind="stable")]
        return rows, column[rows]

    def contrast(self, feature: int, n: int, shown: bool) -> tuple[np.ndarray, np.ndarray]:
        """(positive, negative) example numbers, at most n // 2 each: the strongest, and at random
        those where the feature is silent."""
        rows, values = self.ranked(feature, shown)
        silent = rows[values == 0]
        negative = np.random.default_rng((self.seed, feature)).permutation(silent)[: n // 2]
        return self.examples[rows[values > 0][: n // 2]], self.examples[np.sort(negative)]

    def text(self, feature: int, example: int) -> str:
        """An example as the labeller reads it: its text, or what the model read of it if that is
        long or was cut by MAX_LENGTH.

        Of the latter at most MAX_TOKENS, around the feature's strongest token, or any where it is
        silent; markup is left out.
        """
        start, end = self.evidence.own_start(example), self._n_tokens(example)
        if self._whole(example) and end - start <= MAX_TOKENS:
            return self.texts[example]
        row = self.evidence.offsets[example]
        kind = self.evidence.data["token_kind"][row + start : row + end]
        places = start + (
            np.flatnonzero(kind == CONTENT) if (kind == CONTENT).any() else np.arange(end - start)
        )
        positions, values = self.evidence.token_values([(feature, int(example))])[
            feature, int(example)
        ]
        peak = (
            np.searchsorted(places, positions[np.argmax(values)])
            if len(values)
            else np.random.default_rng((self.seed, feature, int(example))).integers(len(places))
        )
        left = int(max(0, min(peak - MAX_TOKENS // 2, len(places) - MAX_TOKENS)))
        ends_early = left + MAX_TOKENS < len(places) or not self._whole(example)
        return (
            "… " * (left > 0)
            + self._joined(example, places[left : left + MAX_TOKENS])
            + " …" * ends_early
        )

    def _joined(self, example, places):
        """The texts of tokens of an example; where the template cut turns apart, each begins with
        its role, as in `plain_text`."""
        tokens, row = self.evidence.token_texts(int(example)), self.evidence.offsets[example]
        if self.evidence.examples[example].is_text:
            return "".join(tokens[i] for i in places)
        starts = np.flatnonzero(np.diff(places, prepend=-1) > 1) if len(places) else []
        turns = [
            f"{ROLES[self.evidence.data['token_role'][row + turn[0]]]}: "
            f"{''.join(tokens[i] for i in turn).strip()}"
            for turn in np.split(places, starts)
            if len(turn)
        ]
        return "\n\n".join(turns)

    def _n_tokens(self, example):
        return int(self.evidence.offsets[example + 1] - self.evidence.offsets[example])

    def _whole(self, example):
        """Whether the model surely read all of an example."""
        return self.max_length is None or self._n_tokens(example) < self.max_length
