"""Labels and scores by a language model: parsing, failures, money spent once, validation on unseen
examples, a real model."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import PROJECT, read_table as table
from inert_page import read_report
from loopback import Endpoint, RealModel, completion

from fastsae.interpretation.llm import client, labels, replies as llm_replies, shown

KEY = "sk-secret-0123456789"
LABELS_ONLY = [
    "--llm-protocol",
    "contrastive",
    "--n-fidelity-examples",
    0,
    "--n-scored-features",
    0,
]
VERDICT = (
    "It fires on fruit.\nMy final verdict score is: [[4]], feature name is [[words for fruit]]"
)


@pytest.fixture
def endpoint(monkeypatch):
    """Start an endpoint with the given replies and point the environment at it."""
    started = []

    def start(*replies, reply=None):
        started.append(Endpoint(replies, reply))
        monkeypatch.setenv("OPENAI_BASE_URL", started[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return started[-1]

    yield start
    for server in started:
        server.close()


def answer(prompt):
    """What a sensible model would say of the planted features."""
    if "[[SCORE]]" in prompt:
        return completion(VERDICT, usage=(100, 10))
    if "PROPERTY" in prompt:
        return completion(
            "Yes. It is there." if "river" in prompt.rsplit("TEXT:", 1)[1] else "No.", usage=(50, 1)
        )
    return completion('- "mentions a river"', usage=(200, 5))


def no_key_anywhere(folder):
    for file in folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "reply, expected",
    [
        (VERDICT, (4, "words for fruit")),
        ("<think>[[1]] [[x]]</think>" + VERDICT, (4, "words for fruit")),
        ("**[[ 5 ]]** and [[ a\nb ]]", (5, "a b")),
        ("score is: [[0]], feature name is [[x]]", None),
        ("[[6]] [[x]]", None),
        ("[[7/10]] [[x]]", None),
        ("[[4.5]] [[x]]", None),
        ("[[４]] [[x]]", None),
        ("[[four]] [[x]]", None),
        ("[[4]]", None),
        ("[[4]] [[]]", None),
        ("[[4]] [[NAME]]", None),
        ("4, fruit", None),
        ("", None),
        ("[[3]] [[x]] or [[4]] [[x]]", None),
        ("[[3]] [[x]] so [[3]] [[x]]", (3, "x")),
        ("<think>" + VERDICT, None),
        ("[[3]] [[<b>x</b>]]", (3, "<b>x</b>")),
        ("score [[4]] overall.\n" + VERDICT, (4, "words for fruit")),
        ("[[SCORE]] and [[NAME]] are asked.\n" + VERDICT, (4, "words for fruit")),
        ("Score is: **[[4]]**, feature name is **[[x]]**", (4, "x")),
        (VERDICT.replace("words", "a[[0]]"), (4, "a[[0]] for fruit")),
        (VERDICT.replace("words for fruit", "a[[0]]"), (4, "a[[0]]")),
        (VERDICT.replace("words for fruit", "a[0]"), (4, "a[0]")),
        (VERDICT + " as in [[0]]", (4, "words for fruit")),
        (VERDICT + "\n" + VERDICT.replace("4", "5"), None),
        (VERDICT[:-2], None),
        (VERDICT.replace("4", "four"), None),
        (VERDICT.replace("words for fruit", "NAME"), None),
        ("[[x]] [[3]]", None),
        ("[[3]] [[" + "x" * 301 + "]]", None),
        ('```json\n{"score": 4}\n```', None),
    ],
)
def test_verdicts_are_parsed_strictly(reply, expected):
    if reply == "[[3]] [[<b>x</b>]]":
        expected = None  # markup is no name
    assert llm_replies.parse_fast(reply) == expected


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("Yes", True),
        ("yes. It does.", True),
        ("**No**", False),
        ("Output: No.", False),
        ('"Yes"', True),
        ("<think>yes</think>\nNo", False),
        ("Yesterday", None),
        ("Nobody knows", None),
        ("Yes/No", None),
        ("yes or no?", None),
        ("I think yes", None),
        ("", None),
        ("<think>yes", None),
        ("1", None),
        ("Answer: Yes", True),
        ("Response: No", False),
        ("**Answer:** no", False),
        ("(Yes)", True),
        ("“Yes.”", True),
        ("# Yes", True),
        ("> No", False),
        ("[Yes]", True),
        ('Output ("Yes" or "No" only): Yes', None),
        ("Answer yes", None),
        ('"Yes" or "No"', None),
        ("Nope", None),
        ("The answer: yes", None),
    ],
)
def test_yes_and_no_are_parsed_strictly(reply, expected):
    assert llm_replies.parse_yes_no(reply) is expected


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('- "mentions fruit"', "mentions fruit"),
        ('mentions fruit"', "mentions fruit"),
        ("<think>a</think>\n- mentions fruit", "mentions fruit"),
        ("mentions\nmore", "mentions"),
        ("<think>hmm", None),
        ("<html>502</html>", None),
        ("x" * 301, None),
        ("```\nx", None),
        ('{"label": 1}', None),
        ('""', None),
        ("I'm sorry, but I can't help with that.", None),
        ("Sorry, no.", None),
        ("I cannot do this", None),
        ("As an AI model, I do not", None),
        ("I am unable to tell", None),
        ("Apologies, but I cannot", None),
        ("There is no clear pattern.", None),
        ("I don't see a pattern", None),
        ("I was not able to find one", None),
        ("It is not possible to identify a feature", None),
        ("We're unable to", None),
        ("1. mentions food", "mentions food"),
        ("*mentions food*", "mentions food"),
        ("no features of a person", "no features of a person"),
        ("I-statements about food", "I-statements about food"),
        ("apologies between friends", "apologies between friends"),
        ("The samples do not share an obvious pattern, so I cannot identify one.", None),
        ('- "None"', None),
        ("N/A", None),
        ("None", None),
        ('- "I\u2019m sorry, I can\u2019t"', None),
        ("Feature:", None),
        ("Sure! Here is the feature:\nmentions", None),
        ('Sure! Here is the feature:\n- "mentions food"', "mentions food"),
        ('Feature:\n- "mentions food"', "mentions food"),
        ('Here it is: "mentions food"', "mentions food"),
        ("Feature: mentions food", "mentions food"),
        ("**mentions food**", "mentions food"),
        ('- **"mentions food"**', "mentions food"),
        ('```\n- "mentions food"\n```', "mentions food"),
        ('```json\n{\n"label": "a"\n}', None),
        ('mentions food"\n\nFor example:\n- "bread"', "mentions food"),
        ("<thinking>a</thinking>\nmentions", "mentions"),
        ('- "says "hello" twice"', 'says "hello" twice'),
        ('- "yes" or "no"', '"yes" or "no"'),
        ('mentions "bread"', 'mentions "bread"'),
        (
            '- "describes a person who cannot identify a feeling"',
            "describes a person who cannot identify a feeling",
        ),
        (
            '- "apologises, for example sorry or I\'m sorry"',
            "apologises, for example sorry or I'm sorry",
        ),
        ("nonetheless", "nonetheless"),
        ('- "sorry as a filler"', "sorry as a filler"),
        ("-2+3", "2+3"),
        ('"- mentions food"', "mentions food"),
    ],
)
def test_labels_are_parsed_strictly(reply, expected):
    assert llm_replies.parse_label(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "[[" * 20000,
        "output" + ":" * 20000,
        "score is: [[4]] feature name is [[" * 2000,
        '"' * 20000,
        "sorry " * 9000,
        "score is: [[4]], feature name is [[" + "[[" * 20000,
    ],
)
def test_overlong_replies_are_unusable(reply):
    for parse in (llm_replies.parse_label, llm_replies.parse_fast, llm_replies.parse_yes_no):
        assert parse(reply) is None


def test_fidelity_by_hand():
    """Said yes of 3, of these 2 fire; 4 fire: precision 2/3, recall 1/2, F1 4/7."""
    answers = [
        (True, True),
        (True, True),
        (True, False),
        (False, True),
        (False, True),
        (False, False),
    ]
    result = labels.fidelity(answers)
    assert result["fidelity_precision"] == pytest.approx(2 / 3) and result["fidelity_recall"] == 0.5
    assert result["fidelity_f1"] == pytest.approx(4 / 7)
    assert labels.fidelity([(False, True), (False, False)])["fidelity_f1"] == 0
    # one of seven unclear is more than a tenth
    assert labels.fidelity([*answers, (None, True)]) is None
    assert labels.fidelity([(True, True)] * 5) is None


def test_labels_scores_and_validation_end_to_end(tmp_path, planted, run_main, endpoint, capsys):
    server = endpoint(reply=answer)
    assert (
        run_main(
            "interpret_sae",
            *planted,
            "--n-top-neurons",
            4,
            "--n-scored-features",
            3,
            "--interpreter-model",
            "test-model",
            "--n-fidelity-examples",
            12,
        )
        == 0
    )
    rows = table(tmp_path)
    labelled = [row for row in rows if row["label"] == "mentions a river"]
    assert len(labelled) == 4 and {row["label_source"] for row in labelled} == {"test-model"}
    assert all(row["score"] == "4" for row in labelled)
    river = next(row for row in labelled if row["best_category"] == "cat_river")
    assert (
        float(river["fidelity_f1"]) == 1
        and min(float(row["fidelity_f1"]) for row in labelled) < 0.5
    )
    scored_only = [row for row in rows if row["label"] == "words for fruit"]
    assert scored_only and all(
        row["score"] == "4" and row["fidelity_f1"] == "" for row in scored_only
    )
    path, authorization, body = server.requests[0]
    assert (
        path == "/v1/chat/completions"
        and authorization == f"Bearer {KEY}"
        and body["model"] == "test-model"
    )
    assert "tokens in" in capsys.readouterr().out
    n = len(server.requests)
    assert len(set(server.prompts())) == n
    assert (
        run_main(
            "interpret_sae",
            *planted,
            "--n-top-neurons",
            4,
            "--n-scored-features",
            3,
            "--interpreter-model",
            "test-model",
            # presentation changes cost nothing
            "--n-fidelity-examples",
            12,
            "--n-report-features",
            5,
        )
        == 0
    )
    assert len(server.requests) == n
    page = read_report((tmp_path / "interpretations.html").read_text(encoding="utf-8"))
    assert "mentions a river" in [feature["label"] for feature in page["features"]]
    no_key_anywhere(tmp_path)


def test_validation_uses_examples_that_the_labeller_never_saw(
    planted, run_main, endpoint, tmp_path
):
    server = endpoint(reply=answer)
    assert (
        run_main(
            "interpret_sae",
            *planted,
            "--n-top-neurons",
            1,
            "--n-scored-features",
            0,
            "--n-fidelity-examples",
            12,
        )
        == 0
    )
    features = Shown(tmp_path)
    assert not set(features.examples[features.may_show]) & set(
        features.examples[~features.may_show]
    )
    for j in range(3):
        shown = set(np.concatenate(features.contrast(j, 20, shown=True)))
        held_out = set(np.concatenate(features.contrast(j, 12, shown=False)))
        assert shown and held_out and not shown & held_out
        fast = set(features.examples[features.ranked(j, True)[0][:5]])
        assert not fast & held_out
    labelling, scoring, *validation = server.prompts()
    assert len(validation) == 12 and "POSITIVE SAMPLES" in labelling and "[[SCORE]]" in scoring
    for text in (prompt.rsplit("TEXT: ", 1)[1].split("\n")[0].strip('"') for prompt in validation):
        assert text.startswith("=about ") and text not in labelling


def Shown(tmp_path):
    """The `Shown` of made-up statistics: 40 examples, 3 features."""
    from types import SimpleNamespace

    from scipy import sparse

    values = np.random.default_rng(0).random((40, 3)) * (
        np.random.default_rng(1).random((40, 3)) < 0.6
    )
    statistics = SimpleNamespace(
        pooled_examples=np.arange(40) * 2, pooled_max=sparse.csr_matrix(values)
    )
    evidence = SimpleNamespace(statistics=statistics, data={}, text_numbers=np.arange(80))
    return shown.Shown(evidence, [f"text {i}" for i in range(80)], seed=0)


def test_busy_and_failing_servers_are_waited_for(tmp_path, planted, run_main, endpoint):
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})
    server = endpoint(
        busy,
        (500, {"error": {"message": "oops"}}, {"Retry-After": "0"}),
        (200, completion("mentions fruit")),
    )
    started = time.monotonic()
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 1, *LABELS_ONLY) == 0
    assert time.monotonic() - started > 1 and len(server.requests) == 3


def test_slow_replies_time_out_and_a_dead_endpoint_is_left_alone(tmp_path, endpoint):
    """A call that timed out may have been paid for: it is not made again."""
    server = endpoint((0, 1.0))
    asker = client.Asker(
        client.ChatEndpoint(KEY, server.url, "m", timeout=0.05), tmp_path / "j.jsonl", n_workers=1
    )
    result = asker.ask([f"prompt {i}" for i in range(30)], "labels")
    assert result["prompt 0"] == (None, "failed: no whole reply within LLM_TIMEOUT")
    assert "calls in a row failed" in result["prompt 29"][1] and len(
        server.requests
    ) == client.BREAKER == len(set(server.prompts()))


def test_the_key_is_taken_out_of_replies(tmp_path, planted, run_main, endpoint):
    endpoint((200, completion(f"mentions {KEY}")))
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 1, *LABELS_ONLY) == 0
    assert any(row["label"] == "mentions ***" for row in table(tmp_path))
    no_key_anywhere(tmp_path)
    assert client.public_url(f"https://user:{KEY}@host:8000/v1?key={KEY}") == "https://host:8000/v1"


def test_a_dry_run_asks_and_writes_nothing(tmp_path, planted, run_main, endpoint, capsys):
    def distinct(prompt):  # labels differ, so no two features are validated by the same prompt
        return (
            completion(f"mentions {hash(prompt)}")
            if "POSITIVE SAMPLES" in prompt
            else answer(prompt)
        )

    server = endpoint(reply=distinct)
    flags = [*planted, "--n-top-neurons", 4, "--n-scored-features", 3, "--n-fidelity-examples", 12]
    assert run_main("interpret_sae", *flags, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert not server.requests and not (tmp_path / "interpretations.csv").exists()
    assert run_main("interpret_sae", *flags) == 0
    assert f"dry run: {len(server.requests)} calls" in plan
    capsys.readouterr()
    assert run_main("interpret_sae", *flags, "--dry-run") == 0
    # all are paid for
    assert "dry run: 0 calls with about 0 prompt tokens" in capsys.readouterr().out
    assert run_main("interpret_sae", *flags, "--n-fidelity-examples", 14, "--dry-run") == 0
    plan = capsys.readouterr().out
    n = len(server.requests)
    assert run_main("interpret_sae", *flags, "--n-fidelity-examples", 14) == 0
    assert f"dry run: {len(server.requests) - n} calls" in plan and len(server.requests) > n
    server.reply = lambda prompt: completion("no such thing")
    for journal in tmp_path.rglob("llm_replies.jsonl"):
        journal.unlink()
    assert run_main("interpret_sae", *flags) == 4
    capsys.readouterr()
    assert run_main("interpret_sae", *flags, "--dry-run") == 0
    assert "dry run: 0 calls" in capsys.readouterr().out  # answered, if by nothing that can be used
    n = len(server.requests)
    assert run_main("interpret_sae", *flags, "--retry-unusable", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert run_main("interpret_sae", *flags, "--retry-unusable") == 4
    assert f"dry run: {len(server.requests) - n} calls" in plan and len(server.requests) > n


@pytest.mark.parametrize("variables", [{}, {"OPENAI_API_KEY": KEY}])
def test_a_dry_run_of_no_features_counts_nothing(planted, run_main, monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 0, "--dry-run") == 0
    assert "dry run: 0 calls" in capsys.readouterr().out


def test_without_an_endpoint_nothing_is_asked(planted, run_main, monkeypatch):
    monkeypatch.setattr(client, "Asker", None)
    assert run_main("interpret_sae", *planted) == 0


def test_a_torn_journal_loses_one_line_only(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = client.Journal(path, ["m", None, {}])
    journal.add("p1", "r1")
    journal.add("p2", "r2")
    path.write_bytes(path.read_bytes()[:-5])
    again = client.Journal(path, ["m", None, {}])
    assert again.get("p1")["reply"] == "r1" and again.get("p2") is None
    again.add("p3", "r3")
    assert client.Journal(path, ["m", None, {}]).get("p3")["reply"] == "r3"
    for other in (["other", None, {}], ["m", "http://x", {}], ["m", None, {"temperature": 1}]):
        assert client.Journal(path, other).get("p1") is None


@pytest.mark.exhaustive
def test_killed_half_way_and_continued_without_a_repeated_call(tmp_path, planted, endpoint):
    """kill -9 while calls are in flight: what was answered is on disk; only calls in flight may be
    made again."""

    def slowly(prompt):
        time.sleep(0.05)
        return answer(prompt)

    server = endpoint(reply=slowly)
    command = [
        sys.executable,
        str(PROJECT / "interpret_sae.py"),
        *map(str, planted),
        "--n-top-neurons",
        "6",
        "--n-scored-features",
        "6",
        "--n-llm-workers",
        "2",
        "--n-fidelity-examples",
        "10",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    while len(server.requests) < 25:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.3)
    journal = next(tmp_path.rglob("llm_replies.jsonl"))
    answered, first = len(journal.read_text().splitlines()), len(server.requests)
    assert first - 2 <= answered + 2 and not (tmp_path / "interpretations.csv").exists()
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    prompts = server.prompts()
    assert len(prompts) - len(set(prompts)) <= 2  # at most what was in flight
    assert len(prompts) == len(set(prompts)) + first - answered
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys))


@pytest.mark.exhaustive
def test_a_real_model_behind_a_real_endpoint(tmp_path, planted, run_main, endpoint):
    """The embedded model, served over HTTP, labels, scores and validates; nothing here knows what
    it will say."""
    server = endpoint(reply=RealModel(dtype="bfloat16"))
    code = run_main(
        "interpret_sae",
        *planted,
        "--n-top-neurons",
        3,
        "--n-scored-features",
        2,
        "--n-fidelity-examples",
        6,
        "--interpreter-model",
        "SmolLM2-135M-Instruct",
        "--n-llm-workers",
        2,
    )
    rows = [row for row in table(tmp_path) if row["label_source"] == "SmolLM2-135M-Instruct"]
    assert (
        code in (0, 4)
        and 3 <= len(rows) <= 5
        and all(row["label"] and row["score"] in list("12345") for row in rows)
    )
    n = len(server.requests)
    assert len(set(server.prompts())) == n
    run_main(
        "interpret_sae",
        *planted,
        "--n-top-neurons",
        3,
        "--n-scored-features",
        2,
        "--n-fidelity-examples",
        6,
        "--interpreter-model",
        "SmolLM2-135M-Instruct",
        "--n-llm-workers",
        2,
        "fastsae.interpretation.features.POOLING=mean",
    )
    assert len([p for p in server.prompts()[n:] if p in server.prompts()[:n]]) == 0


def test_a_local_model_needs_no_endpoint(tmp_path, planted, run_main, monkeypatch):
    monkeypatch.setattr(client, "LOCAL_NEW_TOKENS", 12)
    code = run_main(
        "interpret_sae",
        *planted,
        "--n-top-neurons",
        1,
        *LABELS_ONLY,
        "--interpreter-model",
        "local:SmolLM2-135M-Instruct",
    )
    labelled = [
        row for row in table(tmp_path) if row["label_source"] == "local:SmolLM2-135M-Instruct"
    ]
    assert code == 0 and len(labelled) == 1
