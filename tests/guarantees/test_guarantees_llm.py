"""An LLM's failure is a status and never a label; what was paid for is neither lost nor bought
twice; the key is nowhere."""

import csv

import pytest
from loopback import Endpoint, RawEndpoint, completion, http_reply
from tiny_world import KEY, replay

VERDICT = "My final verdict score is: [[{}]], feature name is [[words]]"
FAULTS = {  # reply, whether it is paid for, requests for three features
    "null content": ((200, completion(None)), True, 3),
    "empty": ((200, completion("")), True, 3),
    "blank": ((200, completion(" \n ")), True, 3),
    "cut off": ((200, completion("mentions", "length")), True, 3),
    "filtered": ((200, completion("mentions", "content_filter")), True, 3),
    "refusal": ((200, completion("no", refusal="no")), True, 3),
    "refusal in words": ((200, completion("I'm sorry, but I can't help with that.")), True, 3),
    "preamble": ((200, completion("Here is the feature:")), True, 3),
    "no pattern": ((200, completion("None")), True, 3),
    "thinking only": ((200, completion("<think>hmm")), True, 3),
    "markup": ((200, completion("<html>502</html>")), True, 3),
    "fenced JSON": ((200, completion('```json\n{"label": "a"}\n```')), True, 3),
    "JSON": ((200, completion('{"label": "a"}')), True, 3),
    "essay": ((200, completion("x" * 400)), True, 3),
    "no choices": ((200, {"choices": []}), False, 3),
    "html page": ((200, "<html>proxy login</html>"), False, 3),
    "invalid JSON": ((200, "{"), False, 3),
    "401": ((401, {"error": {"message": f"bad key {KEY}"}}), False, 1),
    "403": ((403, {"error": {"message": "no"}}), False, 1),
    "404": ((404, {"error": {"message": "no such model"}}), False, 1),
    # each is tried four times
    "429": ((429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}), False, 12),
    "500": ((500, {"error": {"message": f"oops {KEY}"}}), False, 12),
    "503": ((503, "busy"), False, 12),
    # not made again: it may have been paid for
    "reset": ((200, None), False, 12),
    "slow": ((0, 0.6), False, 3),
    "503 for long": ((503, "busy", {"Retry-After": "3600"}), False, 3),
    **{
        f"score {score}": ((200, completion(VERDICT.format(score))), True, 3)
        for score in ("0", "6", "7/10", "4.5", "-3", "five")
    },
    "two scores": ((200, completion(VERDICT.format(1) + "\n" + VERDICT.format(5))), True, 3),
    "no name": ((200, completion("[[4]] [[]]")), True, 3),
}


@pytest.fixture(scope="module")
def n_top(world):
    """So many features must be asked for that three fire in enough examples to be labelled."""
    worker = world.idle.get()
    try:
        flags = [
            "--n-scored-features",
            0,
            "--n-fidelity-examples",
            0,
            "--llm-protocol",
            "contrastive",
            "--dry-run",
        ]
        return next(
            n
            for n in range(3, 24)
            if "contrastive labels: 3 calls"
            in replay(
                world,
                worker,
                "interpret_sae",
                "--n-top-neurons",
                n,
                *flags,
                url="http://localhost:9/v1",
            )["out"]
        )
    finally:
        world.idle.put(worker)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_a_status_and_never_a_label(world, worker, fault, tally, n_top):
    """The fault for all of three features; then the endpoint recovers, and the same command asks
    only for what was not paid for."""
    reply, paid, n_requests = FAULTS[fault]
    is_score = fault in ("two scores", "no name") or fault.startswith("score")
    good = completion(VERDICT.format(4)) if is_score else completion("mentions bread")
    flags = [
        "--n-top-neurons",
        n_top,
        "--n-scored-features",
        9 if is_score else 0,
        "--n-fidelity-examples",
        0,
        "--llm-timeout",
        0.3 if fault == "slow" else 30,
        "--llm-protocol",
        "fast" if is_score else "contrastive",
    ]
    server = Endpoint([reply])
    try:
        done = replay(world, worker, "interpret_sae", *flags, url=server.url)
        # features that fire in five examples, or those to label
        n = len(server.requests) if is_score else 3
        assert (
            done["code"] == 4
            and f"{n} features, {n} of them without an LLM's label" in done["err"]
            and n > 1
        ), done
        assert KEY not in done["out"] + done["err"]
        rows = table(worker.out)
        failed = [row for row in rows if row["status"].startswith("llm ")]
        assert (
            len(failed) == n
            and {row["label_source"] for row in rows} <= {"rule", ""}
            and not any(row["score"] for row in rows)
        )
        n_requests = n if is_score else n_requests
        assert len(server.requests) == n_requests
        server.replies[:] = [(200, good)]
        done = world.run(worker, "interpret_sae", *flags, url=server.url)
        if paid:  # answered: kept, and still no label, until the user asks for another try
            assert done["code"] == 4 and len(server.requests) == n_requests
            done = world.run(worker, "interpret_sae", *flags, "--retry-unusable", url=server.url)
        assert done["code"] == 0 and len(server.requests) == n_requests + n
        assert sum(row["label_source"] == "m" for row in table(worker.out)) == n
        assert not [
            file
            for file in worker.out.rglob("*")
            if file.is_file() and KEY.encode() in file.read_bytes()
        ]
    finally:
        server.close()
    tally("LLM faults without a label or a second payment", 1)


ATTACKS = {
    "a surrogate in an error": http_reply(b'{"error":{"message":"\\ud800"}}', "422 No"),
    "escapes in a label": http_reply(completion("mentions \x1b[2J\u202e\rwrote a table")),
    "a surrogate in a label": http_reply(completion("mentions \ud800 bread")),
    "nested JSON": http_reply(b"[" * 200_000),
    "choices of no list": http_reply({"choices": {"x": 1}}),
    "charset=hex": http_reply(b"zz", "500 Oops", "Retry-After: 0", kind="text/html; charset=hex"),
    "a redirect": http_reply(b"", "307 Moved", "Location: http://127.0.0.1:9/\x1b[2J"),
    "an echoed key": http_reply({"error": {"message": f"bad {KEY}"}}, "422 No"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_ends_in_whole_tables(world, worker, n_top, attack, tally):
    """Tables and report are there, no line of the output is forged, and what was paid for is not
    asked again."""
    flags = [
        "--n-top-neurons",
        n_top,
        "--n-scored-features",
        0,
        "--n-fidelity-examples",
        0,
        "--llm-protocol",
        "contrastive",
    ]
    server = RawEndpoint(ATTACKS[attack])
    try:
        done = replay(world, worker, "interpret_sae", *flags, url=server.url)
        n, labelled = len(server.requests), attack.endswith("label")
        assert (
            n
            and done["code"] == (0 if labelled else 4)
            and (worker.out / "interpretations.html").exists()
        ), done
        assert (
            all(c.isprintable() or c == "\n" for c in done["out"] + done["err"])
            and KEY not in done["out"] + done["err"]
        )
        rows = table(worker.out)
        assert sum(row["label_source"] == "m" for row in rows) == (3 if labelled else 0)
        assert not [
            file
            for file in worker.out.rglob("*")
            if file.is_file() and KEY.encode() in file.read_bytes()
        ]
        if attack.startswith(("nested", "choices")) or labelled:
            assert (
                world.run(worker, "interpret_sae", *flags, url=server.url)["code"] == done["code"]
            )
            assert len(server.requests) == n
    finally:
        server.close()
    tally("hostile replies survived", 1)


def table(folder):
    with open(folder / "interpretations.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
