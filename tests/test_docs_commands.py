"""Every command of the README and of docs/ is run: here in miniature, in forks of forking.py, or by
the test that ELSEWHERE names.

In miniature means the same script and the same flags, with a tiny model, tiny data and small sizes
in the place of those that the page names.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT
from loopback import Endpoint
from test_docs import PAGES
from tiny_world import KEY, WORDS, answer

import config

ELSEWHERE = {  # what a command holds: the file that runs it, or what CI does with it
    "^srun ": "tests/runtime/test_cluster.py",
    "run_pipeline.py$": "tests/test_pipeline.py",
    "-m pytest -q$": ".ci/run",
    "^.ci/run": ".ci/run",
    "^pip install": ".ci/run",
    "torchrun .*extract_activations.py": "tests/activations/test_extraction_scale.py",
    "torchrun .*train_sae.py": "tests/training/test_training_parallel.py",
    "hf:": "tests/activations/test_extraction_scale.py",
    r"experiments\.studies": "tests/studies",
    r"experiments\.pages": "tests/test_docs.py",
    "source_tree.py$": "tests/test_config.py",
}
SMALL = {  # flags whose values are made small
    "--model-name": "MODEL",
    "--layer-idx": "1",
    "--sae-path": "gemma/layer_0/width_16/average_l0_4",
    "--init-from": "gemma/layer_0/width_16/average_l0_4",
    "--block-length": "16",
    "--m": "16",
    "--k": "4",
    "--matryoshka-prefixes": "4,16",
    "--batch-size": "64",
    "--buffer-tokens": "200",
    "--n-top-neurons": "2",
    "--n-scored-features": "1",
    "--n-hypotheses": "2",
    "--sample-fraction": "0.5",  # of a stream, and 40 examples are few
}
TINY = {  # flags that every command gets besides
    "--device": "cpu",
    "--model-name": "MODEL",
    "--layer-idx": "1",
    "--dataset-path": "my_texts.jsonl",
    "--m": "16",
    "--k": "4",
    "--n-epochs": "1",
    "--batch-size": "64",
    "--n-top-neurons": "2",
    "--n-scored-features": "1",
    "--n-fidelity-examples": "6",
    "--sample-fraction": "0.5",
}


def documented() -> list[str]:
    """The commands of all pages, each once, without comments."""
    found = {}
    for path in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), re.S):
            for line in block.splitlines():
                command = re.sub(r"\s+# .*", "", line).strip()
                if command and not re.fullmatch(r"[A-Z]+=\S+", command):  # a variable
                    found[command] = path.name
    return list(found)


def elsewhere(command: str) -> str | None:
    """What runs a command that is not run here."""
    return next((where for mark, where in ELSEWHERE.items() if re.search(mark, command)), None)


HELP = [command for command in documented() if command.endswith(" --help")]
HERE = [command for command in documented() if not elsewhere(command) and command not in HELP]


def in_miniature(command: str, model: str) -> tuple[str, dict[str, str | None]]:
    """(script, {flag: value or None}) of a command, with what is large in it made small."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    flags: dict[str, str | None] = {}
    for word in words[start + 1 :]:
        if word.startswith("--"):
            flags[name := word] = None
        else:
            small = "2,4" if name == "--k" and "," in word else SMALL.get(name, word)
            flags[name] = small.replace("MODEL", model)
    for name in ("--preset", "--output-dir"):
        flags.pop(name, None)
    if (flags.get("--interpreter-model") or "").startswith("local:"):
        flags["--interpreter-model"] = f"local:{model}"
    return words[start], flags


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama, forks):
    """(folder with a model, data of every form and the results of stages 1 and 2; the forks)."""
    folder = tmp_path_factory.mktemp("documented")
    os.symlink(tiny_llama, folder / "model")
    texts = [" ".join((WORDS * 3)[i : i + 5 + i % 9]) + f" {i}" for i in range(40)]
    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    more = [
        {
            "topic": f"t{i % 2}",
            "cognitive_action": "remembering" if i % 2 else "doubting",
            "rating": i % 5,
        }
        for i in range(40)
    ]
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        for text in texts
    ]
    for name, rows in {
        "my_texts.jsonl": [{"text": text} | rest for text, rest in zip(texts, more)],
        "my_dialogues.jsonl": [{"messages": turn} | rest for turn, rest in zip(turns, more)],
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sharegpt.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": text}]} for text in texts])
    )
    (folder / "corpus.txt").write_text("\n".join(texts))
    reviews = [f'"{text}, or so",{i % 5}' for i, text in enumerate(texts)]
    (folder / "reviews.csv").write_text("\n".join(["review,stars", *reviews]))
    generator = np.random.default_rng(0)
    np.save(folder / "embeddings.npy", generator.standard_normal((40, 6)).astype(np.float32))
    (folder / "rows.csv").write_text("\n".join(["topic", *(f"t{i % 2}" for i in range(40))]))
    gemma = folder / "gemma" / "layer_0" / "width_16" / "average_l0_4"
    gemma.mkdir(parents=True)
    weights = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    biases = {"b_enc": np.zeros(16), "b_dec": np.zeros(8), "threshold": np.full(16, 0.1)}
    biases = {name: value.astype(np.float32) for name, value in biases.items()}
    np.savez(gemma / "params.npz", W_enc=weights[0].T, W_dec=weights[1], **biases)
    stages, ready = forks[0], folder / "ready"
    for script in config.STAGES[:2]:
        done = run(stages, folder, script, {}, ready)
        assert done["code"] == 0, done["err"]
    return folder, stages


def run(stages, folder, script, flags, output, **environment):
    """Run one stage with those of TINY's flags that it knows and the command does not give."""
    words = []
    for name, value in (TINY | flags).items():
        if name in known_flags([script]):
            value = value and value.replace("MODEL", str(folder / "model"))
            if name in ("--dataset-path", "--activations-path", "--sae-path", "--init-from"):
                value = str(folder / value)
            words += [name] if value is None else [name, value]
    return stages.run(script.removesuffix(".py"), *words, output=output, environment=environment)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("command", HERE, ids=lambda command: re.sub(r"[^\w.]+", "-", command)[:60])
def test_the_command_does_what_it_says(command, tiny, tmp_path):
    folder, stages = tiny
    script, flags = in_miniature(command, str(folder / "model"))
    output, environment = tmp_path / "out", {}
    # forks know no subprocesses, so the three stages run one after the other
    names = config.STAGES if script == "run_pipeline.py" else [script]
    assert not set(flags) - known_flags(names)
    if "--activations-path" in flags and names[0] == config.STAGES[2]:
        data = {"--activations-path": flags["--activations-path"]}
        done = run(stages, folder, config.STAGES[1], data, output)
        assert done["code"] == 0, done["err"]
    elif "--activations-path" in flags:
        pass  # there is no stage before it
    elif "--dataset-path" in flags and names[0] != config.STAGES[0]:
        data = {"--dataset-path": flags["--dataset-path"]}
        done = run(stages, folder, config.STAGES[0], data, output)
        assert done["code"] == 0, done["err"]
    elif names[0] != config.STAGES[0]:
        shutil.copytree(folder / "ready", output)
    server = Endpoint(reply=answer) if "OPENAI" in command else None
    if server:
        environment = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    try:
        for name in names:
            done = run(stages, folder, name, flags, output, **environment)
            local = (flags.get("--interpreter-model") or "").startswith("local:")
            assert done["code"] in ((0, 4) if local else (0,)), done["err"]
            assert "Traceback" not in done["err"]
    finally:
        if server:
            assert server.requests
            server.close()


def known_flags(scripts) -> set[str]:
    """Flags that these scripts take."""
    names = {
        name for file in ("config.py", *scripts) for name in config.read_settings(PROJECT / file)
    }
    flags = {"--" + name.lower().replace("_", "-") for name in names}
    return flags | {flag.replace("--", "--no-", 1) for flag in flags}


@pytest.mark.parametrize("command", HELP)
def test_help_is_there(command):
    words = shlex.split(command)
    assert words.pop(0) == "python"
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "usage" in done.stdout


def test_what_is_run_elsewhere_is_there():
    for mark, where in ELSEWHERE.items():
        assert (PROJECT / where).exists(), where
        assert any(re.search(mark, command) for command in documented()), mark
    assert len(HERE) >= 20


def test_modules_of_experiments_exist():
    modules = [
        name
        for command in documented()
        for name in re.findall(r"python -m (experiments[\w.]*)", command)
    ]
    assert len(modules) >= 8
    assert not [
        name for name in modules if not (PROJECT / (name.replace(".", "/") + ".py")).exists()
    ]
