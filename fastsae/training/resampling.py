"""Dead features begin again in the direction of what the autoencoder fails to reconstruct."""

import torch

from fastsae.sae import architectures
from fastsae.sae.autoencoder import decode, encode
from fastsae.training.run import TrainingRun


@torch.no_grad()
def resample(run: TrainingRun, x: torch.Tensor, *, dead_after: int, seed: int) -> int:
    """Re-initialise the dead features of a TrainingRun from the batch x (B, d) of raw activations;
    returns how many there were.

    A token is drawn for each with probability proportional to its squared error squared
    (transformer-circuits.pub/2023/ monosemantic-features, "neuron resampling"); the feature points
    along what is left of it. Its encoder row is as long as the mean of the live ones, or a fifth of
    that where neither K nor a threshold limits what fires, and Adam forgets it.
    """
    sae, dead = run.sae, (run.tokens_since_fired >= dead_after).nonzero().squeeze(1)
    if not len(dead):
        return 0
    form = run.result()
    left = x - decode(form, encode(form, x))  # (B, d)
    weight = left.double().square().sum(1).square()
    if not weight.sum() > 0:
        return 0
    chosen = torch.multinomial(
        weight.cpu(), len(dead), replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    direction = torch.nn.functional.normalize(left[chosen.to(left.device)], dim=1)  # (dead, d)
    live = torch.ones_like(run.tokens_since_fired, dtype=torch.bool)
    live[dead] = False
    length = sae.encoder.weight[live].norm(dim=1).mean() if live.any() else torch.tensor(1.0)
    sae.decoder.weight[:, dead] = direction.t()
    sae.encoder.weight[dead] = direction * length * architectures.of(sae).about.fresh_length
    for name, parameter in sae.named_parameters():
        if parameter.ndim == 1 and name != "input_bias":  # (M,), a value for each feature
            parameter[dead] = parameter[live].mean() if name == "threshold" and live.any() else 0
        state = run.optimizer.state.get(parameter, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state and name != "input_bias":
                state[moment][(slice(None), dead) if name == "decoder.weight" else dead] = 0
    run.tokens_since_fired[dead] = 0
    return len(dead)
