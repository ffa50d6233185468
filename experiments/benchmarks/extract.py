"""Speed of extraction: the seeds' loop, the ways most users write it, this project's path, and the
limit of the matrix products.

    python -m experiments.benchmarks.extract \\
        --dataset-path ../shared/data/cognitive_actions_1350.jsonl
    python -m experiments.benchmarks.extract --shape 8b --device cuda  # random weights of
    Llama-3.1-8B's shape

All methods see the same texts, layer and machine in one run, in turn, so that a slow moment strikes
all of them. Each round takes the same sample of examples (spread over the lengths); figures are
medians over the rounds, in tokens of the result a second. Writes
experiments/results/bench_extract.json.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from experiments.shared.provenance import PROJECT, write_result
from experiments.shared.subjects import some_examples
from fastsae.activations import extraction
from fastsae.data.datasets import stream_examples
from fastsae.data.tokenization import ChatTokenizer, mark_shared_prefix, tokenise
from fastsae.lm import loading, residual, sources

MODEL = "SmolLM2-135M-Instruct"
SHAPE_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
    "rope_theta": 500000.0,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset-path", default=str(PROJECT / "data" / "cognitive_actions.jsonl"))
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--examples", type=int, default=32, help="examples of a round of the sorted methods"
    )
    parser.add_argument(
        "--slow-examples",
        type=int,
        default=8,
        help="examples of a round of the one-at-a-time methods",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=("smollm2", "8b"), default="smollm2")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also the peak memory of stage 1 for the dataset and for ten times as much",
    )
    parser.add_argument("--name", default="bench_extract")
    args = parser.parse_args()
    tokenizer = ChatTokenizer(loading.load_tokenizer(MODEL), max_length=512)
    table = tokenise(stream_examples(args.dataset_path), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model_name = MODEL if args.shape == "smollm2" else random_model(Path(folder))
        result: dict[str, Any] = {"n_examples": len(table.lengths), "n_tokens": len(table.ids)}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            result[name] = compare(args, table, model_name, dtype)
            print(
                name,
                {
                    k: round(v, 2)
                    for k, v in {
                        **result[name]["tokens_per_second"],
                        **result[name]["ratios"],
                    }.items()
                },
                flush=True,
            )
    speeds = {name: result[name]["tokens_per_second"] for name in ("float32", "bfloat16")}
    result["ours_bfloat16_over_seeds_float32"] = (
        speeds["bfloat16"]["ours"] / speeds["float32"]["seeds_loop"]
    )
    if args.shape == "smollm2":
        result["relative_error"] = errors(args, sample(table, args.examples))
    result["tokenise_tokens_per_second"] = tokenise_speed(args.dataset_path, tokenizer)
    if args.memory:
        result["peak_memory_mb"] = memory(args.dataset_path)
    print(
        "ours in bfloat16 over the seeds' loop in float32: "
        f"{result['ours_bfloat16_over_seeds_float32']:.1f}"
    )
    write_result(args.name, vars(args), result)


def random_model(folder):
    import transformers

    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**SHAPE_8B), dtype=torch.bfloat16
        )
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    loading.load_tokenizer(MODEL).save_pretrained(folder)
    return str(folder)


def sample(table, n):
    """`n` examples spread evenly over the lengths, in the order of the dataset."""
    by_length = np.argsort(table.lengths, kind="stable")
    chosen = np.sort(
        by_length[np.linspace(0, len(by_length) - 1, min(n, len(by_length))).astype(int)]
    )
    return some_examples(table, chosen)


def compare(args, table, model_name, dtype):
    """Median tokens a second of each method at one dtype, and what the matrix products alone would
    allow."""
    many, few = sample(table, args.examples), sample(table, args.slow_examples)
    n_shared = mark_shared_prefix(many)
    batch_tokens = extraction.BATCH_TOKENS[args.device.partition(":")[0]]
    cut, fast = (
        residual.ResidualModel(
            model_name, args.layer, device=args.device, dtype=dtype, exact_twin=exact
        )
        for exact in (True, False)
    )
    config = fast.stack.config
    methods = {
        **usual_methods(args, whole_model(args, model_name, dtype), few, sample(table, 16)),
        "one_at_a_time_cut": (
            few,
            lambda: [cut(ids[None])[args.layer][0].float().cpu().numpy() for ids in rows(few)],
        ),
        "sorted_batches_cut": (many, our_path(args, cut, many, 0, batch_tokens)),
        "and_cpu_kernels": (many, our_path(args, fast, many, 0, batch_tokens)),
        "ours": (many, our_path(args, fast, many, n_shared, batch_tokens)),
    }
    seconds, rates = {name: [] for name in methods}, {"torch_matmul": [], "packed": []}
    for round_number in range(args.rounds + 1):
        for name, (_, method) in methods.items():
            taken = timed(method, args.device)
            if round_number:  # the first warms up
                seconds[name].append(taken)
        for name, rate in gemm_rates(config, dtype, batch_tokens, args.device).items():
            rates[name].append(rate)
    speed = {name: len(methods[name][0].ids) / median(times) for name, times in seconds.items()}
    flops = flops_per_token(config) * args.layer
    # tokens a second that the products alone would allow
    limits = {name: median(found) / flops for name, found in rates.items()}
    limit = max(limits.values())
    # the share of the tokens that "ours" runs through the model
    computed = 1 - (n_shared * (len(many.lengths) - 1)) / len(many.ids)
    over = {
        f"ours_over_{name}": speed["ours"] / each for name, each in speed.items() if name != "ours"
    }
    return {
        "tokens_per_second": speed,
        "ratios": {
            **over,
            "ours_share_of_gemm_limit": speed["ours"] / limit,
            "ours_computed_share_of_gemm_limit": speed["ours"] * computed / limit,
            "ours_share_of_torch_matmul_limit": speed["ours"] / limits["torch_matmul"],
        },
        "gemm_limit_tokens_per_second": limit,
        "share_of_tokens_computed": computed,
        "gemm_gflops": {name: median(found) / 1e9 for name, found in rates.items()},
        "megaflops_per_token": flops / 1e6,
        "seconds": {name: [round(t, 4) for t in times] for name, times in seconds.items()},
    }


def whole_model(args, model_name, dtype):
    """The model with its head, as users load it."""
    import transformers

    located = sources.model_source(model_name)
    model = transformers.AutoModelForCausalLM.from_pretrained(located, dtype=dtype)
    return model.to(args.device).eval()


def usual_methods(args, model, few, sixteen):
    """{name: (TokenTable, function)} of the seeds' loop and of padded batches."""
    return {
        "seeds_loop": (few, lambda: [seeds_way(model, ids, args) for ids in rows(few)]),
        "padded_batches_of_16": (sixteen, lambda: padded_batches(model, sixteen, args)),
    }


def our_path(args, model, table, n_shared, batch_tokens):
    """A function that runs all examples as stage 1 does."""
    forward = extraction.Forward(
        model,
        table,
        n_shared=n_shared,
        batch_tokens=batch_tokens,
        storage_dtype="float16",
        dataset_name="d",
        pin=args.device != "cpu",
    )
    return lambda: forward.chunk(0, len(table.lengths), lambda n: None)


def errors(args, table):
    """Relative errors per token (norm of the difference over the norm) of the fast path against one
    at a time, in both dtypes."""
    n_shared, found, alone = mark_shared_prefix(table), {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        cut, fast = (
            residual.ResidualModel(
                MODEL, args.layer, device=args.device, dtype=dtype, exact_twin=exact
            )
            for exact in (True, False)
        )
        forward = extraction.Forward(
            fast,
            table,
            n_shared=n_shared,
            batch_tokens=1024,
            storage_dtype="float32",
            dataset_name="d",
        )
        found[dtype] = torch.from_numpy(
            forward.chunk(0, len(table.lengths), lambda n: None)[args.layer]
        )
        alone[dtype] = torch.cat(
            [cut(ids[None])[args.layer][0].float().cpu() for ids in rows(table)]
        )
    pairs = {
        "ours_float32_against_alone_float32": (found[torch.float32], alone[torch.float32]),
        "ours_bfloat16_against_alone_bfloat16": (found[torch.bfloat16], alone[torch.bfloat16]),
        "ours_bfloat16_against_alone_float32": (found[torch.bfloat16], alone[torch.float32]),
        "alone_bfloat16_against_alone_float32": (alone[torch.bfloat16], alone[torch.float32]),
    }
    relative = {name: ((a - b).norm(dim=1) / b.norm(dim=1)) for name, (a, b) in pairs.items()}
    return {
        name: {"median": float(r.median()), "p99": float(r.quantile(0.99)), "max": float(r.max())}
        for name, r in relative.items()
    }


def rows(table):
    return [
        torch.from_numpy(ids.astype(np.int64))
        for ids in np.split(table.ids, np.cumsum(table.lengths)[:-1])
    ]


def seeds_way(model, ids, args):
    """The seeds' way: one text, the whole model, all hidden states, of which one is kept."""
    with torch.no_grad():
        ids = ids[None].to(args.device)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return out.hidden_states[args.layer][0].float().cpu().numpy()


def padded_batches(model, table, args):
    """What most users write: batches of 16 in the order of the data, padded, with an attention
    mask, the whole model."""
    texts = rows(table)
    for start in range(0, len(texts), 16):
        batch = texts[start : start + 16]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(t) for t in batch], batch_first=True
        )
        with torch.no_grad():
            out = model(
                input_ids=ids.to(args.device),
                attention_mask=mask.to(args.device),
                output_hidden_states=True,
            )
        hidden = out.hidden_states[args.layer]
        [h[: len(t)].float().cpu().numpy() for h, t in zip(hidden, batch)]


def timed(call, device):
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def shapes(config):
    """(in, out) of each matrix of a block."""
    d, h = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return [(d, q), (d, kv), (d, kv), (q, d), (d, h), (d, h), (h, d)]


def flops_per_token(config):
    return sum(2 * a * b for a, b in shapes(config))


def gemm_rates(config, dtype, n_tokens, device):
    """FLOP/s of a block's own matrix products on `n_tokens` rows, by torch's matmul and (CPU) by
    oneDNN with packed weights."""
    inputs = {
        a: torch.randn(n_tokens, a, device=device, dtype=dtype)
        for a in {a for a, _ in shapes(config)}
    }
    weights = [
        (inputs[a], torch.randn(b, a, device=device, dtype=dtype)) for a, b in shapes(config)
    ]
    ways = {"torch_matmul": [lambda x=x, w=w: torch.nn.functional.linear(x, w) for x, w in weights]}
    if device == "cpu":
        from fastsae.lm import cpu_kernels

        packed = [(x, cpu_kernels.packed(w)) for x, w in weights]
        ways["packed"] = [lambda x=x, w=w: cpu_kernels.product(x, w) for x, w in packed]
    rates = {}
    with torch.inference_mode():
        for name, calls in ways.items():
            [call() for call in calls]
            times = [
                timed(lambda calls=calls: [call() for call in calls], device) for _ in range(5)
            ]
            rates[name] = flops_per_token(config) * n_tokens / median(times)
    return rates


def tokenise_speed(path, tokenizer):
    started = time.perf_counter()
    return len(tokenise(stream_examples(path), tokenizer).ids) / (time.perf_counter() - started)


def memory(path):
    """Peak resident memory of stage 1 in MB, layer 1 (the data's part does not depend on the
    layer), for the file and for ten of it."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(path).read_text(encoding="utf-8")
        for times in (1, 10):
            data = Path(folder) / f"times{times}.jsonl"
            data.write_text(
                (text if text.endswith("\n") else text + "\n") * times, encoding="utf-8"
            )
            code = (
                "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
                "stdout=subprocess.DEVNULL); "
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
            )
            stage = [
                sys.executable,
                str(PROJECT / "extract_activations.py"),
                "--dataset-path",
                str(data),
                "--output-dir",
                f"{folder}/{times}",
                "--layer-idx",
                "1",
                "--device",
                "cpu",
            ]
            done = subprocess.run(
                [sys.executable, "-c", code, *stage], capture_output=True, text=True, check=True
            )
            peaks[f"dataset_x{times}"] = round(int(done.stdout.split()[-1]) / 1e3, 1)
    return peaks


if __name__ == "__main__":
    main()
