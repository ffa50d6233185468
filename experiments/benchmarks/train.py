"""Training speed and quality against HypotheSAEs, SAELens and sparsify: same activations, batch
size, learning rate and tokens.

    pip install -r experiments/requirements-bench.txt      # the peers; one that is missing is
    skipped, and said so
    python -m experiments.benchmarks.train --activations activations/activations_layer12.npz

For each shape every trainer runs a few steps in turn, --rounds times over: tokens/s is the median
(initialisation left out). Then each trains once on the same batches, and its normalised MSE on
held-out examples is taken by one piece of code from its own reconstructions. `converged` is the
time that HypotheSAEs' `fit` takes with its own rate, batch size and early stopping, and the time in
which ours, with its own rate, schedule and epochs, comes to the normalised MSE at which that ends.
`dense` is the speed of the architectures without a K beside SAELens'. Writes
experiments/results/bench_train.json, one part and shape at a time with --part and --shapes, so that
no run needs the machine for long. On a machine that others use, --clock cpu counts the seconds of
one thread in place of the clock's.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from experiments.shared.provenance import RESULTS, commit, write_result
from fastsae.runtime import threads

SHAPES: dict[
    str, tuple[int, int, int, list[int] | None, int, int]
] = {  # M, K, batch, prefixes, steps per timing, steps for quality
    "256,8,prefixes": (256, 8, 512, [64, 256], 100, 354),
    "256,8": (256, 8, 512, None, 100, 354),
    "4608,32": (4608, 32, 4096, None, 6, 28),
}
LEARNING_RATE = 5e-4
# rows of `converged` by shape, of which HypotheSAEs' up to 200 epochs take minutes
CONVERGED_ROWS = {"256,8,prefixes": 16384, "256,8": 16384, "4608,32": 8192}
MEASURED_EVERY = 0.25  # epochs of ours after which its normalised MSE is taken
DENSE = {"standard": 5.0, "jumprelu": 6.0, "gated": 5.0}  # their coefficients, as train_sae.py's
START = {"encoder_scale": None, "directions": "mixed"}  # as train_sae.py's defaults
PARTS = ("speed", "quality", "converged", "dense")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter
os.environ["TQDM_DISABLE"] = "1"  # no peer's progress bar


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", default="activations/activations_layer12.npz")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    use_clock(args.clock)
    threads.share_cores()  # as stage 2 does; the peers' threads have it too
    for package, name in (("sae_lens", "sae-lens"), ("sparsify", "eai-sparsify")):
        if importlib.util.find_spec(package) is None:
            print(
                f"skipped: {name} is not installed. pip install -r "
                "experiments/requirements-bench.txt"
            )
    train, validation = load(args.activations)
    path = RESULTS / "bench_train.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {part: result.get(part, {}) for part in ("measured", *PARTS)}
    for name in args.shapes:
        for part in PARTS if args.part == "all" else [args.part]:
            if part == "dense" and name != "4608,32":
                continue
            result[part][name] = globals()[part](name, train, validation, args.rounds)
            result["measured"][f"{part} {name}"] = how(args.clock)
            print(name, part, json.dumps(result[part][name], indent=1))
    write_result(
        "bench_train",
        {
            "activations": Path(args.activations).name,
            "n_train_tokens": len(train),
            "d_model": train.shape[1],
            "n_validation_tokens": len(validation),
            "learning_rate": LEARNING_RATE,
            "rounds": args.rounds,
            "shapes": {
                name: dict(
                    zip(("M", "K", "batch", "prefixes", "speed_steps", "quality_steps"), shape)
                )
                for name, shape in SHAPES.items()
            },
        },
        result,
    )


def use_clock(name):
    """Take all times from the clock `name`; `cpu` counts one thread."""
    global clock
    clock = CLOCKS[name]
    if name == "cpu":
        torch.set_num_threads(1)


def how(name):
    """How a case was measured, as they may come from different runs."""
    return {"clock": name, "threads": torch.get_num_threads(), "commit": commit()}


def load(path):
    """(training tokens in a fixed random order (n, d) float32, validation tokens), split by example
    as train_sae.py does."""
    from fastsae.data.token_masks import split_examples, token_norms, usable_tokens
    from fastsae.runtime import artifacts

    data = artifacts.read_npz(path, made_by="extract_activations.py")
    usable, _ = usable_tokens(
        token_norms(data["activations"]),
        data["token_kind"],
        exclude_shared_prefix=True,
        max_norm_ratio=10.0,
    )
    of_validation = split_examples(len(data["seq_lengths"]), 0.1, 0)[
        np.repeat(np.arange(len(data["seq_lengths"])), data["seq_lengths"])
    ]
    train = np.random.default_rng(0).permutation(np.flatnonzero(usable & ~of_validation))
    return tuple(
        torch.from_numpy(data["activations"][rows]).float()
        for rows in (train, np.flatnonzero(usable & of_validation))
    )


# Trainers: (x (n, d), steps, shape) -> (seconds of the steps without the initialisation, x ->
# reconstruction). Same rows for all.


def hypothesaes(x, steps, m, k, batch, prefixes):
    from hypothesaes.sae import SparseAutoencoder

    n_epochs = max(1, round(steps * batch / len(x)))
    sae = SparseAutoencoder(x.shape[1], m, k, prefix_lengths=prefixes, device="cpu")
    rows = x[: min(len(x), steps * batch // n_epochs)]
    initialise, started = sae.initialize_weights_, []

    def timed(sample):
        initialise(sample)
        started.append(clock())

    sae.initialize_weights_ = timed
    sae.fit(
        rows,
        None,
        batch_size=batch,
        learning_rate=LEARNING_RATE,
        n_epochs=n_epochs,
        show_progress=False,
    )
    return clock() - started[0], lambda x: sae.eval()(x)[0]


def sae_lens(kind):
    def train(x, steps, m, k, batch, prefixes):
        from sae_lens import saes
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        name, settings = {
            "topk": ("TopK", {"k": k}),
            "batchtopk": ("BatchTopK", {"k": k}),
            "standard": ("Standard", {"l1_coefficient": DENSE["standard"]}),
            "jumprelu": ("JumpReLU", {"l0_coefficient": 1.0}),
            "gated": ("Gated", {"l1_coefficient": DENSE["gated"]}),
        }[kind]
        cls, config = (getattr(saes, f"{name}TrainingSAE{end}") for end in ("", "Config"))
        sae = cls(
            config(
                d_in=x.shape[1],
                d_sae=m,
                normalize_activations="expected_average_only_in",
                device=str(x.device),
                **settings,
            )
        )
        options = {
            "lr": LEARNING_RATE,
            "lr_end": LEARNING_RATE,
            "logger": LoggingConfig(log_to_wandb=False),
            "n_batches_for_norm_estimate": 1,
            "device": str(x.device),
        }
        trainer = SAETrainer(
            SAETrainerConfig(steps * batch, batch, **options), sae, batches(x, batch)
        )
        started = clock()
        trainer.fit()
        return seconds_since(started, x), sae.eval()

    return train


def sparsify(x, steps, m, k, batch, prefixes):
    """sparsify's step as its `Trainer.fit` takes it, with Adam (its default is a sign descent that
    needs no learning rate of ours)."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=m, k=k), device=x.device)
    optimizer, source = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE), batches(x, batch)
    started = clock()
    for i in range(steps):
        rows = next(source)
        if i == 0:
            sae.b_dec.data = rows.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(rows).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    return seconds_since(started, x), lambda x: sae(x).sae_out


def seconds_since(started, x):
    """Seconds, what the device of `x` still does included."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return clock() - started


def ours(select, **start):
    def train(x, steps, m, k, batch, prefixes):
        run, step = our_run(x, m, k, batch, prefixes, select, start)
        source, started = batches(x, batch), clock()
        for _ in range(steps):
            step(next(source))
        return clock() - started, reconstruction_of(run.sae)

    return train


def our_run(x, m, k, batch, prefixes, select, start):
    import functools

    from fastsae.sae.sparse_step import sparse_step
    from fastsae.training.run import TrainingRun

    run = TrainingRun(
        {
            "input_dim": x.shape[1],
            "m_total_neurons": m,
            "k_active_neurons": k,
            "aux_k": 2 * k,
            "prefix_lengths": prefixes,
        },
        x[:8192],
        seed=0,
        device="cpu",
        learning_rate=LEARNING_RATE,
        **start,
    )
    function = functools.partial(sparse_step, aux_coef=1 / 32, select=select)

    def step(rows, rate=LEARNING_RATE):
        run.step(function, rows, learning_rate=rate, dead_after=256 * batch, clip_grad=1.0)

    return run, step


def reconstruction_of(sae):
    from fastsae.sae.autoencoder import decode, encode

    return lambda x: decode(sae, encode(sae, x))


def encoder_product(dtype):
    """The one dense product a step cannot do without."""

    def train(x, steps, m, k, batch, prefixes):
        weight, rows = torch.randn(m, x.shape[1]).to(dtype), x[:batch].to(dtype)
        started = clock()
        for _ in range(steps):
            rows @ weight.t()
        return clock() - started, None

    return train


def batches(x, size, seed=0):
    """Endless batches of rows, in a new order each epoch; the first goes through x as it is."""
    epoch, order = 0, torch.arange(len(x), device=x.device)
    while True:
        yield from (x[order[i : i + size]] for i in range(0, len(x) - size + 1, size))
        epoch += 1
        shuffled = np.random.default_rng((seed, epoch)).permutation(len(x))
        order = torch.from_numpy(shuffled).to(x.device)


def trainers(prefixes):
    """{name: trainer} of those that are installed and know the shape."""
    found = {"hypothesaes fit": hypothesaes}
    if prefixes is None and importlib.util.find_spec("sae_lens"):
        found |= {"sae-lens topk": sae_lens("topk"), "sae-lens batchtopk": sae_lens("batchtopk")}
    if prefixes is None and importlib.util.find_spec("sparsify"):
        found["sparsify, Adam"] = sparsify
    return {
        **found,
        "ours float32": ours(torch.float32, **START),
        "ours bfloat16 selection": ours(torch.bfloat16, **START),
    }


def speed(name, train, validation, rounds):
    """{trainer: median tokens/s, all of them, ratio to each of ours}."""
    m, k, batch, prefixes, steps, _ = SHAPES[name]
    shape = (m, k, batch, prefixes)
    products = {
        "encoder product float32": encoder_product(torch.float32),
        "encoder product bfloat16": encoder_product(torch.bfloat16),
    }
    entrants = {**trainers(prefixes), **products}
    for trainer in entrants.values():
        trainer(train, 2, *shape)  # imports and caches
    found = {entrant: [] for entrant in entrants}
    for _ in range(rounds):
        for entrant, trainer in entrants.items():
            found[entrant].append(steps * batch / trainer(train, steps, *shape)[0])
    median = {entrant: statistics.median(values) for entrant, values in found.items()}
    return {
        entrant: {
            "tokens_per_second": round(median[entrant]),
            "all": [round(v) for v in found[entrant]],
            **{
                f"{own} over it": round(median[own] / median[entrant], 2)
                for own in median
                if own.startswith("ours")
            },
        }
        for entrant in entrants
    }


def quality(name, train, validation, rounds):
    """{trainer: normalised MSE on held-out examples after the same number of tokens}, and of ours
    from other starts."""
    *shape, _, steps = SHAPES[name]
    entrants = {
        **trainers(shape[3]),
        "ours float32, HypotheSAEs' start": ours(torch.float32, encoder_scale=1.0),
        "ours float32, start from data": ours(torch.float32, **{**START, "directions": "data"}),
    }
    found = {}
    for entrant, trainer in entrants.items():
        torch.manual_seed(0)
        found[entrant] = round(normalized_mse(trainer(train, steps, *shape)[1], validation), 4)
    best = min(value for entrant, value in found.items() if not entrant.startswith("ours"))
    return {
        entrant: {"normalized_mse": value, "over_best_peer": round(value / best, 4)}
        for entrant, value in found.items()
    }


@torch.no_grad()
def normalized_mse(reconstruct, x):
    error = sum(float((reconstruct(part) - part).double().square().sum()) for part in x.split(4096))
    return error / float((x - x.mean(0)).double().square().sum())


def converged(name, train, validation, rounds):
    """Seconds of HypotheSAEs' `fit` until its early stopping, and of ours until it has that
    normalised MSE on held-out examples; measuring it is not counted.

    Both with their own defaults: theirs a constant rate of 5e-4 in batches of 512, its validation
    included; ours the falling rate and the epochs of train_sae.py.
    """
    m, k, _, prefixes, _, _ = SHAPES[name]
    rows = train[: CONVERGED_ROWS[name]]
    seconds, epochs, theirs = hypothesaes_converged(rows, validation, m, k, prefixes)
    goal = normalized_mse(theirs, validation)
    found = {"seconds": round(seconds, 2), "epochs": epochs, "normalized_mse": round(goal, 4)}
    print(name, "hypothesaes", json.dumps(found))
    return {
        "n_train_tokens": len(rows),
        "hypothesaes": found,
        **{
            label: until(goal, seconds, rows, validation, (m, k, prefixes), select)
            for label, select in (
                ("ours float32", torch.float32),
                ("ours bfloat16 selection", torch.bfloat16),
            )
        },
    }


def hypothesaes_converged(rows, validation, m, k, prefixes):
    """(seconds, epochs, x -> reconstruction) of their `fit` with its defaults."""
    from hypothesaes.sae import SparseAutoencoder

    torch.manual_seed(0)
    sae = SparseAutoencoder(rows.shape[1], m, k, prefix_lengths=prefixes, device="cpu")
    started = clock()
    history = sae.fit(rows, validation, show_progress=False)
    return clock() - started, len(history["train_loss"]), lambda x: sae.eval()(x)[0]


def until(goal, at_most, rows, validation, shape, select):
    """Seconds, start included, and epochs of ours with its defaults until its normalised MSE on
    `validation` is at most `goal`, or its last epoch is done."""
    from fastsae.training import usual
    from fastsae.training.run import learning_rate_factor

    m, k, prefixes = shape
    batch, started = 512, clock()
    rate = usual.learning_rate("topk", m, rows.shape[1], batch)
    run, step = our_run(rows, m, k, batch, prefixes, select, START)
    source, reached, n_batches = batches(rows, batch), 2.0, len(rows) // batch
    n_steps = usual.epochs(len(rows), batch) * n_batches
    spent, every = clock() - started, max(1, round(MEASURED_EVERY * n_batches))
    for n_done in range(0, n_steps, every):
        started = clock()
        for done in range(n_done, min(n_done + every, n_steps)):
            factor = learning_rate_factor(
                done, n_steps=n_steps, warmup_steps=0, schedule="linear", decay_fraction=1.0
            )
            step(next(source), rate * factor)
        spent += clock() - started
        reached = normalized_mse(reconstruction_of(run.sae), validation)
        if reached <= goal:
            break
    return {
        "seconds": round(spent, 2),
        "epochs": round(run.batch / n_batches, 2),
        "epochs_planned": n_steps // n_batches,
        "normalized_mse": round(reached, 4),
        "reached": reached <= goal,
        "hypothesaes_seconds_over_it": round(at_most / spent, 1),
    }


def dense(name, train, validation, rounds):
    """{architecture: median tokens/s of SAELens and of ours, ratio}."""
    m, k, batch, prefixes, steps, _ = SHAPES[name]
    entrants = {("ours", kind): ours_dense(kind) for kind in DENSE}
    if importlib.util.find_spec("sae_lens"):
        entrants |= {("sae-lens", kind): sae_lens(kind) for kind in DENSE}
    found = {entrant: [] for entrant in entrants}
    for number in range(rounds + 1):
        for entrant, trainer in entrants.items():
            seconds = trainer(train, steps if number else 1, m, k, batch, prefixes)[0]
            if number:  # the first is for imports and caches
                found[entrant].append(round(steps * batch / seconds))
    result = {kind: {} for kind in DENSE}
    for (side, kind), values in found.items():
        result[kind][side] = {"tokens_per_second": statistics.median(values), "all": values}
    for row in result.values():
        if "sae-lens" in row:
            both = (row[side]["tokens_per_second"] for side in ("ours", "sae-lens"))
            row["ours over it"] = round(next(both) / next(both), 2)
    return result


def ours_dense(kind):
    """The trainer of our architecture `kind`, on normalised activations as train_sae.py has it."""

    def train(x, steps, m, k, batch, prefixes):
        import functools

        from fastsae.sae.dense_step import dense_step
        from fastsae.training.run import TrainingRun

        config = {"input_dim": x.shape[1], "m_total_neurons": m, "k_active_neurons": k}
        run = TrainingRun(
            {**config, "aux_k": None, "architecture": kind},
            x[:8192],
            seed=0,
            device="cpu",
            learning_rate=LEARNING_RATE,
            normalise="norm",
            **START,
        )
        options = {"sparsity": DENSE[kind], "bandwidth": 1.0, "target_l0": k}
        function = functools.partial(dense_step, **options)
        source, started = batches(x, batch), clock()
        for _ in range(steps):
            run.step(
                function,
                next(source),
                learning_rate=LEARNING_RATE,
                dead_after=256 * batch,
                clip_grad=1.0,
            )
        return clock() - started, None

    return train


if __name__ == "__main__":
    main()
