"""What goes into an interpreter's prompts: what the model read and no more, texts that the labeller
never saw, silent examples."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from fastsae.data.token_text import TokenTexts
from fastsae.data.tokenization import ChatTokenizer, Example, mark_shared_prefix, tokenise
from fastsae.interpretation.evidence import Evidence
from fastsae.interpretation.llm import labels
from fastsae.interpretation.llm.client import Asker
from fastsae.interpretation.llm.labels import Labelling, plain_text
from fastsae.interpretation.llm.shown import MAX_TOKENS, MIN_HELD_OUT, Shown

CJK = "今天天气很好我们去公园散步看见了许多花和树"
WORDS = (
    "bread rose while rain fell on seven quiet houses and nobody chose the longer road "
    "home past them".split()
)


def user(line, text):
    return Example(line, [{"role": "user", "content": text}], is_text=True)


@pytest.fixture
def shown(smol_tokenizer):
    """A `Shown` of examples as stage 1 tokenises them; `peaks` {example: token} are where feature 0
    fires, with value 1 + example."""

    def make(examples, peaks=(), max_length=None, seed=0):
        table = tokenise(examples, ChatTokenizer(smol_tokenizer, max_length=max_length))
        mark_shared_prefix(table)
        evidence = Evidence.__new__(Evidence)
        evidence.examples, evidence.texts_of, evidence._texts = (
            examples,
            TokenTexts(smol_tokenizer),
            {},
        )
        evidence.data = {
            "token_ids": table.ids,
            "token_kind": table.kind,
            "token_role": table.role,
            "metadata": np.array(json.dumps({"settings": {"MAX_LENGTH": max_length}})),
        }
        evidence.offsets, peaks = table.starts, dict(peaks)
        pooled = np.zeros((len(examples), 1), np.float32)
        for example in peaks:
            pooled[example] = 1 + example
        evidence.statistics = SimpleNamespace(
            pooled_examples=np.arange(len(examples)), pooled_max=sparse.csr_matrix(pooled)
        )
        evidence.token_values = lambda pairs: {
            (j, e): (
                np.array([peaks[e]] if e in peaks else [], int),
                np.array([1.0 + e] if e in peaks else []),
            )
            for j, e in pairs
        }
        return Shown(evidence, [plain_text(example) for example in examples], seed)

    return make


def test_short_texts_are_shown_as_they_are(shown):
    some = shown([user(1, "two  spaces <|im_end|> kept\n"), user(2, "other")], max_length=64)
    assert [some.text(0, e) for e in range(2)] == ["two  spaces <|im_end|> kept\n", "other"]


def test_long_texts_are_cut_by_tokens_around_the_strongest_one_without_markup(
    shown, smol_tokenizer
):
    """Neither CJK nor base64 has spaces to count; what is shown is the example's own text at the
    peak."""
    for text in (CJK * 200, "QUJD" + "b64+Xy0/" * 400, " ".join(WORDS * 80)):
        n, start = (
            len(smol_tokenizer(text)["input_ids"]),
            shown([user(1, text), user(2, "Z")]).evidence.own_start(0),
        )
        for peak, left, right in (
            (start + 10, False, True),
            (start + n // 2, True, True),
            (start + n - 5, True, False),
        ):
            some = shown([user(1, text), user(2, "Z")], {0: peak})
            cut = some.text(0, 0)
            middle = cut.removeprefix("… ").removesuffix(" …").strip("\ufffd")
            assert middle in text and (cut.startswith("… "), cut.endswith(" …")) == (left, right)
            assert len(smol_tokenizer(middle)["input_ids"]) <= MAX_TOKENS + 2 and len(middle) > 100
            at_peak = some.evidence.token_texts(0)[peak].strip("\ufffd")
            assert at_peak in cut and "<|im" not in cut and "assistant" not in cut


def test_what_the_model_never_read_is_not_shown(shown):
    examples = [user(i, " ".join(WORDS[i:]) + " UNREADTAIL") for i in range(4)]
    whole = shown(examples, max_length=500)
    assert [whole.text(0, e) for e in range(4)] == whole.texts
    some = shown(examples, max_length=whole.evidence.own_start(0) + 12)
    for e in range(4):
        assert (
            "UNREADTAIL" not in some.text(0, e)
            and some.text(0, e).endswith(" …")
            and "<|im" not in some.text(0, e)
        )
        assert some.text(0, e).removesuffix(" …").strip() in some.texts[e]


def test_turns_of_a_cut_dialogue_keep_their_roles(shown):
    turns = [
        {"role": role, "content": f"{role} says {' '.join(WORDS * 4)} {i}"}
        for i in range(6)
        for role in ("user", "assistant")
    ]
    some = shown([Example(1, turns), user(2, "other")], {0: 500})
    cut = some.text(0, 0)
    assert (
        cut.startswith("… ")
        and cut.endswith(" …")
        and "<|im" not in cut
        and "\n\nassistant: assistant says" in cut
    )
    assert "\n\nuser: user says" in cut


def test_where_a_cut_begins_does_not_tell_silent_examples(shown):
    """Windows of silent examples lie anywhere, by the seed, the feature and the example."""
    examples = [user(i, " ".join(f"{i}x{k}" for k in range(600))) for i in range(12)]
    starts = [
        [shown(examples, seed=seed).text(feature, e)[:12] for e in range(12)]
        for seed, feature in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert starts[0] == starts[1] and starts[0] != starts[2] and starts[0] != starts[3]
    assert len({start[start.index("x") :] for start in starts[0] if start.startswith("… ")}) > 6


def test_equal_texts_are_on_one_side_and_shown_once(shown):
    """20 texts four times each, and texts that differ only where the model no longer read."""
    for tail, max_length in (("", None), (" UNREAD{}", 46)):
        examples = [
            user(i, f"{WORDS[i % 20 % 16]} {i % 20} {' '.join(WORDS)}" + tail.format(i))
            for i in range(80)
        ]
        some = shown(examples, {e: 9 for e in range(0, 80, 2)}, max_length=max_length)
        sides = [
            {some.text(0, int(e)) for e in np.concatenate(some.contrast(0, 40, shown=side))}
            for side in (True, False)
        ]
        assert (
            (max_length is None) == ("…" not in min(sides[0]))
            and not sides[0] & sides[1]
            and len(sides[0]) == len(sides[1]) == 10
        )
        assert sum(len(part) for part in some.contrast(0, 40, shown=True)) == 10


def test_negatives_are_silent_and_drawn_by_the_seed(shown):
    examples = [user(i, f"{WORDS[i % 16]} number {i}") for i in range(80)]
    some = shown(examples, {e: 4 for e in range(40)})
    other = shown(examples, {e: 4 for e in range(40)}, seed=5)
    other.may_show = some.may_show
    assert (
        all(e >= 40 for e in some.contrast(0, 20, shown=True)[1])
        and len(some.contrast(0, 20, shown=True)[1]) == 10
    )
    assert list(some.contrast(0, 20, shown=True)[0]) == list(other.contrast(0, 20, shown=True)[0])
    assert list(some.contrast(0, 20, shown=True)[1]) != list(other.contrast(0, 20, shown=True)[1])


def labelling(shown, **more):
    """A `Labelling` of feature 0 by an interpreter that answers every prompt, and the prompts it is
    asked."""
    asked = []

    def ask(prompts, what, usable):
        asked.extend(prompts)
        return {p: ("Yes" if "PROPERTY" in p else '- "bread"', None) for p in prompts}

    asker = SimpleNamespace(ask=ask, backend=SimpleNamespace(model="m"))
    work = Labelling(
        shown,
        asker,
        protocol="contrastive",
        labelled=[0],
        candidates=[],
        n_scored=0,
        n_fidelity=12,
        **more,
    )
    return work.run()[0], asked


def test_a_feature_without_enough_examples_is_not_asked_about(shown):
    examples = [user(i, f"{WORDS[i % 16]} number {i}") for i in range(40)]
    held_out = [int(e) for e in np.flatnonzero(~shown(examples).may_show)]
    outcome, asked = labelling(shown(examples, {e: 4 for e in held_out}))
    assert (
        not asked
        and "label" not in outcome
        and "too few examples" in outcome["note"]
        and not outcome["problems"]
    )
    in_view = [e for e in range(40) if e not in held_out]
    outcome, asked = labelling(shown(examples, {e: 4 for e in in_view[:MIN_HELD_OUT]}))
    assert (
        len(asked) == 1
        and outcome["label"] == "bread"
        and "too few held-out examples" in outcome["note"]
    )


def test_a_feature_that_fires_everywhere_is_not_tested(shown):
    examples = [user(i, f"{WORDS[i % 16]} number {i}") for i in range(40)]
    silent = [int(e) for e in np.flatnonzero(~shown(examples).may_show)]
    for n_silent, tested in ((2, False), (3, True), (9, True)):
        outcome, asked = labelling(
            shown(examples, {e: 4 for e in range(40) if e not in silent[:n_silent]})
        )
        assert outcome["label"] == "bread"
        # always yes: right on every positive one, and no more of these than of the others
        if tested:
            assert (
                outcome["fidelity_f1"] == pytest.approx(2 / 3)
                and outcome["n_held_out"] == 2 * min(n_silent, 6) == len(asked) - 1
            )
        else:
            assert (
                len(asked) == 1
                and "fires in nearly all" in outcome["note"]
                and not outcome["problems"]
            )


@pytest.mark.parametrize("protocol", ["contrastive", "fast", "both"])
@pytest.mark.parametrize("label", ['- "bread"', "None"])
def test_a_plan_counts_the_calls_that_are_made(shown, tmp_path, protocol, label):
    """Before the run, after a run without validation, and after all."""

    def complete(prompt):
        asked.append(prompt)
        if "[[SCORE]]" in prompt:
            return "My final verdict score is: [[4]], feature name is [[words]]", None, usage
        return ("Yes" if "PROPERTY" in prompt else label), None, usage

    # in its text
    some = shown(
        [user(i, f"{WORDS[i % 16]} number {i}") for i in range(60)], {e: 30 for e in range(30)}
    )
    asked, usage = [], {"prompt_tokens": 1, "completion_tokens": 1}
    backend = SimpleNamespace(parallel=False, scope=["m", None, {}], model="m", complete=complete)
    for n_fidelity in (0, 12, 12):
        asker = Asker(backend, tmp_path / "journal.jsonl", n_workers=1)
        work = Labelling(
            some,
            asker,
            protocol=protocol,
            labelled=[0],
            candidates=[],
            n_scored=0,
            n_fidelity=n_fidelity,
        )
        planned = sum(n for _, n, _ in work.plan(len))
        asked.clear()
        outcome = work.run()[0]
        assert len(asked) == planned and outcome.get("label") == (
            "bread"
            if label != "None" and protocol != "fast"
            else "words"
            if protocol != "contrastive"
            else None
        )
    assert planned == 0 and ("fidelity_f1" in outcome) == ("label" in outcome)


def test_small_activations_are_told_from_silence():
    evidence = SimpleNamespace(
        token_texts=lambda e: ["a", "b", "c", "d", "e"], own_start=lambda e: 0
    )
    lines = labels._token_lines(
        evidence, 0, np.array([1, 2, 3, 4]), np.array([0.047, 0.02134, 0.5, 1234.56])
    ).split("\n")
    assert lines == ["'a' 0", "'b' 0.047", "'c' 0.0213", "'d' 0.5", "'e' 1235"]


def test_activations_on_later_bytes_of_a_character_count_for_it(smol_tokenizer):
    ids = smol_tokenizer("great 🥳 day")["input_ids"]
    tokens = TokenTexts(smol_tokenizer)(ids)
    first = tokens.index("") - 1
    assert tokens.count("") >= 2 and "🥳" in tokens[first]
    evidence = SimpleNamespace(token_texts=lambda e: tokens, own_start=lambda e: 1)
    lines = labels._token_lines(
        evidence, 0, np.array([first, first + 1, first + 2]), np.array([0.5, 2.0, 1.0])
    ).split("\n")
    assert lines == [f"{tokens[first]!r} 2", "' day' 0"]
