"""How often the host waits for the device in a batch of stage 1 and a step of stage 2: both scripts
on the pretended device, with a tiny model. Prints JSON, `python stage_waits.py`."""

import collections
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesaes.sae  # noqa: F401  (looks for CUDA when it loads)
import numpy as np
import transformers
from pretended_cuda import pretended

from fastsae.activations import extraction, work
from fastsae.lm import loading
from fastsae.training import loop

MODEL: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 2,
}


def main():
    """{what: {n, waits_each, where}}."""
    extracting = (work.Work, "run_model", (extraction.Forward, "_launch"))
    training = (loop, "train_epoch", (loop, "one_step"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        extract, train = tiny_world(Path(folder))
        plain = [*extract, "--no-use-chat-template", "--output-dir", f"{out}_plain"]
        extract, train = ([*flags, "--output-dir", out] for flags in (extract, train))
        with pretended() as machine:
            found = {
                "batch_after_a_prefix": count(machine, "extract_activations", extract, *extracting),
                "batch": count(machine, "extract_activations", plain, *extracting),
                "step": count(machine, "train_sae", train, *training),
            }
    json.dump(found, sys.stdout)


def count(machine, script, flags, owner, name, unit):
    """Waits while `owner.name` runs, over the calls of `unit`, in one run of a script."""
    calls, found = [], collections.Counter()
    inner, whole = getattr(*unit), getattr(owner, name)

    def counting(*arguments):
        calls.append(1)
        return inner(*arguments)

    def watching(*arguments):
        before = machine.waits.copy()
        result = whole(*arguments)
        found.update(machine.waits - before)
        return result

    before = sys.argv, sys.stdout  # which --quiet closes
    setattr(unit[0], unit[1], counting)
    setattr(owner, name, watching)
    try:
        sys.argv = [script, *map(str, flags)]
        importlib.import_module(script).main()
    finally:
        sys.argv, sys.stdout = before
        setattr(unit[0], unit[1], inner)
        setattr(owner, name, whole)
    return {
        "n": len(calls),
        "waits_each": round(sum(found.values()) / len(calls), 3),
        "where": {" ".join(where): n for where, n in found.most_common()},
    }


def tiny_world(folder: Path) -> tuple[list, list]:
    """A random model and texts; the flags of stage 1 and of stage 2."""
    config = transformers.LlamaConfig(**MODEL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    loading.load_tokenizer("SmolLM2-135M-Instruct").save_pretrained(folder / "model")
    words = "the bread rose twice while rain fell and we chose a longer road home".split()
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(words, 3 + i % 40))} for i in range(400)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["--model-name", folder / "model", "--layer-idx", 1, "--device", "cuda"]
    shared += ["--run-name", "r", "--quiet"]
    data = ["--dataset-path", folder / "texts.jsonl"]
    training = ["--m", 24, "--k", 2, "--batch-size", 128, "--matryoshka-prefixes", "none"]
    training += ["--n-epochs", 3, "--max-norm-ratio", "none", "--buffer-tokens", 3000]
    return [*shared, *data, "--batch-tokens", 400], [*shared, *training]


if __name__ == "__main__":
    main()
