"""Where training starts: b_dec, the decoder's directions, and how long the encoder's rows are."""

import math

import torch

from fastsae.sae import Autoencoder, architectures
from fastsae.sae.sparse_step import active_entries

LEAN = 0.25  # of mixed directions towards a token each, against 1 at random
MEDIAN_COLUMNS = 512  # sorted at a time
GEOMETRIC_MEDIAN_STEPS = 300  # of Weiszfeld's iteration, at most
GEOMETRIC_MEDIAN_CHANGE = 1e-8  # relative change of the summed distances at which it ends


@torch.no_grad()
def initialise(
    sae: Autoencoder,
    sample: torch.Tensor,
    seed: int,
    *,
    directions: str = "xavier",
    centre: str = "median",
    encoder_scale: float | None = 1.0,
) -> None:
    """Set the weights of `sae` from a sample of activations (n, d); the defaults are HypotheSAEs'
    initialisation.

    Args: directions of the unit decoder rows: xavier, kaiming, orthogonal, data (tokens of the
    sample less b_dec), or mixed (at random with a lean towards such tokens: most of what data gains
    early on, without its many features that never fire); centre, what b_dec is of the sample:
    median, mean or geometric_median; encoder_scale, the length of the encoder's rows, which are
    those of the decoder; None = the length at which the sample's reconstruction has the least
    squared error.

    At length 1 the first reconstruction is too long (overlapping features all explain the same part
    of a token), and the first steps are spent on shrinking the encoder.
    """
    sae.input_bias.copy_(
        {"median": median, "mean": lambda x: x.mean(0), "geometric_median": geometric_median}[
            centre
        ](sample)
    )
    rows = draw_directions(directions, sae.m_total_neurons, sample - sae.input_bias, seed)
    sae.decoder.weight.copy_(rows.t())
    sae.normalize_decoder_()
    sae.encoder.weight.copy_(sae.decoder.weight.t())
    sae.neuron_bias.zero_()
    # from all of the file, whose examples may be sorted
    some = sample[:: math.ceil(len(sample) / 4096)]
    architectures.of(sae).start(sae, some)
    if encoder_scale is None:
        encoder_scale = best_scale(sae, some)
    sae.encoder.weight.mul_(encoder_scale)
    sae.threshold.mul_(encoder_scale)


def draw_directions(kind: str, m: int, sample: torch.Tensor, seed: int) -> torch.Tensor:
    """(M, d) rows of any length from a centred sample (n, d), drawn on the CPU so that every device
    starts from the same numbers."""
    d = sample.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in ("data", "mixed"):
            chosen = torch.cat(
                [torch.randperm(len(sample)) for _ in range(math.ceil(m / len(sample)))]
            )[:m]
            rows = sample[chosen.to(sample.device)]
            noise = torch.randn(m, d).to(sample)
            if kind == "data":
                # no two rows alike, and none 0
                return rows + noise * sample.std().clamp_min(1e-6) * 1e-2
            return torch.nn.functional.normalize(
                noise, dim=1
            ) + LEAN * torch.nn.functional.normalize(rows, dim=1)
        if kind == "orthogonal":  # blocks of d directions at right angles to each other
            blocks = [torch.nn.init.orthogonal_(torch.empty(d, d)) for _ in range(math.ceil(m / d))]
            return torch.cat(blocks)[:m].to(sample.device)
        if kind == "kaiming":
            return torch.nn.init.kaiming_uniform_(torch.empty(m, d)).to(sample.device)
        return torch.nn.init.xavier_uniform_(torch.empty(d, m)).t().to(sample.device)


def best_scale(sae: Autoencoder, sample: torch.Tensor) -> float:
    """The factor that brings the reconstructions of `sample` (n, d) closest to it, by least
    squares; 1 where nothing fires."""
    x = sample - sae.input_bias
    picks_k = architectures.of(sae).about.picks_k
    entries = active_entries(sae, x, training=picks_k)
    reconstruction = entries.times(sae.decoder.weight.t().contiguous())
    squared = float(reconstruction.square().sum())
    return max(float((reconstruction * x).sum()) / squared, 1e-3) if squared > 0 else 1.0


def median(x: torch.Tensor) -> torch.Tensor:
    """(d,) the median of each column of x (n, d), of two middle values the lower one.

    The same number on every device. CUDA's own median refuses to work in deterministic mode; on a
    CPU sorting would take six times as long.
    """
    if x.device.type == "cpu":
        return x.median(dim=0).values
    return torch.cat(
        [block.sort(dim=0).values[(len(x) - 1) // 2] for block in x.split(MEDIAN_COLUMNS, dim=1)]
    )


def geometric_median(x: torch.Tensor) -> torch.Tensor:
    """The point with the least sum of distances to the rows of x (n, d), by Weiszfeld's iteration
    (FAST, section on b_dec)."""
    guess, last = x.mean(0), math.inf
    for _ in range(GEOMETRIC_MEDIAN_STEPS):
        # (n,) a point may lie on a row
        distance = torch.linalg.vector_norm(x - guess, dim=1).clamp_min(1e-10)
        if last - (total := float(distance.double().sum())) <= GEOMETRIC_MEDIAN_CHANGE * total:
            break
        last = total
        weight = 1 / distance
        guess = (weight @ x) / weight.sum()
    return guess
