"""A tiny model, dataset and endpoint, on which whole stages take a third of a second, in forks of
forking.py."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
from forking import PROJECT, Stages
from loopback import Endpoint, completion
from sampling import cores

WORDS = (
    "the bread rose twice while rain fell and we chose a longer road home past seven "
    "quiet houses".split()
)
# a run that was killed just before it wrote them has none
TIMES = ("seconds", "tokens_per_second", "device")
# where pytest itself runs in several processes, these use the cores
N_WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, len(cores()))
KEY = "sk-secret-0123456789"
STAGES = ("extract_activations", "train_sae", "interpret_sae")


def answer(prompt):
    if "[[SCORE]]" in prompt:
        return completion(
            "It fires.\nMy final verdict score is: [[4]], feature name is [[words about bread]]"
        )
    if "PROPERTY" in prompt:
        return completion("Yes." if "bread" in prompt.rsplit("TEXT:", 1)[1] else "No.")
    return completion(f'- "mentions bread {hashlib.sha256(prompt.encode()).hexdigest()[:6]}"')


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, smol_tokenizer):
    """A folder with the smallest model there can be, random, and the embedded model's tokenizer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            pad_token_id=2,
        )
    )
    model.save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forks(tiny_llama):
    """Processes that fork stages, which know the tokenizer of `tiny_llama`: one for each worker."""
    stages = [Stages(TEST_TOKENIZERS=str(tiny_llama)) for _ in range(N_WORKERS)]
    yield stages
    for each in stages:
        each.close()


def torchrun(script, *flags, output):
    """Run a script in two processes as a user does; returns the finished torchrun."""
    start = ["torch.distributed.run", "--nproc-per-node", 2, "--standalone"]
    words = list(map(str, flags))
    constants = [word for word in words if word.startswith("fastsae.")]
    given = [word for word in words if word not in constants]
    # without -- it takes --m for its own
    run = ["-m", "--", "experiments.shared.constants", *constants, f"{script}.py"]
    command = [
        sys.executable,
        "-m",
        *start,
        *(run if constants else ["--", PROJECT / f"{script}.py"]),
    ]
    return subprocess.run(
        list(map(str, [*command, "--output-dir", output, *given])),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


@pytest.fixture(params=["forks", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def two_processes(request, forks):
    """Call `two_processes(script, *flags, output=folder)`: (exit code, stderr of both)."""

    def run(script, *flags, output):
        if request.param == "torchrun":
            done = torchrun(script, *flags, output=output)
            return done.returncode, done.stderr
        done = forks[0].run(script, *flags, output=output, processes=2)
        return done["code"], done["err"]

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_llama, forks):
    """A tiny model, a dataset, an endpoint; for each stage its flags, what lies there before (`old`
    results too), and the outcome."""
    folder = tmp_path_factory.mktemp("kill")
    os.symlink(tiny_llama, folder / "model")
    random_words = np.random.default_rng(0)
    dataset = folder / "texts.jsonl"
    dataset.write_text(
        "".join(
            json.dumps(
                {"text": " ".join(random_words.choice(WORDS, 3 + i % 9)), "topic": f"t{i % 3}"}
            )
            + "\n"
            for i in range(30)
        )
    )
    shared = ["--device", "cpu", "--dataset-path", dataset, "--run-name", "r", "--layer-idx", 1]
    flags = {
        "extract_activations": [
            *shared,
            "--model-name",
            folder / "model",
            "--layer-idx",
            "1,2",
            "fastsae.activations.extraction.CHUNK_TOKENS=180",
        ],
        "train_sae": [
            *shared,
            "--m",
            24,
            "--k",
            2,
            "--matryoshka-prefixes",
            "8,24",
            "--n-epochs",
            2,
            "--batch-size",
            64,
            "--dead-after-tokens",
            190,
            "fastsae.training.loop.SAVE_EVERY=1e-9",
            "--learning-rate",
            0.01,
            "--max-norm-ratio",
            "none",
        ],
        "interpret_sae": [
            *shared,
            "--model-name",
            folder / "model",
            "--label-field",
            "topic",
            "--n-top-neurons",
            16,
            "--n-scored-features",
            4,
            "--n-fidelity-examples",
            6,
            "--no-run-model",
            "--n-llm-workers",
            1,
            "--interpreter-model",
            "m",
        ],
    }
    older = {
        "extract_activations": ["--max-length", 40],
        "train_sae": ["--seed", 7],
        "interpret_sae": ["--n-top-neurons", 0, "--n-report-features", 9],
    }
    world = SimpleNamespace(
        folder=folder, flags=flags, expected={}, old={}, operations={}, idle=SimpleQueue()
    )

    def run(worker, script, *more, url=None, **how):
        environment = {"OPENAI_BASE_URL": url or worker.server.url, "OPENAI_API_KEY": KEY}
        return worker.stages.run(
            script, *flags[script], *more, output=worker.out, environment=environment, **how
        )

    world.run = run
    workers = []
    for i in range(N_WORKERS):  # one output folder each: it is named in some of the files
        worker = SimpleNamespace(
            stages=forks[i],
            out=folder / f"worker{i}" / "out",
            before={},
            after={},
            number=i,
            server=Endpoint(reply=answer),
        )
        worker.out.parent.mkdir()
        for script in STAGES:
            done = run(worker, script, *older[script])
            assert done["code"] == 0, done
            worker.before[script] = folder / f"before{i}" / script
            shutil.copytree(worker.out, worker.before[script])
            done = run(worker, script)  # the outcome, from which the next stage goes on
            assert done["code"] == 0, done
            world.expected[i, script], world.old[i, script] = (
                contents(worker.out),
                contents(worker.out, old=True),
            )
            world.operations[script] = done["operations"]
            worker.after[script] = folder / f"after{i}" / script
            shutil.copytree(worker.out, worker.after[script])
        world.idle.put(worker)
        workers.append(worker)
    yield world
    for worker in workers:
        worker.server.close()


@pytest.fixture
def worker(world):
    """One of the world's workers: a process that forks stages, and its output folder."""
    worker = world.idle.get()
    yield worker
    world.idle.put(worker)


def replay(world, worker, script, *more, **how):
    """Run a stage from its beginning, with its older results in place."""
    shutil.rmtree(worker.out, ignore_errors=True)
    shutil.copytree(worker.before[script], worker.out)
    done = world.run(worker, script, *more, **how)
    assert not done["foreign"], done["foreign"]
    return done


def contents(folder, old=False):
    """{name: sha256} of all files under their final names (or of those kept aside), timings left
    out, replies in any order."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if (".old-" in name) != old or "/." in f"/{name}":
            continue
        if name.endswith(".settings.json"):  # flags that change no result are in it
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(
                {key: value for key, value in json.loads(content).items() if key not in TIMES}
            ).encode()
        elif path.name == "llm_replies.jsonl":
            content = b"\n".join(sorted(content.splitlines()))
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def in_parallel(world, function, items):
    """`function(worker, item)` for all items, on as many workers as there are."""

    def work(item):
        worker = world.idle.get()
        try:
            return function(worker, item)
        finally:
            world.idle.put(worker)

    with ThreadPoolExecutor(N_WORKERS) as pool:
        return list(pool.map(work, items))
