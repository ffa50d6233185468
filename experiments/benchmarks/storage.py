"""Activations in 8 bits (STORAGE_DTYPE = "int8") beside float16: bytes, how far rows are off, and
what that does to autoencoders.

    python -m experiments.benchmarks.storage --work-dir /tmp/w                  # all of it
    python -m experiments.benchmarks.storage --work-dir /tmp/w --step extract   # or step by step

Steps: extract (the demo's examples, in float16), pack (the same rows in 8 bits, as stage 1 packs
them), train (each autoencoder from both files; some minutes, goes on after an interruption), write.
An autoencoder is measured twice on the test
examples: trained on float16 and given int8's rows, and trained on int8's rows; its reconstruction
is always compared with float16's rows. Several seeds say what a difference is worth. Writes
experiments/results/storage.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.shared.provenance import run_stage, write_result
from fastsae.activations.compression import SAMPLE_ROWS, PackedRows, calibrate, members_of, pack
from fastsae.data.token_masks import TEST, split_texts, text_numbers, token_norms, usable_tokens
from fastsae.runtime import artifacts
from fastsae.sae.autoencoder import decode, encode

STEPS = ("extract", "pack", "train", "write")
TYPES = ("float16", "int8")
# of each autoencoder its flags; the first is the demo's, the second eight times as wide as its rows
TRAININGS: dict[str, tuple[Any, ...]] = {
    "M = 256, K = 8": ("--m", 256, "--k", 8),
    "M = 4,608, K = 32": ("--m", 4608, "--k", 32),
}
BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, help="one step; without it all of them")
    parser.add_argument("--only", choices=TYPES, help="of step train: one type of file")
    parser.add_argument("--seeds", default="0,1", help="of the autoencoders")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of stage 1, as A=B")
    parser.add_argument("--epochs", help="of each of the trainings, at most, such as 100,8")
    parser.add_argument("--small", action="store_true", help="trainings of a test")
    parser.add_argument("--name", default="storage", help="of the result")
    args = parser.parse_args()
    args.trainings = {"M = 16, K = 2": ("--m", 16, "--k", 2)} if args.small else TRAININGS
    if args.epochs:
        each = zip(args.trainings.items(), args.epochs.split(","), strict=True)
        args.trainings = {name: (*flags, "--n-epochs", n) for (name, flags), n in each}
    for step in (args.step,) if args.step else STEPS:
        globals()[f"step_{step}"](args)


def step_extract(args: argparse.Namespace) -> None:
    """Stage 1 with float16."""
    flags = [f"--{flag}" for flag in args.flags]
    run_stage(
        "extract_activations.py", "--output-dir", args.work_dir / "float16", "--device", "cpu",
        *flags,
    )  # fmt: skip


def step_pack(args: argparse.Namespace) -> None:
    """A file of the same tokens in 8 bits."""
    path = activations_of(args.work_dir, "float16")
    members = artifacts.read_npz(path, made_by="this with --step extract")
    rows, about = members.pop("activations"), artifacts.metadata_of(members, path)
    decisive = {**about["settings"], "STORAGE_DTYPE": "int8"}
    again = artifacts.new_metadata(about["stage"], decisive, about["inputs"])
    calibration = calibrate(rows, members["token_kind"])
    members |= members_of(pack(rows, calibration), calibration)
    members["metadata"] = np.array(artifacts.to_json({**about, **again}))
    artifacts.write_npz(args.work_dir / "int8" / "activations" / path.name, members)


def step_train(args: argparse.Namespace) -> None:
    """Stage 2 on each file."""
    flags = [f"--{flag}" for flag in args.flags if flag.startswith(("dataset-path", "layer-idx"))]
    for name, training in args.trainings.items():
        for kind in (args.only,) if args.only else TYPES:
            run_stage(
                "train_sae.py", "--output-dir", args.work_dir / kind, "--device", "cpu",
                "--run-name", folder_of(name), "--seed", args.seeds, *training, *flags,
            )  # fmt: skip


def step_write(args: argparse.Namespace) -> None:
    """The rows and the autoencoders beside each other."""
    both = Both(args.work_dir)
    trainings = {
        name: [both.autoencoder(*pair) for pair in pairs_of(args, name)] for name in args.trainings
    }
    result = {
        "n_tokens": len(both.exact),
        "n_tokens_compared": len(both.rows),
        "bytes": {kind: both.paths[kind].stat().st_size for kind in TYPES},
        "kept_rows": len(both.packed.exact_rows),
        "noise": both.noise(),
        "trainings": {name: summed_up(found) for name, found in trainings.items()},
    }
    settings: dict[str, Any] = {
        "seeds": args.seeds,
        "flags": args.flags,
        "trainings": args.trainings,
    }
    write_result(args.name, settings, result)


class Both:
    """The same tokens in float16 and in int8; `rows` are those of the test examples that training
    would use."""

    def __init__(self, work_dir: Path) -> None:
        from fastsae.activations.files import open_activations

        self.paths = {kind: activations_of(work_dir, kind) for kind in TYPES}
        data = open_activations(self.paths["float16"])
        self.exact = np.asarray(data["activations"])  # (n, d)
        self.packed: PackedRows = open_activations(self.paths["int8"])["activations"]
        self.kind, lengths = data["token_kind"], data["seq_lengths"]
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        texts = text_numbers(data["token_ids"], ends)
        part = split_texts(texts, 0.1, 0.1, seed=0)  # as stage 2 splits them
        usable, _ = usable_tokens(
            token_norms(self.exact), self.kind, exclude_shared_prefix=True, max_norm_ratio=10.0
        )
        self.rows = np.flatnonzero(usable & (np.repeat(part, lengths) == TEST))
        x = self.exact[self.rows].astype(np.float64)
        self.variance = float(np.square(x - x.mean(0)).sum())

    def noise(self) -> dict[str, float]:
        """Squared differences from float16's rows, as a part of their variance: as int8 stores
        them, and with a scale per row alone."""
        x = self.exact[self.rows].astype(np.float64)
        scale = np.abs(x).max(1, keepdims=True) / 127
        found = {"int8": self.packed[self.rows].astype(np.float64), "row scale alone": x}
        found["row scale alone"] = np.rint(x / scale) * scale
        calibration = calibrate(self.exact[:SAMPLE_ROWS], self.kind[:SAMPLE_ROWS])
        off = np.abs(found["int8"] - x) / calibration.spread
        return {
            **{name: float(np.square(y - x).sum()) / self.variance for name, y in found.items()},
            "root_mean_square_in_deviations": float(np.sqrt(np.square(off).mean())),
            "most_in_deviations": float(off.max()),
        }

    def autoencoder(self, plain: Path, packed: Path) -> dict[str, float]:
        """Figures of two autoencoders of one seed: trained on float16, and trained on int8."""
        own, from_packed, shared, n_active = self._errors(plain)
        trained_on_packed = self._errors(packed)[0]
        return {
            "normalized_mse": own,
            "given_int8": from_packed,
            "trained_on_int8": trained_on_packed,
            "same_features": shared / n_active,
        }

    def _errors(self, path):
        """(normalised MSE, the same given int8's rows, features active with both, with float16)."""
        from fastsae.formats.load import load_sae

        sae, _ = load_sae(path, "cpu")
        errors, shared, n_active = np.zeros(2), 0, 0
        for start in range(0, len(self.rows), BATCH):
            rows = self.rows[start : start + BATCH]
            true = torch.from_numpy(self.exact[rows].astype(np.float32))  # (b, d)
            active = []
            for i, given in enumerate((true, torch.from_numpy(self.packed[rows]).float())):
                entries = encode(sae, given)
                errors[i] += float((decode(sae, entries) - true).double().square().sum())
                width = sae.m_total_neurons
                active.append((entries.row.long() * width + entries.column).numpy())
            shared += len(np.intersect1d(*active))
            n_active += len(active[0])
        return *(float(each) / self.variance for each in errors), shared, n_active


def summed_up(found: list[dict[str, float]]) -> dict[str, Any]:
    """What changes with int8, beside what changes with the seed."""
    own = np.array([each["normalized_mse"] for each in found])
    given = np.array([each["given_int8"] for each in found])
    trained = np.array([each["trained_on_int8"] for each in found])
    return {
        "seeds": found,
        "normalized_mse": float(own.mean()),
        "given_int8_change": float((given / own - 1).mean()),
        "trained_on_int8_change": float((trained / own - 1).mean()),
        "seed_spread": float((own.max() - own.min()) / own.mean()),
        "same_features": float(np.mean([each["same_features"] for each in found])),
    }


def activations_of(work_dir: Path, kind: str) -> Path:
    """The file of that type."""
    (path,) = (work_dir / kind / "activations").glob("activations_layer*.npz")
    return path


def folder_of(name: str) -> str:
    """The run's folder of a training."""
    return "".join(c if c.isalnum() else "_" for c in name)


def pairs_of(args: argparse.Namespace, name: str) -> list[tuple[Path, Path]]:
    """[(trained on float16, trained on int8)] of a training, a pair for each seed."""
    found = []
    for kind in TYPES:
        folder = args.work_dir / kind / "checkpoints" / folder_of(name)
        found.append(sorted(folder.glob("SAE_*.pt")))
    names = [[path.name for path in paths] for paths in found]
    if not names[0] or names[0] != names[1]:
        raise SystemExit(f"{args.work_dir}: has no autoencoders of both types. run --step train.")
    return list(zip(*found))


if __name__ == "__main__":
    main()
