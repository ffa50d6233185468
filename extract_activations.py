"""Stage 1: run each example alone through the model and keep one layer's residual stream, or
several layers' (FAST, arXiv 2506.07691).

    python extract_activations.py --dataset-path my.jsonl --layer-idx 18
    torchrun --nproc-per-node 4 extract_activations.py --layers 12,18 --dataset-path hf:owner/name

Reads rows with `text`, `messages` or ShareGPT `conversations` (for PROCESSING = "block" also a
plain .txt). Writes `activations/activations_layer{L}.npz` (docs/files.md) and, beside it, a .json
with timings. Examples never see each other: a batch holds several, padded on the right, and
attention is causal. Work is kept in parts of about CHUNK_TOKENS tokens, so an interrupted run
continues. The result must fit on the disk twice, and never into memory; of the dataset only token
ids are kept.
"""

from fastsae.runtime import early_stop
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    startup.explain_slips()  # of config.py, which is imported below

import hashlib

import numpy as np

import config
from fastsae.activations import extraction, files
from fastsae.data.datasets import Deduplicator, identity, require_two, stream_examples, stream_text
from fastsae.data.tokenization import (
    CONTENT,
    SHARED_PREFIX,
    ChatTokenizer,
    cut_blocks,
    mark_shared_prefix,
    tokenise,
)
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime import artifacts, progress, storage
from fastsae.runtime.errors import InputError
from fastsae.runtime.stage import end, run_stage

# fmt: off
# Main settings:
USE_CHAT_TEMPLATE: bool = True  # render each example with the model's own template; off: plain text
PROCESSING: str = "example"     # {example, block} example: each alone (FAST); block: all joined and
                                # cut into equal blocks (the usual baseline)
LAYERS: tuple[int, ...] | None = None  # [1..] several layers in one pass, a file each, at the cost
                                       # of the deepest; none = LAYER_IDX
BATCH_TOKENS: int | None = None  # [1..] padded tokens per forward pass, halved when memory runs
                                 # out; none = 1024 on a CPU, 16384 on CUDA
DTYPE: str = "auto"              # {auto, float32, bfloat16, float16} of the model;
                                 # auto: bfloat16 on CUDA, else float32

# Data:
BLOCK_LENGTH: int = 2048         # [2..2147483647] tokens per block, when PROCESSING is block;
                                 # MAX_LENGTH then plays no part
DEDUP_NGRAM: int = 0             # [0..1000] drop examples that share so many words in a row with
                                 # an earlier one (FAST: 20); 0 = keep all
STORAGE_DTYPE: str = "float16"   # {float16, float32} of the file

# Constants:
TEMPLATE_DATE: str = "26 Jul 2024"  # date for templates that print today's, pinned so that runs
                                    # repeat
CHUNK_TOKENS: int = 65536           # [1..] tokens per part of an unfinished run, the most that an
                                    # interruption loses
SHARD_BYTES: int = 16_000_000_000   # [1..] larger results are written as numbered shards of about
                                    # this size
# fmt: on

DECISIVE = (
    "MAX_LENGTH",
    "MAX_EXAMPLES",
    "TEXT_FIELD",
    "USE_CHAT_TEMPLATE",
    "TEMPLATE_DATE",
    "DTYPE",
    "STORAGE_DTYPE",
    "PROCESSING",
    "DEDUP_NGRAM",
)
# a token whose norm is this many times the median counts as an attention sink in the summary
SINK_RATIO = 10


def main():
    settings = config.resolve(__file__)
    with extraction.World() as world:
        started = progress.start(quiet=settings.QUIET)
        settings.show()
        # after the settings: loading libraries takes seconds
        from fastsae.lm import devices, loading, names, residual, sources

        if world.rank == 0:
            print(f"model: {names.described(settings.MODEL_NAME)}")
        world.use_own_cores()
        progress.step("checking the dataset and the model")
        dataset, dataset_path = identity(settings.DATASET_PATH)
        model_files = sources.held(settings.MODEL_NAME, settings.CACHE_DIR)
        inputs = {
            "dataset": dataset,
            "model": sources.identity(
                settings.MODEL_NAME, settings.MODEL_REVISION, settings.CACHE_DIR
            ),
        }
        wanted = {
            layer: describe(settings, layer, inputs)
            for layer in settings.LAYERS or (settings.LAYER_IDX,)
        }
        for layer in sorted(wanted):
            storage.claim(path_of(settings, layer), "--output-dir")
        missing = {
            layer: about
            for layer, about in wanted.items()
            if not up_to_date(path_of(settings, layer), about)
        }
        if not missing:
            if world.rank == 0:
                extraction.clear_parts(parts_folder(settings, wanted), wanted)
                print_summary(settings, wanted, started, "unchanged")
            return
        storage.require_writable(path_of(settings, layer) for layer in missing)
        # parts of an interrupted run hold all of its layers
        computed = wanted if parts_folder(settings, wanted).exists() else missing

        source = {"revision": settings.MODEL_REVISION, "cache_dir": settings.CACHE_DIR}
        model_config = loading.load_config(settings.MODEL_NAME, **source)
        loading.check_layer(model_config, max(missing), settings.MODEL_NAME)
        table, counts = read_tokens(
            settings, dataset_path, dataset, loading.load_tokenizer(settings.MODEL_NAME, **source)
        )
        n_shared = 0 if settings.PROCESSING == "block" else mark_shared_prefix(table)
        n_values = len(table.ids) * model_config.hidden_size * len(computed)
        extraction.require_disk_space(settings.activations_path, n_values, settings.STORAGE_DTYPE)

        progress.step("loading the model")
        device = devices.choose_device(settings.DEVICE)
        model = residual.ResidualModel(
            settings.MODEL_NAME,
            computed,
            device=device,
            dtype=devices.choose_dtype(settings.DTYPE, device),
            **source,
        )
        model_files.require_unchanged()
        require_same_model(settings, inputs)
        for about in missing.values():
            about.update(
                n_examples=len(table.lengths),
                n_tokens=len(table.ids),
                d_model=model.d_model,
                n_shared_prefix=n_shared,
                **counts,
                compute_dtype=str(model.dtype).removeprefix("torch."),
                device=device.partition(":")[0],
                resolved_revision=model.revision,
            )
        parts = run_model(model, table, n_shared, settings, world, computed)
        # weights are mapped from their file until they are used
        require_same_model(settings, inputs, parts[0].parent)
        if world.rank == 0:
            for layer, about in missing.items():
                progress.step(f"writing {path_of(settings, layer).name}")
                timing = write_layer(
                    path_of(settings, layer), parts, table, about, settings, world.size
                )
            extraction.clear_parts(parts[0].parent, wanted)
            print_summary(
                settings, wanted, started, "written", tokens_per_second=timing["tokens_per_second"]
            )


def require_same_model(settings, inputs, parts=None):
    """InputError if the model is no longer the one whose fingerprint the results will have; `parts`
    made with it go."""
    from fastsae.lm.sources import require_same

    try:
        require_same(
            settings.MODEL_NAME,
            settings.MODEL_REVISION,
            settings.CACHE_DIR,
            inputs["model"],
            "it was changed while this run read it. run again",
        )
    except InputError:
        if parts is not None:
            storage.remove(parts)
        raise


def print_summary(settings, layers, started, status, **more):
    """The summary line; it names the first layer's file."""
    path = path_of(settings, next(iter(layers)))
    about = files.read_metadata(path)
    progress.summary(
        "extract_activations",
        path,
        started,
        status=status,
        layers=list(layers),
        n_examples=about["n_examples"],
        n_tokens=about["n_tokens"],
        **more,
    )


def path_of(settings, layer):
    return settings.activations_path.with_name(f"{HookPoint(layer).file_stem}.npz")


def describe(settings, layer, inputs):
    """The metadata of one layer's file before anything is computed: it does not depend on which
    other layers are asked for."""
    decisive = {"LAYER_IDX": layer, **settings.select(DECISIVE)}
    if settings.PROCESSING == "block":
        decisive["BLOCK_LENGTH"] = settings.BLOCK_LENGTH
        del decisive["MAX_LENGTH"]
    return artifacts.new_metadata(
        "activations",
        decisive,
        inputs,
        model_name=settings.MODEL_NAME,
        model_revision=settings.MODEL_REVISION,
        dataset_path=settings.DATASET_PATH,
    )


def parts_folder(settings, by_layer):
    """Where the parts of an unfinished run lie that computes these layers, {layer: metadata}."""
    content = hashlib.sha256(
        "".join(about["fingerprint"] for about in by_layer.values()).encode()
    ).hexdigest()[:16]
    return settings.activations_path.parent / f".parts-{content}"


def up_to_date(path, metadata):
    """True if the file, or all of its shards, is there, whole (every byte is checked) and made from
    the same."""
    shards = files.find_shards(path)
    return bool(shards) and artifacts.matches(
        shards[0], metadata, lambda _: artifacts.metadata_of(files.open_activations(path), path)
    )


def read_tokens(settings, dataset_path, sha256, tokenizer):
    """(TokenTable of the dataset, what was counted on the way). Texts pass through and are not
    kept."""
    is_text, in_blocks = settings.DATASET_PATH.endswith(".txt"), settings.PROCESSING == "block"
    tokenizer = ChatTokenizer(
        tokenizer,
        max_length=None if in_blocks else settings.MAX_LENGTH,
        date=settings.TEMPLATE_DATE,
        chat_template=settings.USE_CHAT_TEMPLATE and not is_text,
        dataset_name=settings.DATASET_PATH,
        special_tokens=not is_text,
    )
    if is_text:
        examples = stream_text(dataset_path, sha256)
    else:
        examples = labelled(
            settings,
            stream_examples(
                dataset_path,
                text_field=settings.TEXT_FIELD,
                label_field=settings.LABEL_FIELD,
                max_examples=settings.MAX_EXAMPLES,
                sha256=sha256,
            ),
        )
    duplicates = Deduplicator(settings.DEDUP_NGRAM) if settings.DEDUP_NGRAM else None
    examples = progress.counted(examples, "tokenising", "text" if is_text else "example")
    table = tokenise(filter(duplicates.is_new, examples) if duplicates else examples, tokenizer)
    if table.n_truncated and not (table.kind == CONTENT).any():
        only = (
            "the chat template" if tokenizer.chat_template else "what the tokenizer puts before it"
        )
        raise InputError(
            f"MAX_LENGTH: {settings.MAX_LENGTH} tokens hold no text, only {only}. raise it."
        )
    counts = {
        "n_truncated": table.n_truncated,
        "n_control_strings": table.n_control_strings,
        "n_duplicates": duplicates.n_dropped if duplicates else 0,
    }
    if in_blocks:
        n_tokens = len(table.ids)
        table, counts["n_left_over"] = cut_blocks(table, settings.BLOCK_LENGTH)
        if len(table.lengths) < 2:
            raise InputError(
                f"BLOCK_LENGTH: {n_tokens} tokens make {len(table.lengths)} blocks of "
                f"{settings.BLOCK_LENGTH}; at least 2 are "
                "needed. lower --block-length, or give more data."
            )
    require_two(len(table.lengths), settings.DATASET_PATH)
    return table, counts


def labelled(settings, examples):
    """Pass the examples on. A LABEL_FIELD that was chosen and that none of them has is said now
    rather than after training."""
    found = settings.LABEL_FIELD is None or settings.source["LABEL_FIELD"].startswith("preset")
    for example in examples:
        found = found or example.label is not None
        yield example
    if not found:
        raise InputError(
            f"LABEL_FIELD: no row of {settings.DATASET_PATH} has {settings.LABEL_FIELD}. name "
            "another field, or set "
            "--label-field none."
        )


def run_model(model, table, n_shared, settings, world, by_layer):
    """The part files with the activations of all examples, in order, at the layers of `by_layer`
    {layer: metadata}."""
    kind = model.device.partition(":")[0]
    batch_tokens = settings.BATCH_TOKENS or extraction.BATCH_TOKENS[kind]
    chunk_tokens = extraction.chunk_tokens_for(
        settings.CHUNK_TOKENS, model.d_model, len(by_layer), settings.STORAGE_DTYPE
    )
    chunks = extraction.split_chunks(table.lengths, chunk_tokens)
    forward = extraction.Forward(
        model,
        table,
        n_shared=n_shared,
        batch_tokens=batch_tokens,
        storage_dtype=settings.STORAGE_DTYPE,
        dataset_name=settings.DATASET_PATH,
        pin=kind == "cuda",
    )
    # What an interrupted run was doing decides whether its parts may be used: batches change the
    # last bits.
    plan = hashlib.sha256(
        repr((batch_tokens, chunks, str(model.dtype), kind, forward.n_prefix)).encode()
    ).hexdigest()[:8]
    folder = parts_folder(settings, by_layer)
    if world.rank == 0:
        extraction.name_parts(folder, by_layer)
    return extraction.extract_parts(forward, chunks, folder, plan, world)


def write_layer(path, parts, table, metadata, settings, n_processes):
    """Stream one layer's parts into its file, or into shards, in the order of the dataset; then sum
    up. Returns the timing."""
    layer, starts = metadata["settings"]["LAYER_IDX"], table.starts
    shard_tokens = max(
        1, settings.SHARD_BYTES // (metadata["d_model"] * np.dtype(settings.STORAGE_DTYPE).itemsize)
    )
    shards = extraction.split_shards(table.lengths, shard_tokens)
    rows = extraction.RowStream(parts, f"activations_{layer}")
    before = files.find_shards(path)
    timing = timing_of(parts, table, metadata, n_processes)
    # before the file that counts as done once it is there
    artifacts.write_json(path.with_suffix(".json"), timing)
    written = []
    for number, (first, last) in enumerate(shards, 1):
        a, b = int(starts[first]), int(starts[last])
        target = files.shard_path(path, number, len(shards))
        artifacts.write_npz(
            target,
            {
                "activations": (
                    (b - a, metadata["d_model"]),
                    settings.STORAGE_DTYPE,
                    rows.take(b - a),
                ),
                "seq_lengths": table.lengths[first:last],
                "token_ids": table.ids[a:b],
                "token_kind": table.kind[a:b],
                "token_role": table.role[a:b],
                "example_ids": table.lines[first:last],
                "metadata": np.array(
                    artifacts.to_json({**metadata, "shard": number, "n_shards": len(shards)})
                ),
            },
            keep_old=True,
        )
        written.append(target)
    # of an earlier run with another number of shards
    artifacts.set_aside([old for old in before if old not in written])
    print_results(written, table, metadata, timing)
    return timing


def timing_of(parts, table, metadata, n_processes):
    """Speed, and the norms of one layer's tokens: attention sinks are few tokens with norms far
    above the median."""
    norms_name = f"norms_{metadata['settings']['LAYER_IDX']}"
    found = [
        artifacts.read_npz(part, ["seconds", norms_name], made_by=extraction.MAKER)
        for part in parts
    ]
    seconds, norms = (
        sum(float(part["seconds"]) for part in found) / n_processes,
        np.concatenate([part[norms_name] for part in found]),
    )
    own = table.kind != SHARED_PREFIX  # (n_tokens,)
    median = float(np.median(norms[own]))
    sinks = norms > SINK_RATIO * median
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(metadata["n_tokens"] / seconds, 1),
        "device": metadata["device"],
        "compute_dtype": metadata["compute_dtype"],
        "n_processes": n_processes,
        "median_norm": median,
        "max_norm": float(norms.max()),
        "n_sinks": int(sinks.sum()),
        "n_sinks_outside_prefix": int((sinks & own).sum()),
    }


def print_results(written, table, metadata, timing):
    kind, lengths = table.kind, table.lengths
    dropped = (
        f", {metadata['n_duplicates']:,} duplicates dropped" if metadata["n_duplicates"] else ""
    )
    left = f"; {metadata['n_left_over']} tokens left over" if "n_left_over" in metadata else ""
    print(
        f"{'blocks' if left else 'examples'}: {len(lengths):,}, tokens each: min {lengths.min()}, "
        f"max {lengths.max()}, mean "
        f"{lengths.mean():.1f}; {metadata['n_truncated']} truncated{dropped}{left}"
    )
    print(
        f"tokens: {metadata['n_tokens']:,} x {metadata['d_model']}; "
        f"{int((kind == CONTENT).sum()):,} content, "
        f"{int((kind != CONTENT).sum()):,} of the chat template, of these "
        f"{int((kind == SHARED_PREFIX).sum()):,} in the prefix of "
        f"{metadata['n_shared_prefix']} that all examples share"
    )
    if metadata["n_control_strings"]:
        print(
            f"control strings inside the texts, kept as plain text: {metadata['n_control_strings']}"
        )
    print(
        f"norms: median {timing['median_norm']:.1f}, max {timing['max_norm']:.1f}; attention sinks "
        f"(over {SINK_RATIO}x the median): "
        f"{timing['n_sinks']:,}, {timing['n_sinks_outside_prefix']} outside the shared prefix"
    )
    print(
        f"forward passes: {timing['seconds']:.1f} s, {timing['tokens_per_second']:,.0f} tokens/s "
        f"({metadata['device']}, "
        f"computed in {metadata['compute_dtype']})"
    )
    shards = f" and {len(written) - 1} more shards" if len(written) > 1 else ""
    print(f"wrote {written[0]}{shards} ({sum(p.stat().st_size for p in written) / 1e6:.1f} MB)")


if __name__ == "__main__":
    end(run_stage(main))
