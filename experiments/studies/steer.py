"""Steering: z' = z + alpha * d_k in the residual stream while the model writes, and what that
costs; and ablation of features.

    python -m experiments.studies.steer  # the feature that is strongest on SPECIAL_TOKEN
    python -m experiments.studies.steer --label-search music --alphas 0,20,40,80
    python -m experiments.studies.steer --features 17,203 --prompts my_questions.jsonl --ablate

The feature is found as FAST finds it (arXiv 2506.07691): the highest average, over up to
N_DIALOGUES dialogues, of its maximum on the special token. Answers are greedy, with the chat
template and a key-value cache; d_k has length 1 and is added to every token, prompt included. What
an alpha means depends on the length of the model's residual stream, so each is also given relative
to its mean norm; random directions of the same length show what any push does. Measured on the
answers: repetition (1 - distinct / all triples of tokens), perplexity under the unsteered model,
and the share that hold the expected word. Answers count as fluent while perplexity stays below
PERPLEXITY_LIMIT times, and repetition within REPETITION_LIMIT of, the unsteered answers'.

Alpha 0 must give the unsteered answers token for token, which is checked; in bfloat16 a batch may
round otherwise than one row does, so check that with --dtype float32. Writes
experiments/results/steer.json, .png, .md and .html, the answers side by side. Answers already
written are read from OUTPUT_DIR/experiments/steer.jsonl, so a run that was stopped continues.
"""

import importlib.util
import re
import sys

import numpy as np

import config
from experiments.shared.provenance import RESULTS, remembered, write_result
from experiments.shared.subjects import (
    STAGES,
    example_ids,
    load_model,
    require,
    scope,
    some_dialogues,
    subjects,
    usable_tokens_of,
)
from experiments.shared.sweeps import quick_settings
from experiments.studies import side_by_side
from experiments.studies.ablate import ablation
from fastsae.data.tokenization import TEMPLATE_DATE
from fastsae.lm import loading
from fastsae.runtime import artifacts
from fastsae.runtime.errors import InputError
from fastsae.runtime.stage import run_stage

SAE: str | None = None  # checkpoint or SAELens folder; none = the run's own
FEATURES: tuple[int, ...] | None = None  # features by number
LABEL_SEARCH: str | None = None  # features whose label holds this text, strongest first
SPECIAL_TOKEN: str = "<|im_end|>"  # without these two: strongest on this token, on average
N_FEATURES: int = 1  # how many to take of those found
N_DIALOGUES: int = 1000  # dialogues in which the feature is looked for, at most
N_RANDOM: int = 2  # random directions to compare with
ALPHAS: tuple[int, ...] = (0, 15, 25, 50, 100, 150, 200)  # FAST's
ALPHA_PERCENT: bool = False  # ALPHAS are per cent of the stream's mean norm, not lengths
ANSWER_ONLY: bool = False  # leave the prompt's tokens as they are, but for the last
N_NEW_TOKENS: int = 80  # tokens of an answer, at most
PROMPTS: str | None = None  # JSONL with text, perhaps expected (a|b); none = side_by_side.py's
PERPLEXITY_LIMIT: float = 2.0  # see above
REPETITION_LIMIT: float = 0.1  # see above
ABLATE: bool = False  # also take each feature, and N_ABLATED random others, out of the stream
N_ABLATED: int = 8  # random features for that comparison
N_ABLATION_EXAMPLES: int = 100  # held-out examples for it
NAME: str = "steer"  # of the files under experiments/results/
QUICK: bool = False  # 4 questions, 1 random direction, 4 alphas, 24 tokens, 60 dialogues

QUICK_VALUES = {
    "N_RANDOM": 1,
    "N_NEW_TOKENS": 24,
    "N_DIALOGUES": 60,
    "N_ABLATED": 3,
    "N_ABLATION_EXAMPLES": 12,
    "ALPHAS": (0, 25, 100, 200),
}
N_QUICK_PROMPTS = 4  # of the questions in side_by_side.py
RECORDED = (
    "FEATURES",
    "LABEL_SEARCH",
    "SPECIAL_TOKEN",
    "ALPHA_PERCENT",
    "ANSWER_ONLY",
    "PERPLEXITY_LIMIT",
    "REPETITION_LIMIT",
    "QUICK",
    "SEED",
    "DTYPE",
)


def main():
    settings = quick_settings(config.resolve(*STAGES, __file__), QUICK_VALUES)
    settings.show()
    require(
        settings,
        {
            "N_FEATURES": 1,
            "N_DIALOGUES": 1,
            "N_RANDOM": 0,
            "N_NEW_TOKENS": 1,
            "N_ABLATED": 0,
            "N_ABLATION_EXAMPLES": 1,
        },
    )
    work = Work(settings)
    targets = [*work.chosen_features(), *work.random_directions()]
    prompts = side_by_side.read_prompts(settings.PROMPTS)[
        : N_QUICK_PROMPTS if settings.QUICK and not settings.PROMPTS else None
    ]
    unsteered = [work.unsteered(question) for question, _ in prompts]
    results = []
    for target in targets:
        answers = [work.answers(target, question) for question, _ in prompts]  # [prompt][alpha]
        results.append(
            {
                **{name: value for name, value in target.items() if name != "direction"},
                **summary(answers, unsteered, prompts, work, settings),
                "answers": answers,
            }
        )
        show(results[-1], work)
    result = {
        "autoencoder": work.subject.describe(),
        "mean_norm": work.norm,
        "n_dialogues": work.n_dialogues,
        "alphas": work.alphas,
        "alphas_over_mean_norm": [a / work.norm for a in work.alphas],
        "n_prompts": len(prompts),
        "n_with_expected_word": sum(bool(word) for _, word in prompts),
        "n_new_tokens": settings.N_NEW_TOKENS,
        "unsteered": curves([[a] for a in unsteered], unsteered, prompts)[0],
        "targets": [
            {name: value for name, value in r.items() if name != "answers"} for r in results
        ],
    }
    if settings.ABLATE:
        result["ablation"] = work.ablation(
            [t["feature"] for t in targets if t["feature"] is not None]
        )
    write_result(settings.NAME, settings.select(RECORDED), result)
    side_by_side.write(RESULTS / settings.NAME, results, prompts, unsteered, result)
    if importlib.util.find_spec("matplotlib"):
        side_by_side.draw(RESULTS / f"{settings.NAME}.png", result)


class Work:
    """The model, the autoencoder, and what was found out about the stream."""

    def __init__(self, settings):
        from fastsae.intervention import residual_stream, stop_ids_of

        self.settings, self.subject = settings, subjects(settings)[0]
        self.sae, self.model = self.subject.sae, load_model(self.subject, settings)
        self.tokenizer = loading.load_tokenizer(
            self.subject.model_name, revision=self.subject.revision, cache_dir=settings.CACHE_DIR
        )
        self.journal = settings.output_dir / "experiments" / "steer.jsonl"
        self.scope = scope(self.subject, settings)
        found = remembered(
            self.journal,
            {**self.scope, **settings.select(("SPECIAL_TOKEN", "N_DIALOGUES"))},
            lambda: self.look_at_dialogues(residual_stream),
        )
        self.norm, self.n_dialogues, self.strength = (
            found["mean_norm"],
            found["n_dialogues"],
            found["strength"],
        )
        self.alphas = [
            a * self.norm / 100 if settings.ALPHA_PERCENT else float(a) for a in settings.ALPHAS
        ]
        self.stop_ids = stop_ids_of(self.model, self.tokenizer)

    def look_at_dialogues(self, residual_stream):
        """Mean norm of the stream, and every feature's average maximum on SPECIAL_TOKEN:
        {mean_norm, n_dialogues, strength [M]}."""
        table = some_dialogues(
            self.subject, self.settings, self.settings.N_DIALOGUES, held_out=False
        )
        stream = residual_stream(self.model, self.subject.point, example_ids(table))
        usable = usable_tokens_of(self.subject, stream, table)
        token = self.tokenizer.convert_tokens_to_ids(self.settings.SPECIAL_TOKEN)
        example = np.repeat(np.arange(len(table.lengths)), table.lengths)
        rows = np.flatnonzero(usable & (table.ids == (-1 if token is None else token)))
        strength = (
            average_maximum(self.sae, stream[rows], example[rows]).tolist() if len(rows) else None
        )
        return {
            "mean_norm": float(stream[usable].norm(dim=1).mean()),
            "n_dialogues": len(table.lengths),
            "strength": strength,
        }

    def chosen_features(self):
        """[{name, how, feature, direction (d,)}] of FEATURES, of LABEL_SEARCH, or of the strongest
        on SPECIAL_TOKEN."""
        settings, m = self.settings, self.sae.m_total_neurons
        if settings.FEATURES:
            if not all(0 <= k < m for k in settings.FEATURES):
                raise InputError(
                    f"FEATURES: {settings.FEATURES} are not all features of 0 to {m - 1}. give "
                    "others."
                )
            found = {k: "named" for k in settings.FEATURES}
        elif settings.LABEL_SEARCH:
            found = self.by_label()
        elif self.strength is None:
            raise InputError(
                f"SPECIAL_TOKEN: {settings.SPECIAL_TOKEN} is none of the tokens that the "
                "autoencoder is meant for. name "
                "another one, or features with --features."
            )
        else:
            best = np.argsort(-np.array(self.strength), kind="stable")[: settings.N_FEATURES]
            found = {
                int(k): f"average maximum {self.strength[k]:.2f} on {settings.SPECIAL_TOKEN}"
                for k in best
            }
        return [
            {
                "name": f"feature {k}",
                "how": how,
                "feature": k,
                "direction": self.unit(self.sae.decoder.weight[:, k]),
            }
            for k, how in found.items()
        ]

    def by_label(self):
        path = self.settings.output_dir / "interpretations.jsonl"
        head, *rows = artifacts.read_lines(path) or [{}]
        if head.get("inputs", {}).get("checkpoint") != self.subject.meta.get("fingerprint"):
            raise InputError(
                f"{path}: does not speak of {self.subject.path}. run interpret_sae.py, or name "
                "features with --features."
            )
        found = [
            r
            for r in rows
            if self.settings.LABEL_SEARCH.casefold() in r["label"].casefold()
            and r["status"] != "dead"
        ]
        if not found:
            raise InputError(
                f"LABEL_SEARCH: no label holds {self.settings.LABEL_SEARCH!r}. look for another "
                "word."
            )
        best = sorted(found, key=lambda r: -r["max_activation"])[: self.settings.N_FEATURES]
        return {r["feature"]: f"label: {r['label']}" for r in best}

    def random_directions(self):
        import torch

        draws = [
            torch.randn(
                self.sae.input_dim, generator=torch.Generator().manual_seed(self.settings.SEED + i)
            )
            for i in range(self.settings.N_RANDOM)
        ]
        return [
            {
                "name": f"random direction {i}",
                "how": "normal numbers",
                "feature": None,
                "direction": self.unit(draw),
            }
            for i, draw in enumerate(draws, 1)
        ]

    @staticmethod
    def unit(vector):
        return (vector / vector.norm()).detach().float()

    def prompt(self, question):
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=False,
            add_generation_prompt=True,
            date_string=TEMPLATE_DATE,
        )

    def unsteered(self, question):
        """The measured answer of the model as it is, run alone."""
        from fastsae.intervention import generate

        def write():
            ids = self.prompt(question)
            return self.measure(
                ids,
                generate(
                    self.model,
                    as_batch([ids]),
                    n_new=self.settings.N_NEW_TOKENS,
                    stop_ids=self.stop_ids,
                ),
            )[0]

        return remembered(
            self.journal,
            {**self.scope, "prompt": self.prompt(question), "n_new": self.settings.N_NEW_TOKENS},
            write,
        )

    def answers(self, target, question):
        """The measured answers to one question, one per alpha; all alphas go through the model as
        one batch."""
        from fastsae.intervention import generate, steering

        def write():
            ids = self.prompt(question)
            function = steering(
                target["direction"], self.alphas, answer_only=self.settings.ANSWER_ONLY
            )
            return self.measure(
                ids,
                generate(
                    self.model,
                    as_batch([ids] * len(self.alphas)),
                    n_new=self.settings.N_NEW_TOKENS,
                    stop_ids=self.stop_ids,
                    layer=self.subject.point,
                    function=function,
                ),
            )

        return remembered(
            self.journal,
            {
                **self.scope,
                "prompt": self.prompt(question),
                "n_new": self.settings.N_NEW_TOKENS,
                "target": target["name"],
                "alphas": self.alphas,
                "answer_only": self.settings.ANSWER_ONLY,
            },
            write,
        )

    def ablation(self, features):
        settings = self.settings
        key = {
            **self.scope,
            **settings.select(("N_ABLATED", "N_ABLATION_EXAMPLES")),
            "ablated": features,
        }
        return remembered(
            self.journal,
            key,
            lambda: ablation(
                self.subject,
                self.model,
                settings,
                features,
                n_others=settings.N_ABLATED,
                n_examples=settings.N_ABLATION_EXAMPLES,
            ),
        )

    def measure(self, prompt, written):
        """[{ids, text, stopped, repetition, nll (summed, nats)}] of answers to `prompt`, by the
        model as it is."""
        from fastsae.intervention import next_token_losses

        losses = next_token_losses(
            self.model, self.subject.point, [np.array([*prompt, *ids]) for ids in written], {}
        )["clean"].ce
        ends = np.cumsum([len(prompt) + len(ids) for ids in written])
        return [
            {
                "ids": ids,
                "text": self.tokenizer.decode(ids, skip_special_tokens=True),
                "stopped": ids[-1] in self.stop_ids,
                "repetition": repetition(ids),
                "nll": float(losses[end - len(ids) : end].astype(np.float64).sum()),
            }
            for ids, end in zip(written, ends)
        ]


def as_batch(rows):
    import torch

    return torch.tensor(rows)


def average_maximum(sae, x, example):
    """(M,) each feature's maximum on the rows of x (n, d) of an example, averaged over the
    examples; example (n,) its numbers."""
    import torch

    from fastsae.sae.autoencoder import encode

    _, number = np.unique(example, return_inverse=True)
    n, m = int(number.max()) + 1, sae.m_total_neurons
    largest = torch.zeros(n * m)
    for rows in np.array_split(np.arange(len(x)), -(-len(x) // 4096)):
        entries = encode(sae, x[rows].to(sae.input_bias.device))
        place = (
            torch.from_numpy(number[rows])[entries.row.cpu().long()] * m
            + entries.column.cpu().long()
        )
        largest.scatter_reduce_(0, place, entries.value.cpu(), "amax")
    return largest.view(n, m).mean(0)


def repetition(ids, n=3):
    """1 - distinct / all runs of `n` tokens: 0 if none comes twice; 0 for an answer too short to
    have two."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def curves(answers, unsteered, prompts):
    """[{...}] over the prompts, one entry per alpha: what the answers [prompt][alpha] are like."""
    found = []
    for row in zip(*answers):
        expected = [
            bool(re.search(rf"\b({word})\b", a["text"], re.I))
            for a, (_, word) in zip(row, prompts)
            if word
        ]
        found.append(
            {
                "perplexity": float(
                    np.exp(sum(a["nll"] for a in row) / sum(len(a["ids"]) for a in row))
                ),
                "repetition": float(np.mean([a["repetition"] for a in row])),
                "tokens": float(np.mean([len(a["ids"]) for a in row])),
                "changed": float(np.mean([a["ids"] != u["ids"] for a, u in zip(row, unsteered)])),
                "expected_word": float(np.mean(expected)) if expected else None,
            }
        )
    return found


def summary(answers, unsteered, prompts, work, settings):
    """The curves of one direction, up to which alpha from 0 on answers stay fluent, and whether
    alpha = 0 gave the unsteered answers."""
    found, base = (
        curves(answers, unsteered, prompts),
        curves([[a] for a in unsteered], unsteered, prompts)[0],
    )
    fluent = None
    for alpha, point in sorted(
        (pair for pair in zip(work.alphas, found) if pair[0] >= 0), key=lambda pair: pair[0]
    ):
        if (
            point["perplexity"] > settings.PERPLEXITY_LIMIT * base["perplexity"]
            or point["repetition"] > base["repetition"] + settings.REPETITION_LIMIT
        ):
            break
        fluent = alpha
    zero = work.alphas.index(0) if 0 in work.alphas else None
    return {
        "curves": found,
        "fluent_up_to_alpha": fluent,
        "alpha_0_equals_unsteered": None
        if zero is None
        else all(row[zero]["ids"] == u["ids"] for row, u in zip(answers, unsteered)),
    }


def show(row, work):
    verdict = {
        None: "was not tried",
        True: "equals the unsteered answers",
        False: "DIFFERS FROM the unsteered answers",
    }
    print(
        f"{row['name']} ({row['how']}): fluent up to alpha {row['fluent_up_to_alpha']}; alpha 0 "
        f"{verdict[row['alpha_0_equals_unsteered']]}"
    )
    for alpha, p in zip(work.alphas, row["curves"]):
        expected = (
            ""
            if p["expected_word"] is None
            else f", expected word {100 * p['expected_word']:.0f} %"
        )
        print(
            f"  alpha {alpha:6.1f} ({alpha / work.norm:.2f} of the norm): perplexity "
            f"{p['perplexity']:8.2f}, repetition "
            f"{p['repetition']:.2f}, changed {100 * p['changed']:.0f} %{expected}"
        )


if __name__ == "__main__":
    sys.exit(run_stage(main))
