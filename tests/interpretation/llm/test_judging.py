"""Detection, fuzzing and intruder tests of labels: a judge that knows the truth gets 1, one that
guesses what chance gives, and the passages are what they are said to be."""

import json
import re

import numpy as np
import pytest
from conftest import read_table as table
from loopback import Endpoint, completion

from fastsae.interpretation.llm import judging
from fastsae.interpretation.llm.replies import parse_numbers
from fastsae.runtime.artifacts import read_lines

WORDS = ("apple", "river", "engine", "music")
FLAGS = [
    *("--n-top-neurons", 4, "--n-scored-features", 0, "--n-fidelity-examples", 0),
    *("--llm-protocol", "contrastive", "--n-judged-examples", 12),
]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Answer: 1, 3", {1, 3}),
        ("The first is plain.\n**Answer: 2 and 4**", {2, 4}),
        ("answer: none", set()),
        ("Answer: None of the passages.", set()),
        ("Answer: 1\nNo, rather:\nFinal answer: [5]", {5}),
        ("<think>Answer: 3</think>\nAnswer: passages 1, 2, and 5.", {1, 2, 5}),
        ("2, 4", {2, 4}),
        ("none", set()),
        ("Answer: 0", set()),
        ("Answer: the second", None),
        ("Answer:", None),
        ("I think 1 and 3 fit.", None),
        ("Answer: 1, 0", None),
        ("Answer: 1234567", None),
        ("", None),
    ],
)
def test_answers_are_parsed_strictly(reply, expected):
    assert parse_numbers(reply) == (None if expected is None else frozenset(expected))


def test_scores_by_hand():
    # right on 2 of 3 that are true and on 1 of 2 that are not
    answers = [(True, True), (True, True), (False, True), (True, False), (False, False)]
    assert judging.balanced_accuracy(answers) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert judging.balanced_accuracy(answers[:3]) is None
    truth = (True, False, True, False, False)
    tasks = [
        judging.Task(3, "detection", "label", "a", truth),
        judging.Task(3, "intruder", "", "b", (False, True, False, False, False)),
        judging.Task(4, "detection", "other", "c", truth),
        judging.Task(5, "detection", "label", "d", truth),
        judging.Task(6, "detection", "label", "e", truth),
    ]
    replies = {
        "a": ("Answer: 1, 2", None),  # one of two, two of three
        "b": ("Answer: 2", None),
        "c": ("Answer: 6", None),  # there are five
        "d": (None, "failed: 500"),
        "e": ("Answer: none", None),
    }
    scores, reasons = judging.judged(tasks, replies)
    assert scores == {
        3: {"judged_detection": pytest.approx(7 / 12), "judged_intruder": 1},
        6: {"judged_detection": 0.5},
    }
    assert reasons == {4: "unusable: the reply does not follow the form", 5: "failed: 500"}


def test_a_mean_over_features_has_an_interval_and_chance():
    rows = [{"judged_detection": value} for value in (0.5, 0.7, 0.9)] + [{}]
    entry = judging.judging_summary(rows)["judged"]["judged_detection"]
    assert entry["value"] == pytest.approx(0.7) and entry["n"] == 3 and entry["chance"] == 0.5
    assert entry["interval"] == pytest.approx([0.7 - 4.3027 * 0.2 / 3**0.5, 1.0], abs=1e-4)
    assert judging.judging_summary([{}]) == {}


def test_another_features_label_has_other_words():
    labels = {1: "rivers", 2: "rivers", 3: "fruit"}
    found = judging.other_labels(labels, seed=0)
    assert found[1] == found[2] == "fruit" and found[3] == "rivers"
    assert judging.other_labels({1: "rivers", 2: "rivers"}, seed=0) == {}


@pytest.fixture
def endpoint(monkeypatch):
    """Start an endpoint that answers by a function and point the environment at it."""
    started = []

    def start(reply):
        started.append(Endpoint((), reply))
        monkeypatch.setenv("OPENAI_BASE_URL", started[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-none-of-yours")
        return started[-1]

    yield start
    for server in started:
        server.close()


def passages(prompt):
    """The passages of a prompt, as the judge reads them."""
    return [json.loads(text) for text in re.findall(r'^\d: (".*")$', prompt, re.M)]


def name(prompt):
    """The label of a feature: the word of all strong texts."""
    positive = prompt.partition("POSITIVE SAMPLES:")[2].partition("NEGATIVE SAMPLES:")[0]
    counts = {word: positive.count(f"about {word}") for word in WORDS}
    return completion(f'- "mentions {max(counts, key=counts.get)}"')


def knows(prompt):
    """Says what is true of the passages."""
    if "Which passage is that?" in prompt:
        marked = [tuple(re.findall("<<(.*?)>>", text)) for text in passages(prompt)]
        odd = [i for i, tokens in enumerate(marked, 1) if marked.count(tokens) == 1]
        return completion(f"Answer: {odd[0]}")
    if "is said to fire on this" not in prompt:
        return name(prompt)
    word = re.search(r"fire on this: .*?(apple|river|engine|music)", prompt)[1]
    wanted = f"<< {word}>>" if "<<like this>>" in prompt else f" {word}"
    fit = [str(i) for i, text in enumerate(passages(prompt), 1) if wanted in text]
    return completion(f"The word stands there.\nAnswer: {', '.join(fit) or 'none'}")


def guesses(prompt):
    """Says yes to all passages, and always the same intruder."""
    if "Which passage is that?" in prompt:
        return completion("Answer: 3")
    return completion("Answer: 1") if "is said to" in prompt else name(prompt)


def run(run_main, tmp_path, planted, *flags):
    assert run_main("interpret_sae", *planted, *FLAGS, *flags) == 0
    rows = [row for row in table(tmp_path) if row["label"].startswith("mentions")]
    assert len(rows) == 4
    return rows, read_lines(tmp_path / "interpretations.jsonl")[0]["summary"]["judged"]


def test_who_knows_the_truth_gets_1(tmp_path, planted, run_main, endpoint, capsys):
    server = endpoint(knows)
    assert run_main("interpret_sae", *planted, *FLAGS, "--dry-run") == 0
    planned = re.findall(
        r"(detection|fuzzing|intruder) tests, at most: (\d+)", capsys.readouterr().out
    )
    rows, summary = run(run_main, tmp_path, planted)
    for row in rows:
        assert row["judged_detection"] == row["judged_fuzzing"] == row["judged_intruder"] == "1"
    for kind in ("detection", "fuzzing"):
        assert summary[f"judged_{kind}"]["value"] == 1
        assert summary[f"judged_{kind}_rule"]["value"] == 1  # the planted rule is the word
        # no passage of a feature has another's word, and some without it have
        assert summary[f"judged_{kind}_other"]["value"] <= 0.5
    assert "another feature's label" in capsys.readouterr().out
    prompts = [prompt for prompt in server.prompts() if "passages of text" in prompt]
    assert len(prompts) == len(set(prompts)) == sum(int(n) for _, n in planned)
    rows, again = run(run_main, tmp_path, planted, "--n-report-features", 5)
    assert again == summary
    assert len(prompts) == sum("passages of text" in prompt for prompt in server.prompts())


def test_who_guesses_gets_what_chance_gives(tmp_path, planted, run_main, endpoint):
    server = endpoint(guesses)
    _, summary = run(run_main, tmp_path, planted)
    for kind in ("detection", "fuzzing"):
        entry = summary[f"judged_{kind}"]
        assert (
            entry["interval"][0] <= 0.5 <= entry["interval"][1] and abs(entry["value"] - 0.5) < 0.2
        )
        # the order of the passages says nothing of the source
        assert summary[f"judged_{kind}_other"]["value"] == entry["value"]
    assert summary["judged_intruder"]["value"] < 0.6
    # a passage that is silent holds the other words, never the feature's own
    asked = [prompt for prompt in server.prompts() if "does it fire somewhere" in prompt]
    assert asked and all(len(passages(prompt)) <= judging.PER_PROMPT for prompt in asked)


def test_a_judge_that_does_not_answer_leaves_the_label(tmp_path, planted, run_main, endpoint):
    endpoint(lambda prompt: completion("Hm.") if "passages of text" in prompt else name(prompt))
    assert run_main("interpret_sae", *planted, *FLAGS) == 4
    rows = [row for row in table(tmp_path) if row["label"].startswith("mentions")]
    assert len(rows) == 4 and all("judging unusable" in row["status"] for row in rows)
    assert all(row["judged_detection"] == "" for row in rows)


class Made:
    """Stands for a `shown.Shown` whose examples are ten tokens; feature 0 fires on token 1 of the
    first examples, id 7, and not on id 7 at token 5 of the last."""

    seed = 0

    def __init__(self):
        from types import SimpleNamespace

        n = 12
        self.examples = np.arange(n)
        ids = np.full((n, 10), 3)
        ids[:6, 1] = 7
        ids[10:, 5] = 7
        offsets = np.arange(n + 1) * 10
        top = SimpleNamespace(example=np.array([[0, 1]]), position=np.array([[1, 1]]))
        self.evidence = SimpleNamespace(
            statistics=SimpleNamespace(top=top, kept=np.ones(n * 10, bool)),
            offsets=offsets,
            data={"token_ids": ids.ravel()},
            token_texts=lambda example: [f" t{i}<<" for i in range(10)],
            own_start=lambda example: 0,
        )

    def ranked(self, feature, shown):
        values = np.where(self.examples < 6, 6.0 - self.examples, 0)
        return np.argsort(-values, kind="stable"), -np.sort(-values)


def test_passages_hold_what_they_are_said_to():
    found = judging.Passages(Made())
    assert found.firing(0, 3) == [0, 2, 5] and found.firing(0, 99) == [0, 1, 2, 3, 4, 5]
    silent = found.silent(0, 4)
    assert {p.example for p in silent[:2]} == {10, 11} and {p.centre for p in silent[:2]} == {5}
    assert len({p.example for p in silent}) == 4 and min(p.example for p in silent) >= 6
    passage = judging.Passage(0, 1, (1, 2))
    wrong = found.wrongly_marked(0, passage, np.array([1, 2, 4]))
    assert len(wrong.marked) == 2 and not {1, 2, 4} & set(wrong.marked)
    assert found.wrongly_marked(0, passage, np.arange(9)) is None
    # marks are told from what a text holds itself
    text = json.loads(found.text(passage))
    assert re.findall("<<(.*?)>>", text) == [" t1< < ", " t2< < "] and text.count("<<") == 2
