"""Autoencoders: HypotheSAEs' `SparseAutoencoder`, laid out for fast steps; its checkpoints; its
features of given activations."""

from pathlib import Path
from typing import Any

import torch

from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure
from fastsae.runtime.packages import postpone_init
from fastsae.sae import Autoencoder, architectures
from fastsae.sae.normalisation import Normalisation, inference_weights
from fastsae.sae.sparse_step import TINY, SparseActivations, active_entries, update_threshold
from fastsae.settings.architectures import ARCHITECTURES, DENSE

CONFIG_NAMES = (
    "input_dim",
    "m_total_neurons",
    "k_active_neurons",
    "aux_k",
    "multi_k",
    "dead_neuron_threshold_steps",
    "prefix_lengths",
    "use_batch_topk",
)


def checkpoint_name(
    m: int, k: int, prefixes: list[int] | None = None, architecture: str = "topk"
) -> str:
    """The file name HypotheSAEs gives such a checkpoint (without importing it, which takes
    seconds); the dense ones name themselves."""
    if architecture in DENSE:
        return f"SAE_{architecture}_M={m}_K={k}.pt"
    if not prefixes:
        return f"SAE_M={m}_K={k}.pt"
    return f"SAE_matryoshka_M={m}_K={k}_prefixes={'-'.join(map(str, prefixes))}.pt"


def new_sae(config: dict, device: str | torch.device = "cpu") -> Autoencoder:
    """A `hypothesaes.sae.SparseAutoencoder` from its config dict, its decoder stored as the
    transpose of (M, d) rows.

    `architecture` in the config is ours: without it TopK, or BatchTopK if it says use_batch_topk.
    """
    postpone_init("hypothesaes")
    from hypothesaes.sae import SparseAutoencoder

    config = dict(config)
    architecture = config.pop(
        "architecture", "batchtopk" if config.get("use_batch_topk") else "topk"
    )
    # above a threshold at inference
    sae = SparseAutoencoder(**{**config, "use_batch_topk": architecture != "topk"}, device=device)
    sae.decoder.weight.data = sae.decoder.weight.data.t().contiguous().t()
    sae.architecture = architecture
    architectures.of(sae).prepare(sae)
    return sae


def inference_form(sae: Autoencoder, normalisation: Normalisation) -> Autoencoder:
    """`sae`, trained on normalised activations, as one that takes them as they are; `sae` itself if
    there is nothing to change."""
    its = ARCHITECTURES[sae.architecture]
    if normalisation == Normalisation() and its.saved_as is None:
        return sae
    architecture = its.saved_as or sae.architecture  # the same object: see `sae_config`
    form = new_sae({**config_of(sae), "architecture": architecture}, sae.input_bias.device).eval()
    form.load_state_dict(inference_weights(sae, normalisation))
    return form


def config_of(sae: Autoencoder) -> dict[str, Any]:
    """The dict that rebuilds `sae`. It names the architecture only where HypotheSAEs has none that
    computes the same: a standard one is BatchTopK with a threshold of 0 to it."""
    config = {name: getattr(sae, name) for name in CONFIG_NAMES}
    if ARCHITECTURES[sae.architecture].in_hypothesaes:
        return config
    return {**config, "architecture": sae.architecture}


def with_architecture(config: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config with the architecture, where `config_of` left it out though HypotheSAEs
    has no name for it."""
    trained = ARCHITECTURES.get(meta.get("settings", {}).get("ARCHITECTURE"))
    if trained is None:
        return config
    kept = ARCHITECTURES[trained.form]
    left_out = kept.in_hypothesaes and not kept.picks_k
    return {**config, "architecture": kept.name} if left_out else config


def reference_step(
    sae: Autoencoder, x: torch.Tensor, dead: torch.Tensor, *, aux_coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin of `sparse_step`: HypotheSAEs' own forward and loss and autograd, with the same
    corrections to aux-k."""
    sae.zero_grad(set_to_none=True)
    aux_k, threshold = sae.aux_k, sae.threshold.clone()
    sae.train()
    sae.aux_k = None
    try:
        reconstruction, info = sae(x)
        loss = sae.compute_loss(x, reconstruction, info, 0.0, 0.0)
    finally:
        sae.aux_k = aux_k
        sae.eval()
    activations = info["activations"].detach()
    if sae.use_batch_topk:
        sae.threshold.copy_(threshold)
        update_threshold(sae, activations)
    if aux_k and aux_coef and bool(dead.any()):
        pre = sae.encoder(x - sae.input_bias) + sae.neuron_bias
        dead_pre = pre.masked_fill(~dead, -torch.inf)
        value, choice = dead_pre.topk(min(aux_k, int(dead.sum())), dim=1)
        predicted = sae.decoder(torch.zeros_like(pre).scatter(1, choice, value))
        residual = (x - reconstruction).detach()
        variance = (residual - residual.mean(0)).square().mean().clamp_min(TINY)
        loss = loss + aux_coef * (predicted - residual).square().mean() / variance
    loss.backward()
    return loss.detach(), (activations > 0).any(0)


@torch.no_grad()
def encode(sae: Autoencoder, x: torch.Tensor) -> SparseActivations:
    """The positive features of activations x (n, d), as inference has them."""
    entries = active_entries(sae, x - sae.input_bias, training=False)
    return entries.keep(entries.value > 0)


@torch.no_grad()
def decode(sae: Autoencoder, entries: SparseActivations) -> torch.Tensor:
    """Reconstructions (n, d) of features."""
    return entries.times(sae.decoder.weight.t()) + sae.input_bias


def save_sae(path: Path | str, sae: Autoencoder, meta: dict) -> None:
    """Write `{"config", "state_dict", "meta"}`, which `hypothesaes.sae.load_model` reads (see
    `config_of`); never NaN or infinity."""
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in sae.state_dict().items()
    }
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise EnvironmentFailure(
            f"{path}: not written, the weights hold NaN or infinity. lower --learning-rate."
        )
    artifacts.write_checkpoint(path, {"config": config_of(sae), "state_dict": state, "meta": meta})


def load_checkpoint(
    path: Path | str, device: str | torch.device = "cpu"
) -> tuple[Autoencoder, dict[str, Any]]:
    """(sae, meta) of a checkpoint that `save_sae` wrote, its checksum looked at. Raises
    EnvironmentFailure if it is damaged."""
    checkpoint = artifacts.read_checkpoint(path)
    try:
        meta = checkpoint["meta"]
        sae = new_sae(with_architecture(checkpoint["config"], meta), device)
        sae.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, RuntimeError, AssertionError, AttributeError) as error:
        raise EnvironmentFailure(
            f"{path}: is not a checkpoint of train_sae.py ({type(error).__name__}). "
            "run train_sae.py."
        ) from None
    return sae.eval(), meta
