"""What stage 1 makes of the parts of a run: a file for each layer, or shards of it, and the figures
that are printed and kept beside it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.activations import compression, extraction, files
from fastsae.activations.assembly import Assembly
from fastsae.data.tokenization import CONTENT, SHARED_PREFIX, TokenTable
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime import artifacts, progress
from fastsae.settings.values import Settings

# a token whose norm is this many times the median counts as an attention sink in the summary
SINK_RATIO = 10


def path_of(settings: Settings, layer: int) -> Path:
    """The file of a layer's activations."""
    stem = HookPoint(layer, settings.HOOK).file_stem
    return settings.activations_path.with_name(f"{stem}.npz")


def up_to_date(path: Path, metadata: Mapping[str, Any]) -> bool:
    """True if the file, or all of its shards, is there, whole (every byte is checked) and made from
    the same."""
    shards = files.find_shards(path)
    return bool(shards) and artifacts.matches(
        shards[0], metadata, lambda _: artifacts.metadata_of(files.open_activations(path), path)
    )


def complete(
    about: dict[str, Any], model: Any, table: TokenTable, counts: Mapping[str, Any]
) -> None:
    """Add to the metadata of a file what is known once its examples and the model are there."""
    about.update(
        n_examples=len(table.lengths),
        n_tokens=len(table.ids),
        d_model=model.d_model,
        **counts,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.partition(":")[0],
        resolved_revision=model.revision,
        **model.where(about["settings"]["LAYER_IDX"]),
    )


def shards_of(
    table: TokenTable, d_model: int, storage_dtype: str, shard_bytes: int
) -> list[tuple[int, int]]:
    """[(first, last)] ranges of examples, one for each file of about `shard_bytes`."""
    row_bytes = d_model * np.dtype(storage_dtype).itemsize
    return extraction.split_shards(table.lengths, max(1, shard_bytes // row_bytes))


def write_layer(
    assembly: Assembly,
    parts: Sequence[Path],
    places: Sequence[tuple[int, int]],
    shards: Sequence[tuple[int, int]],
    table: TokenTable,
    metadata: Mapping[str, Any],
    *,
    n_processes: int,
    ordered: TokenTable | None = None,
    calibration: compression.Calibration | None = None,
) -> dict[str, Any]:
    """Complete one layer's file, or its shards, around the rows that are in place; then sum up.
    Returns the timing.

    parts: the notes of `extraction.extract_parts`, of the rows at `places` [(first, number)];
    shards: ranges of examples; metadata: of the file, its n_tokens and d_model included;
    ordered: `table` in the order in which examples went through the model, if that is another;
    calibration: of rows that are packed.
    """
    path = assembly.path
    layer = metadata["settings"]["LAYER_IDX"]
    name = f"crc32_{layer}"
    found = [artifacts.read_npz(part, [name], made_by=extraction.MAKER)[name] for part in parts]
    checksums = assembly.checksums(
        [(first, n, each.tolist()) for (first, n), each in zip(places, found, strict=True)]
    )
    starts = table.starts
    before = files.find_shards(path)
    timing = timing_of(parts, ordered or table, metadata, n_processes)
    # before the file that counts as done once it is there
    artifacts.write_json(path.with_suffix(".json"), timing)
    written = []
    for number, (first, last) in enumerate(shards):
        a, b = int(starts[first]), int(starts[last])
        about = {**metadata, "shard": number + 1, "n_shards": len(shards)}
        packed = {}
        if calibration is not None:
            rows = (
                (a, b) if assembly.moves is None else assembly.moves.rows_of_examples(first, last)
            )
            packed = compression.noted_members(parts, places, layer, calibration, rows)
        others = {
            **packed,
            "seq_lengths": table.lengths[first:last],
            "token_ids": table.ids[a:b],
            "token_kind": table.kind[a:b],
            "token_role": table.role[a:b],
            "example_ids": table.lines[first:last],
            "metadata": np.array(artifacts.to_json(about)),
        }
        written.append(assembly.finish(number, checksums[number], others))
    # of an earlier run with another number of shards
    artifacts.set_aside([old for old in before if old not in written])
    print_results(written, table, metadata, timing)
    return timing


def timing_of(
    parts: Sequence[Path], table: TokenTable, metadata: Mapping[str, Any], n_processes: int
) -> dict[str, Any]:
    """Speed, and the norms of one layer's tokens: attention sinks are few tokens with norms far
    above the median."""
    norms_name = f"norms_{metadata['settings']['LAYER_IDX']}"
    found = [
        artifacts.read_npz(part, ["seconds", norms_name], made_by=extraction.MAKER)
        for part in parts
    ]
    seconds = sum(float(part["seconds"]) for part in found) / n_processes
    norms = np.concatenate([part[norms_name] for part in found])  # (n_tokens,)
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


def print_results(
    written: Sequence[Path],
    table: TokenTable,
    metadata: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> None:
    """What one layer's files hold: examples, tokens, norms, speed."""
    kind, lengths = table.kind, table.lengths
    dropped = ""
    if metadata["n_duplicates"]:
        dropped = f", {metadata['n_duplicates']:,} duplicates dropped"
    left = f"; {metadata['n_left_over']} tokens left over" if "n_left_over" in metadata else ""
    print(
        f"{'blocks' if left else 'examples'}: {len(lengths):,}, tokens each: min {lengths.min()}, "
        f"max {lengths.max()}, mean {lengths.mean():.1f}; {metadata['n_truncated']} "
        f"truncated{dropped}{left}"
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
        f"({metadata['device']}, computed in {metadata['compute_dtype']})"
    )
    shards = f" and {len(written) - 1} more shards" if len(written) > 1 else ""
    print(f"wrote {written[0]}{shards} ({sum(p.stat().st_size for p in written) / 1e6:.1f} MB)")


def print_summary(
    settings: Settings, layers: Iterable[int], started: float, status: str, **more: Any
) -> None:
    """The summary line; it names the first layer's file."""
    layers = list(layers)
    path = path_of(settings, layers[0])
    about = files.read_metadata(path)
    progress.summary(
        "extract_activations",
        path,
        started,
        status=status,
        layers=layers,
        n_examples=about["n_examples"],
        n_tokens=about["n_tokens"],
        **more,
    )
