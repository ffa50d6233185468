"""Stage 1 with a budget: the sample is an ordinary activations file, all other examples are parts
of a stream that stage 2 deletes."""

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastsae.activations import compression, extraction, files, producer, results
from fastsae.activations.compression import bytes_of, computed_dtype
from fastsae.activations.stream import (
    POLL,
    Stream,
    folder_of,
    part_tokens,
    require_budget,
    split_parts,
)
from fastsae.data.token_spool import TokenSpool
from fastsae.data.tokenization import TokenTable
from fastsae.runtime import ranks, stage, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.settings.values import Settings

# of stage 1's settings those that decide the parts, and which examples are in them
DECISIVE = ("SAMPLE_FRACTION", "BUFFER_TOKENS", "MAX_TRAIN_TOKENS", "SEED")
MIN_SAMPLE = 10  # examples: validation and test are parts of them


class Streams:
    """The streams of the layers of one run, {layer: Stream}, and what is to be made of them.

    wanted: {layer: metadata} of the samples. Refuses parts of another run that were not trained on
    to their end.
    """

    def __init__(self, settings: Settings, wanted: Mapping[int, Mapping[str, Any]], rank: int):
        self.settings, self.rank = settings, rank
        self.by_layer = {
            layer: Stream(folder_of(results.path_of(settings, layer))) for layer in wanted
        }
        self.fingerprints = {layer: about["fingerprint"] for layer, about in wanted.items()}
        self.run = stage.pipeline()
        for layer, stream in self.by_layer.items():
            if rank == 0:
                stream.require_own_parts(self.fingerprints[layer])
                for name in ("part-*", "stream.*"):
                    storage.sweep(stream.folder, name)
            if stream.read() and stream.about["fingerprint"] != self.fingerprints[layer]:
                stream.about = {}

    def need_nothing(self) -> bool:
        """Whether all parts were made and trained on, and stage 2 of this pipeline needs none of
        them again. The samples must be up to date."""
        if not all(s.sizes and s.next_part() is None for s in self.by_layer.values()):
            return False
        if self.run is None or self.rank:
            return True
        for stream in self.by_layer.values():
            self._announce(stream, {**stream.about})
        while any(stream.answered(self.run) is None for stream in self.by_layer.values()):
            time.sleep(POLL)
        return all(stream.next_part() is None for stream in self.by_layer.values())

    def plan(self, spool: TokenSpool, d_model: int) -> TokenTable:
        """Decide which examples are the sample, whose table is returned, and which parts the others
        make. InputError if the budget is too small or the sample too few examples;
        EnvironmentFailure if the disk has no room for both."""
        settings = self.settings
        self.spool = spool
        in_sample = spool.chosen(settings.SAMPLE_FRACTION, settings.SEED)  # (n_examples,)
        sample, others = np.flatnonzero(in_sample), np.flatnonzero(~in_sample)
        least = min(MIN_SAMPLE, len(spool.lengths) // 2)
        if len(sample) < least or not len(others):
            raise InputError(
                f"SAMPLE_FRACTION: {settings.SAMPLE_FRACTION:g} of {len(spool.lengths):,} examples "
                f"is a sample of {len(sample)}, and validation and test are parts of it. raise "
                "--sample-fraction, or leave --stream-bytes out for so few examples."
            )
        self.parts = split_parts(spool.lengths, others, part_tokens(settings.BUFFER_TOKENS))
        self.n_tokens = [int(spool.lengths[part].sum()) for part in self.parts]
        self.sizes = producer.sizes_of(spool, self.parts, d_model, settings.STORAGE_DTYPE)
        self.budget = settings.STREAM_BYTES // len(self.by_layer)
        require_budget(self.budget, self.sizes)
        n_sample = int(spool.lengths[sample].sum())
        self._require_disk_space(bytes_of(n_sample, d_model, self.sample_dtype))
        return spool.table(sample)

    def about(self) -> dict[str, Any]:
        """What the metadata of the sample and the parts say of the stream."""
        return {
            "n_parts": len(self.parts),
            "n_tokens": sum(self.n_tokens),
            "n_examples": sum(map(len, self.parts)),
        }

    def make_parts(
        self,
        model: Any,
        layers: Mapping[int, Mapping[str, Any]],
        world: extraction.World,
        require_same: Callable[[], object],
    ) -> int:
        """Announce the parts and make them, as the budget has room; returns how many were made.

        layers: {layer: metadata} of the parts. require_same: raises if the model has changed.
        """
        settings, kind = self.settings, model.device.partition(":")[0]
        for layer, stream in self.by_layer.items():
            about = {
                "fingerprint": self.fingerprints[layer],
                "budget": self.budget,
                "sizes": self.sizes,
                "n_tokens": self.n_tokens,
                "device": kind,
            }
            if self.rank == 0:
                self._announce(stream, about)
            else:
                stream.about = about
        make = producer.part_maker(
            model,
            self.spool,
            self.parts,
            layers,
            batch_tokens=settings.BATCH_TOKENS or extraction.BATCH_TOKENS[kind],
            storage_dtype=settings.STORAGE_DTYPE,
            calibrations=self._calibrations(),
            dataset_name=settings.DATASET_PATH,
            pin=kind == "cuda",
            require_same=require_same,
        )
        return producer.write_parts(self.by_layer, self.n_tokens, make, world, self.run)

    @property
    def sample_dtype(self) -> str:
        """The type of the sample's file: figures are of the tokens as they were computed."""
        return computed_dtype(self.settings.STORAGE_DTYPE)

    def _calibrations(self):
        """{layer: Calibration} by the samples, where parts are packed: they are the same for all
        processes and after any kill. They may still be on their way from rank 0."""
        if self.settings.STORAGE_DTYPE != "int8":
            return {}
        found, waiting = {}, ranks.Waiting()
        for layer, fingerprint in self.fingerprints.items():
            path = results.path_of(self.settings, layer)
            while self.rank and not files.is_there(path, fingerprint):
                waiting.say(ranks.listed([0]), "to write the sample")
                time.sleep(POLL)
            data = files.open_activations(path)
            rows = data["activations"][: compression.SAMPLE_ROWS]
            found[layer] = compression.calibrate(rows, data["token_kind"])
        return found

    def _announce(self, stream, about):
        stream.announce({**about, "run": self.run})

    def _require_disk_space(self, sample_bytes):
        folder = next(iter(self.by_layer.values())).folder
        storage.make_folder(folder)
        there = sum(stream.on_disk() for stream in self.by_layer.values())
        parts = min(self.budget, sum(self.sizes)) * len(self.by_layer) - there
        needed = max(0, parts) + sample_bytes * len(self.by_layer)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EnvironmentFailure(
                f"{folder}: {needed / 1e9:.2f} GB are needed for STREAM_BYTES and the sample, and "
                f"{free / 1e9:.2f} GB are free. free some space, lower --stream-bytes, or choose "
                "another --output-dir."
            )
