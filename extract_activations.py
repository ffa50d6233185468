"""Stage 1: run each example alone through the model and keep one layer's residual stream, or
several layers' (FAST, arXiv 2506.07691).

    python extract_activations.py --dataset-path my.jsonl --layer-idx 18
    torchrun --nproc-per-node 4 extract_activations.py --layer-idx 12,18 --dataset-path hf:a/b

Reads rows with `text`, `messages` or ShareGPT `conversations` in any of the formats of
docs/files.md. Writes `activations/activations_layer{L}.npz` (docs/files.md) and, beside it, a .json
with timings. Examples never see each other: a batch holds several, padded on the right, and
attention is causal. Work is kept in parts of about CHUNK_TOKENS tokens, so an interrupted run
continues. The result must fit on the disk once, and never into memory; of the dataset only token
ids are kept.
"""

from fastsae.runtime import early_stop, threads
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    threads.share_cores()
    startup.explain_slips()  # of config.py, which is imported below

import hashlib
from typing import Any, NamedTuple

import config
from fastsae.activations import compression, extraction, results, streaming
from fastsae.activations.work import Work, configuration_and_tokenizer, model_of
from fastsae.data import datasets, reading, tokenization
from fastsae.runtime import artifacts, progress, storage
from fastsae.runtime.errors import InputError
from fastsae.runtime.stage import end, run_stage

# fmt: off
# Main settings:
USE_CHAT_TEMPLATE: bool = True  # render each example with the model's own template; off: plain text
BATCH_TOKENS: int | None = None  # [1..] padded tokens per forward pass, halved when memory runs
                                 # out; none = 1024 on a CPU, 16384 on CUDA
DTYPE: str = "auto"              # {auto, float32, bfloat16, float16} of the model;
                                 # auto: bfloat16 on CUDA, else float32

# Data:
BLOCK_LENGTH: int | None = None  # [2..2147483647] join all examples and cut them into blocks of so
                                 # many tokens (the usual baseline; MAX_LENGTH then plays no part);
                                 # none = each example alone (FAST)
DEDUP_NGRAM: int = 0             # [0..1000] drop examples that share so many words in a row with
                                 # an earlier one (FAST: 20); 0 = keep all
STORAGE_DTYPE: str = "float16"   # {float16, float32, int8} of the file; int8: half of float16's
                                 # bytes, errors of 0.01 standard deviations
SAMPLE_FRACTION: float = 0.02    # [1e-6..0.9] with STREAM_BYTES: part of the examples that is kept
                                 # as activations_layer{L}.npz, for all but training
# fmt: on

# What decides a layer's activations, besides the layer, the dataset and the model.
DECISIVE = (
    "MAX_LENGTH", "MAX_EXAMPLES", "TEXT_FIELD", "USE_CHAT_TEMPLATE", "TEMPLATE_DATE", "DTYPE",
    "STORAGE_DTYPE", "PROCESSING", "DEDUP_NGRAM",
)  # fmt: skip


def main():
    settings = config.resolve(__file__)
    with extraction.World() as world:
        started = progress.start(quiet=settings.QUIET)
        settings.show()
        # after the settings: loading libraries takes seconds
        from fastsae.lm import names, sources

        if world.rank == 0:
            print(f"model: {names.described(settings.MODEL_NAME)}")
        world.use_own_cores()
        progress.step("checking the dataset and the model")
        dataset, dataset_path = datasets.identity(settings.DATASET_PATH)
        model_files = sources.held(settings.MODEL_NAME, settings.CACHE_DIR)
        named = (settings.MODEL_NAME, settings.MODEL_REVISION, settings.CACHE_DIR)
        inputs = {"dataset": dataset, "model": sources.identity(*named)}
        wanted = {
            layer: describe(settings, layer, inputs)
            for layer in settings.LAYERS or (settings.LAYER_IDX,)
        }
        missing = not_up_to_date(wanted, settings)
        streams = streaming.Streams(settings, wanted, world.rank) if settings.STREAM_BYTES else None
        if not missing and (streams is None or streams.need_nothing()):
            if world.rank == 0:
                extraction.clear_parts(parts_folder(settings, wanted), wanted)
                results.print_summary(settings, wanted, started, "unchanged")
            return
        storage.require_writable(results.path_of(settings, layer) for layer in missing)
        job = Job(settings, world, wanted, missing, (dataset_path, dataset), inputs, model_files)
        figures = make_files(job) if streams is None else make_stream(job, streams)
        if world.rank == 0:
            results.print_summary(settings, wanted, started, "written", **figures)


class Job(NamedTuple):
    """What one run of this stage is to do: `missing` of the layers `wanted` {layer: metadata}."""

    settings: config.Settings
    world: extraction.World
    wanted: dict
    missing: dict
    dataset: tuple[Any, str]  # (path, sha256)
    inputs: dict
    model_files: Any  # as they were when their content was looked at


def make_files(job):
    """Make the files of the missing layers; returns figures for the summary."""
    settings, missing = job.settings, job.missing
    # parts of an interrupted run hold all of its layers
    computed = job.wanted if parts_folder(settings, job.wanted).exists() else missing
    model_config, tokenizer = configuration_and_tokenizer(settings, max(missing))
    path, sha256 = job.dataset
    table, counts = reading.read_tokens(settings, path, sha256, tokenizer)
    folder = parts_folder(settings, computed)
    of_layer = compression.bytes_of(
        len(table.ids), model_config.hidden_size, settings.STORAGE_DTYPE
    )
    extraction.require_disk_space(settings.activations_path, of_layer * len(missing), folder)
    return write_files(job, load_model(job, computed), table, counts, folder)


def make_stream(job, streams):
    """Make the samples of the missing layers, then the parts of all layers, as the budget has room
    for them; returns figures for the summary."""
    settings, wanted = job.settings, job.wanted
    model_config, tokenizer = configuration_and_tokenizer(settings, max(wanted))
    path, sha256 = job.dataset
    with storage.scratch_folder(settings.activations_path.parent) as scratch:
        spool, counts = reading.spool_tokens(settings, path, sha256, tokenizer, scratch)
        table = streams.plan(spool, model_config.hidden_size)
        model = load_model(job, wanted)
        counts["stream"] = streams.about()
        if job.missing:
            folder = parts_folder(settings, wanted)
            write_files(job, model, table, counts, folder, streams.sample_dtype)
        for about in wanted.values():
            results.complete(about, model, table, counts)
        n_made = streams.make_parts(
            model, wanted, job.world, lambda: require_same_model(settings, job.inputs)
        )
    return {"n_parts_made": n_made}


def write_files(job, model, table, counts, folder, storage_dtype=None):
    """Run the model over the examples of `table` and write the files of the missing layers;
    `folder` is of the unfinished run, storage_dtype of the files if not STORAGE_DTYPE. Returns
    figures for the summary."""
    settings, world = job.settings, job.world
    for about in job.missing.values():
        results.complete(about, model, table, counts)
    n_shared = counts["n_shared_prefix"]
    work = Work(
        model, table, job.missing,
        n_shared=n_shared, settings=settings, folder=folder, storage_dtype=storage_dtype,
    )  # fmt: skip
    if world.rank == 0:
        extraction.name_parts(folder, job.missing)
    work.run_model(world)
    # weights are mapped from their file until they are used
    require_same_model(settings, job.inputs, folder)
    if world.rank:
        return {}
    timing = work.write(world)
    extraction.clear_parts(folder, job.wanted)
    return {"tokens_per_second": timing["tokens_per_second"]}


def describe(settings, layer, inputs):
    """The metadata of one layer's file before anything is computed: it does not depend on which
    other layers are asked for."""
    recorded = settings.replace(TEMPLATE_DATE=tokenization.TEMPLATE_DATE)
    decisive = {"LAYER_IDX": layer, **recorded.select(DECISIVE)}
    if settings.HOOK != "resid_post":
        decisive["HOOK"] = settings.HOOK
    if settings.PROCESSING == "block":
        decisive["BLOCK_LENGTH"] = settings.BLOCK_LENGTH
        del decisive["MAX_LENGTH"]
        if reading.DIALOGUES_IN_BLOCKS != "joined":
            decisive["DIALOGUES_IN_BLOCKS"] = reading.DIALOGUES_IN_BLOCKS
    if settings.STREAM_BYTES:
        decisive.update(settings.select(streaming.DECISIVE))
    return artifacts.new_metadata(
        "activations",
        decisive,
        inputs,
        model_name=settings.MODEL_NAME,
        model_revision=settings.MODEL_REVISION,
        dataset_path=settings.DATASET_PATH,
    )


def not_up_to_date(wanted, settings):
    """Those of the layers {layer: metadata} that are to be made; this run claims all of them."""
    for layer in sorted(wanted):
        storage.claim(results.path_of(settings, layer), "--output-dir")
    return {
        layer: about
        for layer, about in wanted.items()
        if not results.up_to_date(results.path_of(settings, layer), about)
    }


def parts_folder(settings, by_layer):
    """Where the parts of an unfinished run lie that computes these layers, {layer: metadata}."""
    content = hashlib.sha256(
        "".join(about["fingerprint"] for about in by_layer.values()).encode()
    ).hexdigest()[:16]
    return settings.activations_path.parent / f".parts-{content}"


def load_model(job, layers):
    """The model up to the deepest of the layers; InputError if it is not the one that was looked
    at."""
    progress.step("loading the model")
    model = model_of(job.settings, layers)
    job.model_files.require_unchanged()
    require_same_model(job.settings, job.inputs)
    if job.world.rank == 0:
        for layer in layers:
            artifacts.write_settings(results.path_of(job.settings, layer), job.settings)
    return model


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


if __name__ == "__main__":
    end(run_stage(main))
