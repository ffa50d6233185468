"""Killed, starved of disk space, stopped or started twice at every operation: the same command ends in the same bytes."""
import hashlib
import json
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
from forking import Stages
from loopback import Endpoint, completion

from fastsae import artifacts

WORDS = "the bread rose twice while rain fell and we chose a longer road home past seven quiet houses".split()
TIMES = ("seconds", "tokens_per_second")
N_WORKERS = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
STAGES = ("extract_activations", "train_sae", "interpret_sae")


def answer(prompt):
    if "[[SCORE]]" in prompt:
        return completion("It fires.\nMy final verdict score is: [[4]], feature name is [[words about bread]]")
    if "PROPERTY" in prompt:
        return completion("Yes." if "bread" in prompt.rsplit("TEXT:", 1)[1] else "No.")
    return completion(f'- "mentions bread {hashlib.sha256(prompt.encode()).hexdigest()[:6]}"')


@pytest.fixture(scope="module")
def world(tmp_path_factory, smol_tokenizer):
    """A tiny model, a dataset, an endpoint; for each stage its flags, what lies there before (`old` results too), and the outcome."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("kill")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, pad_token_id=2))
    model.save_pretrained(folder / "model")
    smol_tokenizer.save_pretrained(folder / "model")
    random_words = np.random.default_rng(0)
    dataset = folder / "texts.jsonl"
    dataset.write_text("".join(json.dumps({"text": " ".join(random_words.choice(WORDS, 3 + i % 9)), "topic": f"t{i % 3}"}) + "\n"
                               for i in range(30)))
    server = Endpoint(reply=answer)
    environment = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-never-on-disk-0123"}
    shared = ["--device", "cpu", "--dataset-path", dataset, "--run-name", "r", "--layer-idx", 1]
    flags = {
        "extract_activations": [*shared, "--model-name", folder / "model", "--layers", "1,2", "--chunk-tokens", 130],
        "train_sae": [*shared, "--m", 24, "--k", 2, "--matryoshka-prefixes", "8,24", "--n-epochs", 2, "--batch-size", 64,
                      "--dead-after-tokens", 190, "--save-every", 1e-9, "--learning-rate", 0.01, "--max-norm-ratio", "none"],
        "interpret_sae": [*shared, "--model-name", folder / "model", "--label-field", "topic", "--n-top-neurons", 5,
                          "--n-scored-features", 4, "--n-fidelity-examples", 6, "--n-llm-workers", 1, "--interpreter-model", "m"]}
    older = {"extract_activations": ["--max-length", 40], "train_sae": ["--seed", 7],
             "interpret_sae": ["--n-top-neurons", 0, "--pooling", "mean"]}
    stages = [Stages(TEST_TOKENIZERS=str(folder / "model")) for _ in range(N_WORKERS)]
    world = SimpleNamespace(folder=folder, server=server, flags=flags, expected={}, old={}, operations={}, idle=SimpleQueue())

    def run(worker, script, *more, **how):
        return worker.stages.run(script, *flags[script], *more, output=worker.out, environment=environment, **how)

    world.run = run
    for i in range(N_WORKERS):  # one output folder each: it is named in some of the files
        worker = SimpleNamespace(stages=stages[i], out=folder / f"worker{i}" / "out", before={}, number=i)
        worker.out.parent.mkdir()
        for script in STAGES:
            assert run(worker, script, *older[script])["code"] == 0
            worker.before[script] = folder / f"before{i}" / script
            shutil.copytree(worker.out, worker.before[script])
            done = run(worker, script)  # the outcome, from which the next stage goes on
            assert done["code"] == 0, done
            world.expected[i, script], world.old[i, script] = contents(worker.out), contents(worker.out, old=True)
            world.operations[script] = done["operations"]
        world.idle.put(worker)
    yield world
    for process in stages:
        process.close()
    server.close()


def replay(world, worker, script, **how):
    """Run a stage from its beginning, with its older results in place."""
    shutil.rmtree(worker.out, ignore_errors=True)
    shutil.copytree(worker.before[script], worker.out)
    done = world.run(worker, script, **how)
    assert not done["foreign"], done["foreign"]
    return done


def contents(folder, old=False):
    """{name: sha256} of all files under their final names (or of those kept aside), timings left out, replies in any order."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if (".old-" in name) != old or "/." in f"/{name}":
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps({key: value for key, value in json.loads(content).items() if key not in TIMES}).encode()
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


def assert_whole(world, worker, script):
    """Under every final name there is the older file or the new one; none that another stage reads is neither."""
    new, before = world.expected[worker.number, script], contents(worker.before[script])
    for name, digest in contents(worker.out).items():
        growing = name.endswith(("metrics.jsonl", "llm_replies.jsonl"))  # these grow line by line
        assert growing or digest in (new.get(name), before.get(name)), (script, name)


def assert_outcome(world, worker, script):
    assert contents(worker.out) == world.expected[worker.number, script]
    kept = set(contents(worker.out, old=True).values())
    assert set(world.old[worker.number, script].values()) <= kept  # what was there before is still there
    assert not [path for path in worker.out.rglob(".*") if path.name.endswith((".tmp", ".lock")) or path.name.startswith(".parts")]


def test_nothing_happens_twice(world):
    """The second run of each stage says so and changes nothing; the first wrote through fastsae.storage only."""
    worker = world.idle.get()
    for script in STAGES:
        replay(world, worker, script)
        before = {path: path.stat().st_mtime_ns for path in worker.out.rglob("*") if path.is_file()}
        again = world.run(worker, script)
        assert again["code"] == 0 and "up to date" in again["out"]
        assert {path: path.stat().st_mtime_ns for path in worker.out.rglob("*") if path.is_file()} == before
    world.idle.put(worker)


@pytest.mark.parametrize("script", STAGES)
def test_killed_at_every_operation(world, script, tally):
    def kill(worker, k):
        assert replay(world, worker, script, kill_at=k)["code"] == -9
        assert_whole(world, worker, script)
        done = world.run(worker, script)
        assert done["code"] == 0, (k, done["err"])
        assert_outcome(world, worker, script)

    points = range(1, len(world.operations[script]) + 1)
    in_parallel(world, kill, points)
    tally("kill points survived", len(points))


def test_a_killed_run_asks_no_answered_prompt_again(world, tally):
    worker = world.idle.get()
    replay(world, worker, "interpret_sae")
    points = [k for k, operation in enumerate(world.operations["interpret_sae"], 1) if operation == "fsync"]
    for k in points:
        first = len(world.server.requests)
        replay(world, worker, "interpret_sae", kill_at=k)
        world.run(worker, "interpret_sae")
        prompts = world.server.prompts()[first:]
        assert len(prompts) - len(set(prompts)) <= 1, k  # the one in flight: its reply had not reached the disk
    world.idle.put(worker)
    tally("kills between LLM calls without a repeated one", len(points))


@pytest.mark.parametrize("script", STAGES)
def test_a_disk_that_is_full_from_any_operation_on(world, script, tally):
    def starve(worker, k):
        done = replay(world, worker, script, full_from=k)
        assert done["code"] == 3 and re.fullmatch(r"error: .*: No space left on device\. free some space, .*\n", done["err"]), (k, done)
        assert_whole(world, worker, script)
        assert not list(worker.out.rglob("*.tmp")), k
        if k % 5 == 0:  # then space is made
            assert world.run(worker, script)["code"] == 0
            assert_outcome(world, worker, script)

    points = [k for k, operation in enumerate(world.operations[script], 1) if operation not in ("unlink", "rmtree")]
    in_parallel(world, starve, points)
    tally("full-disk points", len(points))


@pytest.mark.parametrize("script", STAGES)
def test_sigterm_at_any_operation(world, script, tally):
    def stop(worker, k):
        done = replay(world, worker, script, stop_at=k)
        assert done["code"] in (0, 143) and (done["code"] or contents(worker.out) == world.expected[worker.number, script]), (k, done)
        assert done["code"] == 0 or done["err"].endswith("stopped: what was finished is kept; the same command continues.\n")
        assert not list(worker.out.rglob("*.tmp")), k
        assert world.run(worker, script)["code"] == 0
        assert_outcome(world, worker, script)

    points = range(1, len(world.operations[script]) + 1, 4)
    in_parallel(world, stop, points)
    tally("SIGTERM points", len(points))


def test_runs_killed_three_times_at_random(world, tally):
    worker = world.idle.get()
    seconds = {script: min(replay(world, worker, script)["seconds"] for _ in range(3)) for script in STAGES}
    world.idle.put(worker)

    def torment(worker, number):
        chance, script, n_killed = random.Random(number), STAGES[number % 3], 0
        replay(world, worker, script, kill_after=chance.uniform(0.1, 0.9) * seconds[script])
        for _ in range(2):
            n_killed += world.run(worker, script, kill_after=chance.uniform(0.1, 0.9) * seconds[script])["code"] == -9
        assert world.run(worker, script)["code"] == 0
        assert_outcome(world, worker, script)
        return n_killed

    kills = in_parallel(world, torment, range(100))
    tally("runs killed three times at random, identical", len(kills))


@pytest.mark.parametrize("script", STAGES)
def test_of_twenty_that_start_at_once_one_writes(world, script, tally):
    worker = world.idle.get()
    done = replay(world, worker, script, racers=20)
    codes = sorted(racer["code"] for racer in done["racers"])
    assert done["n_waiting"] == 1 and codes == [0] + 19 * [3], codes
    for racer in done["racers"]:
        line = r"error: .*: process \d+ on \S+, since [^,]+, is writing here\. wait until it has ended, or give another --[\w-]+\.\n"
        assert racer["code"] == 0 or re.fullmatch(line, racer["err"]), racer
    assert_outcome(world, worker, script)
    world.idle.put(worker)
    tally("racing starts with one winner", 20)


def test_dead_features_were_there(world):
    worker = world.idle.get()
    replay(world, worker, "train_sae")
    path = next((worker.out / "checkpoints" / "r").glob("SAE_*24*.pt"))
    assert artifacts.read_checkpoint_metadata(path)["metrics"]["dead_fraction_training"] > 0
    world.idle.put(worker)
