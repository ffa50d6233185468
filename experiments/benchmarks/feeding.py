"""What keeps a GPU waiting in stages 1 and 2, as far as it shows without one: how much of a batch
is padding, how often the host waits for the device, and what loading a model takes.

    python -m experiments.benchmarks.feeding            # writes experiments/results/feeding.json
    python -m experiments.benchmarks.feeding --only waits --before earlier.json

Padding is arithmetic on lengths (log-normal, and of the repository's data). Waits are counted on a
pretended CUDA device (tests/support/pretended_cuda.py): all three scripts run there with a tiny
model. Memory is that of a process that loads a random model in the shape of Llama in float32, from
files in bfloat16 as on the hub: 16 blocks, of which the first 4 are read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared.provenance import PROJECT, environment, module_command, write_result

BATCH_TOKENS, D_MODEL = 16384, 4096  # of Llama-3.1-8B on CUDA
N_EXAMPLES, MAX_LENGTH = 50_000, 512
MEDIANS, SIGMA = (60, 250), 0.8
LARGER: dict[str, Any] = {
    "pad_token_id": 2,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1000,
}
LAYER = 4  # of LARGER


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("padding", "waits", "loading"))
    parser.add_argument("--load", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--before", help="the JSON that another commit wrote: kept in this one")
    parser.add_argument("--name", default="feeding")
    args = parser.parse_args()
    if args.load:
        load_and_say(args.load)
        return
    measures = {"padding": padding, "waits": waits, "loading": loading}
    wanted = [args.only] if args.only else list(measures)
    result = {name: measures[name]() for name in wanted}
    if args.before:
        earlier = json.loads(Path(args.before).read_text())
        result["before"] = {
            name: earlier[name] for name in ("commit", *measures) if name in earlier
        }
    print(json.dumps(result))
    write_result(args.name, {"only": args.only}, result)


def lengths_of(median: float, n: int = N_EXAMPLES) -> np.ndarray:
    """(n,) log-normal lengths in tokens, cut at MAX_LENGTH."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), SIGMA, n)
    return np.clip(drawn, 8, MAX_LENGTH).astype(np.int64)


def padding() -> dict[str, Any]:
    """Tokens over padded tokens, with batches planned within a chunk and over a window."""
    from fastsae.activations import extraction, planning

    chunk_tokens = extraction.chunk_tokens_for(extraction.CHUNK_TOKENS, D_MODEL, 1, "float16")
    found = {}
    for median in MEDIANS:
        lengths = lengths_of(median)
        plans = {
            "within_a_chunk": planning.plan_by_chunks(lengths, chunk_tokens),
            "over_a_window": planning.plan_by_length(lengths, BATCH_TOKENS, chunk_tokens),
        }
        found[f"median_{median}"] = {
            name: round(planning.efficiency(lengths, plan, BATCH_TOKENS), 4)
            for name, plan in plans.items()
        }
    return {"batch_tokens": BATCH_TOKENS, "chunk_tokens": chunk_tokens, **found}


def waits() -> dict[str, Any]:
    """Waits of the host per batch of stage 1 and per step of stage 2."""
    script = PROJECT / "tests" / "support" / "stage_waits.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def loading() -> dict[str, Any]:
    """Peak memory (MB) of a process that reads the stream after block LAYER of a larger model."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(**LARGER)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.to(torch.bfloat16).save_pretrained(folder)
        model.float()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        needed = sum(
            p.numel() * p.element_size()
            for part in (*model.model.layers[: LAYER + 1], model.model.embed_tokens)
            for p in part.parameters()
        )
        del model
        done = subprocess.run(
            module_command("experiments.benchmarks.feeding", "--load", folder),
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
    grew = json.loads(done.stdout.splitlines()[-1])
    return {"blocks": 16, "layer": LAYER, "model_mb": size >> 20, "needed_mb": needed >> 20, **grew}


def load_and_say(folder: str) -> None:
    """Print by how many MB the peak of this process grew when the model was loaded."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (not part of the growth)

    from fastsae.lm import residual

    before = peak_mb()
    residual.ResidualModel(folder, LAYER, dtype=torch.float32)
    print(json.dumps({"peak_grew_mb": peak_mb() - before}))


def peak_mb() -> int:
    """The largest memory of this process so far, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10


if __name__ == "__main__":
    main()
