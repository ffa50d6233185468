"""Training that starts from an autoencoder that is there already, of this project or another
library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsae.formats.load import check_fit
from fastsae.formats.parts import Parts
from fastsae.formats.source import Source
from fastsae.runtime.errors import InputError
from fastsae.sae import Autoencoder, architectures
from fastsae.sae.normalisation import Normalisation
from fastsae.settings.architectures import ARCHITECTURES
from fastsae.training.run import TrainingRun


def check_start(
    path: Path | str, source: Autoencoder, architecture: str, *, d: int, m: int, k: int
) -> None:
    """InputError if training `architecture` with M = m on activations of d dimensions cannot start
    from `source`; all at once.

    What one architecture computes another can, as its `starts_from` says; one that learns a single
    threshold for all features only where the thresholds of `source` are equal (as it is exported).
    """
    its, problems = source.architecture, []
    if its not in ARCHITECTURES[architecture].starts_from:
        matching = [name for name, about in ARCHITECTURES.items() if its in about.starts_from]
        problems.append(
            f"INIT_FROM: {path} is {its}, from which {architecture} cannot start. "
            f"give --architecture {' or '.join(matching)}."
        )
    elif ARCHITECTURES[architecture].picks_k and bool(
        (source.threshold != source.threshold.max()).any()
    ):
        problems.append(
            f"INIT_FROM: {path} has a threshold of its own for each feature. "
            f"give --architecture {its}."
        )
    if source.m_total_neurons != m:
        problems.append(
            f"INIT_FROM: {path} has {source.m_total_neurons} features, M is {m}. "
            f"give --m {source.m_total_neurons}."
        )
    if its == "topk" and source.k_active_neurons != k:
        problems.append(
            f"INIT_FROM: {path} has {source.k_active_neurons} active features, K is {k}. "
            f"give --k {source.k_active_neurons}."
        )
    if source.input_dim != d:
        problems.append(
            f"INIT_FROM: {path} takes activations of {source.input_dim} dimensions, "
            f"these have {d}. give one of this model."
        )
    if problems:
        raise InputError(*problems)


def begin(
    run: TrainingRun,
    start: Source,
    sha256: str,
    activations_path: Path | str,
    activations_meta: Mapping[str, Any],
    test_examples: Sequence[int] = (),
) -> None:
    """Let the TrainingRun `run`, before its first step, begin with the autoencoder `start`;
    InputError if it does not belong here.

    sha256: its digest as the run's fingerprint has it. A line says so where the examples
    numbered `test_examples` decided something of that autoencoder.
    """
    path, sae = start.path, run.sae
    source, meta = start.load(sae.input_bias.device, sha256)
    check_start(
        path,
        source,
        sae.architecture,
        d=sae.input_dim,
        m=sae.m_total_neurons,
        k=sae.k_active_neurons,
    )
    check_fit(path, source, meta, activations_path, activations_meta, sae.input_dim, "INIT_FROM")
    start_from(sae, source, run.normalisation)
    print(f"starting from {path} ({source.architecture})")
    if n_seen := seen_before(meta, activations_meta, test_examples):
        print(
            f"warning: {n_seen} of the {len(test_examples)} test examples helped to make {path}: "
            "the reported figures are too good. give the --seed, --validation-fraction and "
            "--test-fraction that it was trained with."
        )


def seen_before(
    meta: Mapping[str, Any], activations_meta: Mapping[str, Any], test_examples: Sequence[int]
) -> int:
    """How many test examples trained, or chose the epoch of, the autoencoder that `meta` is of.

    0 where that cannot be known: it is of other data, or of another choice of their examples.
    """
    its = meta["activations"]
    same = its.get("inputs", {}).get("dataset") == activations_meta["inputs"]["dataset"]
    if not same or its.get("n_examples") != activations_meta["n_examples"]:
        return 0
    return len(set(test_examples) - set(meta.get("test_examples", ())))


@torch.no_grad()
def start_from(sae: Autoencoder, source: Autoencoder, normalisation: Normalisation) -> None:
    """Set `sae`, which is trained on normalised activations, to compute what `source` computes on
    activations as they are.

    The inverse of `normalisation.inference_weights`; decoder rows get the length 1 that training
    keeps them at.
    """
    architecture = architectures.of(sae)
    picks_k = architecture.about.picks_k
    parts = Parts(
        source.encoder.weight,
        source.decoder.weight.t(),
        source.neuron_bias,
        source.input_bias,
        source.architecture,
        source.threshold if picks_k else source.threshold.expand_as(source.neuron_bias),
    )
    length = torch.linalg.vector_norm(parts.w_dec, dim=1)
    if bool(((length - 1).abs() > 1e-4).any()):
        parts.unit_rows()
        if picks_k:
            print(
                "note: its decoder rows are not of length 1; with these lengths in the features, "
                "others may be the largest K of a token."
            )
    mean = 0 if normalisation.mean is None else normalisation.mean
    assert parts.threshold is not None  # it was given above
    bias = parts.b_enc * normalisation.scale
    threshold = parts.threshold.clamp_min(0) * normalisation.scale
    sae.encoder.weight.copy_(parts.w_enc)
    sae.decoder.weight.copy_(parts.w_dec.t())
    # a feature that was taken out, and that has no direction
    nothing = torch.linalg.vector_norm(sae.decoder.weight, dim=0) < 1e-6
    sae.decoder.weight[:, nothing] = parts.w_dec.shape[1] ** -0.5
    sae.input_bias.copy_((parts.b_dec - mean) * normalisation.scale)
    sae.neuron_bias.copy_(bias)
    architecture.begin_at(sae, bias, threshold)
