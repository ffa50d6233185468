"""Stage 3: feature evidence against answers worked out by hand, the tables, and labels from an endpoint on loopback."""
import csv
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scipy import sparse

from fastsae import feature_statistics, llm_labels
from fastsae.categories import auc_matrix, best_category, shuffled_count

WORDS = ("apple", "river", "engine", "music")


def test_auc_by_hand():
    """Category 0 is examples 0 and 1. Feature 0 ranks both on top: 1. Feature 1: pairs won 1 of 4: 0.25. Feature 2 is constant: 0.5."""
    pooled = np.array([[9, 2, 1], [8, 0, 1], [1, 1, 1], [0, 3, 1]], float)
    auc = auc_matrix(pooled, np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(auc, [[1, 0.25, 0.5], [0, 0.75, 0.5]])


def test_category_is_chosen_and_tested_on_different_halves():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 20)
    pooled = generator.random((200, 30))
    pooled[:, 7] += labels == 4
    chosen, auc = best_category(pooled, labels, 10, seed=0)
    assert chosen[7] == 4 and auc[7] == 1
    others = np.delete(auc, 7)
    assert abs(others.mean() - 0.5) < 0.05  # chosen on the test half itself, the mean would be about 0.65
    assert shuffled_count(pooled, labels, 10, 0, 0.8) < 1


def test_categories_with_one_example_give_no_auc():
    chosen, auc = best_category(np.eye(3), np.arange(3), 3, seed=0)
    assert np.isnan(auc).all()


def test_pooling_by_hand():
    features = sparse.csr_matrix(np.array([[1, 0], [3, 0], [0, 0], [0, 5]], np.float32))
    example = np.array([0, 0, 2, 2])
    assert feature_statistics.pool(features, example, 3, "max").tolist() == [[3, 0], [0, 0], [0, 5]]
    assert feature_statistics.pool(features, example, 3, "mean").tolist() == [[2, 0], [0, 0], [0, 2.5]]


def test_characteristic_tokens_by_hand():
    """Token b carries 4 of 5 of the activation but is 1 of 4 of the tokens: 0.8 log(0.8 / 0.25) is the largest term."""
    features = sparse.csr_matrix(np.array([[1], [0], [0], [4]], np.float32))
    rows = feature_statistics.characteristic_tokens(features, np.array([0, 0, 2, 1]), ["a", "b", "c"], 5)
    assert rows == [[("b", pytest.approx(0.8))]]  # a has share 0.2, below its base rate 0.5


def test_evidence_labels():
    assert feature_statistics.evidence_label([("cat", 0.5), ("dog", 0.2)]) == "'cat', 'dog'"
    assert feature_statistics.evidence_label([("cat", 0.1)]) == "mixed contexts, some of 'cat'"
    assert feature_statistics.evidence_label([]) == ""


def test_token_names_merge_case_and_spaces(smol_tokenizer):
    ids = smol_tokenizer(" We we\nWe <|im_end|>", add_special_tokens=False)["input_ids"]
    numbers, names = feature_statistics.token_names(smol_tokenizer, np.array(ids))
    shown = [names[i] for i in numbers]
    assert shown.count("we") == 3 and "⏎" in shown and "<|im_end|>" in shown


def test_excerpt_marks_the_strongest_token(smol_tokenizer):
    ids = np.array(smol_tokenizer("The old clock in the hall struck nine and nobody moved", add_special_tokens=False)["input_ids"])
    activations = np.zeros(len(ids))
    activations[2] = 5
    assert feature_statistics.excerpt(smol_tokenizer, ids, activations, width=3) == "The old «clock» in the hall…"


@pytest.fixture
def planted(tmp_path, write_activations, smol_tokenizer, run_main):
    """Examples about four words; each word's token has its own direction; an autoencoder trained on them."""
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.standard_normal((16, 16)))[0]
    rows, ids, tokens, lengths = [], [], [], []
    filler = smol_tokenizer(" the a of and to in it was", add_special_tokens=False)["input_ids"]
    for i in range(120):
        word = WORDS[i % 4]
        rows.append({"text": f"=about {word} <script>alert(1)</script>", "category": f"cat_{word}"})
        word_id = smol_tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert len(word_id) == 1
        example = [*generator.choice(filler, 9), word_id[0]]
        ids += example
        lengths.append(len(example))
        causes = [4 + filler.index(t) if t in filler else WORDS.index(word) for t in example]
        tokens.append(directions[causes] * generator.uniform(5, 6, (len(example), 1)))
    dataset = tmp_path / "planted.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = write_activations(np.concatenate(tokens).astype(np.float32), lengths, dataset=dataset, token_ids=ids)
    flags += ["--label-field", "category", "--run-name", "test", "--device", "cpu"]
    assert run_main("train_sae", *flags, "--m", 20, "--k", 1, "--no-use-matryoshka", "--n-epochs", 60, "--learning-rate", 0.01,
                    "--batch-size", 64) == 0
    return flags


def table(tmp_path):
    with open(tmp_path / "interpretations.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_planted_features_are_named(tmp_path, planted, run_main, capsys):
    assert run_main("interpret_sae", *planted) == 0
    rows = table(tmp_path)
    assert len(rows) == 20
    for word in WORDS:
        row = next(row for row in rows if row["label"].startswith(f"'{word}'"))
        assert row["best_category"] == f"cat_{word}" and float(row["category_auc"]) == 1.0
        assert row["label_source"] == "tokens" and row["status"] == "ok"
        assert float(row["density"]) == pytest.approx(30 / 1200)  # 30 of the 1,200 tokens are this word
        assert f"«{word}»" in row["top_example_1"] and row["top_example_5"]
    assert "category AUC above 0.8" in capsys.readouterr().out
    dead = [row for row in rows if row["status"] == "dead"]
    assert all(row["label"] == "" and float(row["max_activation"]) == 0 for row in dead)


def test_tables_agree_and_carry_no_formula(tmp_path, planted, run_main):
    assert run_main("interpret_sae", *planted) == 0
    metadata, *exact = [json.loads(line) for line in (tmp_path / "interpretations.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = table(tmp_path)
    assert metadata["complete"] and len(exact) == len(rows)
    for row, twin in zip(rows, exact):
        for name, value in row.items():
            assert not value.startswith(("=", "+", "-", "@", "\t", "\r"))
            if isinstance(twin[name], str):
                assert value.removeprefix("'") == twin[name].removeprefix("'")


def test_up_to_date_changed_by_hand_and_other_settings(tmp_path, planted, run_main, capsys):
    assert run_main("interpret_sae", *planted) == 0
    capsys.readouterr()
    assert run_main("interpret_sae", *planted) == 0
    assert "up to date" in capsys.readouterr().out
    with open(tmp_path / "interpretations.csv", "a") as file:
        file.write("my notes\n")
    assert run_main("interpret_sae", *planted) == 0
    assert "changed by hand" in capsys.readouterr().out
    assert (tmp_path / "interpretations.old-1.csv").read_text().endswith("my notes\n")
    assert run_main("interpret_sae", *planted, "--pooling", "mean") == 0
    assert "POOLING max -> mean" in capsys.readouterr().out


def test_activations_and_checkpoint_must_belong_together(tmp_path, planted, run_main, write_activations, capsys):
    dataset = tmp_path / "planted.jsonl"
    dataset.write_text(dataset.read_text() + json.dumps({"text": "one more", "category": "cat_apple"}) + "\n")
    assert run_main("interpret_sae", *planted) == 2
    assert "run extract_activations.py" in capsys.readouterr().err
    write_activations(np.ones((1200, 16), np.float32), [10] * 120, dataset=dataset)
    assert run_main("interpret_sae", *planted) == 2
    assert "run train_sae.py" in capsys.readouterr().err


def test_unknown_label_field_is_named(planted, run_main, capsys):
    assert run_main("interpret_sae", *planted, "--label-field", "colour") == 2
    assert "LABEL_FIELD" in capsys.readouterr().err


class Endpoint(ThreadingHTTPServer):
    """A chat endpoint on loopback that answers from a list of (status, body), the last one again and again."""

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests = list(replies), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        status, reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if not isinstance(reply, str) else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def completion(text, finish_reason="stop"):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def endpoint(monkeypatch):
    """Start an endpoint with the given replies and point the environment at it."""
    started = []

    def start(*replies, key="sk-secret-0123456789"):
        started.append(Endpoint(replies))
        monkeypatch.setenv("OPENAI_BASE_URL", started[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        return started[-1]
    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_labels_come_through_hypothesaes_prompts_and_chat_completions(tmp_path, planted, run_main, endpoint):
    server = endpoint((200, completion('- "mentions fruit"')))
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 3, "--interpreter-model", "test-model") == 0
    labelled = [row for row in table(tmp_path) if row["label_source"] == "test-model"]
    assert [row["label"] for row in labelled] == ["mentions fruit"] * 3
    assert len(server.requests) == 3
    path, authorization, body = server.requests[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer sk-secret-0123456789" and body["model"] == "test-model"
    assert "POSITIVE SAMPLES" in body["messages"][0]["content"] and "about" in body["messages"][0]["content"]
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 4, "--interpreter-model", "test-model") == 0
    assert len(server.requests) == 4  # three came from the journal
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes(), file


BAD_REPLIES = {
    "null content": (200, completion(None)), "empty": (200, completion("")), "cut off": (200, completion("mentions", "length")),
    "refusal": (200, {**completion(None), "choices": [{"index": 0, "finish_reason": "stop",
                                                       "message": {"role": "assistant", "content": "no", "refusal": "no"}}]}),
    "thinking only": (200, completion("<think>hmm")), "html": (200, completion("<html>502</html>")), "no choices": (200, {"choices": []}),
    "essay": (200, completion("x" * 400)), "html page": (200, "<html>proxy login</html>"),
    "401": (401, {"error": {"message": "bad key sk-secret-0123456789"}}), "404": (404, {"error": {"message": "no such model"}}),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_failure_is_a_status_and_never_a_label(tmp_path, planted, run_main, endpoint, capsys, name):
    server = endpoint(BAD_REPLIES[name])
    assert run_main("interpret_sae", *planted, "--n-top-neurons", 3, "--n-llm-workers", 1) == 4
    rows = table(tmp_path)
    failed = [row for row in rows if row["status"].startswith("llm ")]
    assert len(failed) == 3 and all(row["label_source"] == "tokens" and row["label"].startswith(("'", "mixed")) for row in failed)
    captured = capsys.readouterr()
    assert "unlabelled: 3 of 3" in captured.err and "sk-secret" not in captured.out + captured.err
    assert len(server.requests) == (1 if name in ("401", "404") else 3)  # what every call would repeat is asked once
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes(), file
    server.replies[:] = [(200, completion("mentions fruit"))]  # the endpoint recovers, and the same command finishes
    before = len(server.requests)
    code = run_main("interpret_sae", *planted, "--n-top-neurons", 3, "--n-llm-workers", 1)
    if name in ("empty", "thinking only", "html", "essay"):  # answered and paid for: kept, and still no label
        assert code == 4 and len(server.requests) == before
    else:
        assert code == 0 and sum(row["label"] == "mentions fruit" for row in table(tmp_path)) == 3


def test_without_an_endpoint_nothing_is_asked(planted, run_main, monkeypatch):
    monkeypatch.setattr(llm_labels, "ChatLabeller", None)
    assert run_main("interpret_sae", *planted) == 0


def test_a_torn_journal_loses_one_line_only(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = llm_labels.Journal(path, "m", None)
    journal.add("p1", "r1")
    journal.add("p2", "r2")
    path.write_bytes(path.read_bytes()[:-5])
    again = llm_labels.Journal(path, "m", None)
    assert again.get("p1") == "r1" and again.get("p2") is None
    again.add("p3", "r3")
    assert llm_labels.Journal(path, "m", None).get("p3") == "r3"
    assert llm_labels.Journal(path, "other", None).get("p1") is None
