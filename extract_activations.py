"""Stage 1: run each example alone through the model and keep one layer's residual stream (FAST, arXiv 2506.07691).

    python extract_activations.py --dataset-path my.jsonl --layer-idx 18

Reads a JSONL file (or JSON array) of rows with `text`, `messages` or ShareGPT `conversations`. Writes
`activations/activations_layer{LAYER_IDX}.npz` (README, "Files") and, beside it, a .json with timings. Examples never see each
other: a batch holds several, padded on the right, and attention is causal. Work is kept in parts of about CHUNK_TOKENS tokens,
so an interrupted run continues. The result must fit on the disk, not in memory.
"""
import hashlib
import shutil
import sys
import time
from pathlib import Path

import numpy as np

import config
from fastsae import artifacts
from fastsae.errors import EnvironmentFailure, InputError, run_stage
from fastsae.examples import CONTENT, SHARED_PREFIX, ChatTokenizer, mark_shared_prefix, read_dataset

USE_CHAT_TEMPLATE: bool = True      # render each example with the model's own template; off: plain text
TEMPLATE_DATE: str = "26 Jul 2024"  # date for templates that print today's, pinned so that runs repeat
BATCH_TOKENS: int = 1024            # padded tokens per forward pass; raise it on a GPU, lower it when memory runs out
CHUNK_TOKENS: int = 65536           # tokens per part of an unfinished run, the most that an interruption loses
DTYPE: str = "auto"                 # of the model: auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16
STORAGE_DTYPE: str = "float16"      # of the file: float16 or float32

DECISIVE = ("LAYER_IDX", "MAX_LENGTH", "MAX_EXAMPLES", "TEXT_FIELD", "USE_CHAT_TEMPLATE", "TEMPLATE_DATE", "DTYPE", "STORAGE_DTYPE")
SINK_RATIO = 10  # a token whose norm is this many times the median counts as an attention sink in the summary


def main():
    settings = config.resolve(__file__)
    settings.show()
    from fastsae import language_model  # after the settings: loading libraries takes seconds

    examples = read_dataset(settings.DATASET_PATH, text_field=settings.TEXT_FIELD, label_field=settings.LABEL_FIELD,
                            max_examples=settings.MAX_EXAMPLES)
    metadata = artifacts.new_metadata(
        "activations", settings.select(DECISIVE),
        {"dataset": artifacts.file_sha256(settings.DATASET_PATH),
         "model": language_model.identity(settings.MODEL_NAME, settings.MODEL_REVISION)},
        model_name=settings.MODEL_NAME, model_revision=settings.MODEL_REVISION, dataset_path=settings.DATASET_PATH)
    path = settings.activations_path
    if artifacts.matches(path, metadata, artifacts.read_npz_metadata):
        return

    source = {"revision": settings.MODEL_REVISION, "cache_dir": settings.CACHE_DIR}
    model_config = language_model.load_config(settings.MODEL_NAME, **source)
    language_model.check_layer(model_config, settings.LAYER_IDX, settings.MODEL_NAME)
    tokenize = ChatTokenizer(language_model.load_tokenizer(settings.MODEL_NAME, **source), max_length=settings.MAX_LENGTH,
                             chat_template=settings.USE_CHAT_TEMPLATE, date=settings.TEMPLATE_DATE, dataset_name=settings.DATASET_PATH)
    tokens = tokenize(examples)
    n_shared = mark_shared_prefix(tokens)
    lengths = np.array([len(t.ids) for t in tokens], np.int32)  # (n_examples,)
    require_disk_space(path, lengths.sum() * model_config.hidden_size, settings.STORAGE_DTYPE)

    device = language_model.choose_device(settings.DEVICE)
    model = language_model.ResidualModel(settings.MODEL_NAME, settings.LAYER_IDX, device=device,
                                         dtype=language_model.choose_dtype(settings.DTYPE, device), **source)
    parts = extract_parts(model, tokens, examples, settings, path.parent / f".parts-{metadata['fingerprint'][:16]}")

    statistics = NormStatistics(np.concatenate([t.kind for t in tokens]))
    metadata.update(n_examples=len(tokens), n_tokens=int(lengths.sum()), d_model=model.d_model, n_shared_prefix=n_shared,
                    n_truncated=sum(t.truncated for t in tokens), n_control_strings=sum(t.n_control_strings for t in tokens),
                    compute_dtype=str(model.dtype).removeprefix("torch."), device=device, resolved_revision=model.revision)
    write_activations(path, parts, tokens, examples, metadata, settings.STORAGE_DTYPE, statistics)
    summarise(path, parts, lengths, metadata, statistics)
    shutil.rmtree(parts[0].parent)


def extract_parts(model, tokens, examples, settings, folder):
    """Forward every example and keep its activations in numbered part files under `folder`; returns their paths in order.

    A part that is there is complete (it was renamed into place), so a run that was stopped goes on after the last one.
    """
    import torch
    from tqdm import tqdm

    lengths = [len(t.ids) for t in tokens]
    chunks = split_chunks(lengths, settings.CHUNK_TOKENS)
    # What an interrupted run was doing decides whether its parts may be used: batches change the last bits.
    plan = hashlib.sha256(repr((settings.BATCH_TOKENS, chunks, str(model.dtype), model.device)).encode()).hexdigest()[:8]
    paths = [folder / f"part-{plan}-{i:05}.npz" for i in range(len(chunks))]
    with tqdm(total=sum(lengths), unit="token", unit_scale=True, desc="extracting", mininterval=1, disable=None) as bar:
        for part, (first, last) in zip(paths, chunks):
            if not part.exists():
                started = time.perf_counter()
                rows = np.empty((sum(lengths[first:last]), model.d_model), settings.STORAGE_DTYPE)  # (chunk tokens, d_model)
                starts = np.cumsum([0, *lengths[first:last]])
                for batch in split_batches(lengths[first:last], settings.BATCH_TOKENS):
                    ids = torch.zeros((len(batch), max(lengths[first + i] for i in batch)), dtype=torch.long)
                    for row, i in enumerate(batch):
                        ids[row, :lengths[first + i]] = torch.from_numpy(tokens[first + i].ids)
                    hidden = model(ids).float().cpu().numpy()  # (batch, longest, d_model)
                    for row, i in enumerate(batch):
                        real = hidden[row, :lengths[first + i]]
                        rows[starts[i]:starts[i + 1]] = storable(real, settings, examples[first + i])
                        bar.update(lengths[first + i])
                artifacts.write_npz(part, {"activations": rows, "seconds": np.float64(time.perf_counter() - started)})
            else:
                bar.update(sum(lengths[first:last]))
    return paths


def split_chunks(lengths, chunk_tokens):
    """[(first, last)] ranges of consecutive examples of about `chunk_tokens` tokens each."""
    chunks, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        total += length
        if total >= chunk_tokens or i == len(lengths) - 1:
            chunks.append((first, i + 1))
            first, total = i + 1, 0
    return chunks


def split_batches(lengths, batch_tokens):
    """Lists of example numbers, longest first, of at most `batch_tokens` padded tokens (a longer example goes alone)."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def storable(rows, settings, example):
    """The rows in the storage type; refuses to lose a number to overflow, or to store NaN."""
    largest = np.abs(rows).max()
    where = f"{settings.DATASET_PATH}:{example.line}"
    if not np.isfinite(largest):
        raise InputError(f"{where}: the model gives NaN or infinity here. set --dtype float32 or bfloat16.")
    if settings.STORAGE_DTYPE == "float16" and largest > 65504:
        raise InputError(f"{where}: an activation of {largest:.0f} does not fit into float16. set --storage-dtype float32.")
    return rows.astype(settings.STORAGE_DTYPE)


def require_disk_space(path, n_values, storage_dtype):
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = int(n_values) * np.dtype(storage_dtype).itemsize * 2 + (16 << 20)  # the parts, and the file made from them
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise EnvironmentFailure(f"{path.parent}: {needed / 1e9:.2f} GB are needed while this runs and {free / 1e9:.2f} GB are free. "
                                 "free some space, choose another --output-dir, or lower --max-examples.")


class NormStatistics:
    """Norms of tokens, gathered while rows stream by: attention sinks are few tokens with norms far above the median."""

    def __init__(self, kind):
        self.kind, self.norms = kind, []

    def add(self, rows):
        self.norms.append(np.linalg.norm(rows.astype(np.float32), axis=1))

    def result(self):
        norms = np.concatenate(self.norms)
        median = float(np.median(norms[self.kind != SHARED_PREFIX]))
        sinks = norms > SINK_RATIO * median
        return {"median_norm": median, "max_norm": float(norms.max()), "n_sinks": int(sinks.sum()),
                "n_sinks_outside_prefix": int((sinks & (self.kind != SHARED_PREFIX)).sum())}


def write_activations(path, parts, tokens, examples, metadata, storage_dtype, statistics):
    """Stream the parts into the final file, in the order of the dataset."""
    def rows():
        for part in parts:
            block = artifacts.read_npz(part, ["activations"], made_by="extract_activations.py")["activations"]
            statistics.add(block)
            yield block

    kind = statistics.kind
    artifacts.write_npz(path, {
        "activations": ((metadata["n_tokens"], metadata["d_model"]), storage_dtype, rows()),
        "seq_lengths": np.array([len(t.ids) for t in tokens], np.int32),
        "token_ids": np.concatenate([t.ids for t in tokens]),
        "token_kind": kind,
        "token_role": np.concatenate([t.role for t in tokens]),
        "example_ids": np.array([example.line for example in examples], np.int32),
        "metadata": np.array(artifacts.to_json(metadata)),
    }, keep_old=True)


def summarise(path, parts, lengths, metadata, statistics):
    seconds = sum(float(artifacts.read_npz(part, ["seconds"], made_by="extract_activations.py")["seconds"]) for part in parts)
    norms, kind = statistics.result(), statistics.kind
    timing = {"seconds": round(seconds, 3), "tokens_per_second": round(metadata["n_tokens"] / seconds, 1),
              "device": metadata["device"], "compute_dtype": metadata["compute_dtype"], **norms}
    artifacts.write_json(Path(path).with_suffix(".json"), timing)
    print(f"examples: {len(lengths):,}, tokens each: min {lengths.min()}, max {lengths.max()}, mean {lengths.mean():.1f}; "
          f"{metadata['n_truncated']} truncated")
    print(f"tokens: {metadata['n_tokens']:,} x {metadata['d_model']}; {int((kind == CONTENT).sum()):,} content, "
          f"{int((kind != CONTENT).sum()):,} of the chat template, of these {int((kind == SHARED_PREFIX).sum()):,} in the prefix of "
          f"{metadata['n_shared_prefix']} that all examples share")
    if metadata["n_control_strings"]:
        print(f"control strings inside the texts, kept as plain text: {metadata['n_control_strings']}")
    print(f"norms: median {norms['median_norm']:.1f}, max {norms['max_norm']:.1f}; attention sinks (over {SINK_RATIO}x the median): "
          f"{norms['n_sinks']:,}, {norms['n_sinks_outside_prefix']} outside the shared prefix")
    print(f"forward passes: {seconds:.1f} s, {timing['tokens_per_second']:,.0f} tokens/s ({metadata['device']}, {metadata['compute_dtype']})")
    print(f"wrote {path} ({Path(path).stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(run_stage(main))
