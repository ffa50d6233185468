"""The statistics pass against `SparseAutoencoder.get_activations` + numpy on the same tokens, its
memory, and planted features.

    python -m experiments.benchmarks.interpret            # all parts
    python -m experiments.benchmarks.interpret --parts speed_256 memory_32768

Writes experiments/results/bench_interpret.json. Tokens are made up (d = 576, K-sparse sums of
directions with noise), 140 to an example; the dense twin computes the same statistics, less the
random samples, from the (n_tokens, M) matrix.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np

from experiments.shared.provenance import RESULTS, environment, module_command, write_result

PARTS = {
    "speed_256": (256, 8, 65536),
    "speed_4608": (4608, 32, 16384),
    "memory_32768": (32768, 32, 16384),
}
D, LENGTH, N_NAMES, REPEATS = 576, 140, 5000, 5


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    path, found = RESULTS / "bench_interpret.json", {}
    if path.exists():
        found = json.loads(path.read_text()).get("parts", {})
    for part in args.parts:  # each in a process of its own, for its peak memory
        done = subprocess.run(
            module_command("experiments.benchmarks.interpret", "--child", part),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, found[part])
    write_result(
        "bench_interpret", {"d": D, "tokens_per_example": LENGTH, "parts": PARTS}, {"parts": found}
    )


def measure(part):
    import torch

    from fastsae.interpretation.statistics import collect
    from fastsae.sae.autoencoder import new_sae

    m, k, n = PARTS[part]
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(
        {
            "input_dim": D,
            "m_total_neurons": m,
            "k_active_neurons": k,
            "prefix_lengths": [m // 4, m],
        },
        "cpu",
    ).eval()
    with torch.no_grad():
        sae.decoder.weight.copy_(torch.randn(m, D, generator=generator).t() / D**0.5)
        sae.encoder.weight.copy_(sae.decoder.weight.t())
    code = torch.zeros(n, 200).scatter_(1, torch.randint(0, 200, (n, k), generator=generator), 1.0)
    x = (
        (
            code @ sae.decoder.weight.detach().t()[:200]
            + 0.1 * torch.randn(n, D, generator=generator)
        )
        .half()
        .numpy()
    )
    lengths = np.full(n // LENGTH, LENGTH)
    x = x[: lengths.sum()]
    names = np.random.default_rng(0).integers(0, N_NAMES, len(x))
    kind = role = np.zeros(len(x), np.uint8)

    def run():
        started = time.perf_counter()
        collect(sae, x, lengths, kind, role, names, N_NAMES)
        return time.perf_counter() - started

    result = {"m": m, "k": k, "n_tokens": len(x)}
    if part.startswith("memory"):
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        result["seconds"] = round(run(), 2)
        return {**result, "peak_memory_above_inputs_mib": round(memory("VmHWM") - before)}
    ours, theirs = [], []
    for _ in range(REPEATS):  # in turn, so that a busy moment of the machine meets both
        ours.append(run())
        theirs.append(dense_twin(sae, x, lengths, names))
    encode_only, whole = (min(times) for times in zip(*theirs))
    return {
        **result,
        "seconds": round(min(ours), 3),
        "tokens_per_second": round(len(x) / min(ours)),
        "get_activations_seconds": round(encode_only, 3),
        "dense_seconds": round(whole, 3),
        "times_faster": round(whole / min(ours), 2),
        "times_faster_than_get_activations_alone": round(encode_only / min(ours), 2),
    }


def memory(field):
    """A field of /proc/self/status in MiB."""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )
        / 1024
    )


def dense_twin(sae, x, lengths, names):
    """(seconds of get_activations alone, seconds with the statistics in numpy)."""
    import torch

    started = time.perf_counter()
    # (n_tokens, M)
    features = sae.get_activations(torch.from_numpy(x).float(), show_progress=False)
    encode_only = time.perf_counter() - started
    fires = features > 0
    fires.sum(0), features.sum(0), features.max(0)
    np.linalg.norm(x.astype(np.float32), axis=1)
    bounds = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    pooled, total = np.maximum.reduceat(features, bounds), np.add.reduceat(features, bounds)
    np.argpartition(-pooled, 5, axis=0)[:5], total / LENGTH
    for j in range(features.shape[1]):
        values = features[fires[:, j], j]
        np.histogram(values, 32)
        np.bincount(names[fires[:, j]], values, minlength=N_NAMES)
    ones = fires.astype(np.float32)
    ones.T @ ones
    return encode_only, time.perf_counter() - started


if __name__ == "__main__":
    main()
