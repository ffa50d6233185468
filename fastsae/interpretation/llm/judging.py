"""Tests of labels by a language model that judges, each beside labels that are wrong on purpose
(detection, fuzzing and intruder tests as in arXiv 2410.13928; prompts and sampling are our own).

detection: in which of five passages does the feature fire, by its label? Half of the passages that
are silent hold a token on which the feature fires elsewhere. fuzzing: in which of five passages
are the right tokens marked? intruder: which of five passages marks tokens of another feature? It
needs no label and says whether there is a pattern at all.

Passages come from the half of the texts that labels are not made from. Detection and fuzzing are
asked with the feature's label, with another feature's label (the null), and with the feature's rule
where it has one. Their score is the balanced accuracy, 0.5 by chance; the intruder's is the share
found, 0.2 by chance.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastsae.data.token_text import seen_values, with_text
from fastsae.interpretation.llm.replies import parse_numbers
from fastsae.interpretation.llm.shown import ANSWERED, MIN_HELD_OUT, Shown
from fastsae.interpretation.probing import estimate
from fastsae.interpretation.tables import JUDGED

PER_PROMPT = 5  # passages
WIDTH = 16  # tokens shown on each side of the one a passage is about
STRONG = 0.3  # of the strongest activation in a passage: a token above it is marked
MOST_SEARCHED = 2000  # silent examples in which a token of the feature is looked for
N_TOKENS = 8  # different tokens of a feature that are looked for
CHANCE = {"detection": 0.5, "fuzzing": 0.5, "intruder": 1 / PER_PROMPT}

ANSWER_FORM = """You may think in a sentence or two. \
Then end with exactly one line of this form, the numbers separated by commas:
Answer: {form}"""
PASSAGES = """{passages}

"""
DETECTION = (
    """A feature of a language model is said to fire on this: {label}

In which of the following {n} passages of text does it fire somewhere, if that is true? \
It may be all of them, some or none.

"""
    + PASSAGES
    + ANSWER_FORM.format(form="the numbers of these passages, or none")
)
FUZZING = (
    """A feature of a language model is said to fire on this: {label}

In each of the following {n} passages of text some tokens are marked <<like this>>. \
In which passages are the marked tokens those on which it fires, if that is true? \
It may be all of them, some or none.

"""
    + PASSAGES
    + ANSWER_FORM.format(form="the numbers of these passages, or none")
)
INTRUDER = (
    """In each of the following {n} passages of text some tokens are marked <<like this>>. \
In all passages but one the same feature of a language model fires on the marked tokens; \
in one it is another feature. Which passage is that?

"""
    + PASSAGES
    + ANSWER_FORM.format(form="the number of the passage")
)


class Passage(NamedTuple):
    """A place of an example: around the token `centre`, with `marked` positions."""

    example: int
    centre: int
    marked: tuple[int, ...] = ()


class Task(NamedTuple):
    """One prompt: `truth` says of each passage whether its number belongs into the answer."""

    feature: int
    kind: str
    source: str
    prompt: str
    truth: tuple[bool, ...]


class Passages:
    """The passages of held-out texts in which features fire, are silent, or are marked wrongly."""

    def __init__(self, shown: Shown) -> None:
        self.shown, self.evidence = shown, shown.evidence

    def firing(self, feature: int, n: int) -> list[int]:
        """At most n held-out examples in which a feature fires, from its strongest to its weakest,
        at equal distances."""
        rows, values = self.shown.ranked(feature, shown=False)
        rows = rows[values > 0]
        places = np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int))
        return [int(e) for e in self.shown.examples[rows[places]]] if len(rows) else []

    def marked(
        self, pairs: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], tuple[Passage, np.ndarray]]:
        """{(feature, example): (the passage around the feature's maximum, with the tokens marked
        where it fires strongly; all positions where it fires)}."""
        found = {}
        for pair, (positions, values) in self.evidence.token_values(list(pairs)).items():
            if not len(values):
                continue
            tokens = self.evidence.token_texts(pair[1])
            places, strengths = seen_values(tokens, positions, values)
            centre = int(places[np.argmax(strengths)])
            inside = self.window(pair[1], centre)
            strong = places[(strengths > STRONG * strengths.max()) & np.isin(places, inside)]
            found[pair] = Passage(pair[1], centre, tuple(map(int, strong))), places
        return found

    def silent(self, feature: int, n: int) -> list[Passage]:
        """At most n passages of held-out examples in which a feature does not fire, half of them
        around a token on which it fires elsewhere, where there are such."""
        rows, values = self.shown.ranked(feature, shown=False)
        draw = np.random.default_rng((self.shown.seed, feature, 11))
        examples = draw.permutation(self.shown.examples[rows[values == 0]])
        own = self.tokens_of(feature)
        with_token: list[Passage] = []
        for example in map(int, examples[:MOST_SEARCHED] if len(own) else []):
            if len(with_token) == (n + 1) // 2:
                break
            places = self.places(example)
            same = places[np.isin(self._ids(example)[places], own)]
            if len(same):
                with_token.append(Passage(example, int(draw.choice(same))))
        taken = {passage.example for passage in with_token}
        rest = [int(e) for e in examples if e not in taken][: n - len(with_token)]
        return with_token + [Passage(e, int(draw.choice(self.places(e)))) for e in rest]

    def tokens_of(self, feature: int) -> np.ndarray:
        """The ids of the tokens on which a feature is strongest, by example."""
        top = self.evidence.statistics.top
        offsets, ids = self.evidence.offsets, self.evidence.data["token_ids"]
        found = [
            ids[offsets[e] + p]
            for e, p in zip(top.example[feature], top.position[feature])
            if e >= 0
        ]
        return np.unique(found)[:N_TOKENS] if found else np.zeros(0, np.int64)

    def wrongly_marked(self, feature: int, passage: Passage, fires: np.ndarray) -> Passage | None:
        """The passage with as many marks on tokens where the feature is silent; None where there
        are too few."""
        window = self.window(passage.example, passage.centre)
        free = np.setdiff1d(window, fires)
        if len(free) < len(passage.marked):
            return None
        draw = np.random.default_rng((self.shown.seed, feature, passage.example, 12))
        marks = np.sort(draw.choice(free, len(passage.marked), replace=False))
        return passage._replace(marked=tuple(map(int, marks)))

    def places(self, example: int) -> np.ndarray:
        """The positions of an example's own tokens that training used and that show a text."""
        tokens = self.evidence.token_texts(example)
        offset = self.evidence.offsets[example]
        seen = np.unique(with_text(tokens))
        return seen[self.evidence.statistics.kept[offset + seen]]

    def window(self, example: int, centre: int) -> np.ndarray:
        """The positions shown of a passage."""
        seen = np.unique(with_text(self.evidence.token_texts(example)))
        first = min(self.evidence.own_start(example), centre)
        return seen[(seen >= max(first, centre - WIDTH)) & (seen <= centre + WIDTH)]

    def text(self, passage: Passage) -> str:
        """A passage in quotation marks on one line, marked tokens as <<token>>; such marks in the
        text itself are pulled apart."""
        tokens, marked = self.evidence.token_texts(passage.example), set(passage.marked)
        tokens = [re.sub("[\0\1]", "\N{REPLACEMENT CHARACTER}", token) for token in tokens]
        pieces = [
            f"\0{tokens[i]}\1" if i in marked else tokens[i]
            for i in self.window(passage.example, passage.centre).tolist()
        ]
        text = "".join(pieces)
        for plain, apart in (("<", "< "), (">", "> ")):
            text = re.sub(f"{plain}(?=[{plain}\0\1])", apart, text)
        text = re.sub("([\0\1])(?=[<>])", r"\1 ", text)
        return json.dumps(text.replace("\0", "<<").replace("\1", ">>"), ensure_ascii=False)

    def _ids(self, example):
        offsets = self.evidence.offsets
        return self.evidence.data["token_ids"][offsets[example] : offsets[example + 1]]


def judging_tasks(
    shown: Shown, labels: Mapping[int, str], rules: Mapping[int, str], n_examples: int
) -> list[Task]:
    """The prompts that test these labels, about `n_examples` passages of each kind for each
    feature and source; features that fire in too few held-out texts are left out.

    labels: {feature: label}; rules: {feature: its rule in words}.
    """
    passages, n = Passages(shown), n_examples // 2
    firing = {j: passages.firing(j, n_examples) for j in labels}
    firing = {j: examples for j, examples in firing.items() if len(examples) >= MIN_HELD_OUT}
    marked = passages.marked([(j, e) for j, examples in firing.items() for e in examples])
    others, tasks = other_labels(labels, shown.seed), []
    for j, examples in firing.items():
        right = [marked[j, e] for e in examples if (j, e) in marked]
        words = {"label": labels[j], "other": others.get(j), "rule": rules.get(j)}
        # detection: the stronger and the weaker ones alike, unmarked
        positive = [passage._replace(marked=()) for passage, _ in right[:: -(-len(right) // n)]]
        negative = passages.silent(j, n)
        mixed = [(p, True) for p in positive] + [(p, False) for p in negative]
        if min(len(positive), len(negative)) >= MIN_HELD_OUT:
            tasks += _asked(passages, j, "detection", DETECTION, words, mixed)
        # fuzzing: every other one is marked wrongly
        wrong = [passages.wrongly_marked(j, *found) for found in right[1::2]]
        mixed = [(p, True) for p, _ in right[::2]] + [(p, False) for p in wrong if p]
        if min(sum(true for _, true in mixed), sum(not true for _, true in mixed)) >= 2:
            tasks += _asked(passages, j, "fuzzing", FUZZING, words, mixed)
        tasks += _intruders(passages, j, [passage for passage, _ in right], marked)
    return tasks


def other_labels(labels: Mapping[int, str], seed: int) -> dict[int, str]:
    """{feature: the label of another one}, the next in a random order whose words differ; features
    without such a one are left out."""
    order = [int(j) for j in np.random.default_rng((seed, 13)).permutation(sorted(labels))]
    found = {}
    for i, j in enumerate(order):
        others = (labels[other] for other in [*order[i + 1 :], *order[:i]])
        different = next((text for text in others if text != labels[j]), None)
        if different is not None:
            found[j] = different
    return found


def _asked(passages, feature, kind, form, words, mixed):
    """Tasks of one kind for each source of words, the passages in one random order."""
    draw = np.random.default_rng((passages.shown.seed, feature, 14))
    order, tasks = draw.permutation(len(mixed)), []
    for numbers in np.array_split(order, -(-len(mixed) // PER_PROMPT)):
        part = [mixed[i] for i in numbers]
        listed = _listed(passages, [passage for passage, _ in part])
        truth = tuple(true for _, true in part)
        for source, text in words.items():
            if text:
                prompt = form.format(label=text, n=len(part), passages=listed)
                tasks.append(Task(feature, kind, source, prompt, truth))
    return tasks


def _intruders(passages, feature, own, marked):
    """Tasks of four passages of a feature and one of another, in whose text it is silent; tokens
    are marked in each."""
    draw = np.random.default_rng((passages.shown.seed, feature, 15))
    fires_in = set(passages.shown.examples[passages.shown.pooled[:, [feature]].nonzero()[0]])
    strangers = [
        passage
        for (other, example), (passage, _) in marked.items()
        if other != feature and example not in fires_in
    ]
    tasks = []
    for start in range(0, len(own) - PER_PROMPT + 2, PER_PROMPT - 1):
        if not strangers:
            break
        four = own[start : start + PER_PROMPT - 1]
        place = int(draw.integers(PER_PROMPT))
        stranger = strangers.pop(int(draw.integers(len(strangers))))
        five = [*four[:place], stranger, *four[place:]]
        prompt = INTRUDER.format(n=PER_PROMPT, passages=_listed(passages, five))
        truth = tuple(i == place for i in range(PER_PROMPT))
        tasks.append(Task(feature, "intruder", "", prompt, truth))
    return tasks


def _listed(passages, some):
    return "\n".join(f"{i}: {passages.text(passage)}" for i, passage in enumerate(some, 1))


def judged(
    tasks: Sequence[Task], replies: Mapping[str, tuple[str | None, str | None]]
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """({feature: {figure: score}}, {feature: why something of it was not judged}).

    A score counts if ANSWERED of the replies follow the form.
    """
    said: dict[tuple[int, str, str], list[list[tuple[bool, bool]] | None]] = {}
    reasons: dict[int, str] = {}
    for task in tasks:
        reply, reason = replies[task.prompt]
        numbers = parse_numbers(reply) if reply is not None else None
        clear = numbers is not None and max(numbers, default=0) <= len(task.truth)
        answer = None
        if clear:
            assert numbers is not None
            answer = [(i in numbers, true) for i, true in enumerate(task.truth, 1)]
        elif reason:
            reasons.setdefault(task.feature, reason)
        said.setdefault((task.feature, task.kind, task.source), []).append(answer)
    scores: dict[int, dict[str, float]] = {}
    for (feature, kind, source), answers in said.items():
        found = [answer for answer in answers if answer is not None]
        name = f"judged_{kind}" + ("" if source in ("", "label") else f"_{source}")
        if len(found) < ANSWERED * len(answers):
            reasons.setdefault(feature, "unusable: the reply does not follow the form")
            continue
        if kind == "intruder":
            right = [all(a == b for a, b in answer) for answer in found]
            scores.setdefault(feature, {})[name] = sum(right) / len(right)
        else:
            value = balanced_accuracy([pair for answer in found for pair in answer])
            if value is not None:
                scores.setdefault(feature, {})[name] = value
    return scores, reasons


def balanced_accuracy(answers: Sequence[tuple[bool, bool]]) -> float | None:
    """The mean of the shares answered rightly where the truth is yes and where it is no; None where
    one of them does not occur. answers: [(said, truth)]."""
    shares = []
    for side in (True, False):
        right = [said == truth for said, truth in answers if truth == side]
        if not right:
            return None
        shares.append(sum(right) / len(right))
    return sum(shares) / 2


def judging_summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{figure: {"value": mean over features, "interval": 95 %, "n": features, "chance"}} of what
    was judged, {} if nothing was; the interval is Student's t over features."""
    rows, found = list(rows), {}
    for name in JUDGED:
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            continue
        mean = estimate(values, 0, 1, independent=True)
        assert mean is not None  # of scores, which are finite
        chance = CHANCE[name.split("_")[1]]
        found[name] = {**mean.plain(), "n": len(values), "chance": chance}
    return {"judged": found} if found else {}
