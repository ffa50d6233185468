"""Label, score and validate 20 features with a real model behind a real HTTP endpoint, killed
half-way and continued.

    python -m experiments.benchmarks.llm_end_to_end

The embedded model is served on loopback through transformers, in bfloat16; the
dataset is the first sentence of every third text of the demo. Writes
experiments/results/llm_end_to_end.json. It shows that the machinery works; a 135M-parameter model
is no judge.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.shared.loopback import Endpoint, RealModel
from experiments.shared.provenance import PROJECT, run_stage, write_result

MODEL = "SmolLM2-135M-Instruct"
N_FEATURES, N_FIDELITY = 20, 6


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    server = Endpoint(reply=RealModel(new_tokens=10, dtype="bfloat16"))
    with tempfile.TemporaryDirectory() as folder:
        command = stage_3(prepare(Path(folder)))
        started = time.perf_counter()
        before, journalled, code = kill_and_go_on(command, server, Path(folder))
        seconds = time.perf_counter() - started
        with open(Path(folder) / "interpretations.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["label_source"] == MODEL]
    prompts = server.prompts()
    server.close()
    write_result(
        "llm_end_to_end",
        {"features": N_FEATURES, "held_out_examples": N_FIDELITY, "model": MODEL},
        {
            "seconds": round(seconds, 1),
            "exit_code": code,
            "labelled": len(rows),
            "scored": sum(row["score"] != "" for row in rows),
            "validated": sum(row["fidelity_f1"] != "" for row in rows),
            "statuses": sorted({row["status"] for row in rows}),
            "calls_before_kill": before,
            "journalled_at_kill": journalled,
            "calls": len(prompts),
            "distinct_prompts": len(set(prompts)),
            "in_flight_at_kill": before - journalled,
            "repeated_calls": len(prompts) - len(set(prompts)),
            "labels": [row["label"] for row in rows[:5]],
        },
    )


def stage_3(flags):
    """The command of stage 3 with a language model."""
    return [
        sys.executable,
        str(PROJECT / "interpret_sae.py"),
        *map(str, flags),
        "--n-top-neurons",
        str(N_FEATURES),
        "--n-scored-features",
        "0",
        "--n-fidelity-examples",
        str(N_FIDELITY),
        "--interpreter-model",
        MODEL,
        "--n-llm-workers",
        "2",
        "--llm-timeout",
        "300",
    ]


def kill_and_go_on(command, server, folder):
    """Run the command, kill it after half of its calls, run it again: (calls before the kill,
    replies in the journal then, exit code of the second run)."""
    environment = {
        **os.environ,
        "OPENAI_BASE_URL": server.url,
        "OPENAI_API_KEY": "sk-of-the-experiment",
    }
    process = subprocess.Popen(command, env=environment)
    while len(server.requests) < (2 + N_FIDELITY) * N_FEATURES // 2 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # what the server was answering then
    journal = next(folder.rglob("llm_replies.jsonl"))
    before, journalled = len(server.requests), len(journal.read_text().splitlines())
    return before, journalled, subprocess.run(command, env=environment).returncode


def prepare(folder):
    """Short texts, their activations and a small autoencoder; the flags of stage 3."""
    rows = [
        json.loads(line)
        for line in (PROJECT / "data" / "cognitive_actions.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ][::3]
    texts = [
        {**row, "text": " ".join(re.split(r"(?<=[.?!]) ", row["text"])[0].split()[:14])}
        for row in rows
    ]
    dataset = folder / "sentences.jsonl"
    dataset.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts), encoding="utf-8"
    )
    flags = ["--dataset-path", dataset, "--output-dir", folder]
    run_stage("extract_activations.py", *flags)
    run_stage(
        "train_sae.py", *flags, "--m", 48, "--k", 4, "--matryoshka-prefixes=none", "--n-epochs", 20
    )
    return flags


if __name__ == "__main__":
    main()
