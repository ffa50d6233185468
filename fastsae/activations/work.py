"""The examples of a run through the model, chunk by chunk, into the files of its layers."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastsae.activations import compression, extraction, planning, results
from fastsae.activations.assembly import Assembly
from fastsae.data.tokenization import TokenTable
from fastsae.runtime import progress
from fastsae.settings.values import Settings


def configuration_and_tokenizer(settings: Settings, deepest: int) -> tuple[Any, Any]:
    """(configuration, tokenizer) of the model, which must have the deepest layer, and on DEVICE the
    room for its blocks up to there."""
    from fastsae.lm import devices, loading, memory

    source = {"revision": settings.MODEL_REVISION, "cache_dir": settings.CACHE_DIR}
    model_config = loading.load_config(settings.MODEL_NAME, **source)
    loading.check_layer(model_config, deepest, settings.MODEL_NAME)
    device = devices.choose_device(settings.DEVICE)
    dtype = devices.choose_dtype(settings.DTYPE, device)
    memory.require_memory(model_config, deepest, dtype, device=device, name=settings.MODEL_NAME)
    return model_config, loading.load_tokenizer(settings.MODEL_NAME, **source)


def model_of(settings: Settings, layers: Iterable[int]) -> Any:
    """The model up to the deepest of the layers, on DEVICE and in DTYPE."""
    from fastsae.lm import devices, residual

    device = devices.choose_device(settings.DEVICE)
    return residual.ResidualModel(
        settings.MODEL_NAME,
        layers,
        kind=settings.HOOK,
        device=device,
        dtype=devices.choose_dtype(settings.DTYPE, device),
        revision=settings.MODEL_REVISION,
        cache_dir=settings.CACHE_DIR,
    )


class Work:
    """How the examples of `table` are cut into chunks and files; `run_model` and `write` do it.

    layers: {layer: metadata} of the files that are made, n_tokens and d_model included; `folder`
    keeps what is unfinished. The settings are stage 1's; storage_dtype: of these files, if it is
    another than STORAGE_DTYPE.
    """

    def __init__(
        self,
        model: Any,
        table: TokenTable,
        layers: Mapping[int, Mapping[str, Any]],
        *,
        n_shared: int,
        settings: Settings,
        folder: Path,
        storage_dtype: str | None = None,
    ) -> None:
        self.table, self.layers, self.folder = table, layers, folder
        kind = model.device.partition(":")[0]
        batch_tokens = settings.BATCH_TOKENS or extraction.BATCH_TOKENS[kind]
        dtype = storage_dtype or settings.STORAGE_DTYPE
        computed = compression.computed_dtype(dtype)
        chunk_tokens = extraction.chunk_tokens_for(
            extraction.CHUNK_TOKENS, model.d_model, len(model.layers), computed
        )
        plan = planning.plan_by_chunks(table.lengths, chunk_tokens)
        if kind == "cuda":
            own = table.lengths - extraction.reused_prefix(table.lengths, n_shared, on_cuda=True)
            plan = planning.plan_by_length(own, batch_tokens, chunk_tokens)
        self.chunks = plan.chunks
        self.moves, self.ordered = None, table  # as examples go through the model
        if plan.order is not None:
            self.moves = planning.Moves(plan.order, table.lengths)
            self.ordered = planning.reordered(table, plan.order)
        self.shards = results.shards_of(table, model.d_model, dtype, extraction.SHARD_BYTES)
        self.forward = extraction.Forward(
            model,
            self.ordered,
            n_shared=n_shared,
            batch_tokens=batch_tokens,
            storage_dtype=computed,
            dataset_name=settings.DATASET_PATH,
            pin=kind == "cuda",
        )
        # What an interrupted run was doing decides whether its chunks may be used: batches change
        # the last bits, and shards the place of a row.
        n_prefix = self.forward.n_prefix
        decided_by = (batch_tokens, self.chunks, str(model.dtype), kind, n_prefix, self.shards)
        self.plan = hashlib.sha256(repr(decided_by).encode()).hexdigest()[:8]
        self.packing = compression.Packing(folder, self.plan) if dtype == "int8" else None
        starts = table.starts
        self.assemblies = {
            layer: Assembly(
                results.path_of(settings, layer),
                [0, *(int(starts[last]) for _, last in self.shards)],
                d_model=model.d_model,
                storage_dtype=dtype,
                folder=folder,
                plan=self.plan,
                fingerprint=about["fingerprint"],
                moves=self.moves,
            )
            for layer, about in layers.items()
        }

    def run_model(self, world: extraction.World) -> None:
        """Run the model over the chunks that are not in place yet."""
        self.parts = extraction.extract_parts(
            self.forward, self.chunks, self.folder, self.plan, world, self.assemblies, self.packing
        )

    def write(self, world: extraction.World) -> dict[str, Any]:
        """Complete the file of each layer; returns the last one's timing."""
        places = extraction.places_of(self.ordered, self.chunks)
        for layer, about in self.layers.items():
            assembly = self.assemblies[layer]
            progress.step(f"writing {assembly.path.name}")
            timing = results.write_layer(
                assembly, self.parts, places, self.shards, self.table, about,
                ordered=self.ordered,
                n_processes=world.size,
                calibration=self.packing.of(layer) if self.packing else None,
            )  # fmt: skip
        return timing
