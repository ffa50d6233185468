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

N_FEATURES, N_FIDELITY = 20, 6


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = prepare(Path(folder))
        server = Endpoint(reply=RealModel(new_tokens=10, dtype="bfloat16"))
        command = [
            sys.executable,
            str(PROJECT / "interpret_sae.py"),
            "--no-print-settings",
            *map(str, flags),
            "--n-top-neurons",
            str(N_FEATURES),
            "--n-scored-features",
            "0",
            "--n-fidelity-examples",
            str(N_FIDELITY),
            "--interpreter-model",
            "SmolLM2-135M-Instruct",
            "--n-llm-workers",
            "2",
            "--llm-timeout",
            "300",
        ]
        environment = {
            **os.environ,
            "OPENAI_BASE_URL": server.url,
            "OPENAI_API_KEY": "sk-of-the-experiment",
        }
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment)
        while len(server.requests) < (2 + N_FIDELITY) * N_FEATURES // 2 and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(5)  # what the server was answering then
        before, journalled = (
            len(server.requests),
            len(next(Path(folder).rglob("llm_replies.jsonl")).read_text().splitlines()),
        )
        code = subprocess.run(command, env=environment).returncode
        prompts = server.prompts()
        with open(Path(folder) / "interpretations.csv", newline="", encoding="utf-8") as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if row["label_source"] == "SmolLM2-135M-Instruct"
            ]
        write_result(
            "llm_end_to_end",
            {
                "features": N_FEATURES,
                "held_out_examples": N_FIDELITY,
                "model": "SmolLM2-135M-Instruct",
            },
            {
                "seconds": round(time.perf_counter() - started, 1),
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
        server.close()


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
    run_stage("train_sae.py", *flags, "--m", 48, "--k", 4, "--no-use-matryoshka", "--n-epochs", 20)
    return flags


if __name__ == "__main__":
    main()
