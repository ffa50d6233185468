"""Labels and scores by a language model, by two protocols, and their validation on examples the
labeller never saw.

contrastive: HypotheSAEs' prompt, the strongest examples against those where the feature is silent
(arXiv 2502.04382). fast: the tokens of the five strongest examples with their activations, a score
from 1 to 5 and a name (FAST, arXiv 2506.07691). fidelity: HypotheSAEs' annotator says of held-out
examples whether the label fits; precision, recall and F1 against the feature.

Half of the texts, drawn once by the seed, may be shown to the labeller; validation uses the other
half only.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.data.token_text import seen_values, with_text
from fastsae.interpretation.llm.judging import CHANCE, judged, judging_tasks
from fastsae.interpretation.llm.replies import (
    fits,
    parse_fast,
    parse_label,
    parse_numbers,
    parse_yes_no,
)
from fastsae.interpretation.llm.shown import ANSWERED, MIN_HELD_OUT, Shown
from fastsae.runtime.packages import postpone_init

if TYPE_CHECKING:
    from fastsae.data.datasets import Example
    from fastsae.interpretation.llm.client import Asker

# examples in a contrastive prompt, half of them positive (HypotheSAEs' default)
N_CONTRASTED = 20
FAST_EXAMPLES = 5  # strongest examples in a FAST prompt; a feature must fire in all of them
FAST_WIDTH = 24  # tokens shown on each side of the strongest one
# as long as a label usually is, for counting what is yet to come
ORDINARY_LABEL = "describes a person who hesitates before an everyday decision"

FAST_PROMPT = """You judge how well one feature of a language model can be understood. \
On every token of a text the feature has an activation: 0 where it is silent, \
larger where it is stronger. Below are the {n} text passages in which it is strongest, \
written as token and activation in turn, one token per line.

{passages}

Look at the tokens with high activation and at what stands around them. \
What do they have in common, and how consistently?
Scores:
5 - one clear pattern, and nothing deviates from it
4 - a clear pattern with one or two deviations
3 - a pattern is clear overall, but quite a few activations do not fit it
2 - a broad theme without structure
1 - no pattern

Explain in one or two sentences. Then end with exactly one line of this form, \
the score a whole number from 1 to 5 and the name a short \
description of what the feature fires on:
My final verdict score is: [[SCORE]], feature name is [[NAME]]"""

fits_numbers = fits(parse_numbers)


def contrastive_prompts(shown: Shown, features: Iterable[int]) -> dict[int, str]:
    """{feature: HypotheSAEs' contrastive prompt} for the features that fire in MIN_HELD_OUT
    examples that may be shown."""
    # it prints a warning for every feature with few examples
    with contextlib.redirect_stdout(io.StringIO()):
        postpone_init("hypothesaes")
        from hypothesaes.interpret_neurons import InterpretConfig, NeuronInterpreter

        def sample(neuron_idx, **_):
            positive, negative = shown.contrast(neuron_idx, N_CONTRASTED, shown=True)
            return {
                "positive_texts": [shown.text(neuron_idx, e) for e in positive],
                "negative_texts": [shown.text(neuron_idx, e) for e in negative],
            }

        config = InterpretConfig()
        config.sampling.function = sample
        builder, everywhere = NeuronInterpreter(), _Firing()
        return {
            j: builder._build_interpretation_prompt(None, everywhere, j, 0, config)
            for j in features
            if len(shown.contrast(j, N_CONTRASTED, shown=True)[0]) >= MIN_HELD_OUT
        }


class _Firing:
    """Stands for the (n, M) activations where HypotheSAEs only asks whether a feature fires."""

    def __getitem__(self, key: object) -> np.ndarray:
        return np.ones(1)


def fast_prompts(shown: Shown, features: Iterable[int]) -> dict[int, str]:
    """{feature: FAST prompt} for the features that fire in five examples that may be shown."""
    chosen = {}
    for j in features:
        if can_score(shown, j):
            chosen[j] = [int(e) for e in shown.examples[shown.ranked(j, True)[0][:FAST_EXAMPLES]]]
    found = shown.evidence.token_values(
        [(j, e) for j, examples in chosen.items() for e in examples]
    )
    return {
        j: FAST_PROMPT.format(
            n=FAST_EXAMPLES,
            passages="\n\n".join(
                f"Passage {i}:\n{_token_lines(shown.evidence, e, *found[j, e])}"
                for i, e in enumerate(examples, 1)
            ),
        )
        for j, examples in chosen.items()
    }


def can_score(shown: Shown, feature: int) -> bool:
    """Whether a feature fires in as many examples that may be shown as FAST's prompt needs."""
    return bool((shown.ranked(feature, True)[1][:FAST_EXAMPLES] > 0).sum() == FAST_EXAMPLES)


def _token_lines(evidence, example, positions, values):
    """Token and activation in turn; what a feature has on a later part of a character cut into
    tokens counts for its first part."""
    tokens = evidence.token_texts(example)
    seen, strengths = seen_values(tokens, positions, values)
    activations = np.zeros(len(tokens))
    activations[seen] = strengths
    # (n_shown,) of the tokens that show something
    places = np.unique(with_text(tokens))
    activations = activations[places]
    peak = int(np.argmax(activations))
    first = max(
        min(int(np.searchsorted(places, evidence.own_start(example))), peak), peak - FAST_WIDTH
    )
    return "\n".join(
        f"{tokens[places[i]]!r} {_figure(activations[i])}"
        for i in range(first, min(len(places), peak + FAST_WIDTH + 1))
    )


def _figure(value):
    """A number with three significant digits, but a large one as a whole number."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def fidelity_prompts(
    shown: Shown, labels: Mapping[int, str], n_examples: int
) -> dict[int, list[tuple[str, bool]]]:
    """{feature: [(prompt, should it be yes), ...]} over held-out examples; features that
    `untestable` names are left out.

    There are no more positive than negative ones, so that an annotator who always says yes gets an
    F1 of at most 2/3.
    """
    postpone_init("hypothesaes")
    from hypothesaes.utils import load_prompt

    template, result = load_prompt("annotate"), {}
    for j, label in labels.items():
        if not untestable(shown, j, n_examples):
            positive, negative = shown.contrast(j, n_examples, shown=False)
            result[j] = [
                (template.format(hypothesis=label, text=shown.text(j, e)), yes)
                for examples, yes in ((positive[: len(negative)], True), (negative, False))
                for e in examples
            ]
    return result


def untestable(shown: Shown, feature: int, n_examples: int) -> str | None:
    """Why a label of the feature cannot be tested on held-out examples, or None."""
    positive, negative = shown.contrast(feature, n_examples, shown=False)
    if n_examples // 2 < MIN_HELD_OUT:
        return f"N_FIDELITY_EXAMPLES is below {2 * MIN_HELD_OUT}: too few to validate the label"
    if len(positive) < MIN_HELD_OUT:
        return "fires in too few held-out examples to validate the label"
    return (
        "fires in nearly all held-out examples: too few are silent to validate the label"
        if len(negative) < MIN_HELD_OUT
        else None
    )


def fidelity(answers: Sequence[tuple[bool | None, bool]]) -> dict[str, float] | None:
    """{fidelity_precision, fidelity_recall, fidelity_f1, n_held_out} of [(said yes or None,
    fires)], or None if too few are clear."""
    clear = [(said, fires) for said, fires in answers if said is not None]
    if (
        len(clear) < ANSWERED * len(answers)
        or not any(f for _, f in clear)
        or all(f for _, f in clear)
    ):
        return None
    hits = sum(said and fires for said, fires in clear)
    precision, recall = (
        hits / max(sum(said for said, _ in clear), 1),
        hits / sum(fires for _, fires in clear),
    )
    return {
        "fidelity_precision": precision,
        "fidelity_recall": recall,
        "fidelity_f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "n_held_out": len(clear),
    }


def plain_text(example: "Example") -> str:
    """An example as one text: itself, or its turns with `role: ` before each."""
    return (
        example.messages[0]["content"]
        if example.is_text
        else "\n\n".join(f"{m['role']}: {m['content']}" for m in example.messages)
    )


class Labelling:
    """The calls that label `labelled` features and score `scored` ones: their plan, and their
    outcome."""

    def __init__(
        self,
        shown: Shown,
        asker: "Asker",
        *,
        protocol: str,
        labelled: Sequence[int],
        candidates: Sequence[int],
        n_scored: int,
        n_fidelity: int,
        n_judged: int = 0,
        rules: Mapping[int, str] | None = None,
    ) -> None:
        """candidates: features in random order, of which the first `n_scored` that fire in five
        examples are scored; n_judged, rules: see `judging.judging_tasks`."""
        self.shown, self.asker, self.n_fidelity = shown, asker, n_fidelity
        self.n_judged, self.rules = n_judged, rules or {}
        scored = [j for j in candidates if can_score(shown, j)][:n_scored]
        self.contrastive = contrastive_prompts(shown, labelled) if protocol != "fast" else {}
        self.fast = (
            fast_prompts(shown, list(dict.fromkeys([*labelled, *scored])))
            if protocol != "contrastive"
            else {}
        )
        self.labelled, self.scored, self.protocol = (
            labelled,
            [j for j in scored if j in self.fast],
            protocol,
        )

    def plan(self, count_tokens: Callable[[str], int]) -> list[tuple[str, int, int]]:
        """[(what, calls, prompt tokens)] still to be paid for; validation is counted with the
        label, where it is there already."""
        parts = [
            ("contrastive labels", self.asker.open(self.contrastive.values(), fits(parse_label))),
            ("FAST scores", self.asker.open(self.fast.values(), fits(parse_fast))),
            ("validation, at most", self._open_validation() if self.n_fidelity else []),
            *self._open_judging(),
        ]
        return [
            (what, len(prompts), sum(map(count_tokens, prompts)))
            for what, prompts in parts
            if prompts
        ]

    def _labels_so_far(self):
        """({feature: its label}, [features whose label is yet to come]) of those to be labelled."""
        labels: dict[int, Any] = {}
        to_come: list[int] = []
        for j in self.labelled:
            for prompts, parse in ((self.contrastive, parse_label), (self.fast, parse_fast)):
                if j in prompts:
                    line = self.asker.answered(prompts[j], fits(parse))
                    if line is None:
                        to_come.append(j)
                        break
                    if line["reply"] is not None and (value := parse(line["reply"])) is not None:
                        labels[j] = value if parse is parse_label else value[1]
                        break
        return labels, to_come

    def _open_validation(self):
        """Prompts of the validation still to be asked; a label that is yet to come has the ordinary
        length."""
        labels, to_come = self._labels_so_far()
        known, unknown = (
            fidelity_prompts(self.shown, some, self.n_fidelity).values()
            for some in (labels, dict.fromkeys(to_come, ORDINARY_LABEL))
        )
        return [
            *self.asker.open([p for pairs in known for p, _ in pairs], fits(parse_yes_no)),
            *(p for pairs in unknown for p, _ in pairs),
        ]

    def _open_judging(self):
        """[(what, prompts still to be asked)] of each kind of judgement."""
        if not self.n_judged:
            return []

        labels, to_come = self._labels_so_far()
        # of different words, or no label would be another feature's
        labels |= {j: f"{ORDINARY_LABEL} ({j})" for j in to_come}
        tasks = judging_tasks(self.shown, labels, self.rules, self.n_judged)
        return [
            (
                f"{kind} tests, at most",
                self.asker.open([task.prompt for task in tasks if task.kind == kind], fits_numbers),
            )
            for kind in CHANCE
        ]

    def print_plan(self, tokenizer: Any) -> None:
        """Say what would be asked, in calls and prompt tokens as the examined model's own tokenizer
        counts them."""
        parts = self.plan(lambda prompt: len(tokenizer.encode(prompt, add_special_tokens=False)))
        for what, calls, n_tokens in parts:
            print(f"{what}: {calls:,} calls, {n_tokens:,} prompt tokens")
        print(
            f"dry run: {sum(calls for _, calls, _ in parts):,} calls with about "
            f"{sum(n for *_, n in parts):,} prompt tokens are still to be paid for; "
            "nothing was asked or written."
        )

    def run(self) -> dict[int, dict[str, Any]]:
        """{feature: {label, label_protocol, score, score_name, fidelity_..., problems}} of every
        feature asked about."""
        outcome: dict[int, dict] = {
            j: {"problems": []}
            for j in dict.fromkeys([*self.contrastive, *self.fast, *self.labelled])
        }
        replies = self.asker.ask(list(self.contrastive.values()), "labels", fits(parse_label))
        for j, prompt in self.contrastive.items():
            if (
                label := self._parsed(outcome[j], replies[prompt], parse_label, "label")
            ) is not None:
                outcome[j].update(label=label, label_protocol="contrastive")
        replies = self.asker.ask(list(self.fast.values()), "FAST scores", fits(parse_fast))
        for j, prompt in self.fast.items():
            if (
                verdict := self._parsed(outcome[j], replies[prompt], parse_fast, "score")
            ) is not None:
                outcome[j].update(score=verdict[0], score_name=verdict[1])
                if "label" not in outcome[j]:
                    outcome[j].update(label=verdict[1], label_protocol="fast")
        for j in [j for j in self.labelled if not (j in self.contrastive or j in self.fast)]:
            outcome[j]["note"] = "fires in too few examples for a label by the LLM"
        if self.n_fidelity:
            self._validate(outcome)
        if self.n_judged:
            self._judge(outcome)
        return outcome

    @staticmethod
    def _parsed(outcome, answer, parse, what):
        reply, reason = answer
        value = parse(reply) if reply is not None else None
        if value is None:
            outcome["problems"].append(
                f"{what} {reason or 'unusable: the reply is none'}"
                if reply is None or reason
                else f"{what} unusable: the reply does not follow the form"
            )
        return value

    def _validate(self, outcome):
        labels = {j: outcome[j]["label"] for j in self.labelled if "label" in outcome[j]}
        tasks = fidelity_prompts(self.shown, labels, self.n_fidelity) if labels else {}
        replies = self.asker.ask(
            [prompt for pairs in tasks.values() for prompt, _ in pairs],
            "validation",
            fits(parse_yes_no),
        )
        for j, pairs in tasks.items():
            said = [
                parse_yes_no(reply) if (reply := replies[prompt][0]) is not None else None
                for prompt, _ in pairs
            ]
            result = fidelity([(s, fires) for s, (_, fires) in zip(said, pairs)])
            if result:
                outcome[j].update(result)
            else:
                reasons = [why for prompt, _ in pairs if (why := replies[prompt][1])]
                outcome[j]["problems"].append(
                    f"validation {reasons[0] if reasons else 'unusable: no clear yes or no'}"
                )
        for j in labels.keys() - tasks.keys():
            outcome[j]["note"] = untestable(self.shown, j, self.n_fidelity)

    def _judge(self, outcome):

        labels = {j: outcome[j]["label"] for j in self.labelled if "label" in outcome[j]}
        tasks = judging_tasks(self.shown, labels, self.rules, self.n_judged) if labels else []
        replies = self.asker.ask([task.prompt for task in tasks], "judging", fits_numbers)
        scores, reasons = judged(tasks, replies)
        for j, found in scores.items():
            outcome[j].update(found)
        for j, reason in reasons.items():
            outcome[j]["problems"].append(f"judging {reason}")
