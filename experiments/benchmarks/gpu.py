"""Stages 1 and 2 on one GPU: first whether they are right, then how fast they are.

    python -m experiments.benchmarks.gpu --part check
    python -m experiments.benchmarks.gpu --part training
    python -m experiments.benchmarks.gpu --part extraction
    python -m experiments.benchmarks.gpu --part check --tiny --device cpu      # the code, anywhere

Each part takes at most --minutes (10): what there is no time left for is named in the result. No
network is needed; models have random weights, which is right for speed.

`check`: the kernels and the sparse products against float64, the same bits in two trainings, the
three scripts on the CPU and on the device. A part that fails ends with exit code 1, and says so.
`training`: milliseconds a step of the kernels, the sparse products, dense bfloat16 autograd, and
SAELens and sparsify where they are installed; the share of what the device's own ceilings allow,
by the arithmetic of `limit_ms`; peak memory, host waits, the slowest kernels.
`extraction`: Llama-3.1-8B's shape; stage 1 beside the seeds' loop and padded batches of the whole
model. Writes experiments/results/gpu.json, a part at a time.
"""

import argparse
import functools
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from experiments.shared import gpu_world as world
from experiments.shared.provenance import RESULTS, machine, run_stage, write_result
from fastsae.sae import kernel_step
from fastsae.sae.autoencoder import config_of, new_sae, reference_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.training.run import TrainingRun

FULL: dict[str, Any] = {
    "ceilings": 8192,
    "check": [(512, 4096, 16, 256), (4096, 16_384, 32, 512)],  # d, M, K, batch
    "steps_twice": 20,
    "d": 4096,
    "M": (65_536, 16_384, 131_072),
    "K and batch": [(k, batch) for k in (32, 64) for batch in (4096, 16_384)],
    "steps": 20,  # of a timing, after so many others; of a profile
    "warm": 5,
    "profiled": 3,
    "model": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    },
    "layer": 12,
    "lengths": {"all 500": [500] * 2048, "median 250": world.lognormal_lengths(3000, 250, 2000)},
    "slow_examples": 32,
}
TINY: dict[str, Any] = {
    "ceilings": 64,
    "check": [(24, 40, 3, 16)],
    "steps_twice": 2,
    "d": 24,
    "M": (32,),
    "K and batch": [(2, 8)],
    "steps": 1,
    "warm": 1,
    "profiled": 1,
    "model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "max_position_embeddings": 256,
    },
    "layer": 2,
    "lengths": {"short": world.lognormal_lengths(60, 12, 40)},
    "slow_examples": 3,
}
SMALL_MODEL = {**TINY["model"], "hidden_size": 64, "intermediate_size": 128}  # of the scripts
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, prefixes": {"quarter": True},
    "batchtopk": {"architecture": "batchtopk"},
    "batchtopk, prefixes": {"architecture": "batchtopk", "quarter": True},
}
ERROR = 1e-4  # relative, of a gradient in float32, that a step may have
ADAM_BYTES = 24  # a parameter: gradient, weight and two moments read, three of them written
PARTS = ("check", "training", "extraction")
AUX_COEF = 1 / 32


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the code")
    parser.add_argument("--no-scripts", action="store_true", help="check without the three scripts")
    parser.add_argument("--name", default="gpu")
    args = parser.parse_args()
    args.sizes, args.until = TINY if args.tiny else FULL, time.monotonic() + 60 * args.minutes - 30
    if args.device.startswith("cuda"):
        if not torch.cuda.is_available():
            sys.exit("error: --device: there is no CUDA device. give --tiny --device cpu.")
        torch.cuda.set_device(args.device)
    path = RESULTS / f"{args.name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {part: result.get(part) for part in PARTS}
    found = {"check": check, "training": training, "extraction": extraction}[args.part](args)
    result[args.part] = {"machine": machine(), **found}
    print(json.dumps(result[args.part], indent=1))
    write_result(args.name, {"device": args.device, "tiny": args.tiny}, result)
    if failed := found.get("failed"):
        sys.exit(f"error: {', '.join(failed)} failed")


def in_time(args: Any, left_out: list[str], what: str, seconds: float) -> bool:
    """Whether something of about so many seconds may begin; notes what is left out."""
    if time.monotonic() + seconds < args.until:
        return True
    left_out.append(what)
    return False


def new_run(args: Any, d: int, m: int, k: int, **options: Any) -> tuple[TrainingRun, torch.Tensor]:
    """(a run at its start, a sample (8192, d) of activations with a spectrum that falls)."""
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(8192 if d > 100 else 200, d, generator=random)
    sample = (sample * torch.arange(1, d + 1).float().pow(-0.3)).to(args.device)
    prefixes = [m // 4, m] if options.pop("quarter", False) else None
    config = {"input_dim": d, "m_total_neurons": m, "k_active_neurons": k, "aux_k": 2 * k}
    run = TrainingRun(
        {**config, "prefix_lengths": prefixes, **options},
        sample,
        seed=0,
        device=args.device,
        learning_rate=1e-4,
        directions="mixed",
        encoder_scale=None,
    )
    return run, sample


def engines(args: Any) -> dict[str, Any]:
    """{name: step} of those that work on the device, the kernels first."""
    found: dict[str, Any] = {"sparse products": sparse_step}
    if kernel_step.usable(args.device):
        found = {"kernels": kernel_step.kernel_step, **found}
    return found


def take(run: TrainingRun, step: Callable[..., Any], x: torch.Tensor, dead_after: int) -> None:
    """One step of training."""
    run.step(
        functools.partial(step, aux_coef=AUX_COEF),
        x,
        learning_rate=1e-4,
        dead_after=dead_after,
        clip_grad=1.0,
    )


# Is it right?


def check(args):
    """Errors against float64, bits of two trainings, the scripts on two devices."""
    failed, left_out, errors = [], [], {}
    for d, m, k, batch in args.sizes["check"]:
        for variant, options in VARIANTS.items():
            name = f"d={d} M={m} K={k} batch={batch} {variant}"
            if in_time(args, left_out, name, 30):
                errors[name] = against_float64(args, d, m, k, batch, options)
                failed += [
                    f"{name}, {engine}" for engine, e in errors[name].items() if not e < ERROR
                ]
    bits = {
        f"{engine}, {variant}": same_bits(args, step, options)
        for variant, options in VARIANTS.items()
        for engine, step in engines(args).items()
        if in_time(args, left_out, f"bits of {engine}, {variant}", 30)
    }
    # sparse products add up by atomics on CUDA, and promise no bits
    failed += [f"bits of {name}" for name, same in bits.items() if not same and "kern" in name]
    if args.device.startswith("cuda") and "kernels" not in engines(args):
        failed.append("kernels")
    scripts = None
    if not args.no_scripts and in_time(args, left_out, "scripts", 150):
        scripts = scripts_on_two_devices(args)
        failed += ["scripts"] if not scripts["agree"] else []
    return {
        "relative_errors_against_float64": errors,
        "same_bits_in_two_trainings": bits,
        "scripts": scripts,
        "not_run_for_time": left_out,
        "failed": failed,
    }


def against_float64(args, d, m, k, batch, options):
    """{engine: largest relative error of a gradient}, with an eighth of the features dead."""
    run, sample = new_run(args, d, m, k, **options)
    x, dead = sample[:batch], torch.arange(m, device=args.device) % 8 == 0
    exact = new_sae(config_of(run.sae) | {"architecture": run.sae.architecture}, args.device)
    exact.load_state_dict(run.sae.state_dict())
    exact = exact.double()
    reference_step(exact, x.double(), dead, aux_coef=AUX_COEF)
    exact.adjust_decoder_gradient_()
    found = {}
    for name, step in engines(args).items():
        run.sae.threshold.zero_()
        step(run.sae, x, dead, aux_coef=AUX_COEF)
        run.sae.adjust_decoder_gradient_()
        found[name] = max(
            float((p.grad - q.grad).norm() / q.grad.norm().clamp_min(1e-30))
            for p, q in zip(run.sae.parameters(), exact.parameters())
        )
    return found


def same_bits(args, step, options):
    """Whether two trainings of a few steps end in the same bits."""
    d, m, k, batch = args.sizes["check"][0]
    states = []
    for _ in range(2):
        run, sample = new_run(args, d, m, k, **options)
        for i in range(args.sizes["steps_twice"]):
            take(run, step, sample[i % 3 :: 3][:batch], dead_after=2 * batch)
        states.append({name: value.clone() for name, value in run.sae.state_dict().items()})
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def scripts_on_two_devices(args):
    """The three scripts with a small random model, on the CPU and on the device."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = world.random_model(Path(folder) / "model", SMALL_MODEL, "cpu")
        data = world.texts(Path(folder) / "texts.jsonl", world.lognormal_lengths(120, 30, 120))
        shared = ["--dataset-path", data, "--model-name", model, "--layer-idx", 2, "--quiet"]
        for device in ("cpu", args.device):
            out = Path(folder) / f"out{len(found)}"
            common = [*shared, "--device", device, "--output-dir", out, "--run-name", "r"]
            run_stage("extract_activations.py", *common, "--dtype", "float32")
            training = ["--m", 64, "--k", 4, "--n-epochs", 3, "--max-norm-ratio", "none"]
            run_stage("train_sae.py", *common, *training)
            run_stage("interpret_sae.py", *common, "--n-top-neurons", 0, "--label-field", "topic")
            metrics = json.loads((out / "checkpoints" / "r" / "metrics.json").read_text())
            rows = np.load(out / "activations" / "activations_layer2.npz")["activations"]
            figures = {
                "normalized_mse": metrics["normalized_mse"],
                "features": len((out / "interpretations.jsonl").read_text().splitlines()) - 1,
            }
            found.append((rows.astype(np.float64), figures))
    (a, here), (b, there) = found
    error = float(np.median(np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)))
    agree = error < 1e-3 and abs(here["normalized_mse"] - there["normalized_mse"]) < 0.03
    agree = agree and here["features"] == there["features"]
    return {"median_relative_error": error, "cpu": here, "device": there, "agree": agree}


# How fast is training?


def training(args):
    """{shape: {entrant: figures}}, each beside the limit."""
    ceilings, d = world.ceilings(args.device, args.sizes["ceilings"]), args.sizes["d"]
    shapes: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for m in args.sizes["M"]:
        for name, entrant in all_entrants(args).items():
            args.run = None  # of the entrant before
            for k, batch in args.sizes["K and batch"]:
                shape, limit = f"M={m} K={k} batch={batch}", limit_ms(ceilings, d, m, k, batch)
                entrants = shapes.setdefault(shape, {"limit_ms": round(limit, 4)})
                if in_time(args, left_out, f"{shape}: {name}", 25):
                    entrants[name] = measured(args, entrant, (d, m, k, batch), limit)
                    print(shape, name, json.dumps(entrants[name])[:200], flush=True)
    args.run = None
    return {"ceilings": ceilings, "d": d, "shapes": shapes, "not_run_for_time": left_out}


def limit_ms(ceilings, d, m, k, batch):
    """Milliseconds below which no step of this kind comes, by arithmetic on measured ceilings: the
    encoder's product in bfloat16, four gathers of K rows a token in bfloat16, and Adam."""
    product = 2 * batch * m * d / ceilings["bfloat16_flops"]
    gathers = 4 * batch * k * d * 2 / ceilings["copy_bytes"]
    adam = ADAM_BYTES * 2 * m * d / ceilings["copy_bytes"]
    return 1e3 * (product + gathers + adam)


def all_entrants(args):
    """{name: function of (args, shape) that gives a step to take}."""
    found = {name: functools.partial(our_step, step=step) for name, step in engines(args).items()}
    best = next(iter(found))
    found[f"{best}, all features dead"] = functools.partial(found[best], dead_after=0)
    found["dense bfloat16 autograd"] = functools.partial(dense_step)
    for package, name in (("sae_lens", "SAELens"), ("sparsify", "sparsify")):
        if importlib.util.find_spec(package):
            found[name] = functools.partial(peer_step, package=package)
    return found


def our_step(args, d, m, k, batch, *, step, dead_after=10**9):
    """A step of `TrainingRun`, clipping and all; an entrant's shapes of one M share their run,
    which takes seconds to begin."""
    if args.run is None:
        args.run = new_run(args, d, m, k)
    run, sample = args.run
    run.sae.k_active_neurons, run.sae.aux_k = k, 2 * k
    x = sample.repeat(-(-batch // len(sample)), 1)[:batch]
    return lambda: take(run, step, x, dead_after)


def dense_step(args, d, m, k, batch):
    """TopK as it is usually written: dense matrices, autograd, products in bfloat16."""
    x = torch.randn(batch, d, device=args.device)
    encoder = torch.nn.Linear(d, m, device=args.device)
    decoder = torch.nn.Linear(m, d, device=args.device)
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)

    def step():
        with torch.autocast(args.device.partition(":")[0], torch.bfloat16):
            pre = encoder(x)
            value, column = pre.topk(k, dim=1)
            features = torch.zeros_like(pre).scatter(1, column, value.relu())
            loss = (decoder(features) - x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(args, d, m, k, batch, *, package):
    """The milliseconds of a step of another library's own trainer, which are measured here."""
    from experiments.benchmarks import train

    x = torch.randn(4 * batch, d, device=args.device)
    trainer = train.sae_lens("topk") if package == "sae_lens" else train.sparsify
    n_steps = args.sizes["steps"]

    trainer(x, 2, m, k, batch, None)  # imports and caches
    return 1e3 * trainer(x, n_steps, m, k, batch, None)[0] / n_steps


def measured(args, entrant, shape, limit):
    """Milliseconds a step and what else is known of an entrant; what it failed of otherwise."""
    found: dict[str, Any] = {}
    try:
        with world.peak_memory(args.device, found):
            step = entrant(args, *shape)
            if isinstance(step, float):
                taken = [step]
            else:
                taken = world.times(step, args.device, args.sizes["steps"], args.sizes["warm"])
                found["host_waits"] = world.host_waits(step, args.device)
                found["slowest"] = world.profile(step, args.device, args.sizes["profiled"])
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # a peer that does not know the device or the shape
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    milliseconds = statistics.median(taken)
    return {
        "ms": round(milliseconds, 3),
        "spread_ms": [round(min(taken), 3), round(max(taken), 3)],
        "tokens_per_second": round(shape[-1] / milliseconds * 1e3),
        "share_of_limit": round(limit / milliseconds, 3),
        **found,
    }


# How fast is extraction?


def extraction(args):
    """{dataset: tokens a second of stage 1 and of the usual ways}, and the products' limit."""
    from experiments.benchmarks.extract import flops_per_token

    ceilings, left_out, found = world.ceilings(args.device, args.sizes["ceilings"]), [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes, layer = args.sizes["model"], args.sizes["layer"]
        model = world.random_model(folder / "model", sizes, args.device)
        flops = flops_per_token(SimpleNamespace(**{"head_dim": None, **sizes})) * layer
        limit = ceilings["bfloat16_flops"] / flops
        for dataset, lengths in args.sizes["lengths"].items():
            data = world.texts(folder / "texts.jsonl", lengths)
            found[dataset] = {}
            if in_time(args, left_out, f"{dataset}: stage 1", 120):
                found[dataset]["stage 1"] = stage_speed(args, model, data, folder, layer, limit)
            if in_time(args, left_out, f"{dataset}: usual ways", 120):
                found[dataset] |= usual_speeds(args, model, data, layer)
    return {
        "ceilings": ceilings,
        "limit_tokens_per_second": limit,
        "layer": layer,
        "datasets": found,
        "not_run_for_time": left_out,
    }


def stage_speed(args, model, data, folder, layer, limit):
    """Stage 1 as a user runs it: what it says of itself, and the seconds of the whole process."""
    out = folder / "out"
    started = time.perf_counter()
    run_stage(
        "extract_activations.py",
        *["--dataset-path", data, "--model-name", model, "--layer-idx", layer],
        *["--device", args.device, "--output-dir", out, "--dtype", "bfloat16", "--quiet"],
        *["--max-length", args.sizes["model"]["max_position_embeddings"]],
    )
    seconds = time.perf_counter() - started
    about = json.loads((out / "activations" / f"activations_layer{layer}.json").read_text())
    shutil.rmtree(out)
    return {
        **{name: about[name] for name in ("tokens_per_second", "seconds") if name in about},
        "whole_process_seconds": round(seconds, 2),
        "share_of_limit": round(about["tokens_per_second"] / limit, 3),
    }


def usual_speeds(args, model, data, layer):
    """Tokens a second of one text at a time and of padded batches of 16, through the whole model,
    all hidden states kept: on as many examples as that takes time for."""
    from experiments.benchmarks.extract import padded_batches, rows, sample, seeds_way, whole_model
    from fastsae.data.datasets import stream_examples
    from fastsae.data.tokenization import ChatTokenizer, tokenise
    from fastsae.lm import loading

    longest = args.sizes["model"]["max_position_embeddings"]
    tokenizer = ChatTokenizer(loading.load_tokenizer(str(model)), max_length=longest)
    table = sample(tokenise(stream_examples(str(data)), tokenizer), args.sizes["slow_examples"])
    about = argparse.Namespace(device=args.device, layer=layer)
    loaded = whole_model(about, str(model), torch.bfloat16)
    ways = {
        "seeds' loop": lambda: [seeds_way(loaded, ids, about) for ids in rows(table)],
        "padded batches of 16": lambda: padded_batches(loaded, table, about),
    }
    found = {}
    for name, way in ways.items():
        figures: dict[str, Any] = {}
        with world.peak_memory(args.device, figures):
            taken = statistics.median(world.times(way, args.device, 3, 1))
        found[name] = {"tokens_per_second": round(len(table.ids) / taken * 1e3), **figures}
    return found


if __name__ == "__main__":
    main()
