"""Autoencoders of which one part stays as it was drawn: what the training of that part is worth.

After arXiv 2602.14111, which compares trained autoencoders with such ones: the decoder frozen at
random directions; the decoder nearly frozen, each direction within a cosine of NEAR of where it
began; the encoder frozen. Everything else is trained as stage 2 trains, from the same settings.
The directions are drawn with the data's covariance: there are fewer of them here than the stream
has dimensions, and of those drawn alike in all dimensions most would point where no token is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastsae.interpretation.nulls import Dictionary, draw
from fastsae.sae import Autoencoder
from fastsae.sae.initialisation import best_scale
from fastsae.sae.metrics import evaluate
from fastsae.training import objective
from fastsae.training.data import Tokens, TrainingRows
from fastsae.training.run import TrainingRun, learning_rate_factor

NEAR = 0.8  # the least cosine of a nearly frozen direction with where it began
INIT_SAMPLE = 32768  # tokens of which centre and lengths at the start are taken


def freeze_decoder(sae: Autoencoder) -> Callable[[], None]:
    """What puts the decoder back where it is now, to be called after each step."""
    began = sae.decoder.weight.detach().clone()
    return lambda: sae.decoder.weight.data.copy_(began)


def freeze_encoder(sae: Autoencoder) -> Callable[[], None]:
    """The same of the encoder's directions; its biases are trained."""
    began = sae.encoder.weight.detach().clone()
    return lambda: sae.encoder.weight.data.copy_(began)


def keep_decoder_near(sae: Autoencoder) -> Callable[[], None]:
    """What turns each decoder direction that is further from where it is now than NEAR back to that
    angle, on the shortest way, to be called after each step."""
    began = sae.decoder.weight.detach().clone()  # (d, M), columns of length 1

    def turn_back():
        now = sae.decoder.weight.data
        along = (now * began).sum(0, keepdim=True)
        across = torch.nn.functional.normalize(now - along * began, dim=0)
        limit = NEAR * began + (1 - NEAR**2) ** 0.5 * across
        sae.decoder.weight.data = torch.where(along < NEAR, limit, now)

    return turn_back


KINDS = {
    "decoder frozen": freeze_decoder,
    "decoder nearly frozen": keep_decoder_near,
    "encoder frozen": freeze_encoder,
}


def trained(kind: str, meta: Mapping[str, Any], tokens: Tokens) -> Autoencoder:
    """An autoencoder of one of KINDS, otherwise trained as the checkpoint with this metadata was
    (whose settings are those of a TopK autoencoder), to its last epoch."""
    values = {**meta["settings"], "NORMALIZE_ACTIVATIONS": "none"}
    data = TrainingRows(
        tokens.activations,
        tokens.train,
        batch_size=values["BATCH_SIZE"],
        buffer_tokens=len(tokens.train),
        seed=values["SEED"],
    )
    sample = tokens.rows(tokens.train[:: -(-len(tokens.train) // INIT_SAMPLE)])
    run = TrainingRun(
        objective.sae_config(sample.shape[1], values),
        sample,
        seed=values["SEED"],
        device="cpu",
        learning_rate=values["LEARNING_RATE"],
        centre=objective.INIT_CENTRE,
    )
    begin_at_random(run.sae, sample, values["SEED"])
    hold = KINDS[kind](run.sae)
    n_steps = values["N_EPOCHS"] * data.n_batches()
    for epoch in range(1, values["N_EPOCHS"] + 1):
        for batch, x in enumerate(data.batches(epoch)):
            n_done = (epoch - 1) * data.n_batches() + batch
            factor = learning_rate_factor(
                n_done,
                n_steps=n_steps,
                schedule=values["LR_SCHEDULE"],
                warmup_steps=values["LR_WARMUP_STEPS"],
                decay_fraction=objective.LR_DECAY_FRACTION,
            )
            run.step(
                objective.step_function(values, n_done, "cpu"),
                x,
                learning_rate=values["LEARNING_RATE"] * factor,
                dead_after=values["DEAD_AFTER_TOKENS"],
                clip_grad=objective.CLIP_GRAD,
            )
            hold()
        run.end_epoch(None)
    return run.result()


@torch.no_grad()
def begin_at_random(sae: Autoencoder, sample: torch.Tensor, seed: int) -> None:
    """Give the autoencoder random directions with the covariance of a sample (n, d), in encoder and
    decoder, the encoder's as long as rebuild the sample best."""
    rows = draw("random directions", sae, sample, seed).encoder.weight
    sae.decoder.weight.copy_(rows.t())
    sae.encoder.weight.copy_(rows)
    sae.encoder.weight.mul_(best_scale(sae, sample[:4096]))


def tokens_of(path: Path, meta: Mapping[str, Any]) -> Tokens:
    """The tokens at `path` with the split that the checkpoint with this metadata had."""
    values = meta["settings"]
    return Tokens(
        path,
        validation_fraction=values["VALIDATION_FRACTION"],
        test_fraction=values["TEST_FRACTION"],
        seed=values["SEED"],
        use=values.get("USE_TOKENS", "all"),
        exclude_shared_prefix=values["EXCLUDE_SHARED_PREFIX"],
        max_norm_ratio=values["MAX_NORM_RATIO"],
    )


def figures(sae: Autoencoder, tokens: Tokens) -> dict[str, float]:
    """Normalised MSE and share of dead features on the test examples."""
    found = evaluate(sae, tokens.activations, tokens.test, tokens.example, tokens.special)
    return {name: found[name] for name in ("normalized_mse", "dead_fraction")}


def as_dictionary(kind: str, sae: Autoencoder) -> Dictionary:
    """The autoencoder's encoder as one of the dictionaries that are probed beside others."""
    return Dictionary(
        kind,
        sae.input_bias.detach(),
        SimpleNamespace(weight=sae.encoder.weight.detach()),
        sae.neuron_bias.detach(),
        sae.threshold.detach(),
        bool(sae.use_batch_topk),
        int(sae.k_active_neurons),
    )
